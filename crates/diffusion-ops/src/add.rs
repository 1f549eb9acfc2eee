//! Sums of two tensors: what joins a residual branch with its shortcut.

use crate::cpu::{CHUNK, Real, by_float, native, slice, worth, written};
use crate::gradient::deliver;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply2;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// The sum of two tensors of one shape.
///
/// ```text
/// y = a + b
/// ```
///
/// # Shapes
/// `a`, `b` and the result alike; nothing is broadcast.
///
/// # Errors
/// When shapes or element types differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        bail!(
            "add: {:?} {:?} and {:?} {:?}; both must be alike",
            a.dtype(),
            a.dims(),
            b.dtype(),
            b.dims()
        )
    }
    if !native(a) || !native(b) {
        return a + b;
    }
    apply2(&a.contiguous()?, &b.contiguous()?, Add)
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s1, "add", T => {
            let (a, b) = (slice::<T>(s1, l1, "add")?, slice::<T>(s2, l2, "add")?);
            let fill = |out: &mut [T]| {
                out.par_chunks_mut(CHUNK)
                    .zip(a.par_chunks(CHUNK))
                    .zip(b.par_chunks(CHUNK))
                    .with_min_len(worth(CHUNK))
                    .for_each(|((out, a), b)| dispatch(Sum { a, b, out }));
            };
            // SAFETY: the chunks cover the output, and the kernel writes all of each.
            unsafe { written(a.len(), fill) }
        });
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((deliver(a, grad.clone())?, deliver(b, grad.clone())?))
    }
}

struct Sum<'a, T> {
    a: &'a [T],
    b: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Kernel for Sum<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for ((out, a), b) in self.out.iter_mut().zip(self.a).zip(self.b) {
            *out = *a + *b;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{
        at_every_level, max_relative_error, normal, same_bits_on_any_number_of_threads,
    };
    use candle_core::DType;

    #[test]
    fn sums_gradients_and_views() -> Result<()> {
        at_every_level(|_| {
            for shape in [(1, 1), (3, 7), (5, 20_000)] {
                let (a, b) = (normal(1, shape)?, normal(2, (shape.1, shape.0))?.t()?);
                for dtype in [DType::F32, DType::F64, DType::BF16] {
                    let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
                    let bits = |t: Tensor| t.to_dtype(DType::F64)?.to_vec2::<f64>();
                    assert_eq!(bits(add(&a, &b)?)?, bits((&a + &b)?)?);
                }
            }
            let error = max_relative_error(
                |t| add(&add(&t[0], &t[1])?, &t[0])?.sqr(),
                &[normal(3, (3, 5))?, normal(4, (3, 5))?],
            )?;
            assert!(error < 1e-6, "{error:e}");
            same_bits_on_any_number_of_threads(|| {
                Ok(vec![add(
                    &normal(5, (3, 50_000))?,
                    &normal(6, (3, 50_000))?,
                )?])
            })
        })
    }

    #[test]
    fn shapes_that_differ_are_refused() -> Result<()> {
        let error = add(&normal(1, (3, 1))?, &normal(2, (3, 4))?).unwrap_err();
        assert!(error.to_string().contains("[3, 4]"), "{error}");
        Ok(())
    }
}
