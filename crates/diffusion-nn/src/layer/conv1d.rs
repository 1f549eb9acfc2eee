//! A trainable convolution of sequences.

use crate::error::Result;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::Init;

/// Sizes of a [`Conv1d`].
#[derive(Clone, Copy, Debug)]
pub struct Conv1dConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Number of taps.
    pub kernel: usize,
    /// Step between output positions.
    pub stride: usize,
    /// Zeros before and after the sequence.
    pub padding: (usize, usize),
    /// Step between taps.
    pub dilation: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

impl Conv1dConfig {
    /// An odd number of taps, `dilation` apart, that keeps the length of the sequence.
    pub fn same(in_channels: usize, out_channels: usize, kernel: usize, dilation: usize) -> Self {
        let reach = dilation * (kernel / 2);
        Self {
            in_channels,
            out_channels,
            kernel,
            stride: 1,
            padding: (reach, reach),
            dilation,
            bias: true,
        }
    }
}

/// A convolution: see [`diffusion_ops::conv1d`]. Names: `weight`, `bias`.
#[derive(Clone, Debug)]
pub struct Conv1d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv1dConfig,
}

impl Conv1d {
    /// A convolution begun uniformly within `1/√(C k)`.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, config: Conv1dConfig) -> Result<Self> {
        let init = Init::fan_in(config.in_channels * config.kernel);
        let shape = (config.out_channels, config.in_channels, config.kernel);
        let weight = scope.param("weight", shape, init)?;
        let bias = config
            .bias
            .then(|| scope.param("bias", config.out_channels, init))
            .transpose()?;
        Ok(Self {
            weight,
            bias,
            config,
        })
    }

    /// `[B, C, L] -> [B, K, L']`.
    ///
    /// # Errors
    /// If the channels don't fit or the sequence is too short.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Conv1dConfig {
            stride,
            padding,
            dilation,
            ..
        } = self.config;
        let bias = self.bias.as_ref();
        Ok(diffusion_ops::conv1d(
            x,
            &self.weight,
            bias,
            stride,
            padding,
            dilation,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use candle_core::{DType, Device};
    use diffusion_ops::gradcheck::{max_abs_difference, max_relative_error, normal};

    fn config() -> Conv1dConfig {
        Conv1dConfig {
            stride: 2,
            ..Conv1dConfig::same(2, 3, 3, 2)
        }
    }

    #[test]
    fn it_is_the_sum_of_the_definition() -> Result<()> {
        let store = Store::new(3, DType::F64, &Device::Cpu);
        let conv = Conv1d::new(&store.root(), config())?;
        assert_eq!(store.named().keys().collect::<Vec<_>>(), ["bias", "weight"]);
        let x = normal(1, (2, 2, 9))?;
        let y = conv.forward(&x)?.to_vec3::<f64>()?;
        let (x, w) = (x.to_vec3::<f64>()?, conv.weight.to_vec3::<f64>()?);
        let b = store.named()["bias"].to_vec1::<f64>()?;
        assert_eq!((y.len(), y[0].len(), y[0][0].len()), (2, 3, 5));
        for n in 0..2 {
            for k in 0..3 {
                for l in 0..5usize {
                    let mut sum = b[k];
                    for c in 0..2 {
                        for tap in 0..3usize {
                            // The output position 2l sees 2l − 2, 2l, 2l + 2.
                            let at = (2 * l + 2 * tap).checked_sub(2).filter(|&at| at < 9);
                            sum += at.map_or(0.0, |at| w[k][c][tap] * x[n][c][at]);
                        }
                    }
                    assert!((sum - y[n][k][l]).abs() < 1e-12, "{n} {k} {l}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_right() -> Result<()> {
        let inputs = [normal(1, (2, 2, 9))?, normal(2, (3, 2, 3))?, normal(3, 3)?];
        let f = |t: &[Tensor]| {
            let conv = Conv1d {
                weight: t[1].clone(),
                bias: Some(t[2].clone()),
                config: config(),
            };
            conv.forward(&t[0]).map_err(candle_core::Error::wrap)
        };
        let error = max_relative_error(f, &inputs)?;
        assert!(error < 1e-6, "{error}");
        Ok(())
    }

    #[test]
    fn without_a_bias_nothing_is_added() -> Result<()> {
        let store = Store::new(3, DType::F64, &Device::Cpu);
        let bare = Conv1dConfig {
            bias: false,
            ..config()
        };
        let conv = Conv1d::new(&store.root(), bare)?;
        let zero = conv.forward(&Tensor::zeros((1, 2, 9), DType::F64, &Device::Cpu)?)?;
        assert_eq!(max_abs_difference(&zero, &zero.zeros_like()?)?, 0.0);
        Ok(())
    }
}
