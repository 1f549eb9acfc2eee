//! Comparisons, and the worst that they found.

use super::fixture::{Tensors, Tolerance, values};
use anyhow::Result;
use candle_core::Tensor;

/// Collects comparisons.
#[derive(Debug, Default)]
pub struct Check {
    tolerance: Tolerance,
    /// Values compared so far.
    pub compared: usize,
    /// Largest `|a − b|`.
    pub max_abs: f64,
    /// Largest `|a − b|/|b|` over `|b|` above the absolute tolerance.
    pub max_rel: f64,
    /// What lies outside the tolerance, a line each.
    pub failures: Vec<String>,
}

impl Check {
    /// Nothing compared yet.
    pub fn new(tolerance: Tolerance) -> Self {
        Self {
            tolerance,
            ..Self::default()
        }
    }

    /// The relative part of the tolerance.
    pub fn relative(&self) -> f64 {
        self.tolerance.rel
    }

    /// Compares values with stored ones under the fixture's tolerance.
    pub fn values(&mut self, what: &str, ours: &[f64], stored: &[f64]) {
        let Tolerance { abs, rel } = self.tolerance;
        self.within(what, ours, stored, |b| abs + rel * b.abs());
    }

    /// Compares values with stored ones, each with the bound that belongs to the stored one.
    pub fn within(&mut self, what: &str, ours: &[f64], stored: &[f64], bound: impl Fn(f64) -> f64) {
        if ours.len() != stored.len() {
            self.failures.push(format!(
                "{what}: {} values instead of {}",
                ours.len(),
                stored.len()
            ));
            return;
        }
        self.compared += ours.len();
        let (mut outside, mut worst) = (0, (0usize, 0.0f64));
        for (i, (a, b)) in ours.iter().zip(stored).enumerate() {
            let gap = if a == b { 0.0 } else { (a - b).abs() };
            let size = b.abs();
            // Written so that NaN is outside.
            let inside = gap <= bound(*b);
            let gap = if gap.is_nan() { f64::INFINITY } else { gap };
            self.max_abs = self.max_abs.max(gap);
            if size > self.tolerance.abs {
                self.max_rel = self.max_rel.max(gap / size);
            }
            if !inside {
                outside += 1;
                if outside == 1 || gap > worst.1 {
                    worst = (i, gap);
                }
            }
        }
        if outside > 0 {
            let i = worst.0;
            self.failures.push(format!(
                "{what}: {outside} of {} outside, worst at {i}: {} instead of {}",
                ours.len(),
                ours[i],
                stored[i]
            ));
        }
    }

    /// Compares whole numbers, which may differ by `slack`.
    pub fn integers(&mut self, what: &str, ours: &[f64], stored: &[f64], slack: f64) {
        self.within(what, ours, stored, |_| slack);
    }

    /// Compares a tensor with a stored one under the fixture's tolerance, shape included.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn tensor(&mut self, what: &str, ours: &Tensor, stored: &Tensor) -> Result<()> {
        if ours.dims() != stored.dims() {
            self.failures.push(format!(
                "{what}: shape {:?} instead of {:?}",
                ours.dims(),
                stored.dims()
            ));
            return Ok(());
        }
        self.values(what, &values(ours)?, &values(stored)?);
        Ok(())
    }

    /// Compares a tensor with the stored one of this name, if there is one.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn stored(&mut self, outputs: &Tensors, name: &str, ours: &Tensor) -> Result<()> {
        match outputs.get(name) {
            Some(stored) => self.tensor(name, ours, stored),
            None => Ok(()),
        }
    }

    /// Compares a list of states with the stored stack `[calls, B, …]` of this name, if there is
    /// one.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn stack(&mut self, outputs: &Tensors, name: &str, ours: &[Tensor]) -> Result<()> {
        let Some(stored) = outputs.get(name) else {
            return Ok(());
        };
        if stored.dim(0)? != ours.len() {
            self.failures.push(format!(
                "{name}: {} of them instead of {}",
                ours.len(),
                stored.dim(0)?
            ));
            return Ok(());
        }
        for (k, ours) in ours.iter().enumerate() {
            self.tensor(&format!("{name}[{k}]"), ours, &stored.get(k)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_absolute_plus_relative_and_nan_is_outside() {
        let tolerance = Tolerance {
            abs: 0.1,
            rel: 0.01,
        };
        let mut check = Check::new(tolerance);
        check.values("a", &[1.1, 100.9], &[1.0, 100.0]);
        assert!(check.failures.is_empty(), "{:?}", check.failures);
        assert!((check.max_abs - 0.9).abs() < 1e-9 && (check.max_rel - 0.1).abs() < 1e-9);
        check.values("b", &[1.2], &[1.0]);
        check.values("c", &[f64::NAN], &[1.0]);
        check.values("d", &[1.0], &[1.0, 2.0]);
        check.integers("e", &[3.0, 4.0], &[4.0, 4.0], 0.0);
        let heads: Vec<&str> = check.failures.iter().map(|f| &f[..1]).collect();
        assert_eq!(heads, ["b", "c", "d", "e"]);
        assert_eq!(check.max_abs, f64::INFINITY);
        check.integers("f", &[3.0, 4.0], &[4.0, 4.0], 1.0);
        assert_eq!(check.failures.len(), 4);
    }
}
