//! Chains that stand for an SDE: one forward step `x_{i+1} = x_i + F(x_i) + G z` a time.
//!
//! ```text
//! F = (a − 1) x,   G² = variance of x_{i+1} given x_i
//!
//! Euler, step dt        a = 1 + f dt          G² = g² dt
//! DDPM   (VP, N steps)  a = √(1 − β_i)        G² = β_i                β_i = β(i/(N−1))/N
//! SMLD   (VE, N steps)  a = 1                 G² = σ_i² − σ_{i−1}²    σ_{−1} = 0
//! ```
//!
//! A continuous time finds its step by `i = ⌊t (N − 1)⌋` (Song et al. 2021, the authors' code).

use crate::error::Result;
use crate::forward::{posterior, transition};
use crate::schedule::linear::linspace;
use crate::schedule::{BetaSchedule, Point, SharedSchedule, Table, Ve, Vp};
use candle_core::Tensor;

use crate::tensor::lincomb;

/// One forward step of a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kernel {
    /// `a`, the factor on the cleaner sample.
    pub alpha: f64,
    /// `G²`, the variance that the step adds.
    pub variance: f64,
    /// Variance of the cleaner sample given the noisier one and the data; that of the step where
    /// the chain has no levels (Euler).
    pub posterior: f64,
}

impl Kernel {
    /// The exact step of the process from a cleaner to a noisier point.
    pub fn between(cleaner: &Point, noisier: &Point) -> Self {
        let step = transition(cleaner, noisier);
        Self {
            alpha: step.alpha,
            variance: step.variance.max(0.0),
            posterior: posterior(noisier, cleaner).variance.max(0.0),
        }
    }

    /// The mean of the reversed step, `x − F(x) + w G² s` (Song et al. 2021, eq. 46; `w = ½` for the
    /// probability flow, eq. 48).
    ///
    /// # Errors
    /// When shapes differ.
    pub fn reversed(&self, x: &Tensor, score: &Tensor, weight: f64) -> Result<Tensor> {
        lincomb(2.0 - self.alpha, x, weight * self.variance, score)
    }

    /// The mean of the cleaner sample given the noisier one, `(x + G² s)/a` (Tweedie for one step).
    ///
    /// # Errors
    /// When shapes differ.
    pub fn denoised(&self, x: &Tensor, score: &Tensor) -> Result<Tensor> {
        lincomb(1.0 / self.alpha, x, self.variance / self.alpha, score)
    }
}

/// Which chain stands for a process.
#[derive(Clone)]
pub enum Discretisation {
    /// Euler and Maruyama with a fixed step: for every process.
    Euler {
        /// The process.
        schedule: SharedSchedule,
        /// The step in time, positive.
        dt: f64,
    },
    /// A table of levels, cleanest first.
    Chain(
        /// The levels; what precedes the first is the data.
        Vec<Point>,
    ),
}

impl Discretisation {
    /// Euler's chain of `1/steps`.
    pub fn euler(schedule: SharedSchedule, steps: usize) -> Self {
        Self::Euler {
            schedule,
            dt: (steps as f64).recip(),
        }
    }

    /// DDPM's chain for the VP process: betas evenly spaced from `β(0)/N` to `β(1)/N`.
    ///
    /// # Errors
    /// `Config` when a beta leaves `[0, 1]`: too few steps.
    pub fn ddpm(vp: &Vp, steps: usize) -> Result<Self> {
        Ok(Self::table(&Self::ddpm_table(vp, steps)?))
    }

    /// The table of [`Discretisation::ddpm`].
    ///
    /// # Errors
    /// As there.
    pub fn ddpm_table(vp: &Vp, steps: usize) -> Result<Table> {
        let n = steps as f64;
        BetaSchedule::Linear {
            start: vp.beta_min / n,
            end: vp.beta_max / n,
        }
        .table(steps)
    }

    /// The chain of a table.
    pub fn table(table: &Table) -> Self {
        let steps = table.betas().len() as i64;
        Self::Chain((0..steps).map(|i| table.index(i)).collect())
    }

    /// NCSN's chain for the VE process: `ln σ` evenly spaced.
    pub fn smld(ve: &Ve, steps: usize) -> Self {
        let levels = linspace(ve.sigma_min.ln(), ve.sigma_max.ln(), steps);
        Self::Chain(
            levels
                .into_iter()
                .enumerate()
                .map(|(i, l)| Point::new(i as f64, 1.0, l.exp()))
                .collect(),
        )
    }

    /// The levels of a chain, cleanest first; none for Euler's.
    pub fn levels(&self) -> &[Point] {
        match self {
            Self::Euler { .. } => &[],
            Self::Chain(levels) => levels,
        }
    }

    /// The step that leads up to time `t ∈ [0, 1]`.
    pub fn kernel(&self, t: f64) -> Kernel {
        match self {
            Self::Euler { schedule, dt } => {
                let rates = schedule.rates(t);
                let variance = rates.g2 * dt;
                Kernel {
                    alpha: 1.0 + rates.d_log_alpha * dt,
                    variance,
                    posterior: variance,
                }
            }
            Self::Chain(levels) => {
                let last = levels.len().saturating_sub(1);
                // A negative or undefined time becomes 0 in the conversion.
                let index = ((t * last as f64).floor() as usize).min(last);
                let data = Point::data(0.0);
                let noisier = levels.get(index).unwrap_or(&data);
                let cleaner = match index {
                    0 => &data,
                    _ => levels.get(index - 1).unwrap_or(&data),
                };
                Kernel::between(cleaner, noisier)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Schedule, SubVp};
    use std::sync::Arc;

    #[test]
    fn the_chains_of_ddpm_and_smld() {
        let (n, vp) = (25, Vp::default());
        let chain = Discretisation::ddpm(&vp, n).unwrap();
        for i in 0..n {
            let t = (i as f64 + 0.5) / (n as f64 - 1.0);
            let beta = vp.beta(i as f64 / (n as f64 - 1.0)) / n as f64;
            let kernel = chain.kernel(t);
            assert!((kernel.alpha - (1.0 - beta).sqrt()).abs() < 1e-13);
            assert!((kernel.variance - beta).abs() < 1e-13);
        }
        let ve = Ve::default();
        let chain = Discretisation::smld(&ve, n);
        let first = chain.kernel(0.0);
        assert!((first.variance - 1e-4).abs() < 1e-15 && first.posterior == 0.0);
        let (a, b) = (ve.at(0.5), ve.at(0.5 - 1.0 / 24.0));
        let gap = a.sigma.powi(2) - b.sigma.powi(2);
        assert!((chain.kernel(0.5 + 1e-9).variance / gap - 1.0).abs() < 1e-9);
        assert!(chain.kernel(7.0).variance > 0.0 && chain.kernel(-1.0) == first);
    }

    /// As the chain gets finer all chains of a process become Euler's.
    #[test]
    fn chains_agree_in_the_limit() {
        let n = 100_000;
        let vp = Vp::default();
        let (a, b) = (
            Discretisation::ddpm(&vp, n).unwrap().kernel(0.4),
            Discretisation::euler(Arc::new(vp), n).kernel(0.4),
        );
        assert!((a.variance / b.variance - 1.0).abs() < 1e-4);
        assert!(((a.alpha - 1.0) / (b.alpha - 1.0) - 1.0).abs() < 1e-3);
        let sub = Discretisation::euler(Arc::new(SubVp::default()), n).kernel(0.4);
        let (s, t) = (SubVp::default().at(0.4), SubVp::default().at(0.4 + 1e-5));
        let exact = Kernel::between(&s, &t);
        assert!((sub.variance / exact.variance - 1.0).abs() < 1e-3);
    }
}
