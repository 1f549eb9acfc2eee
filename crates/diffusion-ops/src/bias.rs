//! Adding one number per channel.

use crate::cpu::{by_float, filled, native, slice, sum1, worth};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Adds `bias[c]` to everything that has index `c` along `dim`.
///
/// ```text
/// y[…, c, …] = x[…, c, …] + β[c]
/// ```
///
/// # Shapes
/// `x` of any shape, `bias [x.dim(dim)]`; the result has the shape of `x`.
///
/// # Errors
/// If `bias` does not have that shape.
pub fn add_bias(x: &Tensor, bias: &Tensor, dim: usize) -> Result<Tensor> {
    let dims = x.dims();
    let channels = x.dim(dim)?;
    if bias.dims() != [channels] {
        bail!(
            "add_bias: the bias has shape {:?}, expected [{channels}]",
            bias.dims()
        );
    }
    if !native(x) {
        let mut shape = vec![1; dims.len()];
        shape[dim] = channels;
        return x.broadcast_add(&bias.reshape(shape)?);
    }
    let op = AddBias {
        channels,
        inner: dims[dim + 1..].iter().product(),
    };
    x.contiguous()?.apply_op2(&bias.contiguous()?, op)
}

#[derive(Clone, Copy)]
struct AddBias {
    channels: usize,
    inner: usize,
}

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (channels, inner) = (self.channels, self.inner);
        let out = by_float!(s1, CustomOp2::name(self), T => {
            let x = slice::<T>(s1, l1, "add_bias")?;
            let bias = slice::<T>(s2, l2, "add_bias")?;
            filled::<T>(x.len(), |out| {
                let item = (channels * inner).max(1);
                out.par_chunks_mut(item).with_min_len(worth(item)).zip(x.par_chunks(item)).for_each(|(out, x)| {
                    if inner == 1 {
                        for ((o, v), b) in out.iter_mut().zip(x).zip(bias) {
                            *o = *v + *b;
                        }
                        return;
                    }
                    let lines = out.chunks_mut(inner.max(1)).zip(x.chunks(inner.max(1)));
                    for ((out, x), b) in lines.zip(bias) {
                        for (o, v) in out.iter_mut().zip(x) {
                            *o = *v + *b;
                        }
                    }
                });
            })
        });
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad_bias = if bias.track_op() {
            Some(
                grad.detach()
                    .contiguous()?
                    .apply_op1_no_bwd(&ChannelSums(*self))?,
            )
        } else {
            None
        };
        Ok((x.track_op().then(|| grad.clone()), grad_bias))
    }
}

/// Σ over everything but the channel.
struct ChannelSums(AddBias);

impl CustomOp1 for ChannelSums {
    fn name(&self) -> &'static str {
        "channel_sums"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let AddBias { channels, inner } = self.0;
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            filled::<T>(channels, |out| {
                for item in x.chunks_exact((channels * inner).max(1)) {
                    if inner == 1 {
                        out.iter_mut().zip(item).for_each(|(o, v)| *o += *v);
                    } else {
                        for (o, line) in out.iter_mut().zip(item.chunks_exact(inner)) {
                            *o += sum1(line, |v| v);
                        }
                    }
                }
            })
        });
        Ok((out, Shape::from(channels)))
    }
}

/// Adds a bias along the last axis.
pub(crate) fn add_last(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let last = x.rank().saturating_sub(1);
    debug_assert_eq!(x.dim(D::Minus1)?, x.dim(last)?);
    add_bias(x, bias, last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, max_relative_error, normal};

    #[test]
    fn value_and_gradient() -> Result<()> {
        let x = normal(1, (3, 4, 5))?;
        for dim in 0..3 {
            let inputs = [x.clone(), normal(2, x.dim(dim)?)?];
            let mut shape = vec![1; 3];
            shape[dim] = x.dim(dim)?;
            let expected = x.broadcast_add(&inputs[1].reshape(shape)?)?;
            assert_eq!(
                max_abs_difference(&add_bias(&x, &inputs[1], dim)?, &expected)?,
                0.0
            );
            let e = max_relative_error(|t| add_bias(&t[0], &t[1], dim), &inputs)?;
            assert!(e < 1e-6, "{dim}: {e:e}");
        }
        assert!(add_bias(&x, &normal(2, 7)?, 0).is_err());
        Ok(())
    }
}
