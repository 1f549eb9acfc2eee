//! Networks of Improved DDPM as denoisers (Karras et al. 2022, table 1, column iDDPM).

use super::{Preconditioner, Scalings};
use crate::error::{Report, Result};
use crate::predict::{Kind, Prediction};
use crate::schedule::cosine::cosine_signal;
use candle_core::Tensor;

/// The scalings of the cosine schedule in discrete time.
///
/// ```text
/// c_skip = 1,   c_out = −σ,   c_in = 1/√(σ² + 1),   c_noise = M − 1 − argmin_j |u_j − σ|
/// u_M = 0,   u_{j−1} = √((u_j² + 1)/max(ᾱ_{j−1}/ᾱ_j, C₁) − 1),   ᾱ_j = sin²(π/2 · j/(M (C₂ + 1)))
/// ```
///
/// so that the network predicts `ε`.
#[derive(Clone, Debug, PartialEq)]
pub struct IddpmPrecond {
    /// The levels, from the largest to 0.
    u: Vec<f64>,
}

impl IddpmPrecond {
    /// The table of `steps` (`M`) levels with the paper's constants `C₁` (0.001) and `C₂` (0.008).
    ///
    /// # Errors
    /// `Config` when there are no steps or a constant is not positive.
    pub fn new(steps: usize, c_1: f64, c_2: f64) -> Result<Self> {
        if !(c_1 > 0.0 && c_2 > 0.0) {
            return Err(Report::new("C_1 and C_2", format!("{c_1} and {c_2}"))
                .expected("positive numbers")
                .remedy("0.001 and 0.008 are the paper's")
                .config());
        }
        let signal = |j: usize| cosine_signal(1.0 - j as f64 / steps as f64, c_2);
        let mut u = vec![0.0f64];
        for j in (1..=steps).rev() {
            let before = u.last().copied().unwrap_or(0.0);
            let kept = (signal(j - 1) / signal(j)).max(c_1);
            u.push(((before.powi(2) + 1.0) / kept - 1.0).sqrt());
        }
        u.reverse();
        Self::from_levels(u)
    }

    /// A given table: the buffer `u` of the authors' networks.
    ///
    /// # Errors
    /// `Config` when it does not fall from its largest level to 0, or has fewer than two.
    pub fn from_levels(u: Vec<f64>) -> Result<Self> {
        let falls = u.windows(2).all(|pair| pair[0] > pair[1]);
        if u.len() < 2 || u.last() != Some(&0.0) || !falls || !u.iter().all(|u| u.is_finite()) {
            return Err(Report::new("levels", format!("{} of them", u.len()))
                .expected("at least two finite levels that fall to 0")
                .config());
        }
        Ok(Self { u })
    }

    /// The levels `u_0 > … > u_M = 0`.
    pub fn levels(&self) -> &[f64] {
        &self.u
    }

    /// The place of the nearest level, the first of two at the same distance.
    pub fn index(&self, sigma_hat: f64) -> usize {
        let distance = |level: &f64| (level - sigma_hat).abs();
        let nearest = self
            .u
            .iter()
            .enumerate()
            .min_by(|(_, a), (_, b)| distance(a).total_cmp(&distance(b)));
        nearest.map_or(0, |(j, _)| j)
    }
}

impl Preconditioner for IddpmPrecond {
    fn scalings(&self, sigma_hat: f64) -> Scalings {
        let steps = self.u.len() - 1;
        Scalings {
            skip: 1.0,
            out: -sigma_hat,
            input: sigma_hat.hypot(1.0).recip(),
            noise: steps as f64 - 1.0 - self.index(sigma_hat) as f64,
        }
    }

    fn read(&self, raw: Tensor) -> Result<Prediction> {
        Ok(Prediction::new(Kind::Epsilon, raw))
    }

    fn round_sigma(&self, sigma_hat: f64) -> f64 {
        self.u.get(self.index(sigma_hat)).copied().unwrap_or(0.0)
    }

    fn span(&self) -> (f64, f64) {
        // The last level is no noise at all.
        let low = self.u.len().checked_sub(2).and_then(|j| self.u.get(j));
        let level = |u: Option<&f64>| u.copied().unwrap_or(0.0);
        (level(low), level(self.u.first()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without the bound `C₁` the levels are those of the signal itself: ᾱ_j = 1/(1 + u_j²) ᾱ_M.
    #[test]
    fn the_table_is_the_cosine_schedule_until_it_is_bounded() {
        let p = IddpmPrecond::new(1000, 0.001, 0.008).unwrap();
        assert_eq!(p.levels().len(), 1001);
        let last = cosine_signal(0.0, 0.008);
        for j in [2, 10, 500, 999] {
            let signal = cosine_signal(1.0 - j as f64 / 1000.0, 0.008) / last;
            let exact = (1.0 / signal - 1.0).sqrt();
            assert!((p.levels()[j] / exact - 1.0).abs() < 1e-6, "{j}");
        }
        let (low, high) = p.span();
        assert!(
            (low - 0.0064).abs() < 1e-4 && (high - 20291.0).abs() < 200.0,
            "{low} {high}"
        );
    }

    #[test]
    fn levels_are_rounded_to_the_nearest() {
        let p = IddpmPrecond::from_levels(vec![4.0, 2.0, 1.0, 0.0]).unwrap();
        for (sigma, index) in [(100.0, 0), (3.1, 0), (2.9, 1), (3.0, 0), (0.4, 3)] {
            assert_eq!(p.index(sigma), index, "{sigma}");
            assert_eq!(p.round_sigma(sigma), p.levels()[index]);
            assert_eq!(p.scalings(sigma).noise, 2.0 - index as f64);
        }
        assert_eq!(p.span(), (1.0, 4.0));
        for bad in [vec![], vec![1.0], vec![1.0, 2.0, 0.0], vec![2.0, 1.0]] {
            assert!(IddpmPrecond::from_levels(bad).is_err());
        }
        assert!(IddpmPrecond::new(0, 0.001, 0.008).is_err());
        assert!(IddpmPrecond::new(10, 0.0, 0.008).is_err());
    }
}
