//! EDM's process (Karras et al. 2022, table 1): time is the noise level itself.

use super::{Point, Rates, Schedule};
use serde::{Deserialize, Serialize};

/// `α = 1, σ = t`, hence `f = 0` and `g² = 2t`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Edm {
    /// Least noise at which the network is asked.
    pub sigma_min: f64,
    /// Noise of the first sample.
    pub sigma_max: f64,
}

impl Default for Edm {
    fn default() -> Self {
        Self {
            sigma_min: 0.002,
            sigma_max: 80.0,
        }
    }
}

impl Schedule for Edm {
    fn at(&self, t: f64) -> Point {
        Point {
            t,
            alpha: 1.0,
            sigma: t,
        }
    }

    fn rates(&self, t: f64) -> Rates {
        Rates {
            d_log_alpha: 0.0,
            g2: 2.0 * t,
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        self.at((-0.5 * l).exp())
    }

    fn span(&self) -> (f64, f64) {
        (self.sigma_min, self.sigma_max)
    }
}
