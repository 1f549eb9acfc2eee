//! The softmax over one axis.

use crate::cpu::{Real, by_float, filled, half_on_cpu, native, slice, sum1, sum2, worth};
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
        return x.contiguous()?.apply_op1(Softmax);
    }
    x.transpose(dim, rank - 1)?
        .contiguous()?
        .apply_op1(Softmax)?
        .transpose(dim, rank - 1)
}

fn composed(x: &Tensor, dim: usize) -> Result<Tensor> {
    // The shift changes nothing in exact arithmetic, so its gradient is left out.
    let e = x.broadcast_sub(&x.detach().max_keepdim(dim)?)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(dim)?)
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = l.dims().last().copied().unwrap_or(1).max(1);
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            filled::<T>(x.len(), |out| {
                out.par_chunks_mut(n).with_min_len(worth(n)).zip(x.par_chunks(n)).for_each(|(o, x)| row(o, x));
            })
        });
        Ok((out, l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        Ok(Some(y.detach().apply_op2_no_bwd(&grad, &Backward)?))
    }
}

fn row<T: Real>(out: &mut [T], x: &[T]) {
    let max = x
        .iter()
        .copied()
        .fold(x[0], |m, v| if v > m { v } else { m });
    for (o, v) in out.iter_mut().zip(x) {
        *o = (*v - max).exp();
    }
    let scale = T::one() / sum1(out, |v| v);
    out.iter_mut().for_each(|o| *o *= scale);
}

/// ∂L/∂xᵢ = yᵢ (gᵢ − Σⱼ gⱼ yⱼ).
struct Backward;

impl CustomOp2 for Backward {
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
            let g = slice::<T>(s2, l2, self.name())?;
            filled::<T>(y.len(), |out| {
                let rows = y.par_chunks(n).zip(g.par_chunks(n));
                out.par_chunks_mut(n).with_min_len(worth(n)).zip(rows).for_each(|(o, (y, g))| {
                    let mean = sum2(y, g, |y, g| y * g);
                    for k in 0..o.len() {
                        o[k] = y[k] * (g[k] - mean);
                    }
                });
            })
        });
        Ok((out, l1.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, max_relative_error, normal};
    use candle_core::Device;

    #[test]
    fn value_and_gradient_on_each_axis() -> Result<()> {
        let x = [normal(1, (3, 4, 17))?];
        for dim in 0..3 {
            let gap = max_abs_difference(&softmax(&x[0], dim)?, &composed(&x[0], dim)?)?;
            assert!(gap < 1e-15, "{gap:e}");
            for f in [softmax, composed] {
                let e = max_relative_error(|t| f(&t[0], dim), &x)?;
                assert!(e < 1e-6, "{dim}: {e:e}");
            }
        }
        assert!(softmax(&x[0], 3).is_err());
        Ok(())
    }

    #[test]
    fn large_and_masked_entries() -> Result<()> {
        let x = Tensor::new(
            &[1e4f64, 1e4 - f64::ln(3.0), f64::NEG_INFINITY],
            &Device::Cpu,
        )?;
        let y = softmax(&x, 0)?.to_vec1::<f64>()?;
        assert!((y[0] - 0.75).abs() < 1e-12 && (y[1] - 0.25).abs() < 1e-12 && y[2] == 0.0);
        Ok(())
    }
}
