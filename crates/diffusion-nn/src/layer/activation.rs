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
        Ok(self.op().apply(x)?)
    }

    /// The operation of this name.
    pub(crate) fn op(self) -> diffusion_ops::Activation {
        match self {
            Self::Silu | Self::Swish => diffusion_ops::Activation::Silu,
            Self::Mish => diffusion_ops::Activation::Mish,
            Self::Gelu => diffusion_ops::Activation::Gelu,
            Self::Relu => diffusion_ops::Activation::Relu,
        }
    }
}
