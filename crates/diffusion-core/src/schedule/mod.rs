//! How signal fades and noise grows: the first of the four nouns.
//!
//! Every Gaussian diffusion process in this workspace has the marginal
//!
//! ```text
//! x_t = α(t) x₀ + σ(t) ε,   ε ~ N(0, I)
//! ```
//!
//! and a schedule says what `α` and `σ` are. "VP" means `α² + σ² = 1`, "VE" means `α = 1`.
//! The signal-to-noise ratio is `SNR = α²/σ²`; three logarithms of it are in use in the field and
//! must not be mixed up: `log_snr = ln SNR`, DPM-Solver's `λ = ½ ln SNR` and VDM's `γ = −ln SNR`.
//!
//! | file | process |
//! |---|---|
//! | [`table`] | a table of T steps: [`linear`], scaled linear, [`cosine`], [`sigmoid`], custom betas |
//! | [`learned`] | VDM's γ(t): linear, scalar, a monotone network |
//! | [`respaced`] | fewer steps of a trained table |
//! | [`vp`], [`sub_vp`], [`ve`] | the three SDEs of Song et al. 2021 |
//! | [`edm`] | `α = 1, σ = t` of Karras et al. 2022 |
//! | [`designed`] | `σ̂(t)` and `α(t)` chosen apart (Karras et al. 2022, table 1) |

pub mod cosine;
pub mod designed;
pub mod edm;
pub mod learned;
pub mod linear;
pub mod respaced;
pub mod sigmoid;
pub mod sub_vp;
pub mod table;
pub mod ve;
pub mod vp;

pub use designed::{Designed, NoiseLaw, Scaling};
pub use edm::Edm;
pub use learned::{Frozen, LearnedSchedule, LinearGamma, MonotoneGamma, ScalarGamma};
pub use respaced::Respaced;
pub use sub_vp::SubVp;
pub use table::{BetaSchedule, Table};
pub use ve::Ve;
pub use vp::Vp;

use std::sync::Arc;

/// A schedule that several owners share.
pub type SharedSchedule = Arc<dyn Schedule + Send + Sync>;

/// One place of a diffusion process: time, signal level, noise level.
///
/// `alpha = 0` (no signal left) and `sigma = 0` (data) are legal. `t` is what the network is told
/// about the place, in the units of its schedule; a grid may round it without touching the levels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Time, in the units of the schedule (an index for tables, `[0, 1]` for SDEs, σ for EDM).
    pub t: f64,
    /// Signal level `α ≥ 0`.
    pub alpha: f64,
    /// Noise level `σ ≥ 0`.
    pub sigma: f64,
}

impl Point {
    /// The point with these levels.
    pub fn new(t: f64, alpha: f64, sigma: f64) -> Self {
        Self { t, alpha, sigma }
    }

    /// The variance-preserving point with `ᾱ = α²`; `σ = √(1 − ᾱ)`.
    pub fn from_alpha_bar(t: f64, alpha_bar: f64) -> Self {
        Self {
            t,
            alpha: alpha_bar.sqrt(),
            sigma: (1.0 - alpha_bar).max(0.0).sqrt(),
        }
    }

    /// The variance-preserving point with `SNR = e^l`: `α² = 1/(1 + e^{−l})`.
    ///
    /// Both levels keep full relative precision however small they are.
    pub fn from_log_snr(t: f64, log_snr: f64) -> Self {
        let alpha = (1.0 + (-log_snr).exp()).sqrt().recip();
        let sigma = (1.0 + log_snr.exp()).sqrt().recip();
        Self { t, alpha, sigma }
    }

    /// Pure data: `α = 1, σ = 0`.
    pub fn data(t: f64) -> Self {
        Self {
            t,
            alpha: 1.0,
            sigma: 0.0,
        }
    }

    /// `SNR = α²/σ²`, infinite at the data.
    pub fn snr(&self) -> f64 {
        (self.alpha / self.sigma).powi(2)
    }

    /// `ln SNR`.
    pub fn log_snr(&self) -> f64 {
        2.0 * self.lambda()
    }

    /// DPM-Solver's `λ = ln(α/σ) = ½ ln SNR`.
    pub fn lambda(&self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }

    /// The noise level of `x/α`, a variance-exploding sample: `σ̂ = σ/α`.
    pub fn sigma_hat(&self) -> f64 {
        self.sigma / self.alpha
    }
}

/// How fast the levels change: the coefficients of the forward SDE.
///
/// ```text
/// dx = f(t) x dt + g(t) dw,   f = d ln α/dt,   g² = dσ²/dt − 2 f σ²
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// `f(t) = d ln α / dt`.
    pub d_log_alpha: f64,
    /// `g(t)²`.
    pub g2: f64,
}

/// Signal and noise as functions of time. Larger times are noisier.
pub trait Schedule {
    /// The levels at time `t`.
    fn at(&self, t: f64) -> Point;

    /// Drift and squared diffusion at time `t`.
    fn rates(&self, t: f64) -> Rates;

    /// The point whose log-SNR is `l`, clamped to the span of the schedule.
    fn at_log_snr(&self, l: f64) -> Point;

    /// The least noisy and the noisiest time at which the network is asked.
    fn span(&self) -> (f64, f64);

    /// Number of steps for a table, `None` for a continuous process.
    fn steps(&self) -> Option<usize> {
        None
    }
}

/// `t` with `value(t) = target` for a function that falls (or rises) monotonically on `[low, high]`.
///
/// Bisection to the last bit: schedules are inverted once a grid, never in an inner loop.
pub(crate) fn bisect(low: f64, high: f64, target: f64, value: impl Fn(f64) -> f64) -> f64 {
    let rising = value(high) > value(low);
    let (mut low, mut high) = (low, high);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if (value(middle) < target) == rising {
            low = middle
        } else {
            high = middle
        }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every schedule: rates are derivatives of the levels, log-SNR falls, its inverse inverts.
    #[test]
    fn rates_and_inverse_of_every_schedule() {
        let table = BetaSchedule::Linear {
            start: 1e-4,
            end: 0.02,
        }
        .table(1000)
        .unwrap();
        let schedules: Vec<(&str, Box<dyn Schedule>)> = vec![
            ("vp", Box::new(Vp::default())),
            ("sub_vp", Box::new(SubVp::default())),
            ("ve", Box::new(Ve::default())),
            ("edm", Box::new(Edm::default())),
            ("designed vp", Box::new(Designed::vp(0.1, 20.0, 1e-3))),
            ("designed sqrt", Box::new(Designed::sqrt(0.02, 100.0))),
            ("table", Box::new(table)),
        ];
        for (name, s) in &schedules {
            let (low, high) = s.span();
            let mut last = f64::INFINITY;
            for i in 1..40 {
                // Off the nodes of a table, where its levels have a kink.
                let t = low + (high - low) * (f64::from(i) + 0.013) / 40.0;
                let h = 1e-8 * (high - low);
                let (p, a, b) = (s.at(t), s.at(t - h), s.at(t + h));
                let f = (b.alpha.ln() - a.alpha.ln()) / (2.0 * h);
                let g2 =
                    (b.sigma.powi(2) - a.sigma.powi(2)) / (2.0 * h) - 2.0 * f * p.sigma.powi(2);
                let r = s.rates(t);
                let close = |x: f64, y: f64| (x - y).abs() <= 2e-6 * y.abs().max(1e-3);
                assert!(
                    close(f, r.d_log_alpha),
                    "{name} f at {t}: {f} {}",
                    r.d_log_alpha
                );
                assert!(close(g2, r.g2), "{name} g² at {t}: {g2} {}", r.g2);
                assert!(p.log_snr() < last, "{name}: log-SNR must fall");
                last = p.log_snr();
                let back = s.at_log_snr(p.log_snr());
                assert!(
                    (back.t - t).abs() < 1e-8 * t.max(1.0),
                    "{name}: {t} -> {}",
                    back.t
                );
                assert!(
                    (back.alpha - p.alpha).abs() < 1e-9
                        && (back.sigma - p.sigma).abs() < 1e-9 * p.sigma.max(1.0)
                );
            }
        }
    }

    #[test]
    fn levels_from_log_snr_stay_precise_at_both_ends() {
        for l in [-80.0, -18.4, 0.0, 18.4, 80.0] {
            let p = Point::from_log_snr(0.0, l);
            assert!((p.log_snr() - l).abs() < 1e-12 * l.abs().max(1.0));
            assert!((p.alpha.powi(2) + p.sigma.powi(2) - 1.0).abs() < 1e-15);
        }
    }
}
