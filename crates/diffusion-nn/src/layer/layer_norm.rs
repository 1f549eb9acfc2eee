//! Trainable layer normalisation.

use crate::error::Result;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::Init;

/// Layer normalisation: see [`diffusion_ops::layer_norm`]. Names: `weight`, `bias`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// A normalisation that begins with scale 1 and shift 0.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, features: usize, eps: f64) -> Result<Self> {
        let weight = scope.param("weight", features, Init::Const(1.0))?;
        let bias = scope.param("bias", features, Init::Const(0.0))?;
        Ok(Self { weight, bias, eps })
    }

    /// `[..., D] -> [..., D]`.
    ///
    /// # Errors
    /// If the last axis doesn't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(diffusion_ops::layer_norm(
            x,
            &self.weight,
            &self.bias,
            self.eps,
        )?)
    }
}
