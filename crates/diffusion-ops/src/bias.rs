//! Adding one number per channel.

use crate::cpu::{Real, by_float, native, slice, worth, written};
use crate::gradient::{deliver, wanted};
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply2;
use crate::vmath::{real, sum};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, WithDType, bail,
};
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
    apply2(&x.contiguous()?, &bias.contiguous()?, op)
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
        let inner = self.inner;
        let item = (self.channels * inner).max(1);
        let out = by_float!(s1, CustomOp2::name(self), T => {
            let x = slice::<T>(s1, l1, "add_bias")?;
            let bias = slice::<T>(s2, l2, "add_bias")?;
            let block = item * worth(item);
            let fill = |out: &mut [T]| {
                out.par_chunks_mut(block)
                    .zip(x.par_chunks(block))
                    .for_each(|(out, x)| dispatch(Add { x, bias, inner, out }));
            };
            // SAFETY: the blocks cover the output with whole items, which the kernel writes.
            unsafe { written(x.len(), fill) }
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
        let grad_bias = if wanted(bias) {
            let grad = grad.detach().contiguous()?;
            deliver(bias, grad.apply_op1_no_bwd(&ChannelSums(*self))?)?
        } else {
            None
        };
        let grad_x = if wanted(x) {
            deliver(x, grad.clone())?
        } else {
            None
        };
        Ok((grad_x, grad_bias))
    }
}

struct Add<'a, T> {
    x: &'a [T],
    bias: &'a [T],
    inner: usize,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Add<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let item = self.bias.len() * self.inner;
        let items = self.x.chunks_exact(item);
        for (x, out) in items.zip(self.out.chunks_exact_mut(item)) {
            if self.inner == 1 {
                for ((o, v), b) in out.iter_mut().zip(x).zip(self.bias) {
                    *o = *v + *b;
                }
                continue;
            }
            let lines = x.chunks_exact(self.inner);
            let lines = lines.zip(out.chunks_exact_mut(self.inner));
            for ((x, out), b) in lines.zip(self.bias) {
                for (o, v) in out.iter_mut().zip(x) {
                    *o = *v + *b;
                }
            }
        }
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
            T::to_cpu_storage_owned(channel_sums(x, channels, inner))
        });
        Ok((out, Shape::from(channels)))
    }
}

/// `[B, C, inner] -> [C]`, in an order that depends on the sizes only.
fn channel_sums<T: Real>(x: &[T], channels: usize, inner: usize) -> Vec<T> {
    let mut out = vec![real::<T>(0.0); channels];
    if x.is_empty() {
        return out;
    }
    if inner == 1 {
        // At most 64 blocks of rows, then the sums of the blocks.
        let rows = x.len() / channels;
        let block = rows.div_ceil(64).max(worth(channels).min(rows)) * channels;
        let mut partial = vec![real::<T>(0.0); x.len().div_ceil(block) * channels];
        partial
            .par_chunks_mut(channels)
            .zip(x.par_chunks(block))
            .for_each(|(out, x)| dispatch(Columns { x, out }));
        dispatch(Columns {
            x: &partial,
            out: &mut out,
        });
        return out;
    }
    let batch = x.len() / (channels * inner);
    out.par_iter_mut()
        .with_min_len(worth(batch * inner))
        .enumerate()
        .for_each(|(c, out)| {
            for b in 0..batch {
                *out += dispatch(Total(&x[(b * channels + c) * inner..][..inner]));
            }
        });
    out
}

/// Adds up rows of the length of `out`.
struct Columns<'a, T> {
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Kernel for Columns<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for row in self.x.chunks_exact(self.out.len()) {
            for (o, v) in self.out.iter_mut().zip(row) {
                *o += *v;
            }
        }
    }
}

struct Total<'a, T>(&'a [T]);

impl<T: Real> Kernel for Total<'_, T> {
    type Out = T;
    #[inline(always)]
    fn run<S: Simd>(self) -> T {
        sum::<S, T>(self.0)
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
    use crate::gradcheck::{
        at_every_level, max_abs_difference, max_relative_error, normal,
        same_bits_on_any_number_of_threads,
    };
    use candle_core::{DType, Var};

    #[test]
    fn value_and_gradient() -> Result<()> {
        let x = normal(1, (3, 4, 5))?;
        at_every_level(|level| {
            for dim in 0..3 {
                let inputs = [x.clone(), normal(2, x.dim(dim)?)?];
                let mut shape = vec![1; 3];
                shape[dim] = x.dim(dim)?;
                let expected = x.broadcast_add(&inputs[1].reshape(shape)?)?;
                let y = add_bias(&x, &inputs[1], dim)?;
                assert_eq!(max_abs_difference(&y, &expected)?, 0.0);
                let e = max_relative_error(|t| add_bias(&t[0], &t[1], dim), &inputs)?;
                assert!(e < 1e-6, "axis {dim} at {level:?}: {e:e}");
            }
            Ok(())
        })?;
        assert!(add_bias(&x, &normal(2, 7)?, 0).is_err());
        let empty = x.narrow(0, 0, 0)?;
        assert_eq!(add_bias(&empty, &normal(2, 4)?, 1)?.dims(), [0, 4, 5]);
        Ok(())
    }

    #[test]
    fn sums_are_near_f64_with_the_same_bits_on_any_number_of_threads() -> Result<()> {
        for (shape, dim) in [((700, 1, 130), 2), ((3, 17, 2100), 1), ((1, 300, 1), 1)] {
            let x = normal(1, shape)?;
            let run = |dtype: DType| -> Result<Vec<Tensor>> {
                let x = x.to_dtype(DType::F32)?.to_dtype(dtype)?;
                let bias = Var::zeros(x.dim(dim)?, dtype, x.device())?;
                let y = add_bias(&x, &bias, dim)?;
                let grads = (&y * &x)?.sum_all()?.backward()?;
                Ok(vec![grads.get(&bias).unwrap().clone(), y])
            };
            at_every_level(|level| {
                same_bits_on_any_number_of_threads(|| run(DType::F32))?;
                let (ours, exact) = (run(DType::F32)?, run(DType::F64)?);
                let largest = max_abs_difference(&exact[0], &exact[0].zeros_like()?)?;
                let gap = max_abs_difference(&ours[0], &exact[0])? / largest;
                assert!(gap < 1e-5, "{shape:?} at {level:?}: {gap:e}");
                Ok(())
            })?;
        }
        Ok(())
    }
}
