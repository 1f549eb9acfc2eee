//! Dropout with a reproducible mask.

use crate::cpu::{CHUNK, Real, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::deliver;
use crate::rng::Key;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply1;
use crate::vmath::real;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::sync::Arc;

/// Dropout (Srivastava et al. 2014), scaled so that the mean is kept.
///
/// ```text
/// y = m ⊙ x / (1 − p),   m ~ Bernoulli(1 − p)
/// ```
///
/// The mask of batch element `i` is drawn under `key.item(key.item + i)`: it depends neither on
/// the batch size nor on the number of threads.
///
/// # Shapes
/// `x [B, ...]`; the result has the shape of `x`.
///
/// # Errors
/// If `p` is not in `[0, 1)`.
pub fn dropout(x: &Tensor, p: f64, key: Key) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout: probability {p}, expected at least 0 and less than 1");
    }
    if p == 0.0 || x.elem_count() == 0 {
        return Ok(x.clone());
    }
    if half_on_cpu(x) {
        return dropout(&x.to_dtype(DType::F32)?, p, key)?.to_dtype(x.dtype());
    }
    let keep = 1.0 / (1.0 - p);
    let kept = mask(x, p, key);
    if native(x) {
        return apply1(&x.contiguous()?, Dropout { kept, keep });
    }
    let kept = Tensor::from_slice(&kept, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?;
    x * (kept.to_device(x.device())? * keep)?
}

/// 1 for what is kept and 0 for what is dropped.
fn mask(x: &Tensor, p: f64, key: Key) -> Arc<[u8]> {
    let batch = x.dims().first().copied().unwrap_or(1);
    let item = x.elem_count() / batch;
    let mut mask = vec![0u8; x.elem_count()];
    mask.par_chunks_mut(item)
        .with_min_len(worth(item))
        .enumerate()
        .for_each(|(i, mask)| {
            let draws = key.item(key.item.wrapping_add(i as u64)).uniform(item);
            for (m, u) in mask.iter_mut().zip(draws) {
                *m = u8::from(u >= p);
            }
        });
    mask.into()
}

/// m ⊙ x/(1 − p), which is its own adjoint.
#[derive(Clone)]
struct Dropout {
    kept: Arc<[u8]>,
    keep: f64,
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            assert_eq!(x.len(), self.kept.len());
            let keep = real::<T>(self.keep);
            let fill = |out: &mut [T]| {
                out.par_chunks_mut(CHUNK)
                    .with_min_len(worth(CHUNK))
                    .zip(x.par_chunks(CHUNK).zip(self.kept.par_chunks(CHUNK)))
                    .for_each(|(out, (x, kept))| dispatch(Apply { x, kept, keep, out }));
            };
            // SAFETY: the chunks cover the output, of which every element is written.
            unsafe { written(x.len(), fill) }
        });
        Ok((out, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        deliver(x, grad.detach().contiguous()?.apply_op1_no_bwd(self)?)
    }
}

struct Apply<'a, T> {
    x: &'a [T],
    kept: &'a [u8],
    keep: T,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Apply<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let zero = real::<T>(0.0);
        for ((o, x), kept) in self.out.iter_mut().zip(self.x).zip(self.kept) {
            *o = *x * if *kept != 0 { self.keep } else { zero };
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
    use crate::rng::stream;

    #[test]
    fn keeps_the_mean_and_the_item() -> Result<()> {
        let key = Key::new(3, stream::TEST);
        let x = normal(1, (4, 5000))?.ones_like()?;
        let y = dropout(&x, 0.3, key)?;
        let mean = y.mean_all()?.to_scalar::<f64>()?;
        // Standard deviation of the mean: √(p/(1−p)/n).
        assert!(
            (mean - 1.0).abs() < 4.0 * (0.3f64 / 0.7 / 20000.0).sqrt(),
            "{mean}"
        );
        let second = dropout(&x.narrow(0, 1, 1)?, 0.3, key.item(1))?;
        assert_eq!(second.to_vec2::<f64>()?[0], y.to_vec2::<f64>()?[1]);
        assert_eq!(
            dropout(&x, 0.0, key)?.to_vec2::<f64>()?,
            x.to_vec2::<f64>()?
        );
        assert!(dropout(&x, 1.0, key).is_err());
        Ok(())
    }

    #[test]
    fn gradient() -> Result<()> {
        let key = Key::new(3, stream::TEST);
        at_every_level(|_| {
            let e = max_relative_error(|t| dropout(&t[0], 0.4, key), &[normal(1, (3, 11))?])?;
            assert!(e < 1e-6, "{e:e}");
            Ok(())
        })
    }

    #[test]
    fn the_mask_is_the_one_of_the_stream() -> Result<()> {
        let key = Key::new(5, stream::TEST).item(2);
        let x = normal(1, (2, 9000))?.to_dtype(DType::F32)?;
        at_every_level(|_| {
            let y = dropout(&x, 0.25, key)?.to_vec2::<f32>()?;
            for (i, (y, x)) in y.iter().zip(x.to_vec2::<f32>()?).enumerate() {
                let draws = key.item(2 + i as u64).uniform(x.len());
                for ((y, x), u) in y.iter().zip(x).zip(draws) {
                    assert_eq!(*y, if u < 0.25 { 0.0 } else { x * (1.0f32 / 0.75) });
                }
            }
            same_bits_on_any_number_of_threads(|| Ok(vec![dropout(&x, 0.25, key)?]))?;
            let half = dropout(&x.to_dtype(DType::F16)?, 0.5, key)?;
            let kept = dropout(&x.to_dtype(DType::F16)?.to_dtype(DType::F32)?, 0.5, key)?;
            assert_eq!(max_abs_difference(&half, &kept.to_dtype(DType::F16)?)?, 0.0);
            Ok(())
        })
    }
}
