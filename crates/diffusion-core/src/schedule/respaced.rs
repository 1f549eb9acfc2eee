//! Fewer steps of a trained table (Nichol and Dhariwal 2021, section 4).

use super::{Point, Table};
use crate::error::{Report, Result};

/// A table of the kept steps, and which step of the original table each of them is.
///
/// ```text
/// β'_i = 1 − ᾱ_{S_i}/ᾱ_{S_{i−1}},   S the kept steps
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Respaced {
    /// The shorter table.
    pub table: Table,
    /// The original step of each index, rising.
    pub original: Vec<usize>,
    /// The number of steps of the original table.
    pub total: usize,
}

impl Respaced {
    /// Keeps the steps that a rule such as `"ddim25"` or `"10,10,5"` chooses, see [`kept_steps`].
    ///
    /// # Errors
    /// `Config` when the rule does not fit the table.
    pub fn new(table: &Table, rule: &str) -> Result<Self> {
        Self::keeping(table, &kept_steps(table.betas().len(), rule)?)
    }

    /// Keeps these steps, rising.
    ///
    /// # Errors
    /// `Config` when there is none, they do not rise, or leave the table.
    pub fn keeping(table: &Table, steps: &[usize]) -> Result<Self> {
        let total = table.betas().len();
        let rising = steps.windows(2).all(|w| w[0] < w[1]);
        if steps.is_empty() || !rising || steps.last().is_some_and(|s| *s >= total) {
            return Err(Report::new("kept steps", format!("{steps:?}"))
                .expected(format!("rising indices below {total}, at least one"))
                .config());
        }
        let mut previous = 1.0;
        let betas = steps
            .iter()
            .map(|s| {
                let bar = table.alpha_bar()[*s];
                let beta = 1.0 - bar / previous;
                previous = bar;
                beta
            })
            .collect();
        Ok(Self {
            table: Table::new(betas)?,
            original: steps.to_vec(),
            total,
        })
    }

    /// The points of a run, noisiest first and ending at the data. A point's time is the step of
    /// the original table, which is what the network knows.
    pub fn points(&self) -> Vec<Point> {
        let mut points: Vec<Point> = self
            .original
            .iter()
            .enumerate()
            .rev()
            .map(|(i, s)| Point {
                t: *s as f64,
                ..self.table.index(i as i64)
            })
            .collect();
        points.push(Point::data(-1.0));
        points
    }

    /// What a network that was trained on rescaled times multiplies a step by: `1000/T`.
    pub fn time_scale(&self) -> f64 {
        1000.0 / self.total as f64
    }
}

/// The steps that a rule keeps of a table of `total`, rising.
///
/// `"ddimN"` keeps every k-th step from 0 on, with the k that gives exactly N of them.
/// `"a,b,c"` cuts the table in as many sections as there are numbers, each but for a remainder as
/// long as the others, and keeps so many steps of each, ends included, rounded half to even.
///
/// # Errors
/// `Config` when the rule cannot be read, no stride fits, or a section is too short.
pub fn kept_steps(total: usize, rule: &str) -> Result<Vec<usize>> {
    let wrong = |expected: String| {
        Report::new("respacing", rule)
            .expected(expected)
            .remedy("\"ddim25\" or \"10,10,5\", with at most as many steps as were trained")
            .config()
    };
    if let Some(count) = rule.strip_prefix("ddim") {
        let count: usize = count
            .trim()
            .parse()
            .map_err(|_| wrong("a whole number after \"ddim\"".into()))?;
        return (1..total.max(2))
            .find(|stride| total.div_ceil(*stride) == count)
            .map(|stride| (0..total).step_by(stride).collect())
            .ok_or_else(|| wrong(format!("a number of steps that a stride gives of {total}")));
    }
    let counts = rule
        .split(',')
        .map(|c| c.trim().parse::<usize>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| wrong("whole numbers with commas between them".into()))?;
    let (size, extra) = (total / counts.len(), total % counts.len());
    let mut start = 0;
    let mut steps = Vec::new();
    for (i, count) in counts.iter().enumerate() {
        let size = size + usize::from(i < extra);
        if size < *count {
            return Err(wrong(format!("at most {size} steps in section {}", i + 1)));
        }
        let stride = match count {
            0 | 1 => 1.0,
            _ => (size - 1) as f64 / (count - 1) as f64,
        };
        // Added up, not multiplied: halves are decided by this sum's rounding.
        let mut place = 0.0f64;
        for _ in 0..*count {
            steps.push(start + place.round_ties_even() as usize);
            place += stride;
        }
        start += size;
    }
    if steps.is_empty() {
        return Err(wrong("at least one step".into()));
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::BetaSchedule;

    #[test]
    fn rules() {
        assert_eq!(kept_steps(10, "ddim5").unwrap(), [0, 2, 4, 6, 8]);
        assert_eq!(kept_steps(10, "3").unwrap(), [0, 4, 9]);
        assert_eq!(kept_steps(7, "1,2").unwrap(), [0, 4, 6]);
        for rule in ["ddim7", "ddimx", "11", "3,9", "a", "", "0"] {
            assert!(kept_steps(10, rule).is_err(), "{rule}");
        }
        assert_eq!(kept_steps(1, "ddim1").unwrap(), [0]);
    }

    #[test]
    fn keeps_the_levels_of_the_kept_steps() {
        let table = BetaSchedule::ddpm(50).table(50).unwrap();
        let short = Respaced::new(&table, "5,3").unwrap();
        assert_eq!(short.original.len(), 8);
        for (i, s) in short.original.iter().enumerate() {
            let (a, b) = (short.table.alpha_bar()[i], table.alpha_bar()[*s]);
            assert!((a / b - 1.0).abs() < 1e-12);
        }
        let points = short.points();
        assert_eq!((points[0].t, points[8].sigma), (49.0, 0.0));
        assert_eq!(Respaced::new(&table, "50").unwrap().original.len(), 50);
        assert!(Respaced::keeping(&table, &[3, 3]).is_err());
        assert_eq!(short.time_scale(), 20.0);
    }
}
