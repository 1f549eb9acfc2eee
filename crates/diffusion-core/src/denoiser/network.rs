//! The usual denoiser: a network that is told the time in its own code.

use super::{Call, Denoiser};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// How a network is told where it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeCode {
    /// The time itself: the index of a table.
    #[default]
    Index,
    /// The time times a factor: 999 t for score-SDE networks on `[0, 1]`.
    Scaled(f64),
    /// The noise level σ.
    Sigma,
    /// The signal level `√ᾱ = α` (WaveGrad).
    SqrtAlphaBar,
    /// VDM's `γ = −ln SNR`.
    Gamma,
    /// EDM's `c_noise = ¼ ln(σ/α)`.
    CNoise,
}

impl TimeCode {
    /// The number that the network is given for a point.
    pub fn encode(self, point: &Point) -> f64 {
        match self {
            TimeCode::Index => point.t,
            TimeCode::Scaled(factor) => factor * point.t,
            TimeCode::Sigma => point.sigma,
            TimeCode::SqrtAlphaBar => point.alpha,
            TimeCode::Gamma => -point.log_snr(),
            TimeCode::CNoise => 0.25 * point.sigma_hat().ln(),
        }
    }

    /// The codes of a batch, `[B]`, in the dtype and on the device of `like`.
    ///
    /// # Errors
    /// Those of tensor creation.
    pub fn tensor(self, at: At<'_>, like: &Tensor) -> Result<Tensor> {
        let codes: Vec<f64> = at
            .points(like.dim(0)?)
            .iter()
            .map(|point| self.encode(point))
            .collect();
        Ok(Tensor::new(codes, &candle_core::Device::Cpu)?
            .to_dtype(like.dtype())?
            .to_device(like.device())?)
    }
}

/// A network `f(x, time) → value`, with what its value means.
///
/// The state of a sampler may be f64 while the network is f32: the input is cast to `dtype` and
/// the output back.
pub struct Network<F> {
    /// The function: `x` `[B, …]` and time codes `[B]` to a value shaped as `x`.
    pub f: F,
    /// What the value is.
    pub kind: Kind,
    /// How the time is told.
    pub time: TimeCode,
    /// The dtype of the network's weights.
    pub dtype: DType,
}

impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor>> Network<F> {
    /// An f32 network.
    pub fn new(kind: Kind, time: TimeCode, f: F) -> Self {
        Self {
            f,
            kind,
            time,
            dtype: DType::F32,
        }
    }
}

impl<F: Fn(&Tensor, &Tensor) -> Result<Tensor>> Denoiser for Network<F> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let input = x.to_dtype(self.dtype)?;
        let value = (self.f)(&input, &self.time.tensor(at, &input)?)?.to_dtype(x.dtype())?;
        let value = if call.tracked { value } else { value.detach() };
        Ok(Prediction::new(self.kind, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_one_point() {
        let p = Point::new(0.5, 0.6, 0.8);
        let ratio: f64 = 0.8 / 0.6;
        assert_eq!(TimeCode::Index.encode(&p), 0.5);
        assert_eq!(TimeCode::Scaled(999.0).encode(&p), 499.5);
        assert_eq!(TimeCode::Sigma.encode(&p), 0.8);
        assert_eq!(TimeCode::SqrtAlphaBar.encode(&p), 0.6);
        assert!((TimeCode::Gamma.encode(&p) - 2.0 * ratio.ln()).abs() < 1e-15);
        assert!((TimeCode::CNoise.encode(&p) - 0.25 * ratio.ln()).abs() < 1e-15);
    }
}
