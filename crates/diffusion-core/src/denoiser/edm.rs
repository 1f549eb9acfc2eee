//! EDM's preconditioning (Karras et al. 2022, section 5).

use super::{Call, Denoiser, TimeCode};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::tensor::At;
use candle_core::{DType, Tensor};

/// A network `F` behind EDM's scalings.
///
/// ```text
/// D(x; σ) = c_skip x + c_out F(c_in x; c_noise)
/// c_in = 1/√(σ² + s_d²),   c_noise = ¼ ln σ,   c_skip and c_out as in [`Kind::Edm`]
/// ```
///
/// With `σ̂ = σ/α` and `x/α` in place of `σ` and `x` it serves every schedule.
pub struct EdmNetwork<F> {
    /// The function: scaled input `[B, …]` and `c_noise` `[B]` to `F`.
    pub f: F,
    /// Standard deviation of the data, `s_d`: measure yours.
    pub sigma_data: f64,
    /// Whether `c_out` is negative (a network trained as a velocity).
    pub negative: bool,
    /// The dtype of the network's weights.
    pub dtype: DType,
}

/// `c_in = 1/√(σ̂² + s_d²)`, which gives the network's input unit variance.
pub fn edm_in(sigma_hat: f64, sigma_data: f64) -> f64 {
    sigma_hat.hypot(sigma_data).recip()
}

impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor>> Denoiser for EdmNetwork<F> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let input = at
            .coef(|p| edm_in(p.sigma_hat(), self.sigma_data) / p.alpha)
            .times(x)?
            .to_dtype(self.dtype)?;
        let value = (self.f)(&input, &TimeCode::CNoise.tensor(at, &input)?)?.to_dtype(x.dtype())?;
        let value = if call.tracked { value } else { value.detach() };
        let kind = Kind::Edm {
            sigma_data: self.sigma_data,
            negative: self.negative,
        };
        Ok(Prediction::new(kind, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predict::{edm_out, edm_skip};

    /// The three conditions of appendix B.6: unit-variance input, unit-variance target, and the
    /// least amplification of the network's errors.
    #[test]
    fn unit_variance_in_and_out() {
        let sd = 0.5;
        for sigma in [0.002, 0.1, 0.5, 3.0, 80.0] {
            let (skip, out, scale) = (edm_skip(sigma, sd), edm_out(sigma, sd), edm_in(sigma, sd));
            assert!((scale.powi(2) * (sd * sd + sigma * sigma) - 1.0).abs() < 1e-12);
            // Var[(y − c_skip (y + n))/c_out] = 1
            let variance = ((1.0 - skip) * sd).powi(2) + (skip * sigma).powi(2);
            assert!((variance / out.powi(2) - 1.0).abs() < 1e-9);
            // The loss weight (σ² + s_d²)/(σ s_d)² makes w c_out² = 1.
            let weight = (sigma * sigma + sd * sd) / (sigma * sd).powi(2);
            assert!((weight * out.powi(2) - 1.0).abs() < 1e-12);
        }
    }
}
