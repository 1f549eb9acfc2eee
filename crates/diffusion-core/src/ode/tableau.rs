//! Explicit Runge-Kutta methods with fixed steps, by their Butcher tableau.

use super::System;
use crate::error::{Error, Report, Result};

/// An explicit method.
///
/// ```text
/// k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j),   y′ = y + h Σ_i b_i k_i
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Tableau {
    /// `c`, one a stage; the first is 0.
    pub nodes: Vec<f64>,
    /// Rows of `a` below the diagonal: row `i` has `i` entries.
    pub matrix: Vec<Vec<f64>>,
    /// `b`, one a stage.
    pub weights: Vec<f64>,
    /// Order of the global error.
    pub order: u32,
}

impl Tableau {
    fn new(order: u32, nodes: &[f64], matrix: &[&[f64]], weights: &[f64]) -> Self {
        Self {
            nodes: nodes.to_vec(),
            matrix: matrix.iter().map(|row| row.to_vec()).collect(),
            weights: weights.to_vec(),
            order,
        }
    }

    /// Euler's method.
    pub fn euler() -> Self {
        Self::new(1, &[0.0], &[&[]], &[1.0])
    }

    /// The family of two stages and order 2 (Karras et al. 2022, algorithm 3).
    ///
    /// ```text
    /// y′ = y + h [(1 − 1/(2α)) k₁ + 1/(2α) k₂],   k₂ at (t + α h, y + α h k₁)
    /// ```
    ///
    /// `α = 1` is Heun's method, `½` the midpoint method, `2/3` Ralston's.
    ///
    /// # Errors
    /// `Config` when `α` is not in `(0, 1]`.
    pub fn second_order(alpha: f64) -> Result<Self> {
        if !(alpha > 0.0 && alpha <= 1.0) {
            return Err(Report::new("alpha of a method of order 2", alpha)
                .expected("a number in (0, 1]")
                .config());
        }
        Ok(Self::two_stages(alpha))
    }

    fn two_stages(alpha: f64) -> Self {
        let last = 0.5 / alpha;
        Self::new(2, &[0.0, alpha], &[&[], &[alpha]], &[1.0 - last, last])
    }

    /// Heun's method.
    pub fn heun() -> Self {
        Self::two_stages(1.0)
    }

    /// The midpoint method.
    pub fn midpoint() -> Self {
        Self::two_stages(0.5)
    }

    /// The third-order method of Bogacki and Shampine's pair.
    pub fn bogacki_shampine() -> Self {
        Self::new(
            3,
            &[0.0, 0.5, 0.75],
            &[&[], &[0.5], &[0.0, 0.75]],
            &[2.0 / 9.0, 1.0 / 3.0, 4.0 / 9.0],
        )
    }

    /// The classical method of order 4.
    pub fn rk4() -> Self {
        Self::new(
            4,
            &[0.0, 0.5, 0.5, 1.0],
            &[&[], &[0.5], &[0.0, 0.5], &[0.0, 0.0, 1.0]],
            &[1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0],
        )
    }

    /// `y(to)` in `steps` equal steps from `y(from)`, all rows at the same time.
    ///
    /// # Errors
    /// `Config` when there is no step, `Interrupted` when the system says so, and whatever it
    /// refuses.
    pub fn solve(
        &self,
        system: &mut dyn System,
        rows: usize,
        y: &[f64],
        (from, to): (f64, f64),
        steps: usize,
    ) -> Result<Vec<f64>> {
        if steps == 0 {
            return Err(Report::new("steps", 0).expected("at least 1").config());
        }
        let h = (to - from) / steps as f64;
        let mut y = y.to_vec();
        for step in 0..steps {
            let t = from + step as f64 * h;
            let mut slopes: Vec<Vec<f64>> = Vec::with_capacity(self.nodes.len());
            for (node, row) in self.nodes.iter().zip(&self.matrix) {
                let at = advanced(&y, h, row, &slopes);
                slopes.push(system.rate(&vec![t + node * h; rows], &at)?);
            }
            y = advanced(&y, h, &self.weights, &slopes);
            let t = if step + 1 == steps { to } else { t + h };
            if system.accepted(&vec![t; rows], &y)?.is_break() {
                return Err(Error::Interrupted);
            }
        }
        Ok(y)
    }
}

/// `y + h Σ w_j k_j`.
fn advanced(y: &[f64], h: f64, weights: &[f64], slopes: &[Vec<f64>]) -> Vec<f64> {
    let mut out = y.to_vec();
    for (weight, slope) in weights.iter().zip(slopes) {
        for (o, k) in out.iter_mut().zip(slope) {
            *o += h * weight * k;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// y' = −y² with y(0) = 1 is 1/(1 + t).
    #[test]
    fn every_method_has_its_order() {
        let methods = [
            Tableau::euler(),
            Tableau::midpoint(),
            Tableau::heun(),
            Tableau::second_order(2.0 / 3.0).unwrap(),
            Tableau::bogacki_shampine(),
            Tableau::rk4(),
        ];
        for method in methods {
            let error = |steps| {
                let mut system = |_: &[f64], y: &[f64]| Ok(y.iter().map(|v| -v * v).collect());
                let y = method
                    .solve(&mut system, 1, &[1.0], (0.0, 2.0), steps)
                    .unwrap();
                (y[0] - 1.0 / 3.0).abs()
            };
            let slope = (error(40) / error(80)).log2();
            assert!(
                (slope - f64::from(method.order)).abs() < 0.2,
                "{method:?}: {slope}"
            );
        }
    }

    #[test]
    fn an_impossible_member_of_the_family_is_refused() {
        for alpha in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(Tableau::second_order(alpha).is_err());
        }
    }
}
