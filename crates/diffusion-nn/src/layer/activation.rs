//! Nonlinearities by name.

use crate::error::Result;
use candle_core::Tensor;
use diffusion_ops::{combine, relu};
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
    /// `x` where it is positive, `e^x − 1` elsewhere (Clevert et al. 2016).
    Elu,
    /// `x` where it is positive, `0.2 x` elsewhere.
    Lrelu,
}

impl Activation {
    /// Applies it to every element.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self.op() {
            Some(op) => Ok(op.apply(x)?),
            None => self.composed(x),
        }
    }

    /// The operation of this name, where there is one.
    pub(crate) fn op(self) -> Option<diffusion_ops::Activation> {
        Some(match self {
            Self::Silu | Self::Swish => diffusion_ops::Activation::Silu,
            Self::Mish => diffusion_ops::Activation::Mish,
            Self::Gelu => diffusion_ops::Activation::Gelu,
            Self::Relu => diffusion_ops::Activation::Relu,
            Self::Elu | Self::Lrelu => return None,
        })
    }

    /// The rarer ones, from rectified parts: `x = relu(x) − relu(−x)`.
    fn composed(self, x: &Tensor) -> Result<Tensor> {
        let (above, below) = (relu(x)?, relu(&x.neg()?)?);
        Ok(match self {
            Self::Elu => {
                combine(&[(1.0, &above), (1.0, &below.neg()?.exp()?)])?.affine(1.0, -1.0)?
            }
            Self::Lrelu => combine(&[(1.0, &above), (-LEAK, &below)])?,
            _ => combine(&[(1.0, &above), (-1.0, &below)])?,
        })
    }
}

/// What the leaky unit lets through.
const LEAK: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use diffusion_ops::gradcheck::{max_relative_error, normal};

    #[test]
    fn the_composed_ones_have_their_values_and_gradients() {
        let x = Tensor::new(&[1.5f64, -2.0, 0.0, -40.0], &Device::Cpu).unwrap();
        for (act, expected) in [
            (Activation::Elu, [1.5, (-2.0f64).exp() - 1.0, 0.0, -1.0]),
            (Activation::Lrelu, [1.5, -0.4, 0.0, -8.0]),
        ] {
            let y = act.forward(&x).unwrap().to_vec1::<f64>().unwrap();
            for (a, b) in y.iter().zip(expected) {
                assert!((a - b).abs() < 1e-15, "{act:?}: {y:?}");
            }
            let f = |t: &[Tensor]| act.forward(&t[0]).map_err(candle_core::Error::wrap);
            let error = max_relative_error(f, &[normal(1, (3, 7)).unwrap()]).unwrap();
            assert!(error < 1e-6, "{act:?}: {error}");
        }
    }
}
