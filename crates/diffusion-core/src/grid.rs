//! Where to stop on the way back: the second of the four nouns.
//!
//! A grid is a list of points from the noisiest to the cleanest, computed in f64. The rules of
//! other libraries for integer tables (leading, trailing, linspace) are kept to the index, because
//! a network trained on a table answers best exactly there.

pub mod beta;

use crate::error::{Report, Result};
use crate::schedule::linear::linspace;
use crate::schedule::{Point, Schedule};
use serde::{Deserialize, Serialize};

/// How the points of a run are chosen. The data itself (`σ = 0`) is appended by [`Grid::points`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Grid {
    /// Indices `k ⌊T/n⌋ + offset`: starts below the noisiest step (Lin et al. 2023, table 2).
    Leading {
        /// Added to every index.
        #[serde(default)]
        offset: usize,
    },
    /// Indices `round(T − k T/n) − 1`: starts at the noisiest step.
    Trailing,
    /// Indices evenly spaced from `T − 1` to 0, rounded half to even; times evenly spaced over
    /// the span of a continuous schedule.
    Linspace,
    /// `σ̂_i = (σ_max^{1/ρ} + i/(n−1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ` (Karras et al. 2022, eq. 5).
    Karras {
        /// Smallest noise level; the schedule's when absent.
        sigma_min: Option<f64>,
        /// Largest noise level; the schedule's when absent.
        sigma_max: Option<f64>,
        /// How strongly steps crowd at low noise, 7 in the paper.
        #[serde(default = "paper_rho")]
        rho: f64,
    },
    /// `ln σ̂` evenly spaced.
    Exponential {
        /// Smallest noise level; the schedule's when absent.
        sigma_min: Option<f64>,
        /// Largest noise level; the schedule's when absent.
        sigma_max: Option<f64>,
    },
    /// `σ̂_i = σ_min + q(1 − i/(n−1)) (σ_max − σ_min)` with the quantiles `q` of a beta distribution
    /// (Lee et al. 2024): crowded at both ends.
    Beta {
        /// Smallest noise level; the schedule's when absent.
        sigma_min: Option<f64>,
        /// Largest noise level; the schedule's when absent.
        sigma_max: Option<f64>,
        /// First parameter, 0.6 in diffusers.
        #[serde(default = "usual_beta")]
        alpha: f64,
        /// Second parameter.
        #[serde(default = "usual_beta")]
        beta: f64,
    },
    /// Indices `(linspace(0, √(0.8 T), n))²` (DDIM's for CIFAR-10); `√t` evenly spaced over the span
    /// of a continuous schedule.
    Quadratic,
    /// Log-SNR evenly spaced over the span of the schedule (Lu et al. 2022, DPM-Solver).
    UniformLogSnr,
    /// These times, noisiest first.
    Times {
        /// Times in the units of the schedule.
        times: Vec<f64>,
    },
}

fn paper_rho() -> f64 {
    7.0
}

fn usual_beta() -> f64 {
    0.6
}

/// No run has more steps than this.
const MOST: usize = 100_000;

impl Grid {
    /// Refuses parameters without a meaning.
    ///
    /// # Errors
    /// `Config` naming the parameter.
    pub fn check(&self) -> Result<()> {
        let wrong = |field: &str, value: f64, expected: &str| {
            Report::new(format!("grid, {field}"), value)
                .expected(expected)
                .remedy("leave it out for the usual value")
                .config()
        };
        let positive = |field: &str, value: f64| {
            let sound = value > 0.0 && value.is_finite();
            sound
                .then_some(())
                .ok_or_else(|| wrong(field, value, "a positive number"))
        };
        let (low, high) = match self {
            Grid::Karras {
                sigma_min,
                sigma_max,
                rho,
            } => {
                positive("rho", *rho)?;
                (sigma_min, sigma_max)
            }
            Grid::Exponential {
                sigma_min,
                sigma_max,
            } => (sigma_min, sigma_max),
            Grid::Beta {
                sigma_min,
                sigma_max,
                alpha,
                beta,
            } => {
                positive("alpha", *alpha)?;
                positive("beta", *beta)?;
                (sigma_min, sigma_max)
            }
            _ => return Ok(()),
        };
        low.map_or(Ok(()), |v| positive("sigma_min", v))?;
        high.map_or(Ok(()), |v| positive("sigma_max", v))?;
        match (low, high) {
            (Some(low), Some(high)) if low >= high => Err(wrong(
                "sigma_min",
                *low,
                &format!("below sigma_max = {high}"),
            )),
            _ => Ok(()),
        }
    }

    /// Karras' grid with the paper's `ρ = 7` over the schedule's span.
    pub fn karras() -> Self {
        Grid::Karras {
            sigma_min: None,
            sigma_max: None,
            rho: 7.0,
        }
    }

    /// Karras' grid as the paper bounds it: from `σ̂ = 80` down where the schedule goes further, as the
    /// cosine table does (to about 20,000), where few steps would be spent on nothing but noise.
    pub fn edm(schedule: &dyn Schedule) -> Self {
        const SIGMA_MAX: f64 = 80.0;
        let (_, high) = schedule.span();
        let beyond = schedule.at(high).sigma_hat() > SIGMA_MAX;
        Grid::Karras {
            sigma_min: None,
            sigma_max: beyond.then_some(SIGMA_MAX),
            rho: 7.0,
        }
    }

    /// The `n` points at which the network is asked, followed by the data.
    ///
    /// # Errors
    /// `Config` when `n` is 0, larger than a table, or the times are not falling; or when an index
    /// rule is used on a continuous schedule.
    pub fn points(&self, schedule: &dyn Schedule, n: usize) -> Result<Vec<Point>> {
        let n = if let Grid::Times { times } = self {
            times.len()
        } else {
            n
        };
        if !(1..=MOST).contains(&n) {
            return Err(Report::new("steps", n)
                .expected(format!("1 to {MOST}"))
                .config());
        }
        self.check()?;
        let (low, high) = schedule.span();
        let hats = || (schedule.at(low).sigma_hat(), schedule.at(high).sigma_hat());
        let by_hat = |values: Vec<f64>| -> Vec<Point> {
            values
                .into_iter()
                .map(|s| schedule.at_log_snr(-2.0 * s.ln()))
                .collect()
        };
        let mut points: Vec<Point> = match self {
            Grid::Leading { .. } | Grid::Trailing | Grid::Linspace | Grid::Quadratic
                if schedule.steps().is_some() =>
            {
                let total = schedule.steps().unwrap_or(0);
                self.indices(total, n)?
                    .into_iter()
                    .map(|i| schedule.at(i as f64))
                    .collect()
            }
            Grid::Leading { .. } | Grid::Trailing => {
                return Err(
                    Report::new("grid", format!("{self:?} on a continuous process"))
                        .expected("a table of steps")
                        .remedy("use linspace, karras, exponential or uniform_log_snr")
                        .config(),
                );
            }
            Grid::Linspace => linspace(high, low, n)
                .into_iter()
                .map(|t| schedule.at(t))
                .collect(),
            Grid::Karras {
                sigma_min,
                sigma_max,
                rho,
            } => {
                let (a, b) = hats();
                by_hat(karras(
                    sigma_min.unwrap_or(a),
                    sigma_max.unwrap_or(b),
                    n,
                    *rho,
                ))
            }
            Grid::Exponential {
                sigma_min,
                sigma_max,
            } => {
                let (a, b) = hats();
                by_hat(exponential(
                    sigma_min.unwrap_or(a),
                    sigma_max.unwrap_or(b),
                    n,
                ))
            }
            Grid::Beta {
                sigma_min,
                sigma_max,
                alpha,
                beta,
            } => {
                let (a, b) = hats();
                by_hat(beta_spaced(
                    sigma_min.unwrap_or(a),
                    sigma_max.unwrap_or(b),
                    n,
                    (*alpha, *beta),
                ))
            }
            Grid::Quadratic => linspace(high.sqrt(), low.sqrt(), n)
                .into_iter()
                .map(|root| schedule.at(root * root))
                .collect(),
            Grid::UniformLogSnr => {
                let (a, b) = (schedule.at(high).log_snr(), schedule.at(low).log_snr());
                linspace(a, b, n)
                    .into_iter()
                    .map(|l| schedule.at_log_snr(l))
                    .collect()
            }
            Grid::Times { times } => {
                if let Some(pair) = times
                    .windows(2)
                    .find(|w| w[0].is_nan() || w[1].is_nan() || w[0] <= w[1])
                {
                    return Err(Report::new(
                        "times",
                        format!("{} followed by {}", pair[0], pair[1]),
                    )
                    .expected("falling times, noisiest first")
                    .config());
                }
                times.iter().map(|t| schedule.at(*t)).collect()
            }
        };
        if let Some(bad) = points
            .iter()
            .find(|p| !p.alpha.is_finite() || !p.sigma.is_finite())
        {
            return Err(Report::new("grid", format!("{bad:?}"))
                .expected("finite levels")
                .remedy("this schedule ends without signal: use leading, trailing or linspace")
                .config());
        }
        points.push(Point::data(0.0));
        Ok(points)
    }

    /// The indices of an integer rule on a table of `total` steps, noisiest first.
    ///
    /// # Errors
    /// `Config` when `n` is 0 or larger than the table, an offset leaves the table, or the rule is
    /// not one on indices.
    pub fn indices(&self, total: usize, n: usize) -> Result<Vec<i64>> {
        if n == 0 || n > total {
            return Err(Report::new("steps", n)
                .expected(format!("1 to {total}, the length of the table"))
                .config());
        }
        let indices: Vec<i64> = match self {
            Grid::Leading { offset } => (0..n)
                .rev()
                .map(|k| (k * (total / n) + offset) as i64)
                .collect(),
            Grid::Trailing => trailing(total as f64, total as f64 / n as f64),
            Grid::Linspace => linspace(0.0, (total - 1) as f64, n)
                .into_iter()
                .rev()
                .map(|t| t.round_ties_even() as i64)
                .collect(),
            Grid::Quadratic => {
                let mut next = 0;
                let mut rising: Vec<i64> = linspace(0.0, (0.8 * total as f64).sqrt(), n)
                    .into_iter()
                    .map(|root| {
                        // Where squares crowd, every index is used once.
                        let index = ((root * root) as i64).max(next);
                        next = index + 1;
                        index
                    })
                    .collect();
                rising.reverse();
                rising
            }
            other => {
                return Err(Report::new("grid", format!("{other:?}"))
                    .expected("a rule on indices")
                    .config());
            }
        };
        match indices.first() {
            Some(&first) if first >= total as i64 => {
                Err(Report::new("grid offset", format!("index {first}"))
                    .expected(format!("below {total}"))
                    .config())
            }
            _ => Ok(indices),
        }
    }
}

/// Indices from `start` downwards in steps of `ratio`, rounded half to even, less one; the number
/// of them is that of a half-open range in floating point.
pub fn trailing(start: f64, ratio: f64) -> Vec<i64> {
    let count = (start / ratio).ceil() as usize;
    // The step as NumPy's `arange` has it, rounded by the first difference: halves depend on it.
    let step = (start - ratio) - start;
    (0..count)
        .map(|k| (start + k as f64 * step).round_ties_even() as i64 - 1)
        .filter(|i| *i >= 0)
        .collect()
}

/// The noise levels of Karras et al. 2022, largest first.
pub fn karras(sigma_min: f64, sigma_max: f64, n: usize, rho: f64) -> Vec<f64> {
    linspace(sigma_max.powf(1.0 / rho), sigma_min.powf(1.0 / rho), n)
        .into_iter()
        .map(|root| root.powf(rho))
        .collect()
}

/// Noise levels whose logarithms are evenly spaced, largest first.
pub fn exponential(sigma_min: f64, sigma_max: f64, n: usize) -> Vec<f64> {
    linspace(sigma_max.ln(), sigma_min.ln(), n)
        .into_iter()
        .map(f64::exp)
        .collect()
}

/// Noise levels at the quantiles of a beta distribution, largest first.
pub fn beta_spaced(sigma_min: f64, sigma_max: f64, n: usize, (a, b): (f64, f64)) -> Vec<f64> {
    linspace(0.0, 1.0, n)
        .into_iter()
        .map(|u| sigma_min + beta::beta_quantile(1.0 - u, a, b) * (sigma_max - sigma_min))
        .collect()
}

/// Grids by name with their usual parameters, for command lines.
pub const GRIDS: [(&str, &str); 9] = [
    (
        "leading",
        "every floor(T/n)-th index, from below the noisiest",
    ),
    ("trailing", "every T/n-th index, from the noisiest"),
    ("linspace", "evenly spaced times, both ends included"),
    ("quadratic", "evenly spaced square roots of time"),
    ("karras", "sigma^(1/7) evenly spaced"),
    ("edm", "karras from sigma = 80 at most"),
    ("exponential", "log sigma evenly spaced"),
    ("log-snr", "log SNR evenly spaced"),
    ("beta", "quantiles of Beta(0.6, 0.6), crowded at both ends"),
];

impl Grid {
    /// A grid by name, or as JSON with its parameters: `{"kind": "karras", "rho": 5}`.
    ///
    /// # Errors
    /// `Config` listing the names, or saying what is wrong in the JSON.
    pub fn parse(text: &str, schedule: &dyn Schedule) -> Result<Self> {
        if !text.trim_start().starts_with('{') {
            return Self::named(text, schedule);
        }
        serde_json::from_str(text).map_err(|error| {
            Report::new("grid", text)
                .expected(format!("a grid's parameters as JSON ({error})"))
                .config()
        })
    }

    /// The grid of this name on a schedule.
    ///
    /// # Errors
    /// `Config` listing the names.
    pub fn named(name: &str, schedule: &dyn Schedule) -> Result<Self> {
        Ok(match name {
            "leading" => Grid::Leading { offset: 0 },
            "trailing" => Grid::Trailing,
            "linspace" => Grid::Linspace,
            "quadratic" => Grid::Quadratic,
            "karras" => Grid::karras(),
            "edm" => Grid::edm(schedule),
            "exponential" => Grid::Exponential {
                sigma_min: None,
                sigma_max: None,
            },
            "log-snr" => Grid::UniformLogSnr,
            "beta" => Grid::Beta {
                sigma_min: None,
                sigma_max: None,
                alpha: 0.6,
                beta: 0.6,
            },
            other => {
                let names: Vec<&str> = GRIDS.iter().map(|g| g.0).collect();
                return Err(Report::new("grid", other)
                    .expected(format!("one of {}", names.join(", ")))
                    .config());
            }
        })
    }
}

/// `n` of the noise levels that iDDPM's cosine table of `steps` steps has between two limits, largest
/// first, evenly spaced in their number (Karras et al. 2022, table 1).
///
/// ```text
/// u_M = 0,   u_{j−1} = √( (u_j² + 1)/max(ᾱ_{j−1}/ᾱ_j, C₁) − 1 ),   ᾱ_j = sin²( π/2 · j/(M (C₂ + 1)) )
/// ```
///
/// # Errors
/// `Config` when no level lies between the limits.
pub fn iddpm(
    (sigma_min, sigma_max): (f64, f64),
    n: usize,
    steps: usize,
    c1: f64,
    c2: f64,
) -> Result<Vec<f64>> {
    let alpha_bar = |j: usize| {
        (0.5 * std::f64::consts::PI * j as f64 / steps as f64 / (c2 + 1.0))
            .sin()
            .powi(2)
    };
    // From the cleanest level up, then turned round.
    let mut levels = vec![0.0f64];
    let mut last = 0.0f64;
    for j in (1..=steps).rev() {
        let ratio = (alpha_bar(j - 1) / alpha_bar(j)).max(c1);
        last = ((last * last + 1.0) / ratio - 1.0).sqrt();
        levels.push(last);
    }
    levels.reverse();
    levels.retain(|u| (sigma_min..=sigma_max).contains(u));
    if levels.is_empty() {
        return Err(
            Report::new("iddpm grid", format!("no level of {steps} steps"))
                .expected(format!("some between {sigma_min} and {sigma_max}"))
                .config(),
        );
    }
    let stride = (levels.len() - 1) as f64 / n.saturating_sub(1).max(1) as f64;
    Ok((0..n)
        .filter_map(|i| {
            let place = (stride * i as f64).round_ties_even() as usize;
            levels.get(place).copied()
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{BetaSchedule, Edm, Vp};

    #[test]
    fn the_grid_of_edm_is_bounded_where_the_schedule_goes_further() {
        let cosine = BetaSchedule::Cosine.table(1000).unwrap();
        let linear = BetaSchedule::ddpm(1000).table(1000).unwrap();
        let first = |table: &crate::schedule::Table| {
            Grid::edm(table).points(table, 5).unwrap()[0].sigma_hat()
        };
        assert!((first(&cosine) - 80.0).abs() < 1e-6, "{}", first(&cosine));
        let high = linear.at(linear.span().1).sigma_hat();
        assert!((first(&linear) / high.min(80.0) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn integer_rules_of_table_two() {
        // Lin et al. 2023, table 2, T = 1000 and 5 steps (the paper counts steps from 1).
        let at = |g: Grid| g.indices(1000, 5).unwrap();
        assert_eq!(at(Grid::Leading { offset: 0 }), [800, 600, 400, 200, 0]);
        assert_eq!(at(Grid::Trailing), [999, 799, 599, 399, 199]);
        assert_eq!(at(Grid::Linspace), [999, 749, 500, 250, 0]);
        assert_eq!(Grid::Linspace.indices(1000, 1).unwrap(), [0]);
    }

    #[test]
    fn every_length_is_exact_falling_and_inside() {
        for total in [10usize, 50, 1000, 4000] {
            for n in (1..=total).step_by(total / 10) {
                for grid in [
                    Grid::Leading { offset: 0 },
                    Grid::Trailing,
                    Grid::Linspace,
                    Grid::Quadratic,
                ] {
                    let indices = grid.indices(total, n).unwrap();
                    assert_eq!(indices.len(), n, "{grid:?} {total} {n}");
                    assert!(indices.windows(2).all(|w| w[0] > w[1]));
                    assert!(indices.iter().all(|i| (0..total as i64).contains(i)));
                }
            }
        }
    }

    #[test]
    fn edm_grid_hits_both_ends() {
        let points = Grid::karras().points(&Edm::default(), 18).unwrap();
        assert_eq!(points.len(), 19);
        assert!((points[0].sigma - 80.0).abs() < 1e-9 && (points[17].sigma - 0.002).abs() < 1e-12);
        assert_eq!(points[18], Point::data(0.0));
        // ρ = 7: the second level of 18 as the formula gives it by hand.
        let root =
            80f64.powf(1.0 / 7.0) + (0.002f64.powf(1.0 / 7.0) - 80f64.powf(1.0 / 7.0)) / 17.0;
        assert!((points[1].sigma - root.powi(7)).abs() < 1e-9);
    }

    /// The levels of iDDPM are those of the cosine law ᾱ = sin²(…): u = cot, until C₁ bounds a step.
    #[test]
    fn iddpm_levels_are_those_of_the_cosine_law() {
        let (m, c2) = (200, 0.008);
        let levels = iddpm((0.0, 1e9), m + 1, m, 0.001, c2).unwrap();
        assert_eq!(levels.len(), m + 1);
        assert!(levels.windows(2).all(|w| w[0] > w[1]));
        let angle = |j: usize| 0.5 * std::f64::consts::PI * j as f64 / m as f64 / (1.0 + c2);
        for j in [150usize, 100, 20] {
            // ᾱ_M is not 1: the ratio to it is what counts.
            let bar = (angle(j).sin() / angle(m).sin()).powi(2);
            let exact = ((1.0 - bar) / bar).sqrt();
            assert!((levels[j] / exact - 1.0).abs() < 1e-9, "{j}");
        }
        let few = iddpm((0.0064, 81.0), 6, m, 0.001, c2).unwrap();
        assert!(few.len() == 6 && few[0] <= 81.0 && few[5] >= 0.0064);
        assert!(iddpm((1e8, 1e9), 6, m, 0.001, c2).is_err());
    }

    #[test]
    fn even_log_snr_is_even() {
        let points = Grid::UniformLogSnr.points(&Vp::default(), 11).unwrap();
        let steps: Vec<f64> = points[..11]
            .windows(2)
            .map(|w| w[1].log_snr() - w[0].log_snr())
            .collect();
        assert!(steps.iter().all(|h| (h - steps[0]).abs() < 1e-9));
        assert!((points[10].t - 1e-3).abs() < 1e-10);
    }

    #[test]
    fn refuses_what_cannot_be() {
        let table = BetaSchedule::Cosine.table(100).unwrap();
        let error = |g: Grid, n| g.points(&table, n).unwrap_err().to_string();
        assert!(error(Grid::Trailing, 0).contains("steps: 0"));
        assert!(error(Grid::karras(), 20_000_000).contains("1 to 100000"));
        let json = |text: &str| error(Grid::parse(text, &table).unwrap(), 5);
        assert!(json(r#"{"kind": "karras", "rho": 0}"#).contains("rho: 0"));
        assert!(json(r#"{"kind": "beta", "alpha": -1}"#).contains("alpha: -1"));
        let crossed = r#"{"kind": "karras", "sigma_min": 5, "sigma_max": 1}"#;
        assert!(json(crossed).contains("below sigma_max"));
        assert!(error(Grid::Trailing, 101).contains("1 to 100"));
        assert!(
            error(
                Grid::Times {
                    times: vec![3.0, 5.0]
                },
                0
            )
            .contains("falling")
        );
        assert!(error(Grid::Leading { offset: 50 }, 2).contains("below 100"));
        assert!(
            Grid::Trailing
                .points(&Vp::default(), 5)
                .unwrap_err()
                .to_string()
                .contains("continuous")
        );
        let zero = table.rescaled_to_zero_terminal_snr();
        assert!(
            Grid::karras()
                .points(&zero, 5)
                .unwrap_err()
                .to_string()
                .contains("without signal")
        );
    }
}
