//! Sinusoidal embeddings of a diffusion time.

use crate::gradient::wanted;
use candle_core::{DType, Device, Result, Tensor, bail};

/// Sinusoidal embedding (Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B).
///
/// ```text
/// ω_k = P^{−k/(h − δ)},  h = ⌊dim/2⌋,  k = 0 … h−1
/// e = [sin(s t ω), cos(s t ω)]      or [cos, sin] with `flip_sin_to_cos`
/// ```
///
/// where `P` is `max_period`, `δ` is `downscale_freq_shift` and `s` is `scale`; an odd `dim` gets
/// one zero at the end.
///
/// # Shapes
/// `t [B]`, of any number type; the result is `[B, dim]`, `f64` for `f64` times and `f32`
/// otherwise. It is differentiable in `t`.
///
/// # Errors
/// If `dim < 2`, `h = δ`, or `t` is not a vector.
pub fn timestep_embedding(
    t: &Tensor,
    dim: usize,
    flip_sin_to_cos: bool,
    downscale_freq_shift: f64,
    scale: f64,
    max_period: f64,
) -> Result<Tensor> {
    let batch = t.dims1()?;
    let half = dim / 2;
    let divisor = half as f64 - downscale_freq_shift;
    if half == 0 || (half > 1 && divisor == 0.0) {
        bail!("timestep_embedding: dimension {dim} with frequency shift {downscale_freq_shift}");
    }
    let dtype = if t.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    // The argument of the sine reaches thousands, where f32 leaves four digits: use f64 where the
    // device has it.
    let inner = if t.device().is_metal() {
        DType::F32
    } else {
        DType::F64
    };
    // With one frequency the exponent is 0 whatever the divisor.
    let omega = (0..half)
        .map(|k| {
            if k == 0 {
                scale
            } else {
                scale * max_period.powf(-(k as f64) / divisor)
            }
        })
        .collect::<Vec<f64>>();
    if t.device().is_cpu() && !wanted(t) {
        let times = t.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mut out = vec![0.0; batch * dim];
        for (row, t) in out.chunks_exact_mut(dim).zip(times) {
            let (first, second) = row.split_at_mut(half);
            for ((a, b), omega) in first.iter_mut().zip(second).zip(&omega) {
                let (sin, cos) = (t * omega).sin_cos();
                (*a, *b) = if flip_sin_to_cos {
                    (cos, sin)
                } else {
                    (sin, cos)
                };
            }
        }
        return Tensor::from_vec(out, (batch, dim), &Device::Cpu)?.to_dtype(dtype);
    }
    let omega = Tensor::from_vec(omega, (1, half), &Device::Cpu)?
        .to_dtype(inner)?
        .to_device(t.device())?;
    let phase = t
        .to_dtype(inner)?
        .reshape((batch, 1))?
        .broadcast_mul(&omega)?;
    let (sin, cos) = (phase.sin()?, phase.cos()?);
    let both = if flip_sin_to_cos {
        [cos, sin]
    } else {
        [sin, cos]
    };
    let out = Tensor::cat(&both, 1)?;
    let out = if dim % 2 == 1 {
        out.pad_with_zeros(1, 0, 1)?
    } else {
        out
    };
    out.to_dtype(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, max_relative_error, normal};

    #[test]
    fn layout_and_values() -> Result<()> {
        let t = Tensor::new(&[2f64], &Device::Cpu)?;
        let e = timestep_embedding(&t, 5, false, 1.0, 1.0, 1e4)?.to_vec2::<f64>()?;
        let expected = [2f64.sin(), 2e-4f64.sin(), 2f64.cos(), 2e-4f64.cos(), 0.0];
        for (a, b) in e[0].iter().zip(expected) {
            assert!((a - b).abs() < 1e-14, "{e:?}");
        }
        let e = timestep_embedding(&t, 4, true, 0.0, 3.0, 100.0)?.to_vec2::<f64>()?;
        let expected = [6f64.cos(), 0.6f64.cos(), 6f64.sin(), 0.6f64.sin()];
        for (a, b) in e[0].iter().zip(expected) {
            assert!((a - b).abs() < 1e-14, "{e:?}");
        }
        assert_eq!(
            timestep_embedding(&t.to_dtype(DType::I64)?, 4, true, 0.0, 1.0, 1e4)?.dtype(),
            DType::F32
        );
        assert!(timestep_embedding(&t, 1, true, 0.0, 1.0, 1e4).is_err());
        Ok(())
    }

    #[test]
    fn gradient() -> Result<()> {
        let t = [normal(1, 5)?];
        // A time that is tracked takes the differentiable way, with the same result.
        for dim in [8, 9] {
            let tracked = candle_core::Var::from_tensor(&t[0])?;
            let run = |t: &Tensor| timestep_embedding(t, dim, false, 1.0, 2.0, 50.0);
            let gap = max_abs_difference(&run(&t[0])?, &run(&tracked)?)?;
            assert!(gap < 1e-15, "{gap:e}");
        }
        let e = max_relative_error(|t| timestep_embedding(&t[0], 9, true, 0.5, 2.0, 50.0), &t)?;
        assert!(e < 1e-6, "{e:e}");
        Ok(())
    }
}
