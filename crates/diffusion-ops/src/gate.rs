//! The gated activation of WaveNet.

use crate::cpu::{Real, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::deliver;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply1;
use crate::vmath::{exp_of_minus, expm1_of_minus_twice_abs, real, with_sign};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// The gated activation unit (van den Oord et al. 2016, WaveNet, equation 2; used by Kong et al.
/// 2021, DiffWave).
///
/// ```text
/// y = tanh(a) ⊙ σ(b),   x = [a, b] along `dim`,   σ(b) = 1/(1 + e^{−b})
/// ```
///
/// # Shapes
/// `x` with an even size `2C` along `dim`; the result has size `C` there and the sizes of `x`
/// elsewhere.
///
/// # Errors
/// If `x` has no axis `dim` or its size there is odd.
pub fn gated_tanh(x: &Tensor, dim: usize) -> Result<Tensor> {
    if dim >= x.rank() || !x.dims()[dim].is_multiple_of(2) {
        bail!(
            "gated_tanh: an input of shape {:?}, expected an even size along axis {dim}",
            x.dims()
        );
    }
    if half_on_cpu(x) {
        return gated_tanh(&x.to_dtype(DType::F32)?, dim)?.to_dtype(x.dtype());
    }
    if !native(x) {
        return composed(x, dim);
    }
    apply1(&x.contiguous()?, Gate(dim))
}

/// The same function from the tensor library's differentiable operations.
fn composed(x: &Tensor, dim: usize) -> Result<Tensor> {
    let half = x.dim(dim)? / 2;
    let (a, b) = (x.narrow(dim, 0, half)?, x.narrow(dim, half, half)?);
    // σ(b) = (1 + tanh(b/2))/2 does not overflow.
    let sigmoid = ((((b * 0.5)?.tanh()? + 1.0)?) * 0.5)?;
    a.tanh()? * sigmoid
}

/// Elements of one task; large enough to hide the cost of starting it.
const BLOCK: usize = 4096;

struct Gate(usize);

impl Gate {
    /// Elements of one half of one item.
    fn half(&self, l: &Layout) -> usize {
        l.dims()[self.0..].iter().product::<usize>() / 2
    }
}

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gated_tanh"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut dims = l.dims().to_vec();
        dims[self.0] /= 2;
        let half = self.half(l).max(1);
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            let fill = |out: &mut [T]| {
                let items = out.par_chunks_mut(half).with_min_len(worth(half));
                items.zip(x.par_chunks(2 * half)).for_each(|(out, x)| {
                    let (a, b) = x.split_at(half);
                    out.par_chunks_mut(BLOCK)
                        .with_min_len(worth(BLOCK))
                        .zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)))
                        .for_each(|(out, (a, b))| dispatch(Forward { a, b, out }));
                });
            };
            // SAFETY: items of half elements each cover the output, and blocks cover an item.
            unsafe { written(x.len() / 2, fill) }
        });
        Ok((out, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        deliver(
            x,
            x.detach().apply_op2_no_bwd(&grad, &Slopes(Gate(self.0)))?,
        )
    }
}

struct Forward<'a, T> {
    a: &'a [T],
    b: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for ((o, a), b) in self.out.iter_mut().zip(self.a).zip(self.b) {
            // With m = e^{−2|a|} − 1 and e = e^{−b}: |y| = −m/((m + 2)(1 + e)), one division.
            let m = expm1_of_minus_twice_abs::<S, T>(*a);
            let e = exp_of_minus::<S, T>(*b);
            let below = (m + real(2.0)) * (e + real(1.0));
            *o = with_sign(m / below, *a);
        }
    }
}

/// `[g σ(b) (1 − tanh² a), g tanh(a) σ(b) (1 − σ(b))]`.
struct Slopes(Gate);

impl CustomOp2 for Slopes {
    fn name(&self) -> &'static str {
        "gated_tanh_backward"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let half = self.0.half(l1).max(1);
        let out = by_float!(s1, self.name(), T => {
            let x = slice::<T>(s1, l1, self.name())?;
            let grad = slice::<T>(s2, l2, self.name())?;
            assert_eq!(x.len(), 2 * grad.len());
            let fill = |out: &mut [T]| {
                let items = out.par_chunks_mut(2 * half).with_min_len(worth(half));
                let inputs = x.par_chunks(2 * half).zip(grad.par_chunks(half));
                items.zip(inputs).for_each(|(out, (x, grad))| backward(out, x, grad));
            };
            // SAFETY: items of 2 half elements each cover the output, and blocks cover an item.
            unsafe { written(x.len(), fill) }
        });
        Ok((out, l1.shape().clone()))
    }
}

fn backward<T: Real>(out: &mut [T], x: &[T], grad: &[T]) {
    let (a, b) = x.split_at(grad.len());
    let (da, db) = out.split_at_mut(grad.len());
    let inputs = a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK));
    let outs = da.par_chunks_mut(BLOCK).zip(db.par_chunks_mut(BLOCK));
    outs.with_min_len(worth(BLOCK))
        .zip(inputs.zip(grad.par_chunks(BLOCK)))
        .for_each(|((da, db), ((a, b), grad))| {
            dispatch(Backward { a, b, grad, da, db });
        });
}

struct Backward<'a, T> {
    a: &'a [T],
    b: &'a [T],
    grad: &'a [T],
    da: &'a mut [T],
    db: &'a mut [T],
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let inputs = self.a.iter().zip(self.b).zip(self.grad);
        let outs = self.da.iter_mut().zip(self.db);
        for ((da, db), ((a, b), g)) in outs.zip(inputs) {
            let one = real::<T>(1.0);
            let m = expm1_of_minus_twice_abs::<S, T>(*a);
            let e = exp_of_minus::<S, T>(*b);
            let (p, q) = (m + real(2.0), e + one);
            let d = one / (p * q);
            // 1/q = p d and 1/p = q d; 1 − tanh² a = 4 (1 + m)/p², and 1 − σ = e σ.
            let (sigma, r) = (p * d, q * d);
            let gs = *g * sigma;
            *da = gs * (m + one) * (r * r) * real(4.0);
            *db = gs * (e * sigma) * with_sign(m * r, *a);
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
    fn gradients_equal_finite_differences_on_each_axis() -> Result<()> {
        let x = [(normal(1, (2, 4, 6))? * 2.0)?];
        at_every_level(|level| {
            for dim in 0..3 {
                let gap = max_abs_difference(&gated_tanh(&x[0], dim)?, &composed(&x[0], dim)?)?;
                assert!(gap < 1e-15, "{gap:e}");
                for f in [gated_tanh, composed] {
                    let e = max_relative_error(|t| f(&t[0], dim), &x)?;
                    assert!(e < 1e-6, "axis {dim} at {level:?}: {e:e}");
                }
            }
            Ok(())
        })
    }

    fn both(x: &Tensor, dim: usize) -> Result<Vec<Tensor>> {
        let x = Var::from_tensor(x)?;
        let y = gated_tanh(&x, dim)?;
        let grads = y.sqr()?.sum_all()?.backward()?;
        Ok(vec![y, grads.get(&x).unwrap().clone()])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn f32_follows_f64(
            b in 1usize..4, c in 1usize..5, n in 1usize..90, scale in 0.01f64..20.0
        ) {
            at_every_level(|level| {
                let x = (normal(5, (b, 2 * c, n))? * scale)?.to_dtype(DType::F32)?;
                let wide = both(&x.to_dtype(DType::F64)?, 1)?;
                for (a, e) in both(&x, 1)?.iter().zip(&wide) {
                    let largest = max_abs_difference(e, &e.zeros_like()?)?;
                    // Where every element is saturated what is left is smaller than the scale that
                    // the rounding of 1 − tanh² belongs to.
                    let scale = largest.max((0.2 * scale).min(1.0));
                    let gap = max_abs_difference(a, e)? / scale;
                    assert!(gap < 2e-6, "{level:?}: {gap:e}");
                }
                Ok(())
            }).unwrap();
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let x = normal(1, (3, 4, 2 * BLOCK + 5))?.to_dtype(DType::F32)?;
        at_every_level(|_| same_bits_on_any_number_of_threads(|| both(&x, 1)))
    }

    #[test]
    fn extremes_and_errors() -> Result<()> {
        at_every_level(|_| {
            let x = Var::new(&[1e30f32, -1e30, 2.0, 1e30, 1e30, -1e30], &Device::Cpu)?;
            let y = gated_tanh(&x, 0)?;
            let grads = y.sum_all()?.backward()?;
            let y = y.to_vec1::<f32>()?;
            assert_eq!(y[..2], [1.0, -1.0]);
            assert!(y[2].abs() < 1e-37);
            let g = grads.get(&x).unwrap().to_vec1::<f32>()?;
            assert!(g.iter().all(|g| g.abs() < 1e-30), "{g:?}");
            Ok(())
        })?;
        let x = normal(1, (2, 3))?;
        assert!(gated_tanh(&x, 1).is_err() && gated_tanh(&x, 2).is_err());
        assert_eq!(
            gated_tanh(&x.to_dtype(DType::BF16)?, 0)?.dtype(),
            DType::BF16
        );
        Ok(())
    }
}
