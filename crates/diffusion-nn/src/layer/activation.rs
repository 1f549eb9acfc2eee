//! Nonlinearities by name.

use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// A nonlinearity, under the names that configurations use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// See [`diffusion_ops::silu`].
    #[default]
    Silu,
    /// Another name of [`Activation::Silu`].
    Swish,
    /// See [`diffusion_ops::mish`].
    Mish,
    /// See [`diffusion_ops::gelu`].
    Gelu,
    /// See [`diffusion_ops::relu`].
    Relu,
}

impl Activation {
    /// Applies it to every element.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Silu | Self::Swish => diffusion_ops::silu(x)?,
            Self::Mish => diffusion_ops::mish(x)?,
            Self::Gelu => diffusion_ops::gelu(x)?,
            Self::Relu => diffusion_ops::relu(x)?,
        })
    }
}
