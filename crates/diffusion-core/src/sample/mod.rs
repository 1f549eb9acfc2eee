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
//! | [`dpm_multistep`] | DPM-Solver and DPM-Solver++ 1, 2M, 3M, ODE and SDE | 1, 2, 3 |
//! | [`dpm_singlestep`] | DPM-Solver and DPM-Solver++ 2S, 3S | 2, 3 |
//! | [`dpm_adaptive`] | DPM-Solver-12 and -23 with adaptive steps | by tolerance |
//! | [`dpm_pp_sde`] | DPM-Solver++ SDE of k-diffusion | stochastic |
//! | [`kdpm2`] | DPM2 of k-diffusion, plain and ancestral | 2 |
//! | [`deis`] | DEIS in ρ, ln ρ and t; the linear multistep method | 1 to 4 |
//! | [`gddim`] | gDDIM, for linear diffusions of position and velocity | 1 to 3 |
//! | [`unipc`] | UniPC, any order, both `B(h)` | order + 1 |
//! | [`pndm`] | F-PNDM, PLMS, iPNDM | unstated |
//! | [`sa_solver`] | SA-Solver, predictor and corrector | stochastic |
//! | [`flow_heun`] | Heun on straight paths | 2 |
//! | [`consistency`] | LCM, consistency models, any few-step `x₀` map | stochastic |
//! | [`tcd`] | trajectory consistency sampling | stochastic |
//! | [`euler_maruyama`] | reverse SDE, probability flow and what lies between | stochastic; 1 on the flow |
//! | [`reverse_diffusion`] | reverse SDE discretised as its forward SDE is | stochastic |
//! | [`ancestral_score`] | ancestral sampling written with the score, DDPM and SMLD | stochastic |
//! | [`adaptive_sde`] | reverse SDE with adaptive steps | stochastic |
//! | [`langevin`] | correctors, predictor-corrector plans, annealed Langevin dynamics | stochastic |
//! | [`flow_rk`] | Runge-Kutta on the flow in the schedule's own time, EDM's ablation | 1 to 4 |
//! | [`ode`] | adaptive Dormand-Prince on the flow | to a tolerance |
//! | [`inversion`] | DDIM's path from data up to noise | 1 |
//! | [`inpaint`] | a constraint that pastes what is known | |
//! | [`partial`], [`fit`] | starts on the way, early stops, true to a measurement | |

pub mod adaptive_sde;
pub mod analytic;
pub mod ancestral;
pub mod ancestral_score;
mod check;
pub mod churn;
pub mod config;
pub mod consistency;
pub mod ddim;
pub mod deis;
pub mod dpm_adaptive;
pub mod dpm_multistep;
pub mod dpm_pp_sde;
pub mod dpm_singlestep;
pub mod euler;
pub mod euler_maruyama;
pub mod exponential;
pub mod fit;
pub mod flow_heun;
pub mod flow_rk;
pub mod gddim;
pub mod heun;
pub mod inpaint;
pub mod inversion;
pub mod kdpm2;
pub mod langevin;
pub mod mean_guided;
pub mod ode;
pub mod partial;
mod plan;
pub mod pndm;
mod registry;
pub mod reverse;
pub mod reverse_diffusion;
pub mod sa_solver;
pub mod tcd;
pub mod unipc;

pub use adaptive_sde::AdaptiveSde;
pub use analytic::{Analytic, Bounds, noise_moments};
pub use ancestral::{Ancestral, Variance};
pub use ancestral_score::AncestralScore;
pub use churn::{Churn, ChurnOrder};
pub use config::SamplerConfig;
pub use consistency::{Boundary, Consistency};
pub use ddim::{Ddim, Direction};
pub use deis::{Basis, Deis};
pub use dpm_adaptive::DpmAdaptive;
pub use dpm_multistep::{DpmMultistep, Third};
pub use dpm_pp_sde::DpmPpSde;
pub use dpm_singlestep::DpmSinglestep;
pub use euler::Euler;
pub use euler_maruyama::EulerMaruyama;
pub use exponential::{Belief, Rule};
pub use flow_heun::FlowHeun;
pub use flow_rk::FlowRk;
pub use gddim::{Gddim, GddimPlan, power_times};
pub use heun::Heun;
pub use inpaint::Inpaint;
pub use inversion::Inversion;
pub use kdpm2::{Kdpm2, kdpm2_points};
pub use langevin::{Langevin, Norms, StepSize};
pub use mean_guided::MeanGuided;
pub use ode::{Finish, FlowOde};
pub use plan::{Constraint, Corrector, Move, Planned};
pub use pndm::{Ipndm, Pndm, Start};
pub use registry::{Named, SAMPLERS, names};
pub use reverse::{Chain, Hop, Mean, Reverse};
pub use reverse_diffusion::ReverseDiffusion;
pub use sa_solver::{SaSolver, Tau};
pub use tcd::Tcd;
pub use unipc::{UniPc, UniPcB};

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
    /// Whether the last move ends in the data.
    pub ends_in_data: bool,
    /// Whether the noise of a step is the increment of one Brownian path over `λ`, so that a finer
    /// grid refines the same path. Slower than independent draws.
    pub brownian: bool,
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
            ends_in_data: false,
            brownian: false,
            calls: 0,
        }
    }

    /// Standard normal noise for the step between two points, shaped as `like`.
    ///
    /// # Errors
    /// Those of the noise source.
    pub fn noise_between(&mut self, like: &Tensor, from: &Point, to: &Point) -> Result<Tensor> {
        let (a, b) = (from.lambda(), to.lambda());
        if !self.brownian || !a.is_finite() || !b.is_finite() || a == b {
            return self.noise.normal(like);
        }
        let increment = self.noise.brownian(like, a, b)?;
        Ok(increment.affine((b - a).abs().sqrt().recip(), 0.0)?)
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

    /// Asks the model about every item at a point of its own.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn denoise_each(&mut self, x: &Tensor, points: &[Point]) -> Result<Prediction> {
        self.calls += 1;
        let mut call = Call {
            noise: self.noise,
            items: self.items.clone(),
            tracked: false,
        };
        self.denoiser.predict(x, At::Each(points), &mut call)
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
