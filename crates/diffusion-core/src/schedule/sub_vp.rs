//! The sub-VP SDE (Song et al. 2021, eq. 13): like VP, with less noise at every time.

use super::{Point, Rates, Schedule, Vp};
use serde::{Deserialize, Serialize};

/// `dx = −½ β(t) x dt + √(β(t) (1 − e^{−2B})) dw`.
///
/// ```text
/// α = e^{−B/2},   σ = 1 − e^{−B}
/// ```
///
/// σ is a standard deviation; it happens to equal the VP variance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SubVp(
    /// The VP process whose `β(t)` is used.
    pub Vp,
);

impl Schedule for SubVp {
    fn at(&self, t: f64) -> Point {
        let b = self.0.integral(t);
        Point {
            t,
            alpha: (-0.5 * b).exp(),
            sigma: -(-b).exp_m1(),
        }
    }

    fn rates(&self, t: f64) -> Rates {
        let (beta, b) = (self.0.beta(t), self.0.integral(t));
        Rates {
            d_log_alpha: -0.5 * beta,
            g2: -beta * (-2.0 * b).exp_m1(),
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        // SNR = (1 − σ)/σ², hence σ = 2/(1 + √(1 + 4 SNR)) in the form that does not cancel.
        let sigma = 2.0 / (1.0 + (1.0 + 4.0 * l.exp()).sqrt());
        let t = self.0.inverse_integral(-(-sigma).ln_1p());
        Point {
            t,
            alpha: (1.0 - sigma).sqrt(),
            sigma,
        }
    }

    fn span(&self) -> (f64, f64) {
        self.0.span()
    }
}
