//! A trainable affine map.

use crate::error::Result;
use crate::layer::Initial;
use crate::store::Scope;
use candle_core::Tensor;

/// An affine map of the last axis: see [`diffusion_ops::linear`]. Names: `weight`, `bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// A map from `inputs` to `outputs` features, begun uniformly within `1/√inputs`.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, inputs: usize, outputs: usize, bias: bool) -> Result<Self> {
        Self::begun(scope, inputs, outputs, bias, Initial::FanIn)
    }

    /// A map from `inputs` to `outputs` features, begun as said.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn begun(
        scope: &Scope,
        inputs: usize,
        outputs: usize,
        bias: bool,
        initial: Initial,
    ) -> Result<Self> {
        let init = initial.weight(inputs, outputs);
        let weight = scope.param("weight", (outputs, inputs), init)?;
        let bias = bias
            .then(|| scope.param("bias", outputs, initial.bias(inputs)))
            .transpose()?;
        Ok(Self { weight, bias })
    }

    /// `[..., I] -> [..., O]`.
    ///
    /// # Errors
    /// If the last axis of `x` is not `I`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(diffusion_ops::linear(x, &self.weight, self.bias.as_ref())?)
    }
}
