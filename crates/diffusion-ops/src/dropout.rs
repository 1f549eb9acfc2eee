//! Dropout with a reproducible mask.

use crate::cpu::worth;
use crate::rng::Key;
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

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
    let batch = x.dims().first().copied().unwrap_or(1);
    let item = x.elem_count() / batch;
    let keep = 1.0 / (1.0 - p);
    let mut mask = vec![0f32; x.elem_count()];
    mask.par_chunks_mut(item)
        .with_min_len(worth(item))
        .enumerate()
        .for_each(|(i, mask)| {
            let draws = key.item(key.item.wrapping_add(i as u64)).uniform(item);
            for (m, u) in mask.iter_mut().zip(draws) {
                *m = if u < p { 0.0 } else { 1.0 };
            }
        });
    let mask = Tensor::from_vec(mask, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?;
    x * (mask.to_device(x.device())? * keep)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_relative_error, normal};
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
        let e = max_relative_error(|t| dropout(&t[0], 0.4, key), &[normal(1, (3, 11))?])?;
        assert!(e < 1e-6, "{e:e}");
        Ok(())
    }
}
