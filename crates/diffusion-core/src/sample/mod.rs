//! From noise to data: the last of the four nouns, and the loop that drives it.
//!
//! A [`Step`] is one update rule from a point to a cleaner one, written in `(α, σ)` so that every
//! schedule runs through it. A [`Planned`] solver applies a step along a list of moves; solvers
//! that choose their own points implement [`Solver`] themselves.
//!
//! | file | method | order |
//! |---|---|---|
//! | [`ancestral`] | DDPM | stochastic |
//! | [`analytic`] | Analytic-DPM, any η | stochastic |
//! | [`mean_guided`] | DDPM with a classifier on the mean | stochastic |
//! | [`reverse`] | the law of a reverse step, for samplers and bounds | |
//! | [`ddim`] | DDIM, any η | 1 at η = 0 |
//! | [`euler`] | Euler in σ̂ = σ/α, with churn | 1 |
//! | [`heun`] | Heun in σ̂, EDM algorithm 2 | 2 |
//! | [`dpm_solver_pp`] | DPM-Solver++ 1 and 2M | 1, 2 |

pub mod analytic;
pub mod ancestral;
pub mod churn;
pub mod ddim;
pub mod dpm_solver_pp;
pub mod euler;
pub mod heun;
pub mod mean_guided;
mod plan;
mod registry;
pub mod reverse;

pub use analytic::{Analytic, Bounds, noise_moments};
pub use ancestral::{Ancestral, Variance};
pub use churn::{Churn, ChurnOrder};
pub use ddim::{Ddim, Direction};
pub use dpm_solver_pp::{DpmSolverPp, LowerFinal};
pub use euler::Euler;
pub use heun::Heun;
pub use mean_guided::MeanGuided;
pub use plan::{Constraint, Corrector, Move, Planned};
pub use registry::SamplerConfig;
pub use reverse::{Chain, Hop, Mean, Reverse};

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::noise::Noise;
use crate::predict::Prediction;
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::Tensor;
use std::ops::{ControlFlow, Range};

/// How the global error falls with the number of steps on a smooth problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Measured to be this.
    Exactly(u32),
    /// Measured to be this or better.
    AtLeast(u32),
    /// Stochastic, or the published rule measures otherwise.
    Unstated,
}

/// What a step may use besides its arguments.
pub struct Ctx<'a> {
    /// The model.
    pub denoiser: &'a dyn Denoiser,
    /// Noise for stochastic samplers.
    pub noise: &'a mut dyn Noise,
    /// Which items of the run the batch holds.
    pub items: Range<u64>,
    /// Index of the present move.
    pub index: usize,
    /// Number of moves.
    pub total: usize,
    /// Network calls so far.
    pub calls: usize,
}

impl<'a> Ctx<'a> {
    /// A context at the beginning of a run over the items of a batch.
    pub fn new(denoiser: &'a dyn Denoiser, noise: &'a mut dyn Noise, items: Range<u64>) -> Self {
        Self {
            denoiser,
            noise,
            items,
            index: 0,
            total: 0,
            calls: 0,
        }
    }

    /// Asks the model about the whole batch at one point.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn denoise(&mut self, x: &Tensor, at: &Point) -> Result<Prediction> {
        self.calls += 1;
        let mut call = Call {
            noise: self.noise,
            items: self.items.clone(),
            tracked: false,
        };
        self.denoiser.predict(x, At::All(*at), &mut call)
    }
}

/// One update rule.
pub trait Step {
    /// What a multistep method remembers between steps.
    type Memory: Default;

    /// The order of the method.
    fn order(&self) -> Order;

    /// The sample at `to`, given the sample `x` at `from`; `[B, …]` both.
    ///
    /// # Errors
    /// Whatever the model refuses.
    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Self::Memory,
    ) -> Result<Tensor>;
}

/// Anything that takes noise to data.
pub trait Solver {
    /// The result of the whole way, starting from `x`.
    ///
    /// # Errors
    /// `Numeric` when the state leaves the finite numbers, `Interrupted` when the observer says
    /// so, and whatever the model refuses.
    fn solve(&self, x: Tensor, ctx: &mut Ctx<'_>, watch: &mut dyn Observer) -> Result<Tensor>;
}

/// Where a run stands.
pub struct Progress<'a> {
    /// Moves done, from 1.
    pub done: usize,
    /// Moves in all (an estimate for adaptive solvers).
    pub total: usize,
    /// Network calls so far.
    pub calls: usize,
    /// The point reached.
    pub at: Point,
    /// The sample there.
    pub x: &'a Tensor,
}

/// Somebody who watches a run, and may stop it.
pub trait Observer {
    /// Called after every move; `Break` ends the run with `Interrupted`.
    fn step(&mut self, progress: &Progress<'_>) -> ControlFlow<()>;
}

impl Observer for () {
    fn step(&mut self, _: &Progress<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(&Progress<'_>) -> ControlFlow<()>> Observer for F {
    fn step(&mut self, progress: &Progress<'_>) -> ControlFlow<()> {
        self(progress)
    }
}

/// The first sample of a run: `x_T = σ_T z`, shaped and typed as `like`.
///
/// # Errors
/// Those of the noise source.
pub fn prior(like: &Tensor, first: &Point, noise: &mut dyn Noise) -> Result<Tensor> {
    Ok(noise.normal(like)?.affine(first.sigma, 0.0)?)
}

/// Runs a solver over a batch without watching it.
///
/// # Errors
/// As [`Solver::solve`].
pub fn sample(
    solver: &dyn Solver,
    denoiser: &dyn Denoiser,
    x: Tensor,
    noise: &mut dyn Noise,
    items: Range<u64>,
) -> Result<Tensor> {
    solver.solve(x, &mut Ctx::new(denoiser, noise, items), &mut ())
}
