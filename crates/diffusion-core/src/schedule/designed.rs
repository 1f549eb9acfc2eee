//! Processes whose noise level and scaling are chosen apart (Karras et al. 2022, table 1 and
//! section 2): the frame in which EDM compares the older samplers.

use super::{Point, Rates, Schedule};
use serde::{Deserialize, Serialize};

/// The noise level `σ̂(t)` of `x/α`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NoiseLaw {
    /// `σ̂² = e^{½ β_d t² + β_min t} − 1`, the law of VP.
    Vp {
        /// `β_d = β_max − β_min`.
        beta_d: f64,
        /// `β_min`.
        beta_min: f64,
    },
    /// `σ̂ = √t`, the law that the VE samplers assume.
    Sqrt,
    /// `σ̂ = t`: DDIM's and EDM's.
    Linear,
}

impl NoiseLaw {
    /// The law of VP with `σ̂(t_min) = sigma_min` and `σ̂(1) = sigma_max`.
    pub fn vp_between(sigma_min: f64, sigma_max: f64, t_min: f64) -> Self {
        let (low, high) = (sigma_min.powi(2).ln_1p(), sigma_max.powi(2).ln_1p());
        let beta_d = 2.0 * (low / t_min - high) / (t_min - 1.0);
        NoiseLaw::Vp {
            beta_d,
            beta_min: high - 0.5 * beta_d,
        }
    }

    /// `σ̂(t)`.
    pub fn sigma_hat(&self, t: f64) -> f64 {
        match *self {
            NoiseLaw::Vp { beta_d, beta_min } => (0.5 * beta_d * t * t + beta_min * t)
                .exp_m1()
                .max(0.0)
                .sqrt(),
            NoiseLaw::Sqrt => t.max(0.0).sqrt(),
            NoiseLaw::Linear => t,
        }
    }

    /// `σ̂ dσ̂/dt`, finite where `dσ̂/dt` is not.
    pub fn half_slope_of_variance(&self, t: f64) -> f64 {
        match *self {
            NoiseLaw::Vp { beta_d, beta_min } => {
                0.5 * (beta_min + beta_d * t) * (0.5 * beta_d * t * t + beta_min * t).exp()
            }
            NoiseLaw::Sqrt => 0.5,
            NoiseLaw::Linear => t,
        }
    }

    /// The time at which `σ̂(t)` is this.
    pub fn inverse(&self, sigma_hat: f64) -> f64 {
        match *self {
            NoiseLaw::Vp { beta_d, beta_min } => {
                let b = sigma_hat.powi(2).ln_1p();
                2.0 * b / (beta_min + (beta_min.powi(2) + 2.0 * beta_d * b).sqrt())
            }
            NoiseLaw::Sqrt => sigma_hat.powi(2),
            NoiseLaw::Linear => sigma_hat,
        }
    }
}

/// The signal level that goes with a noise level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// `α = 1`.
    #[default]
    None,
    /// `α = 1/√(1 + σ̂²)`: unit variance is kept.
    Vp,
}

/// `x_t = α(t) (x₀ + σ̂(t) ε)`.
///
/// ```text
/// f = d ln α/dt,   g² = 2 α² σ̂ σ̂′        (Karras et al. 2022, eqs. 3 and 4)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Designed {
    /// `σ̂(t)`.
    pub noise: NoiseLaw,
    /// `α(t)`.
    pub scaling: Scaling,
    /// Least `σ̂` at which the network is asked.
    pub sigma_min: f64,
    /// Largest `σ̂`.
    pub sigma_max: f64,
}

impl Designed {
    /// VP in this frame; `t_min` is the least noisy time.
    pub fn vp(beta_min: f64, beta_max: f64, t_min: f64) -> Self {
        let noise = NoiseLaw::Vp {
            beta_d: beta_max - beta_min,
            beta_min,
        };
        Self {
            noise,
            scaling: Scaling::Vp,
            sigma_min: noise.sigma_hat(t_min),
            sigma_max: noise.sigma_hat(1.0),
        }
    }

    /// `σ̂ = √t` without scaling.
    pub fn sqrt(sigma_min: f64, sigma_max: f64) -> Self {
        Self {
            noise: NoiseLaw::Sqrt,
            scaling: Scaling::None,
            sigma_min,
            sigma_max,
        }
    }

    /// The point with the noise level `σ̂`.
    pub fn at_sigma_hat(&self, sigma_hat: f64) -> Point {
        let t = self.noise.inverse(sigma_hat);
        let alpha = self.alpha(sigma_hat);
        Point::new(t, alpha, alpha * sigma_hat)
    }

    fn alpha(&self, sigma_hat: f64) -> f64 {
        match self.scaling {
            Scaling::None => 1.0,
            Scaling::Vp => 1f64.hypot(sigma_hat).recip(),
        }
    }
}

impl Schedule for Designed {
    fn at(&self, t: f64) -> Point {
        let sigma_hat = self.noise.sigma_hat(t);
        let alpha = self.alpha(sigma_hat);
        Point::new(t, alpha, alpha * sigma_hat)
    }

    fn rates(&self, t: f64) -> Rates {
        let slope = self.noise.half_slope_of_variance(t);
        let alpha2 = self.alpha(self.noise.sigma_hat(t)).powi(2);
        Rates {
            d_log_alpha: match self.scaling {
                Scaling::None => 0.0,
                Scaling::Vp => -slope * alpha2,
            },
            g2: 2.0 * alpha2 * slope,
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        self.at_sigma_hat((-0.5 * l).exp())
    }

    fn span(&self) -> (f64, f64) {
        (
            self.noise.inverse(self.sigma_min),
            self.noise.inverse(self.sigma_max),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Vp;

    #[test]
    fn the_vp_of_both_frames_is_one() {
        let (ours, vp) = (Designed::vp(0.1, 20.0, 1e-3), Vp::default());
        for t in [1e-3, 0.2, 0.7, 1.0] {
            let (a, b) = (ours.at(t), vp.at(t));
            assert!((a.alpha / b.alpha - 1.0).abs() < 1e-12);
            assert!((a.sigma / b.sigma - 1.0).abs() < 1e-12);
            let (a, b) = (ours.rates(t), vp.rates(t));
            assert!(
                (a.d_log_alpha / b.d_log_alpha - 1.0).abs() < 1e-9,
                "{a:?} {b:?}"
            );
            assert!((a.g2 / b.g2 - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_vp_law_through_two_levels() {
        let law = NoiseLaw::vp_between(0.01, 80.0, 1e-3);
        assert!((law.sigma_hat(1e-3) / 0.01 - 1.0).abs() < 1e-9);
        assert!((law.sigma_hat(1.0) / 80.0 - 1.0).abs() < 1e-9);
    }
}
