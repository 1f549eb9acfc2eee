//! A process of T discrete steps, given by its betas (Ho et al. 2020).

use super::cosine::cosine_betas;
use super::linear::{linear_betas, scaled_linear_betas};
use super::sigmoid::sigmoid_betas;
use super::{Point, Rates, Schedule, bisect};
use crate::error::{Report, Result};
use serde::{Deserialize, Serialize};

/// The named ways to choose the betas of a [`Table`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum BetaSchedule {
    /// [`linear_betas`].
    Linear {
        /// First beta.
        start: f64,
        /// Last beta.
        end: f64,
    },
    /// [`scaled_linear_betas`].
    ScaledLinear {
        /// First beta.
        start: f64,
        /// Last beta.
        end: f64,
    },
    /// [`cosine_betas`].
    Cosine,
    /// [`sigmoid_betas`].
    Sigmoid {
        /// Lower asymptote.
        start: f64,
        /// Upper asymptote.
        end: f64,
    },
    /// Betas given one by one.
    Custom {
        /// One value in `[0, 1]` a step.
        betas: Vec<f64>,
    },
}

impl BetaSchedule {
    /// DDPM's linear betas for any number of steps: `1e-4` to `0.02`, scaled by `1000/T` so that
    /// the noisiest step keeps the same signal.
    pub fn ddpm(steps: usize) -> Self {
        let scale = 1000.0 / steps as f64;
        Self::Linear {
            start: 1e-4 * scale,
            end: (0.02 * scale).min(0.999),
        }
    }

    /// The betas of `steps` steps.
    pub fn betas(&self, steps: usize) -> Vec<f64> {
        match self {
            Self::Linear { start, end } => linear_betas(*start, *end, steps),
            Self::ScaledLinear { start, end } => scaled_linear_betas(*start, *end, steps),
            Self::Cosine => cosine_betas(steps),
            Self::Sigmoid { start, end } => sigmoid_betas(*start, *end, steps),
            Self::Custom { betas } => betas.clone(),
        }
    }

    /// The table of `steps` steps.
    ///
    /// # Errors
    /// `Config` when a beta lies outside `[0, 1]` or the number of custom betas is not `steps`.
    pub fn table(&self, steps: usize) -> Result<Table> {
        let betas = self.betas(steps);
        if betas.len() != steps {
            return Err(Report::new("betas", format!("{} values", betas.len()))
                .expected(format!("one for each of the {steps} steps"))
                .config());
        }
        Table::new(betas)
    }
}

/// A table of T steps: `ᾱ_t = Π_{s ≤ t} (1 − β_s)`, `α_t = √ᾱ_t`, `σ_t = √(1 − ᾱ_t)`.
///
/// Index `i` of the table is step `t = i + 1` of the paper; time `−1` is the data itself. Between
/// two indices `ln ᾱ` is interpolated linearly, as DPM-Solver does.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    betas: Vec<f64>,
    alpha_bar: Vec<f64>,
}

impl Table {
    /// A table from its betas.
    ///
    /// # Errors
    /// `Config` when there is none, or one lies outside `[0, 1]`.
    pub fn new(betas: Vec<f64>) -> Result<Self> {
        if betas.is_empty() {
            return Err(Report::new("betas", "an empty table")
                .expected("at least one step")
                .config());
        }
        if let Some((i, beta)) = betas
            .iter()
            .enumerate()
            .find(|(_, b)| !(0.0..=1.0).contains(*b))
        {
            return Err(Report::new(format!("betas[{i}]"), beta)
                .expected("a value in [0, 1]")
                .remedy("choose other ends of the schedule")
                .config());
        }
        let mut product = 1.0;
        let alpha_bar = betas
            .iter()
            .map(|beta| {
                product *= 1.0 - beta;
                product
            })
            .collect();
        Ok(Self { betas, alpha_bar })
    }

    /// A table whose `ᾱ` are given beside the betas, where rounding makes them differ from the
    /// running product.
    ///
    /// # Errors
    /// As [`Table::new`]; also when the lengths differ or an `ᾱ` lies outside `[0, 1]`.
    pub fn from_parts(betas: Vec<f64>, alpha_bar: Vec<f64>) -> Result<Self> {
        let table = Self::new(betas)?;
        if alpha_bar.len() != table.betas.len()
            || alpha_bar.iter().any(|a| !(0.0..=1.0).contains(a))
        {
            return Err(
                Report::new("alpha_bar", format!("{} values", alpha_bar.len()))
                    .expected(format!("{} values in [0, 1]", table.betas.len()))
                    .config(),
            );
        }
        Ok(Self { alpha_bar, ..table })
    }

    /// The betas.
    pub fn betas(&self) -> &[f64] {
        &self.betas
    }

    /// `ᾱ` at every index.
    pub fn alpha_bar(&self) -> &[f64] {
        &self.alpha_bar
    }

    /// Shifts and scales `√ᾱ` so that the last step holds no signal at all (Lin et al. 2023,
    /// algorithm 1). The first step keeps its value.
    ///
    /// ```text
    /// √ᾱ'_t = (√ᾱ_t − √ᾱ_T) · √ᾱ_1 / (√ᾱ_1 − √ᾱ_T)
    /// ```
    pub fn rescaled_to_zero_terminal_snr(&self) -> Self {
        let root: Vec<f64> = self.alpha_bar.iter().map(|a| a.sqrt()).collect();
        let (first, last) = (root[0], root[root.len() - 1]);
        let alpha_bar: Vec<f64> = root
            .iter()
            .map(|r| ((r - last) * first / (first - last)).powi(2))
            .collect();
        let mut previous = 1.0;
        let betas = alpha_bar
            .iter()
            .map(|a| {
                let beta = 1.0 - a / previous;
                previous = *a;
                beta
            })
            .collect();
        Self { betas, alpha_bar }
    }

    /// The same table with the last `ᾱ` replaced: solvers that divide by `α` cannot start from
    /// zero signal and use the smallest number of half precision, `2⁻²⁴`, instead.
    pub fn with_last_alpha_bar(mut self, alpha_bar: f64) -> Self {
        if let Some(last) = self.alpha_bar.last_mut() {
            *last = alpha_bar;
        }
        self
    }

    /// The point at an index; `−1` is the data.
    pub fn index(&self, index: i64) -> Point {
        match usize::try_from(index) {
            Ok(i) => Point::from_alpha_bar(
                index as f64,
                self.alpha_bar[i.min(self.alpha_bar.len() - 1)],
            ),
            Err(_) => Point::data(index as f64),
        }
    }

    /// `ln ᾱ` at a fractional index, 0 at `−1`.
    fn log_alpha_bar(&self, t: f64) -> f64 {
        let value = |i: i64| {
            if i < 0 {
                0.0
            } else {
                self.alpha_bar[i as usize].ln()
            }
        };
        let t = t.clamp(-1.0, (self.alpha_bar.len() - 1) as f64);
        let (low, fraction) = (t.floor(), t - t.floor());
        if fraction == 0.0 {
            return value(low as i64);
        }
        (1.0 - fraction) * value(low as i64) + fraction * value(low as i64 + 1)
    }
}

impl Schedule for Table {
    fn at(&self, t: f64) -> Point {
        if t.fract() == 0.0 {
            return Point {
                t,
                ..self.index(t as i64)
            };
        }
        let log = self.log_alpha_bar(t);
        Point {
            t,
            alpha: (0.5 * log).exp(),
            sigma: (-log.exp_m1()).sqrt(),
        }
    }

    fn rates(&self, t: f64) -> Rates {
        // Inside a step ln ᾱ is linear, so the drift is constant there.
        let next = (t.floor() + 1.0).clamp(0.0, (self.betas.len() - 1) as f64) as usize;
        let d_log_alpha = 0.5 * (-self.betas[next]).ln_1p();
        Rates {
            d_log_alpha,
            g2: -2.0 * d_log_alpha,
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        // ln ᾱ = −ln(1 + e^{−l}); ties to the span at both ends.
        let target = -(-l).exp().ln_1p();
        let last = (self.alpha_bar.len() - 1) as f64;
        let t = bisect(-1.0, last, target, |t| self.log_alpha_bar(t));
        Point {
            t,
            ..Point::from_log_snr(t, l)
        }
    }

    fn span(&self) -> (f64, f64) {
        (0.0, (self.alpha_bar.len() - 1) as f64)
    }

    fn steps(&self) -> Option<usize> {
        Some(self.betas.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_terminal_snr_keeps_the_first_step_and_empties_the_last() {
        let table = BetaSchedule::ScaledLinear {
            start: 0.00085,
            end: 0.012,
        }
        .table(1000)
        .unwrap();
        let zero = table.rescaled_to_zero_terminal_snr();
        assert!((zero.alpha_bar[0] - table.alpha_bar[0]).abs() < 1e-15);
        assert_eq!(zero.alpha_bar[999], 0.0);
        assert_eq!(zero.betas[999], 1.0);
        let p = zero.index(999);
        assert_eq!((p.alpha, p.sigma), (0.0, 1.0));
        assert_eq!(
            zero.with_last_alpha_bar(2f64.powi(-24))
                .index(999)
                .sigma_hat()
                .round(),
            4096.0
        );
    }

    #[test]
    fn refuses_bad_betas_by_name() {
        let error = BetaSchedule::Custom {
            betas: vec![0.1, 1.5],
        }
        .table(2)
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "betas[1]: 1.5; expected a value in [0, 1] (choose other ends of the schedule)"
        );
        assert!(BetaSchedule::Custom { betas: vec![0.1] }.table(2).is_err());
        assert!(Table::new(vec![f64::NAN]).is_err());
        assert!(Table::new(vec![]).is_err());
    }

    #[test]
    fn fewer_steps_keep_the_terminal_signal() {
        let long = BetaSchedule::ddpm(1000).table(1000).unwrap();
        let short = BetaSchedule::ddpm(200).table(200).unwrap();
        let ratio = short.alpha_bar[199].ln() / long.alpha_bar[999].ln();
        assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
    }
}
