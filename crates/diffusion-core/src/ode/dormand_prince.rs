//! The adaptive pair of Dormand and Prince (1980), orders 5 and 4.
//!
//! The first step, the norm of the error and the growth of the step follow Hairer, Nørsett and
//! Wanner, "Solving Ordinary Differential Equations I", sections II.4 and II.5, with the constants
//! that SciPy's RK45 uses, so that both take the same steps on the same problem.

use super::System;
use crate::error::{Error, Report, Result};

const STAGES: usize = 6;
/// `c` of the six stages.
const NODES: [f64; STAGES] = [0.0, 0.2, 0.3, 0.8, 8.0 / 9.0, 1.0];
/// Rows of `a`; the last row is unused weight of the stages that do not exist yet.
const MATRIX: [[f64; STAGES]; STAGES] = [
    [0.0; STAGES],
    [0.2, 0.0, 0.0, 0.0, 0.0, 0.0],
    [3.0 / 40.0, 9.0 / 40.0, 0.0, 0.0, 0.0, 0.0],
    [44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0, 0.0, 0.0, 0.0],
    [
        19372.0 / 6561.0,
        -25360.0 / 2187.0,
        64448.0 / 6561.0,
        -212.0 / 729.0,
        0.0,
        0.0,
    ],
    [
        9017.0 / 3168.0,
        -355.0 / 33.0,
        46732.0 / 5247.0,
        49.0 / 176.0,
        -5103.0 / 18656.0,
        0.0,
    ],
];
/// `b` of order 5.
const WEIGHTS: [f64; STAGES] = [
    35.0 / 384.0,
    0.0,
    500.0 / 1113.0,
    125.0 / 192.0,
    -2187.0 / 6784.0,
    11.0 / 84.0,
];
/// `b` of order 5 less `b` of order 4, the seventh stage being the first of the next step.
const ERROR: [f64; STAGES + 1] = [
    -71.0 / 57600.0,
    0.0,
    71.0 / 16695.0,
    -71.0 / 1920.0,
    17253.0 / 339200.0,
    -22.0 / 525.0,
    1.0 / 40.0,
];
const SAFETY: f64 = 0.9;
const SHRINK: f64 = 0.2;
const GROW: f64 = 10.0;
/// `−1/(order of the error + 1)`.
const EXPONENT: f64 = -0.2;

/// Whose error decides about a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Each item's own: steps and results do not depend on the rest of the batch.
    #[default]
    PerItem,
    /// The root mean square over the whole batch, one step for all (SciPy on the flattened batch).
    Whole,
}

/// The solver and its tolerances.
///
/// ```text
/// scale = atol + rtol max(|y|, |y′|),   error = rms(h Σ e_i k_i / scale)
/// accepted if error < 1;   h ← h · clamp(0.9 error^{−1/5}, 0.2, 10)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DormandPrince {
    /// Relative tolerance; at least 100 units of rounding.
    pub rtol: f64,
    /// Absolute tolerance.
    pub atol: f64,
    /// Whose error counts.
    pub control: Control,
    /// Attempted steps after which the solution is given up.
    pub max_steps: usize,
}

impl Default for DormandPrince {
    fn default() -> Self {
        Self {
            rtol: 1e-5,
            atol: 1e-5,
            control: Control::PerItem,
            max_steps: 100_000,
        }
    }
}

/// Where the solution ended and what it cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// The state at the end, row after row.
    pub y: Vec<f64>,
    /// Calls of the right-hand side on the whole batch (`nfev`).
    pub evaluations: usize,
    /// Attempted steps, accepted or not.
    pub attempts: usize,
}

/// Entries that share a step.
struct Group {
    /// Its rows and its entries.
    rows: std::ops::Range<usize>,
    entries: std::ops::Range<usize>,
    t: f64,
    /// The next step, without its sign.
    h: f64,
    rejected: bool,
}

impl DormandPrince {
    /// `y(to)` of every row, `to` on either side of `from`.
    ///
    /// # Errors
    /// `Config` when a tolerance is no positive number or the rows do not divide the state;
    /// `Numeric` when the step falls below the spacing of numbers or the state is not finite;
    /// `Limit` after `max_steps`; `Interrupted` when the system says so.
    pub fn solve(
        &self,
        system: &mut dyn System,
        rows: usize,
        y: &[f64],
        (from, to): (f64, f64),
    ) -> Result<Solution> {
        self.check(rows, y)?;
        let width = y.len() / rows.max(1);
        let mut solution = Solution {
            y: y.to_vec(),
            evaluations: 0,
            attempts: 0,
        };
        if from == to || y.is_empty() {
            return Ok(solution);
        }
        let size = match self.control {
            Control::Whole => rows,
            Control::PerItem => 1,
        };
        let mut groups: Vec<Group> = (0..rows)
            .step_by(size)
            .map(|start| Group {
                rows: start..start + size,
                entries: start * width..(start + size) * width,
                t: from,
                h: 0.0,
                rejected: false,
            })
            .collect();
        let side = (to - from).signum();
        let mut first = system.rate(&vec![from; rows], y)?;
        self.choose_first_steps(system, &mut groups, rows, y, &first, (from, to))?;
        solution.evaluations = 2;
        while groups.iter().any(|g| g.t != to) {
            if solution.attempts == self.max_steps {
                return Err(Report::new("steps of the adaptive solver", self.max_steps)
                    .expected("the end to be reached within them")
                    .remedy("loosen rtol and atol, or raise max_steps")
                    .limit());
            }
            solution.attempts += 1;
            let mut steps = vec![0.0; rows];
            let mut times = vec![0.0; rows];
            for group in &mut groups {
                let step = group.next_step(side, to)?;
                for (s, t) in steps[group.rows.clone()]
                    .iter_mut()
                    .zip(&mut times[group.rows.clone()])
                {
                    (*s, *t) = (step, group.t);
                }
            }
            let (new, slopes) = stages(system, &times, &steps, &solution.y, &first, width)?;
            solution.evaluations += STAGES;
            for group in &mut groups {
                let Some(&h) = steps.get(group.rows.start) else {
                    continue;
                };
                if h == 0.0 {
                    continue;
                }
                let norm = self.error(group, h, &solution.y, &new, &slopes);
                if !norm.is_finite() {
                    return Err(Report::new(
                        format!("adaptive solver at t = {}", group.t),
                        format!("an error of {norm}"),
                    )
                    .remedy("check the model's weights, or end at a noisier time")
                    .numeric());
                }
                if group.judge(norm, h, side, to) {
                    let range = group.entries.clone();
                    solution.y[range.clone()].copy_from_slice(&new[range.clone()]);
                    first[range.clone()].copy_from_slice(&slopes[STAGES][range]);
                }
            }
            let mut reached = vec![0.0; rows];
            for group in &groups {
                reached[group.rows.clone()].fill(group.t);
            }
            if system.accepted(&reached, &solution.y)?.is_break() {
                return Err(Error::Interrupted);
            }
        }
        Ok(solution)
    }

    fn check(&self, rows: usize, y: &[f64]) -> Result<()> {
        if !(self.rtol >= 0.0 && self.atol >= 0.0 && self.rtol + self.atol > 0.0) {
            return Err(Report::new(
                "tolerances",
                format!("rtol = {}, atol = {}", self.rtol, self.atol),
            )
            .expected("numbers that are not negative, one of them positive")
            .config());
        }
        if rows == 0 && y.is_empty() || rows > 0 && y.len().is_multiple_of(rows) {
            return Ok(());
        }
        Err(
            Report::new("state", format!("{} numbers in {rows} rows", y.len()))
                .expected("rows of equal length")
                .config(),
        )
    }

    fn rtol(&self) -> f64 {
        self.rtol.max(100.0 * f64::EPSILON)
    }

    /// Hairer's choice (algorithm 4.14), which costs one evaluation.
    fn choose_first_steps(
        &self,
        system: &mut dyn System,
        groups: &mut [Group],
        rows: usize,
        y: &[f64],
        slope: &[f64],
        (from, to): (f64, f64),
    ) -> Result<()> {
        let (side, length) = ((to - from).signum(), (to - from).abs());
        let scale: Vec<f64> = y
            .iter()
            .map(|v| self.atol + v.abs() * self.rtol())
            .collect();
        let norm = |group: &Group, v: &dyn Fn(usize) -> f64| {
            rms(group.entries.clone().map(|i| v(i) / scale[i]))
        };
        let mut times = vec![from; rows];
        let mut probe = y.to_vec();
        for group in groups.iter_mut() {
            let (d0, d1) = (norm(group, &|i| y[i]), norm(group, &|i| slope[i]));
            let h0 = if d0 < 1e-5 || d1 < 1e-5 {
                1e-6
            } else {
                0.01 * d0 / d1
            };
            group.h = h0.min(length);
            times[group.rows.clone()].fill(from + group.h * side);
            for i in group.entries.clone() {
                probe[i] += group.h * side * slope[i];
            }
        }
        let there = system.rate(&times, &probe)?;
        for group in groups.iter_mut() {
            let d1 = norm(group, &|i| slope[i]);
            let d2 = norm(group, &|i| there[i] - slope[i]) / group.h;
            let h1 = if d1 <= 1e-15 && d2 <= 1e-15 {
                (group.h * 1e-3).max(1e-6)
            } else {
                (0.01 / d1.max(d2)).powf(-EXPONENT)
            };
            group.h = h1.min(100.0 * group.h).min(length);
        }
        Ok(())
    }

    /// The root mean square of the error of a group's step over its scale.
    fn error(&self, group: &Group, h: f64, y: &[f64], new: &[f64], slopes: &[Vec<f64>]) -> f64 {
        rms(group.entries.clone().map(|i| {
            let scale = self.atol + y[i].abs().max(new[i].abs()) * self.rtol();
            let error: f64 = ERROR.iter().zip(slopes).map(|(e, k)| e * k[i]).sum();
            error * h / scale
        }))
    }
}

impl Group {
    /// The signed step to try next, 0 at the end.
    fn next_step(&mut self, side: f64, to: f64) -> Result<f64> {
        if self.t == to {
            return Ok(0.0);
        }
        let least = 10.0 * (next_after(self.t, side) - self.t).abs();
        if self.rejected && self.h < least {
            return Err(Report::new(
                format!("adaptive solver at t = {}", self.t),
                "a step below the spacing of numbers",
            )
            .remedy("loosen the tolerance, or end at a noisier time")
            .numeric());
        }
        self.h = self.h.max(least);
        let end = self.t + self.h * side;
        Ok(if side * (end - to) > 0.0 {
            to - self.t
        } else {
            end - self.t
        })
    }

    /// Takes or refuses the step, and chooses the next one. Whether it was taken.
    fn judge(&mut self, norm: f64, h: f64, side: f64, to: f64) -> bool {
        let length = h.abs();
        if norm < 1.0 {
            let grown = if norm == 0.0 {
                GROW
            } else {
                (SAFETY * norm.powf(EXPONENT)).min(GROW)
            };
            let factor = if self.rejected { grown.min(1.0) } else { grown };
            let end = self.t + h;
            // The last step is the distance to the end, which rounding must not miss.
            self.t = if side * (end - to) >= 0.0 || h == to - self.t {
                to
            } else {
                end
            };
            self.h = length * factor;
            self.rejected = false;
            true
        } else {
            self.h = length * (SAFETY * norm.powf(EXPONENT)).max(SHRINK);
            self.rejected = true;
            false
        }
    }
}

/// The new state of order 5 and the seven slopes; the last belongs to the new state.
fn stages(
    system: &mut dyn System,
    times: &[f64],
    steps: &[f64],
    y: &[f64],
    first: &[f64],
    width: usize,
) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let moved = |weights: &[f64], slopes: &[Vec<f64>]| -> Vec<f64> {
        let mut out = y.to_vec();
        for (i, o) in out.iter_mut().enumerate() {
            let sum: f64 = weights.iter().zip(slopes).map(|(w, k)| w * k[i]).sum();
            *o += steps[i / width] * sum;
        }
        out
    };
    let at =
        |node: f64| -> Vec<f64> { times.iter().zip(steps).map(|(t, h)| t + node * h).collect() };
    let mut slopes = vec![first.to_vec()];
    for (node, row) in NODES.iter().zip(&MATRIX).skip(1) {
        let state = moved(row, &slopes);
        slopes.push(checked(system.rate(&at(*node), &state)?, y.len())?);
    }
    let new = moved(&WEIGHTS, &slopes);
    slopes.push(checked(system.rate(&at(1.0), &new)?, y.len())?);
    Ok((new, slopes))
}

fn checked(slope: Vec<f64>, len: usize) -> Result<Vec<f64>> {
    if slope.len() == len {
        return Ok(slope);
    }
    Err(
        Report::new("right-hand side", format!("{} numbers", slope.len()))
            .expected(format!("{len}, as many as the state"))
            .config(),
    )
}

fn rms(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len().max(1) as f64;
    (values.map(|v| v * v).sum::<f64>() / n).sqrt()
}

/// The neighbouring number on a side.
fn next_after(t: f64, side: f64) -> f64 {
    if side > 0.0 {
        t.next_up()
    } else {
        t.next_down()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// y' = −2 t y: y = exp(−t²).
    fn bell(calls: &mut usize) -> impl FnMut(&[f64], &[f64]) -> Result<Vec<f64>> + '_ {
        move |t, y| {
            *calls += 1;
            Ok(t.iter().zip(y).map(|(t, y)| -2.0 * t * y).collect())
        }
    }

    #[test]
    fn the_error_follows_the_tolerance_forwards_and_back() {
        let mut last = f64::INFINITY;
        for tolerance in [1e-4, 1e-6, 1e-8, 1e-10] {
            let solver = DormandPrince {
                rtol: tolerance,
                atol: tolerance,
                ..DormandPrince::default()
            };
            let mut calls = 0;
            let out = solver
                .solve(&mut bell(&mut calls), 1, &[1.0], (0.0, 2.0))
                .unwrap();
            assert_eq!(out.evaluations, calls);
            assert_eq!(out.evaluations, 2 + 6 * out.attempts);
            let error = (out.y[0] - (-4f64).exp()).abs();
            assert!(
                error < 20.0 * tolerance && error < last,
                "{tolerance}: {error}"
            );
            last = error;
            let back = solver
                .solve(&mut bell(&mut 0), 1, &out.y, (2.0, 0.0))
                .unwrap();
            assert!((back.y[0] - 1.0).abs() < 5e3 * tolerance, "{}", back.y[0]);
        }
    }

    /// Lotka and Volterra's equations: the evaluations and results of SciPy 1.17's RK45.
    #[test]
    fn takes_the_steps_of_scipy() {
        for (tolerance, evaluations, end) in [
            (1e-3, 242, [0.2970090199603734, 0.44604387722411254]),
            (1e-5, 548, [0.28725808978119566, 0.4496874507219224]),
            (1e-8, 1760, [0.2872129930203567, 0.44977740836205626]),
        ] {
            let solver = DormandPrince {
                rtol: tolerance,
                atol: tolerance,
                control: Control::Whole,
                ..DormandPrince::default()
            };
            let mut prey = |_: &[f64], y: &[f64]| {
                let meetings = y[0] * y[1];
                Ok(vec![1.5 * y[0] - meetings, meetings - 3.0 * y[1]])
            };
            let out = solver
                .solve(&mut prey, 2, &[10.0, 5.0], (0.0, 10.0))
                .unwrap();
            assert_eq!(out.evaluations, evaluations);
            for (ours, scipy) in out.y.iter().zip(end) {
                assert!((ours / scipy - 1.0).abs() < 1e-9, "{ours} {scipy}");
            }
        }
    }

    /// The pair really is of orders 5 and 4: conditions on the coefficients.
    #[test]
    fn the_coefficients_satisfy_the_order_conditions() {
        for power in 0..5 {
            let moment: f64 = WEIGHTS
                .iter()
                .zip(NODES)
                .map(|(b, c)| b * c.powi(power))
                .sum();
            assert!(
                (moment - 1.0 / f64::from(power + 1)).abs() < 1e-15,
                "{power}"
            );
        }
        for (row, node) in MATRIX.iter().zip(NODES) {
            assert!((row.iter().sum::<f64>() - node).abs() < 1e-14);
        }
        for power in 0..4 {
            let nodes = NODES.iter().copied().chain([1.0]);
            let moment: f64 = ERROR
                .iter()
                .zip(nodes)
                .map(|(e, c)| e * c.powi(power))
                .sum();
            assert!(moment.abs() < 1e-15, "{power}: {moment}");
        }
    }

    #[test]
    fn an_item_does_not_depend_on_its_batch_unless_asked() {
        // Rows of very different stiffness.
        let rates = [1.0, 50.0, 0.1];
        let run = |rows: &[usize], control| {
            let mut system = |t: &[f64], y: &[f64]| {
                let slope = rows.iter().zip(t).zip(y);
                Ok(slope
                    .map(|((r, t), y)| -rates[*r] * y + (3.0 * t).sin())
                    .collect())
            };
            let solver = DormandPrince {
                control,
                ..DormandPrince::default()
            };
            let y = vec![1.0; rows.len()];
            solver
                .solve(&mut system, rows.len(), &y, (0.0, 1.0))
                .unwrap()
                .y
        };
        let together = run(&[0, 1, 2], Control::PerItem);
        for (i, value) in together.iter().enumerate() {
            assert_eq!(run(&[i], Control::PerItem)[0].to_bits(), value.to_bits());
        }
        assert_ne!(run(&[0, 1, 2], Control::Whole)[0], together[0]);
    }

    #[test]
    fn what_cannot_be_solved_is_an_error() {
        let solver = DormandPrince::default();
        // y' = y² from 1 explodes at t = 1.
        let mut pole = |_: &[f64], y: &[f64]| Ok(y.iter().map(|v| v * v).collect());
        let error = solver.solve(&mut pole, 1, &[1.0], (0.0, 2.0)).unwrap_err();
        assert!(error.to_string().contains("t = "), "{error}");
        let short = DormandPrince {
            max_steps: 1,
            ..solver
        };
        let error = short.solve(&mut bell(&mut 0), 1, &[1.0], (0.0, 2.0));
        assert!(error.unwrap_err().to_string().contains("max_steps"));
        assert!(
            solver
                .solve(&mut bell(&mut 0), 2, &[1.0], (0.0, 2.0))
                .is_err()
        );
        let free = DormandPrince {
            rtol: 0.0,
            atol: 0.0,
            ..solver
        };
        assert!(
            free.solve(&mut bell(&mut 0), 1, &[1.0], (0.0, 2.0))
                .is_err()
        );
    }
}
