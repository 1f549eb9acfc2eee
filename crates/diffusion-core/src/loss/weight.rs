//! How much each noise level counts.

use crate::predict::{Kind, edm_out};
use crate::schedule::{Point, Schedule};
use serde::{Deserialize, Serialize};

/// A weight, named by the loss that it gives. `SNR = α²/σ²`.
///
/// | name | on ‖ε error‖² | on ‖x₀ error‖² |
/// |---|---|---|
/// | `simple` (Ho et al. 2020, eq. 14) | 1 | SNR |
/// | `x0` | 1/SNR | 1 |
/// | `velocity` (Salimans and Ho 2022) | (α² + σ²)²/α² | (α² + σ²)²/σ² |
/// | `truncated_snr` (Salimans and Ho 2022) | max(SNR, 1)/SNR | max(SNR, 1) |
/// | `min_snr` (Hang et al. 2023) | min(SNR, γ)/SNR | min(SNR, γ) |
/// | `p2` (Choi et al. 2022) | 1/(k + SNR)^γ | SNR/(k + SNR)^γ |
/// | `edm` (Karras et al. 2022) | (σ̂² + s_d²)/s_d² | 1/σ̂² + 1/s_d² |
/// | `likelihood` (Song, Durkan, Murray and Ermon 2021) | g²/σ² | g² α²/σ⁴ |
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Weight {
    /// DDPM's simple loss.
    #[default]
    Simple,
    /// Unweighted error of the data.
    X0,
    /// Unweighted error of the velocity; under VP, SNR + 1.
    Velocity,
    /// At least as much as the error of the data.
    TruncatedSnr,
    /// Bounded at high SNR.
    MinSnr {
        /// The bound, 5 in the paper.
        gamma: f64,
    },
    /// Less weight where only imperceptible detail is left.
    P2 {
        /// Strength, 0.5 or 1 in the paper.
        gamma: f64,
        /// Offset, 1 in the paper.
        k: f64,
    },
    /// Unit weight on the output of an EDM-preconditioned network.
    Edm {
        /// Standard deviation of the data.
        sigma_data: f64,
    },
    /// Twice the bound on the likelihood: `g² ‖s error‖²`. Only [`Weight::under`] knows it, for `g` is
    /// the schedule's; without the schedule it is not a number.
    Likelihood,
}

impl Weight {
    /// The weight on the squared error of what a network predicts at a point of a schedule.
    pub fn under(&self, schedule: &dyn Schedule, kind: Kind, p: &Point) -> f64 {
        match self {
            Weight::Likelihood => {
                let rate = schedule.rates(p.t).g2 / p.sigma.powi(2);
                rate * Weight::Simple.on_kind(kind, p)
            }
            known => known.on_kind(kind, p),
        }
    }

    /// The weight on the squared error of `ε`.
    pub fn on_epsilon(&self, p: &Point) -> f64 {
        let snr = p.snr();
        match *self {
            Weight::Simple => 1.0,
            Weight::X0 => 1.0 / snr,
            Weight::Velocity => (p.alpha.powi(2) + p.sigma.powi(2)).powi(2) / p.alpha.powi(2),
            Weight::TruncatedSnr => (1.0 / snr).max(1.0),
            Weight::MinSnr { gamma } => (gamma / snr).min(1.0),
            Weight::P2 { gamma, k } => (k + snr).powf(-gamma),
            Weight::Edm { sigma_data } => (p.sigma_hat() / sigma_data).powi(2) + 1.0,
            Weight::Likelihood => f64::NAN,
        }
    }

    /// The weight on the squared error of `x₀`.
    pub fn on_x0(&self, p: &Point) -> f64 {
        let snr = p.snr();
        match *self {
            Weight::Simple => snr,
            Weight::X0 => 1.0,
            Weight::Velocity => (p.alpha.powi(2) + p.sigma.powi(2)).powi(2) / p.sigma.powi(2),
            Weight::TruncatedSnr => snr.max(1.0),
            Weight::MinSnr { gamma } => snr.min(gamma),
            Weight::P2 { gamma, k } => snr * (k + snr).powf(-gamma),
            Weight::Edm { sigma_data } => p.sigma_hat().powi(-2) + sigma_data.powi(-2),
            Weight::Likelihood => f64::NAN,
        }
    }

    /// The weight on the squared error of what a network predicts.
    ///
    /// An error `e` of `x₀` is an error of the prediction of
    /// `−(α/σ) e` (ε), `(α/σ²) e` (score), `−((α² + σ²)/σ) e` (velocity), `−((α + σ)/σ) e` (flow)
    /// or `e/c_out` (EDM).
    pub fn on_kind(&self, kind: Kind, p: &Point) -> f64 {
        match kind {
            Kind::Epsilon => self.on_epsilon(p),
            Kind::Score => self.on_epsilon(p) * p.sigma.powi(2),
            Kind::X0 => self.on_x0(p),
            Kind::Velocity => {
                self.on_x0(p) * (p.sigma / (p.alpha.powi(2) + p.sigma.powi(2))).powi(2)
            }
            Kind::Flow => self.on_x0(p) * (p.sigma / (p.alpha + p.sigma)).powi(2),
            Kind::Edm { sigma_data, .. } => {
                self.on_x0(p) * edm_out(p.sigma_hat(), sigma_data).powi(2)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Weight; 8] = [
        Weight::Simple,
        Weight::X0,
        Weight::Velocity,
        Weight::TruncatedSnr,
        Weight::MinSnr { gamma: 5.0 },
        Weight::P2 { gamma: 1.0, k: 1.0 },
        Weight::P2 { gamma: 0.5, k: 1.0 },
        Weight::Edm { sigma_data: 0.5 },
    ];

    #[test]
    fn the_two_columns_differ_by_the_snr() {
        for weight in ALL {
            for log_snr in [-9.0, -1.0, 0.0, 2.0, 9.0] {
                let p = Point::from_log_snr(0.0, log_snr);
                let ratio = weight.on_x0(&p) / weight.on_epsilon(&p) / p.snr();
                assert!(
                    (ratio - 1.0).abs() < 1e-12,
                    "{weight:?} at {log_snr}: {ratio}"
                );
            }
        }
    }

    #[test]
    fn known_equalities() {
        for log_snr in [-5.0, 0.0, 5.0] {
            let p = Point::from_log_snr(0.0, log_snr);
            let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
            // Under VP the velocity weight is SNR + 1, and EDM's with unit data is the same.
            close(Weight::Velocity.on_x0(&p), p.snr() + 1.0);
            close(Weight::Edm { sigma_data: 1.0 }.on_x0(&p), p.snr() + 1.0);
            close(Weight::Velocity.on_kind(Kind::Velocity, &p), 1.0);
            // Min-SNR for a velocity network: min(SNR, γ)/(SNR + 1).
            close(
                Weight::MinSnr { gamma: 5.0 }.on_kind(Kind::Velocity, &p),
                p.snr().min(5.0) / (p.snr() + 1.0),
            );
            for sigma_data in [0.5, 2.0] {
                let kind = Kind::Edm {
                    sigma_data,
                    negative: false,
                };
                close(Weight::Edm { sigma_data }.on_kind(kind, &p), 1.0);
            }
        }
    }

    /// `g² ‖s error‖²` for every way of saying it.
    #[test]
    fn the_likelihood_weight_is_that_of_the_score() {
        use crate::schedule::{SubVp, Ve, Vp};
        let schedules: [&dyn Schedule; 3] = [&Vp::default(), &SubVp::default(), &Ve::default()];
        for schedule in schedules {
            let p = schedule.at(0.4);
            let g2 = schedule.rates(0.4).g2;
            let under = |kind| Weight::Likelihood.under(schedule, kind, &p);
            assert!((under(Kind::Score) / g2 - 1.0).abs() < 1e-12);
            // An error e of ε is one of −e/σ of the score, and one of −σ e/α of x₀.
            assert!((under(Kind::Epsilon) / (g2 / p.sigma.powi(2)) - 1.0).abs() < 1e-12);
            let on_x0 = under(Kind::Epsilon) * p.snr();
            assert!((under(Kind::X0) / on_x0 - 1.0).abs() < 1e-12);
            let simple = Weight::Simple.under(schedule, Kind::Epsilon, &p);
            assert_eq!(simple, 1.0);
        }
        assert!(
            Weight::Likelihood
                .on_epsilon(&Vp::default().at(0.4))
                .is_nan()
        );
    }

    #[test]
    fn finite_without_signal_where_the_loss_is() {
        let p = Point::new(999.0, 0.0, 1.0);
        assert_eq!(Weight::Simple.on_kind(Kind::Epsilon, &p), 1.0);
        assert_eq!(
            Weight::MinSnr { gamma: 5.0 }.on_kind(Kind::Epsilon, &p),
            1.0
        );
        assert_eq!(
            Weight::MinSnr { gamma: 5.0 }.on_kind(Kind::Velocity, &p),
            0.0
        );
        assert_eq!(Weight::Velocity.on_kind(Kind::Velocity, &p), 1.0);
    }
}
