//! The "network in network" of DDPM's first code: an affine map of the channels.

use crate::error::Result;
use crate::layer::Initial;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::Init;

/// An affine map of the channels of each pixel, with the weight laid out `[in, out]`. Names: `W`,
/// `b`.
///
/// ```text
/// y[b, k, h, w] = b[k] + Σ_c W[c, k] x[b, c, h, w]
/// ```
#[derive(Clone, Debug)]
pub struct Nin {
    weight: Tensor,
    bias: Tensor,
}

impl Nin {
    /// A map from `inputs` to `outputs` channels; the bias begins at 0.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, inputs: usize, outputs: usize, initial: Initial) -> Result<Self> {
        let weight = scope.param("W", (inputs, outputs), initial.weight(inputs, outputs))?;
        let bias = scope.param("b", outputs, Init::Const(0.0))?;
        Ok(Self { weight, bias })
    }

    /// `[B, C, H, W] -> [B, K, H, W]`, or `[B, N, C] -> [B, N, K]`.
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.t()?.contiguous()?;
        if x.rank() == 4 {
            let (out, from) = weight.dims2()?;
            let weight = weight.reshape((out, from, 1, 1))?;
            return Ok(diffusion_ops::conv2d(
                x,
                &weight,
                Some(&self.bias),
                1,
                0,
                1,
            )?);
        }
        Ok(diffusion_ops::linear(x, &weight, Some(&self.bias))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use candle_core::{DType, Device};
    use diffusion_ops::gradcheck::{max_abs_difference, normal};

    #[test]
    fn maps_and_tokens_are_the_same_sum() -> Result<()> {
        let store = Store::new(3, DType::F64, &Device::Cpu);
        let nin = Nin::new(&store.root(), 3, 2, Initial::FanIn)?;
        assert_eq!(store.named().keys().collect::<Vec<_>>(), ["W", "b"]);
        store.named()["b"].set(&normal(9, 2)?)?;
        let x = normal(1, (2, 3, 2, 2))?;
        let tokens = x.flatten_from(2)?.transpose(1, 2)?;
        let y = nin.forward(&x)?.flatten_from(2)?.transpose(1, 2)?;
        assert!(max_abs_difference(&y, &nin.forward(&tokens)?)? < 1e-14);
        let (w, b) = (nin.weight.to_vec2::<f64>()?, nin.bias.to_vec1::<f64>()?);
        let (x, y) = (tokens.to_vec3::<f64>()?, y.to_vec3::<f64>()?);
        let sum: f64 = (0..3).map(|c| w[c][1] * x[1][2][c]).sum::<f64>() + b[1];
        assert!((sum - y[1][2][1]).abs() < 1e-14);
        Ok(())
    }
}
