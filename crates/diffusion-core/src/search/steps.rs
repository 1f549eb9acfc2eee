//! Analytic-DPM's choices of K of N steps (Bao et al. 2022, section 4.1 and the authors' code).
//!
//! Steps are numbered from 1 to N, rising; index `i` of a table is step `i + 1`.

use super::dp::Paths;
use crate::error::{Report, Result};
use serde::{Deserialize, Serialize};

/// A rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StepChoice {
    /// Evenly from 1 to N.
    Linear,
    /// `1 + (N − 1)(1 − y^{1/p})` with `y` evenly from 1 to 0: denser at the data.
    Power {
        /// The exponent `p`.
        exponent: f64,
    },
    /// DDIM's squares, `1 + ⌊u²⌋` with `u` evenly from 0 to `√(0.8 N)`. Many of few steps fall
    /// together next to the data; drop the repeated ones before sampling.
    QuadDdim,
    /// The optimal trajectory: the cheapest path for the analytic variance, with the steps of
    /// impossible estimates (`E‖ε̂‖²/D > 1`) replaced by even ones.
    ///
    /// ```text
    /// Σ ln(1 − β_{t|s} Γ_t),   Γ_t = E‖ε̂‖²/(D σ_t²),   β_{t|s} = 1 − ᾱ_t/ᾱ_s
    /// ```
    OptimalTrajectory {
        /// `E‖ε̂‖²/D` of the steps 1 to N, in this order.
        moments: Vec<f64>,
        /// `ᾱ` of the steps 1 to N.
        alpha_bar: Vec<f64>,
    },
}

impl StepChoice {
    /// The rule with this name in the authors' code: `linear`, `power<p>`, `quad_ddim`; `dp_seg`
    /// needs its statistics.
    ///
    /// # Errors
    /// `Config` for another name.
    pub fn named(name: &str) -> Result<Self> {
        let power = || name.strip_prefix("power").and_then(|p| p.parse().ok());
        match name {
            "linear" => Ok(Self::Linear),
            "quad_ddim" => Ok(Self::QuadDdim),
            _ => match power() {
                Some(exponent) if exponent > 0.0 => Ok(Self::Power { exponent }),
                _ => Err(Report::new("choice of steps", name)
                    .expected("linear, power2 or quad_ddim")
                    .config()),
            },
        }
    }

    /// The `count` steps of `total`, rising (see [`StepChoice::QuadDdim`]).
    ///
    /// # Errors
    /// `Config` when there are fewer than two or more than `total` steps, or the rule cannot
    /// choose so many.
    pub fn steps(&self, total: usize, count: usize) -> Result<Vec<usize>> {
        if count < 2 || count > total {
            return Err(Report::new("steps", count)
                .expected(format!("2 to {total}"))
                .config());
        }
        let last = (count - 1) as f64;
        let span = (total - 1) as f64;
        let steps = match self {
            Self::Linear => {
                // Added up, not multiplied: halves are decided by this sum's rounding.
                let mut place = 1.0;
                let stride = span / last;
                (0..count)
                    .map(|_| {
                        let step = round(place);
                        place += stride;
                        step
                    })
                    .collect()
            }
            Self::Power { exponent } => {
                let place = |k: usize| {
                    let y = (count - 1 - k) as f64 / last;
                    span * (1.0 - y.powf(1.0 / exponent)) + 1.0
                };
                let mut floor = 0;
                (0..count)
                    .map(|k| {
                        floor = round(place(k)).max(floor + 1);
                        floor
                    })
                    .collect()
            }
            Self::QuadDdim => {
                let end = (total as f64 * 0.8).sqrt();
                let place = |k: usize| match k + 1 {
                    n if n == count => end,
                    _ => k as f64 * (end / last),
                };
                return Ok((0..count).map(|k| place(k).powi(2) as usize + 1).collect());
            }
            Self::OptimalTrajectory { moments, alpha_bar } => {
                return optimal(moments, alpha_bar, total, count);
            }
        };
        check(steps, total, count)
    }
}

fn round(x: f64) -> usize {
    x.round_ties_even() as usize
}

fn check(steps: Vec<usize>, total: usize, count: usize) -> Result<Vec<usize>> {
    let rising = steps.windows(2).all(|w| w[0] < w[1]);
    if !rising || steps.len() != count || steps.last().is_some_and(|s| *s > total) {
        return Err(Report::new("choice of steps", format!("{steps:?}"))
            .expected(format!("{count} rising steps up to {total}"))
            .remedy("choose fewer steps, or the linear rule")
            .config());
    }
    Ok(steps)
}

fn optimal(moments: &[f64], bar: &[f64], total: usize, count: usize) -> Result<Vec<usize>> {
    if moments.len() != total || bar.len() != total {
        let found = format!("{} moments, {} levels", moments.len(), bar.len());
        return Err(Report::new("optimal trajectory", found)
            .expected(format!("one of each of the {total} steps"))
            .config());
    }
    let (path_count, good) = split(moments, total, count)?;
    let cost = |s: usize, t: usize| {
        let gamma = moments[t] / (1.0 - bar[t]);
        (1.0 - (1.0 - bar[t] / bar[s]) * gamma).ln()
    };
    let row = |s: usize| {
        let entry = |t: usize| if t > s { cost(s, t) } else { f64::INFINITY };
        (0..good).map(entry).collect()
    };
    let costs: Vec<Vec<f64>> = (0..good).map(row).collect();
    let mut steps: Vec<usize> = match path_count {
        n if n == good => (1..=good).collect(),
        n => {
            let path = Paths::new(&costs, n.max(2) - 1)?.path(n.max(2) - 1)?;
            path.into_iter().map(|i| i + 1).collect()
        }
    };
    let rest = count - path_count;
    let stride = (total - good) as f64 / rest.max(1) as f64;
    steps.extend(
        (0..rest)
            .rev()
            .map(|k| round(total as f64 - stride * k as f64)),
    );
    check(steps, total, count)
}

/// How many of `count` steps go to the path, and the last step that the path may use: twice the
/// steps from the first impossible estimate on are cut off, and get a fifth of their share less
/// than evenly chosen ones would.
fn split(moments: &[f64], total: usize, count: usize) -> Result<(usize, usize)> {
    let first_bad = moments.iter().position(|m| *m > 1.0).unwrap_or(total);
    let bad = 2 * (total - first_bad);
    let Some(good) = total.checked_sub(bad).filter(|good| *good > 0) else {
        return Err(Report::new(
            "noise moments",
            format!("above 1 from step {}", first_bad + 1),
        )
        .expected("estimates of at most 1 over the first half of the steps")
        .remedy("estimate them from more data")
        .config());
    };
    let share = 1.0 - 0.8 * (bad as f64 / total as f64);
    let mut path = ((share * count as f64).ceil() as usize).min(good);
    path = path.max(count.saturating_sub(bad));
    if bad > 0 && path == count {
        path -= 1;
    }
    Ok((path, good))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::BetaSchedule;

    #[test]
    fn rules() {
        let choose = |name, total, count| {
            let rule = StepChoice::named(name).unwrap();
            rule.steps(total, count)
        };
        assert_eq!(choose("linear", 10, 4).unwrap(), [1, 4, 7, 10]);
        assert_eq!(choose("power2", 10, 4).unwrap(), [1, 3, 5, 10]);
        assert_eq!(choose("power1", 10, 4).unwrap(), [1, 4, 7, 10]);
        assert_eq!(choose("quad_ddim", 1000, 3).unwrap(), [1, 201, 801]);
        assert_eq!(choose("linear", 5, 5).unwrap(), [1, 2, 3, 4, 5]);
        assert!(choose("linear", 10, 1).is_err());
        assert_eq!(choose("quad_ddim", 20, 6).unwrap(), [1, 1, 3, 6, 11, 17]);
        assert!(StepChoice::named("dp").is_err());
    }

    fn trajectory(change: impl Fn(usize, f64) -> f64) -> StepChoice {
        let table = BetaSchedule::ddpm(40).table(40).unwrap();
        let bar = table.alpha_bar().to_vec();
        let c2 = 0.2;
        let moment = |(i, b): (usize, &f64)| change(i, (1.0 - b) / (b * c2 + 1.0 - b));
        StepChoice::OptimalTrajectory {
            moments: bar.iter().enumerate().map(moment).collect(),
            alpha_bar: bar,
        }
    }

    #[test]
    fn the_optimal_trajectory_has_both_ends_and_beats_the_even_one() {
        let rule = trajectory(|_, m| m);
        let steps = rule.steps(40, 6).unwrap();
        assert_eq!((steps[0], steps[5], steps.len()), (1, 40, 6));
        assert_eq!(rule.steps(40, 40).unwrap(), (1..=40).collect::<Vec<_>>());
        let StepChoice::OptimalTrajectory { moments, alpha_bar } = &rule else {
            panic!()
        };
        let cost = |steps: &[usize]| -> f64 {
            let pair = |w: &[usize]| {
                let (s, t) = (w[0] - 1, w[1] - 1);
                let gamma = moments[t] / (1.0 - alpha_bar[t]);
                (1.0 - (1.0 - alpha_bar[t] / alpha_bar[s]) * gamma).ln()
            };
            steps.windows(2).map(pair).sum()
        };
        let even = StepChoice::Linear.steps(40, 6).unwrap();
        assert!(cost(&steps) <= cost(&even) + 1e-12);
    }

    #[test]
    fn impossible_estimates_get_even_steps() {
        // Bad from step 36 on: ten steps are cut off, and a path to step 30 remains.
        let rule = trajectory(|i, m| if i >= 35 { 1.1 } else { m });
        let steps = rule.steps(40, 10).unwrap();
        assert!(
            steps.contains(&30) && steps.ends_with(&[35, 40]),
            "{steps:?}"
        );
        let hopeless = trajectory(|_, _| 1.1);
        assert!(
            hopeless
                .steps(40, 10)
                .unwrap_err()
                .to_string()
                .contains("above 1")
        );
    }
}
