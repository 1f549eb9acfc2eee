//! Networks of the variance-exploding SDE as denoisers (Karras et al. 2022, table 1, column VE).

use super::{Preconditioner, Scalings};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use candle_core::Tensor;

/// The scalings of NCSN++ in continuous time.
///
/// ```text
/// c_skip = 1,   c_out = σ,   c_in = 1,   c_noise = ln(σ/2)
/// ```
///
/// so that the network predicts `−ε = σ ∇ log p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VePrecond {
    /// Smallest level of training.
    pub sigma_min: f64,
    /// Largest level of training.
    pub sigma_max: f64,
}

impl Default for VePrecond {
    fn default() -> Self {
        Self {
            sigma_min: 0.02,
            sigma_max: 100.0,
        }
    }
}

impl Preconditioner for VePrecond {
    fn scalings(&self, sigma_hat: f64) -> Scalings {
        Scalings {
            skip: 1.0,
            out: sigma_hat,
            input: 1.0,
            noise: (0.5 * sigma_hat).ln(),
        }
    }

    fn read(&self, raw: Tensor) -> Result<Prediction> {
        Ok(Prediction::new(Kind::Epsilon, raw.neg()?))
    }

    fn span(&self) -> (f64, f64) {
        (self.sigma_min, self.sigma_max)
    }
}
