//! Samplers as configurations: every method with its parameters, and the solver that it stands for.

use super::langevin::predictor_corrector;
use super::{
    AdaptiveSde, Ancestral, Basis, Belief, Consistency, Ddim, Deis, DpmAdaptive, DpmMultistep,
    DpmPpSde, DpmSinglestep, Euler, EulerMaruyama, Finish, FlowHeun, FlowOde, FlowRk, Heun, Ipndm,
    Kdpm2, Langevin, Order, Planned, Pndm, ReverseDiffusion, SaSolver, Solver, Step, StepSize, Tcd,
    UniPc, dpm_adaptive, kdpm2_points,
};
use crate::grid::Grid;
use crate::ode::{DormandPrince, Tableau};
use crate::schedule::{Edm, Point, Schedule};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A sampler and its parameters.
#[derive(Clone, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum SamplerConfig {
    /// [`Ancestral`].
    Ddpm(Ancestral),
    /// [`Ddim`].
    Ddim(Ddim),
    /// [`Euler`].
    Euler(Euler),
    /// [`Heun`].
    Heun(Heun),
    /// [`Kdpm2`].
    Kdpm2(Kdpm2),
    /// [`DpmMultistep`].
    DpmMultistep(DpmMultistep),
    /// [`DpmSinglestep`].
    DpmSinglestep(DpmSinglestep),
    /// [`DpmAdaptive`].
    DpmAdaptive(DpmAdaptive),
    /// [`DpmPpSde`].
    DpmPpSde(DpmPpSde),
    /// [`Deis`].
    Deis(Deis),
    /// [`UniPc`].
    UniPc(UniPc),
    /// [`Pndm`].
    Pndm(Pndm),
    /// [`Ipndm`].
    Ipndm(Ipndm),
    /// [`SaSolver`].
    SaSolver(SaSolver),
    /// [`FlowHeun`].
    FlowHeun(FlowHeun),
    /// [`Consistency`].
    Consistency(Consistency),
    /// [`Tcd`].
    Tcd(Tcd),
    /// [`EulerMaruyama`].
    EulerMaruyama(EulerMaruyama),
    /// [`ReverseDiffusion`] between the points, with Langevin corrections.
    PredictorCorrector(ByScore),
    /// [`FlowRk`].
    FlowRk(RungeKutta),
    /// [`FlowOde`].
    FlowOde(Tolerance),
    /// [`AdaptiveSde`].
    AdaptiveSde(SdeTolerance),
}

/// Reverse diffusion, corrected at every point (Song et al. 2021, algorithms 2 to 5).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ByScore {
    /// Predict by the probability flow in place of the reverse SDE.
    pub flow: bool,
    /// Langevin steps before each prediction.
    pub corrections: usize,
    /// The size of their steps. By the noise level when absent: the ratio of two norms has a heavy
    /// tail where the data have few dimensions.
    pub size: StepSize,
}

impl Default for ByScore {
    fn default() -> Self {
        Self {
            flow: false,
            corrections: 0,
            size: StepSize::NoiseLevel { ratio: 0.16 },
        }
    }
}

/// A Runge-Kutta method by name: `euler`, `midpoint`, `heun`, `bogacki_shampine` or `rk4`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Order 1.
    Euler,
    /// Order 2.
    Midpoint,
    /// Order 2.
    Heun,
    /// Order 3.
    BogackiShampine,
    /// Order 4.
    #[default]
    Rk4,
}

/// Which Runge-Kutta method is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RungeKutta {
    /// The method.
    pub method: Method,
}

impl RungeKutta {
    fn tableau(self) -> Tableau {
        match self.method {
            Method::Euler => Tableau::euler(),
            Method::Midpoint => Tableau::midpoint(),
            Method::Heun => Tableau::heun(),
            Method::BogackiShampine => Tableau::bogacki_shampine(),
            Method::Rk4 => Tableau::rk4(),
        }
    }
}

/// How exact an adaptive solver is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tolerance {
    /// Relative to the sample.
    pub relative: f64,
    /// In the units of the data.
    pub absolute: f64,
}

impl Default for Tolerance {
    fn default() -> Self {
        Self {
            relative: 1e-5,
            absolute: 1e-5,
        }
    }
}

/// How exact the adaptive solver of the SDE is: by default as its authors have it for images on
/// `[−1, 1]`, far coarser than an ODE solver, beside the noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SdeTolerance {
    /// Relative to the sample.
    pub relative: f64,
    /// In the units of the data.
    pub absolute: f64,
}

impl Default for SdeTolerance {
    fn default() -> Self {
        Self {
            relative: 0.02,
            absolute: 2.0 / 256.0,
        }
    }
}

/// From the first point to the last at which the network is asked.
fn span(points: &[Point]) -> (f64, f64, Finish) {
    let asked: Vec<&Point> = points.iter().filter(|p| p.sigma > 0.0).collect();
    let finish = match asked.len() < points.len() {
        true => Finish::Denoised,
        false => Finish::None,
    };
    let time = |p: Option<&&Point>| p.map_or(0.0, |p| p.t);
    (time(asked.first()), time(asked.last()), finish)
}

/// The points with the data where a schedule has it in time: one index below a table's first.
fn in_time(points: &[Point], schedule: &dyn Schedule) -> Vec<Point> {
    let mut points = points.to_vec();
    if let (Some(last), Some(_)) = (points.last_mut(), schedule.steps())
        && last.sigma == 0.0
    {
        last.t = -1.0;
    }
    points
}

impl SamplerConfig {
    /// The grid that the sampler is usually run on: EDM's for methods in `σ/α`, which crowd at low
    /// noise, and the trailing indices of a table for the others.
    ///
    /// Methods on the noise divide by α, so that they start where DPM-Solver's authors bound log SNR
    /// (`λ ≥ −5.1`) if the schedule goes further, as the cosine table does.
    pub fn usual_grid(&self, schedule: &dyn Schedule) -> Grid {
        const LAMBDA_MIN: f64 = -5.1;
        let (_, high) = schedule.span();
        let far = schedule.at(high).lambda() < LAMBDA_MIN;
        match self {
            Self::Heun(_) | Self::Kdpm2(_) | Self::DpmPpSde(_) => Grid::edm(schedule),
            Self::Deis(step) if step.basis == Basis::Rho => Grid::edm(schedule),
            Self::Pndm(_) if far && schedule.steps().is_some() => Grid::Leading { offset: 0 },
            _ if far && self.belief() == Some(Belief::Epsilon) => Grid::Exponential {
                sigma_min: None,
                sigma_max: Some((-LAMBDA_MIN).exp()),
            },
            _ if schedule.steps().is_none() => Grid::UniformLogSnr,
            _ => Grid::Trailing,
        }
    }

    /// Which belief an exponential integrator integrates.
    fn belief(&self) -> Option<Belief> {
        match self {
            Self::DpmMultistep(step) => Some(step.belief),
            Self::DpmSinglestep(step) => Some(step.belief),
            Self::DpmAdaptive(solver) => Some(solver.belief),
            Self::UniPc(step) => Some(step.belief),
            Self::SaSolver(step) => Some(step.belief),
            _ => None,
        }
    }

    /// The same sampler without its cautious end of lower orders, which costs an order on fine grids.
    pub fn without_cautious_end(mut self) -> Self {
        match &mut self {
            Self::DpmMultistep(step) => step.lower_order_final = false,
            Self::DpmSinglestep(step) => step.lower_order_final = false,
            Self::Deis(step) => step.lower_order_final = false,
            Self::UniPc(step) => step.lower_order_final = false,
            Self::SaSolver(step) => step.lower_order_final = false,
            _ => {}
        }
        self
    }

    /// The order of the method on smooth problems.
    pub fn order(&self) -> Order {
        match self {
            Self::Ddpm(step) => step.order(),
            Self::Ddim(step) => step.order(),
            Self::Euler(step) => step.order(),
            Self::Heun(step) => step.order(),
            Self::Kdpm2(step) => step.order(),
            Self::DpmMultistep(step) => step.order(),
            Self::DpmSinglestep(step) => step.order(),
            Self::DpmAdaptive(solver) => solver.order(),
            Self::DpmPpSde(step) => step.order(),
            Self::Deis(step) => step.order(),
            Self::UniPc(step) => step.order(),
            Self::Pndm(step) => step.order(),
            Self::Ipndm(step) => step.order(),
            Self::SaSolver(step) => step.order(),
            Self::FlowHeun(step) => step.order(),
            Self::Consistency(step) => step.order(),
            Self::Tcd(step) => step.order(),
            Self::EulerMaruyama(step) => step.order(),
            Self::PredictorCorrector(_) | Self::FlowOde(_) | Self::AdaptiveSde(_) => {
                Order::Unstated
            }
            Self::FlowRk(method) => Order::Exactly(method.tableau().order),
        }
    }

    /// The solver along the points of a grid, its state in f64 where the method asks for it.
    ///
    /// `schedule` is what the points lie on; it says where points between them stand, and what time a
    /// churned sample has. Without one the time is the noise level of a variance-exploding sample.
    pub fn solver(
        &self,
        points: &[Point],
        schedule: Option<Arc<dyn Schedule + Send + Sync>>,
    ) -> Box<dyn Solver> {
        let between = || schedule.clone().unwrap_or_else(|| Arc::new(Edm::default()));
        match self.clone() {
            Self::Ddpm(step) => Box::new(Planned::new(step, points)),
            Self::Ddim(step) => Box::new(Planned::new(step, points)),
            Self::Euler(mut step) => {
                step.churn.schedule = schedule;
                Box::new(Planned::new(step, points))
            }
            Self::Heun(mut step) => {
                step.churn.schedule = schedule;
                let churns = step.churn.s_churn > 0.0;
                let planned = Planned::new(step, points);
                // EDM's stochastic sampler, as its authors run it.
                Box::new(if churns { planned.in_f64() } else { planned })
            }
            Self::Kdpm2(step) => {
                let points = kdpm2_points(points, &*between(), step.eta);
                Box::new(Planned::new(step, &points))
            }
            Self::DpmMultistep(step) => Box::new(Planned::new(step, points)),
            Self::DpmSinglestep(step) => Box::new(Planned::new(step, points)),
            Self::DpmAdaptive(mut step) => {
                let asked: Vec<&Point> = points.iter().filter(|p| p.sigma > 0.0).collect();
                if let (Some(from), Some(to)) = (asked.first(), asked.last()) {
                    step.span = Some(dpm_adaptive::Span {
                        from: **from,
                        to: **to,
                        schedule: between(),
                        denoise: asked.len() < points.len(),
                    });
                }
                Box::new(step)
            }
            Self::DpmPpSde(step) => {
                let points = kdpm2_points(points, &*between(), 0.0);
                Box::new(Planned::new(step, &points))
            }
            Self::Deis(mut step) => {
                step.schedule = Some(between());
                Box::new(Planned::new(step, points))
            }
            Self::UniPc(step) => Box::new(Planned::new(step, points)),
            Self::Pndm(step) => Box::new(Pndm::along(step.start, points, &*between())),
            Self::Ipndm(step) => Box::new(Planned::new(step, points)),
            Self::SaSolver(step) => Box::new(Planned::new(step, points)),
            Self::FlowHeun(step) => Box::new(Planned::new(step, points)),
            Self::Consistency(step) => Box::new(Planned::new(step, points)),
            Self::EulerMaruyama(mut step) => {
                step.schedule = Some(between());
                Box::new(Planned::new(step, &in_time(points, &*between())))
            }
            Self::PredictorCorrector(settings) => {
                let step = ReverseDiffusion {
                    flow: settings.flow,
                    ..ReverseDiffusion::default()
                };
                if settings.corrections == 0 {
                    return Box::new(Planned::new(step, points));
                }
                let mut planned = Planned::with_moves(step, predictor_corrector(points));
                planned.corrector = Some(Box::new(Langevin {
                    steps: settings.corrections,
                    size: settings.size,
                    chain: None,
                }));
                Box::new(planned)
            }
            Self::FlowRk(method) => {
                let step = FlowRk::new(method.tableau(), between());
                Box::new(Planned::new(step, &in_time(points, &*between())))
            }
            Self::FlowOde(tolerance) => {
                let (start, end, finish) = span(points);
                Box::new(FlowOde {
                    start,
                    end,
                    finish,
                    solver: DormandPrince {
                        rtol: tolerance.relative,
                        atol: tolerance.absolute,
                        ..DormandPrince::default()
                    },
                    ..FlowOde::new(between())
                })
            }
            Self::AdaptiveSde(tolerance) => {
                let (start, end, finish) = span(points);
                Box::new(AdaptiveSde {
                    start,
                    end,
                    finish,
                    relative: tolerance.relative,
                    absolute: tolerance.absolute,
                    first: 0.01 * (start - end),
                    ..AdaptiveSde::new(between())
                })
            }
            Self::Tcd(step) => Box::new(Planned::new(
                Tcd::along(step.gamma, points, &*between()),
                points,
            )),
        }
    }
}
