//! The variance-exploding SDE (Song et al. 2021, eq. 9), the continuous limit of NCSN.

use super::{Point, Rates, Schedule};
use serde::{Deserialize, Serialize};

/// `dx = g(t) dw` with geometric noise on `[0, 1]`.
///
/// ```text
/// α = 1,   σ(t) = σ_min (σ_max/σ_min)^t,   g² = 2 σ² ln(σ_max/σ_min)
/// ```
///
/// As in the authors' code the variance `σ(0)²` that is there at `t = 0` is not subtracted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ve {
    /// `σ(0)`.
    pub sigma_min: f64,
    /// `σ(1)`: about the largest distance between two data points.
    pub sigma_max: f64,
}

impl Default for Ve {
    fn default() -> Self {
        Self {
            sigma_min: 0.01,
            sigma_max: 50.0,
        }
    }
}

impl Schedule for Ve {
    fn at(&self, t: f64) -> Point {
        Point {
            t,
            alpha: 1.0,
            sigma: self.sigma_min * (self.sigma_max / self.sigma_min).powf(t),
        }
    }

    fn rates(&self, t: f64) -> Rates {
        let sigma = self.at(t).sigma;
        Rates {
            d_log_alpha: 0.0,
            g2: 2.0 * sigma * sigma * (self.sigma_max / self.sigma_min).ln(),
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        let sigma = (-0.5 * l).exp();
        let t = (sigma / self.sigma_min).ln() / (self.sigma_max / self.sigma_min).ln();
        Point {
            t,
            alpha: 1.0,
            sigma,
        }
    }

    fn span(&self) -> (f64, f64) {
        (0.0, 1.0)
    }
}
