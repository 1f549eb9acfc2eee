//! Networks of the variance-preserving SDE as denoisers (Karras et al. 2022, table 1, column VP).

use super::{Preconditioner, Scalings};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::schedule::{Schedule, Vp};
use candle_core::Tensor;

/// The scalings of DDPM++ in continuous time.
///
/// ```text
/// c_skip = 1,   c_out = −σ,   c_in = 1/√(σ² + 1),   c_noise = (M − 1) t(σ)
/// σ(t) = √(e^{½ β_d t² + β_min t} − 1),   β_d = β_max − β_min
/// ```
///
/// so that the network predicts `ε`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VpPrecond {
    /// The process; its `t_min` is the least time of training.
    pub schedule: Vp,
    /// Number of steps `M` of the original formulation.
    pub steps: usize,
}

impl Default for VpPrecond {
    fn default() -> Self {
        let schedule = Vp {
            t_min: 1e-5,
            ..Vp::default()
        };
        Self {
            schedule,
            steps: 1000,
        }
    }
}

impl VpPrecond {
    /// The time `t(σ)`.
    pub fn time(&self, sigma_hat: f64) -> f64 {
        self.schedule.inverse_integral(sigma_hat.powi(2).ln_1p())
    }
}

impl Preconditioner for VpPrecond {
    fn scalings(&self, sigma_hat: f64) -> Scalings {
        Scalings {
            skip: 1.0,
            out: -sigma_hat,
            input: sigma_hat.hypot(1.0).recip(),
            noise: self.steps.saturating_sub(1) as f64 * self.time(sigma_hat),
        }
    }

    fn read(&self, raw: Tensor) -> Result<Prediction> {
        Ok(Prediction::new(Kind::Epsilon, raw))
    }

    fn span(&self) -> (f64, f64) {
        let (low, high) = self.schedule.span();
        let level = |t| self.schedule.at(t).sigma_hat();
        (level(low), level(high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_levels_are_inverse_and_the_ends_are_those_of_the_authors() {
        let p = VpPrecond::default();
        for t in [1e-5f64, 0.01, 0.4, 1.0] {
            let exact = ((0.5 * 19.9 * t * t + 0.1 * t).exp() - 1.0).sqrt();
            let sigma = p.schedule.at(t).sigma_hat();
            assert!((sigma / exact - 1.0).abs() < 1e-6, "{t}");
            assert!((p.time(sigma) / t - 1.0).abs() < 1e-9, "{t}");
        }
        let (low, high) = p.span();
        assert!(
            (low - 1.0e-3).abs() < 1e-5 && (high - 152.17).abs() < 0.01,
            "{low} {high}"
        );
    }
}
