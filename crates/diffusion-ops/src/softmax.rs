//! The softmax over one axis.

use crate::cpu::{Real, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::deliver;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply1;
use crate::vmath::{dot, exp_nonpositive, maximum, real, sum};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// The softmax over the axis `dim`.
///
/// ```text
/// yᵢ = e^{xᵢ − m} / Σⱼ e^{xⱼ − m},   m = maxⱼ xⱼ
/// ```
///
/// # Shapes
/// Any; the result has the shape of `x`.
///
/// # Errors
/// If `x` has no axis `dim`.
pub fn softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let rank = x.rank();
    if dim >= rank {
        bail!("softmax: axis {dim} of a tensor of shape {:?}", x.dims());
    }
    if half_on_cpu(x) {
        return softmax(&x.to_dtype(DType::F32)?, dim)?.to_dtype(x.dtype());
    }
    if !native(x) {
        return composed(x, dim);
    }
    if dim + 1 == rank {
        return apply1(&x.contiguous()?, Softmax);
    }
    let rows = x.transpose(dim, rank - 1)?.contiguous()?;
    apply1(&rows, Softmax)?.transpose(dim, rank - 1)
}

fn composed(x: &Tensor, dim: usize) -> Result<Tensor> {
    // The shift changes nothing in exact arithmetic, so its gradient is left out.
    let e = x.broadcast_sub(&x.detach().max_keepdim(dim)?)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(dim)?)
}

struct Softmax;

/// Rows of one task; `n` is the length of a row.
fn rows(n: usize) -> usize {
    worth(n) * n
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = l.dims().last().copied().unwrap_or(1).max(1);
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            let fill = |out: &mut [T]| {
                out.par_chunks_mut(rows(n))
                    .zip(x.par_chunks(rows(n)))
                    .for_each(|(out, x)| dispatch(Forward { x, n, out }));
            };
            // SAFETY: the chunks cover the output, and the kernel writes each of their rows.
            unsafe { written(x.len(), fill) }
        });
        Ok((out, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        deliver(x, y.detach().apply_op2_no_bwd(&grad, &Slope)?)
    }
}

struct Forward<'a, T> {
    x: &'a [T],
    n: usize,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let rows = self.x.chunks_exact(self.n);
        for (x, out) in rows.zip(self.out.chunks_exact_mut(self.n)) {
            let max = maximum(x);
            for (o, v) in out.iter_mut().zip(x) {
                *o = exp_nonpositive::<S, T>(*v - max);
            }
            let scale = real::<T>(1.0) / sum::<S, T>(out);
            out.iter_mut().for_each(|o| *o *= scale);
        }
    }
}

/// ∂L/∂xᵢ = yᵢ (gᵢ − Σⱼ gⱼ yⱼ).
struct Slope;

impl CustomOp2 for Slope {
    fn name(&self) -> &'static str {
        "softmax_backward"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let n = l1.dims().last().copied().unwrap_or(1).max(1);
        let out = by_float!(s1, self.name(), T => {
            let y = slice::<T>(s1, l1, self.name())?;
            let grad = slice::<T>(s2, l2, self.name())?;
            assert_eq!(y.len(), grad.len());
            let fill = |out: &mut [T]| {
                out.par_chunks_mut(rows(n))
                    .zip(y.par_chunks(rows(n)).zip(grad.par_chunks(rows(n))))
                    .for_each(|(out, (y, grad))| dispatch(Backward { y, grad, n, out }));
            };
            // SAFETY: as for the forward.
            unsafe { written(y.len(), fill) }
        });
        Ok((out, l1.shape().clone()))
    }
}

struct Backward<'a, T> {
    y: &'a [T],
    grad: &'a [T],
    n: usize,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let rows = self
            .y
            .chunks_exact(self.n)
            .zip(self.grad.chunks_exact(self.n));
        for (out, (y, grad)) in self.out.chunks_exact_mut(self.n).zip(rows) {
            let mean = dot::<S, T>(y, grad);
            for ((o, y), g) in out.iter_mut().zip(y).zip(grad) {
                *o = *y * (*g - mean);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{
        at_every_level, max_abs_difference, max_relative_error, normal,
        same_bits_on_any_number_of_threads,
    };
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    #[test]
    fn value_and_gradient_on_each_axis() -> Result<()> {
        let x = [normal(1, (3, 4, 17))?];
        at_every_level(|level| {
            for dim in 0..3 {
                let gap = max_abs_difference(&softmax(&x[0], dim)?, &composed(&x[0], dim)?)?;
                assert!(gap < 1e-15, "{gap:e}");
                for f in [softmax, composed] {
                    let e = max_relative_error(|t| f(&t[0], dim), &x)?;
                    assert!(e < 1e-6, "axis {dim} at {level:?}: {e:e}");
                }
            }
            Ok(())
        })?;
        assert!(softmax(&x[0], 3).is_err());
        Ok(())
    }

    fn both(x: &Tensor, w: &Tensor) -> Result<Vec<Tensor>> {
        let x = Var::from_tensor(x)?;
        let y = softmax(&x, 1)?;
        let grads = (&y * w)?.sum_all()?.backward()?;
        Ok(vec![y, grads.get(&x).unwrap().clone()])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn f32_follows_f64(rows in 1usize..20, n in 2usize..200, scale in 0.1f64..30.0) {
            at_every_level(|level| {
                let x = (normal(1, (rows, n))? * scale)?.to_dtype(DType::F32)?;
                let w = normal(2, (rows, n))?.to_dtype(DType::F32)?;
                let wide = both(&x.to_dtype(DType::F64)?, &w.to_dtype(DType::F64)?)?;
                for (a, e) in both(&x, &w)?.iter().zip(&wide) {
                    // A nearly hard maximum has a gradient that is small against its terms.
                    let largest = max_abs_difference(e, &e.zeros_like()?)?.max(0.1);
                    let gap = max_abs_difference(a, e)? / largest;
                    assert!(gap < 1e-5, "{rows} {n} at {level:?}: {gap:e}");
                }
                Ok(())
            }).unwrap();
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let x = normal(1, (900, 130))?.to_dtype(DType::F32)?;
        at_every_level(|_| same_bits_on_any_number_of_threads(|| both(&x, &x)))
    }

    #[test]
    fn large_and_masked_entries() -> Result<()> {
        let x = Tensor::new(
            &[1e4f64, 1e4 - f64::ln(3.0), f64::NEG_INFINITY],
            &Device::Cpu,
        )?;
        at_every_level(|_| {
            let y = softmax(&x, 0)?.to_vec1::<f64>()?;
            assert!((y[0] - 0.75).abs() < 1e-12 && (y[1] - 0.25).abs() < 1e-12 && y[2] == 0.0);
            let masked = Tensor::new(&[0.0, -f32::ln(3.0), f32::NEG_INFINITY], &Device::Cpu)?;
            let y = softmax(&masked, 0)?.to_vec1::<f32>()?;
            assert!((y[0] - 0.75).abs() < 1e-6 && (y[1] - 0.25).abs() < 1e-6 && y[2] == 0.0);
            Ok(())
        })
    }
}
