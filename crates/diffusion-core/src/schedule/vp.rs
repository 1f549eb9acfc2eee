//! The variance-preserving SDE (Song et al. 2021, eq. 11), the continuous limit of DDPM.

use super::{Point, Rates, Schedule};
use serde::{Deserialize, Serialize};

/// `dx = −½ β(t) x dt + √β(t) dw` with linear `β(t) = β_min + t (β_max − β_min)` on `[0, 1]`.
///
/// ```text
/// B(t) = β_min t + ½ (β_max − β_min) t²,   α = e^{−B/2},   σ = √(1 − e^{−B})
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vp {
    /// `β(0)`.
    pub beta_min: f64,
    /// `β(1)`.
    pub beta_max: f64,
    /// Least noisy time at which the network is asked (1e-3 for sampling).
    pub t_min: f64,
}

impl Default for Vp {
    fn default() -> Self {
        Self {
            beta_min: 0.1,
            beta_max: 20.0,
            t_min: 1e-3,
        }
    }
}

impl Vp {
    /// `β(t)`.
    pub fn beta(&self, t: f64) -> f64 {
        self.beta_min + t * (self.beta_max - self.beta_min)
    }

    /// `B(t) = ∫₀ᵗ β`.
    pub fn integral(&self, t: f64) -> f64 {
        self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t
    }

    /// The time at which `B(t) = b`, by the stable form of the quadratic formula.
    pub fn inverse_integral(&self, b: f64) -> f64 {
        2.0 * b
            / (self.beta_min
                + (self.beta_min.powi(2) + 2.0 * (self.beta_max - self.beta_min) * b).sqrt())
    }
}

impl Schedule for Vp {
    fn at(&self, t: f64) -> Point {
        let b = self.integral(t);
        Point {
            t,
            alpha: (-0.5 * b).exp(),
            sigma: (-(-b).exp_m1()).sqrt(),
        }
    }

    fn rates(&self, t: f64) -> Rates {
        Rates {
            d_log_alpha: -0.5 * self.beta(t),
            g2: self.beta(t),
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        // e^{−B} = 1/(1 + e^{−l})
        let t = self.inverse_integral((-l).exp().ln_1p());
        Point::from_log_snr(t, l)
    }

    fn span(&self) -> (f64, f64) {
        (self.t_min, 1.0)
    }
}
