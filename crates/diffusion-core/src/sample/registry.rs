//! Samplers by name, for configurations and command lines.

use super::{
    Ancestral, Basis, Belief, Churn, Consistency, Ddim, Deis, Direction, DpmAdaptive, DpmMultistep,
    DpmPpSde, DpmSinglestep, Euler, FlowHeun, Heun, Ipndm, Kdpm2, Order, Planned, Pndm, SaSolver,
    Solver, Start, Step, Tcd, Third, UniPc, UniPcB, Variance, dpm_adaptive, kdpm2_points,
};
use crate::error::{Report, Result};
use crate::grid::Grid;
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
}

/// A named sampler.
pub struct Named {
    /// The name.
    pub name: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// The sampler with its usual parameters.
    pub config: fn() -> SamplerConfig,
}

/// The multistep solver of this belief and order with its usual end.
fn multistep(belief: Belief, order: usize) -> DpmMultistep {
    DpmMultistep {
        belief,
        order,
        ..DpmMultistep::default()
    }
}

fn singlestep(belief: Belief, order: usize) -> SamplerConfig {
    SamplerConfig::DpmSinglestep(DpmSinglestep {
        belief,
        order,
        ..DpmSinglestep::default()
    })
}

fn sde(order: usize) -> SamplerConfig {
    SamplerConfig::DpmMultistep(DpmMultistep {
        stochastic: true,
        ..multistep(Belief::X0, order)
    })
}

fn ddim(eta: f64) -> SamplerConfig {
    SamplerConfig::Ddim(Ddim {
        eta,
        direction: Direction::Rederived,
    })
}

fn deis(basis: Basis, order: usize) -> SamplerConfig {
    SamplerConfig::Deis(Deis {
        basis,
        order,
        ..Deis::default()
    })
}

fn unipc(order: usize, b: UniPcB) -> SamplerConfig {
    SamplerConfig::UniPc(UniPc {
        order,
        b,
        ..UniPc::default()
    })
}

fn adaptive(order: usize) -> SamplerConfig {
    SamplerConfig::DpmAdaptive(DpmAdaptive {
        order,
        ..DpmAdaptive::default()
    })
}

macro_rules! samplers {
    ($($name:literal, $about:literal, $config:expr;)*) => {
        &[$(Named { name: $name, about: $about, config: || $config }),*]
    };
}

/// Every named sampler; adding one is adding a line.
#[rustfmt::skip]
pub const SAMPLERS: &[Named] = samplers![
    "ddpm", "ancestral sampling with the small variance", SamplerConfig::Ddpm(Ancestral::default());
    "ddpm-large", "ancestral sampling with the large variance", SamplerConfig::Ddpm(Ancestral { variance: Variance::FixedLarge, ..Ancestral::default() });
    "ddpm-learned", "ancestral sampling with the network's variance", SamplerConfig::Ddpm(Ancestral { variance: Variance::LearnedRange, ..Ancestral::default() });
    "ddim", "deterministic DDIM", ddim(0.0);
    "ddim-eta1", "DDIM with eta = 1", ddim(1.0);
    "euler", "Euler in sigma/alpha", SamplerConfig::Euler(Euler::default());
    "euler-a", "Euler ancestral: DDIM with eta = 1", ddim(1.0);
    "heun", "Heun in sigma/alpha, two calls a step", SamplerConfig::Heun(Heun::default());
    "edm", "Heun with EDM's churn (40, 0.05 to 50, 1.003)", SamplerConfig::Heun(Heun { churn: Churn { s_churn: 40.0, s_min: 0.05, s_max: Some(50.0), s_noise: 1.003, ..Churn::default() } });
    "kdpm2", "DPM2 of k-diffusion, two calls a step", SamplerConfig::Kdpm2(Kdpm2::default());
    "kdpm2-a", "DPM2 ancestral of k-diffusion, two calls a step", SamplerConfig::Kdpm2(Kdpm2 { eta: 1.0 });
    "lms", "linear multistep method of order 4", SamplerConfig::Deis(Deis::lms(4));
    "dpm-2m", "DPM-Solver of order 2, multistep", SamplerConfig::DpmMultistep(multistep(Belief::Epsilon, 2));
    "dpm-3m", "DPM-Solver of order 3, multistep", SamplerConfig::DpmMultistep(multistep(Belief::Epsilon, 3));
    "dpm-2s", "DPM-Solver of order 2, singlestep", singlestep(Belief::Epsilon, 2);
    "dpm-3s", "DPM-Solver of order 3, singlestep (fast)", singlestep(Belief::Epsilon, 3);
    "dpm-12", "DPM-Solver with adaptive steps, orders 1 and 2", adaptive(2);
    "dpm-23", "DPM-Solver with adaptive steps, orders 2 and 3", adaptive(3);
    "dpmpp-1", "DPM-Solver++ of order 1", SamplerConfig::DpmMultistep(multistep(Belief::X0, 1));
    "dpmpp-2m", "DPM-Solver++ 2M", SamplerConfig::DpmMultistep(multistep(Belief::X0, 2));
    "dpmpp-3m", "DPM-Solver++ 3M, with the factor that makes it third order", SamplerConfig::DpmMultistep(multistep(Belief::X0, 3));
    "dpmpp-3m-published", "DPM-Solver++ 3M as published", SamplerConfig::DpmMultistep(DpmMultistep { third: Third::Published, ..multistep(Belief::X0, 3) });
    "dpmpp-2s", "DPM-Solver++ of order 2, singlestep", singlestep(Belief::X0, 2);
    "dpmpp-3s", "DPM-Solver++ of order 3, singlestep", singlestep(Belief::X0, 3);
    "dpmpp-1-sde", "SDE-DPM-Solver++ of order 1", sde(1);
    "dpmpp-2m-sde", "SDE-DPM-Solver++ 2M", sde(2);
    "dpmpp-3m-sde", "SDE-DPM-Solver++ 3M", sde(3);
    "dpmpp-sde", "DPM-Solver++ SDE of k-diffusion, two calls a step", SamplerConfig::DpmPpSde(DpmPpSde::default());
    "deis", "DEIS of order 3 in ln(sigma/alpha)", deis(Basis::LogRho, 3);
    "deis-rho", "DEIS of order 3 in sigma/alpha", deis(Basis::Rho, 3);
    "deis-t", "DEIS of order 3 in time", deis(Basis::Time, 3);
    "unipc", "UniPC of order 2, B(h) = e^h - 1", unipc(2, UniPcB::Bh2);
    "unipc-3", "UniPC of order 3, B(h) = e^h - 1", unipc(3, UniPcB::Bh2);
    "unipc-bh1", "UniPC of order 2, B(h) = h", unipc(2, UniPcB::Bh1);
    "unipc-3-bh1", "UniPC of order 3, B(h) = h", unipc(3, UniPcB::Bh1);
    "pndm", "PNDM started by pseudo Runge-Kutta steps", SamplerConfig::Pndm(Pndm { start: Start::RungeKutta, ..Pndm::default() });
    "plms", "PNDM started by a pseudo Heun step", SamplerConfig::Pndm(Pndm::default());
    "ipndm", "DDIM with extrapolated noise", SamplerConfig::Ipndm(Ipndm::default());
    "sa-solver", "SA-Solver, predictor and corrector of order 2, tau = 1", SamplerConfig::SaSolver(SaSolver::default());
    "flow-heun", "Heun on straight paths, two calls a step", SamplerConfig::FlowHeun(FlowHeun::default());
    "consistency", "jumps to the data with fresh noise between", SamplerConfig::Consistency(Consistency::default());
    "tcd", "trajectory consistency sampling, gamma = 0.3", SamplerConfig::Tcd(Tcd::default());
];

/// Names of samplers, comma by comma.
pub fn names() -> String {
    let names: Vec<&str> = SAMPLERS.iter().map(|s| s.name).collect();
    names.join(", ")
}

impl SamplerConfig {
    /// The sampler of this name with its usual parameters.
    ///
    /// # Errors
    /// `Config` listing the names.
    pub fn named(name: &str) -> Result<Self> {
        match SAMPLERS.iter().find(|s| s.name == name) {
            Some(found) => Ok((found.config)()),
            None => Err(Report::new("sampler", name)
                .expected(format!("one of {}", names()))
                .config()),
        }
    }

    /// A sampler by name, or as JSON with its parameters: `{"name": "dpm_multistep", "order": 3}`.
    ///
    /// # Errors
    /// `Config` listing the names, or saying what is wrong in the JSON.
    pub fn parse(text: &str) -> Result<Self> {
        if !text.trim_start().starts_with('{') {
            return Self::named(text);
        }
        serde_json::from_str(text).map_err(|error| {
            Report::new("sampler", text)
                .expected(format!("a sampler's parameters as JSON ({error})"))
                .config()
        })
    }

    /// The grid that the sampler is usually run on: EDM's for methods in `σ/α`, which crowd at low
    /// noise, and the trailing indices of a table for the others.
    pub fn usual_grid(&self, schedule: &dyn Schedule) -> Grid {
        match self {
            Self::Heun(_) | Self::Kdpm2(_) | Self::DpmPpSde(_) => Grid::edm(schedule),
            Self::Deis(step) if step.basis == Basis::Rho => Grid::edm(schedule),
            _ if schedule.steps().is_none() => Grid::UniformLogSnr,
            _ => Grid::Trailing,
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
                Box::new(Planned::new(step, points).in_f64())
            }
            Self::Heun(mut step) => {
                step.churn.schedule = schedule;
                Box::new(Planned::new(step, points).in_f64())
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
            Self::Tcd(step) => Box::new(Planned::new(
                Tcd::along(step.gamma, points, &*between()),
                points,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_is_known_and_no_other() {
        for Named { name, .. } in SAMPLERS {
            assert!(SamplerConfig::named(name).is_ok(), "{name}");
            let twice = SAMPLERS.iter().filter(|s| s.name == *name).count();
            assert_eq!(twice, 1, "{name}");
        }
        let error = SamplerConfig::named("dimm").err().unwrap().to_string();
        assert!(
            error.contains("dimm") && error.contains("dpmpp-2m"),
            "{error}"
        );
    }

    #[test]
    fn survives_a_round_trip_through_json() {
        for Named { name, config, .. } in SAMPLERS {
            let text = serde_json::to_string(&config()).unwrap();
            let back: SamplerConfig = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&back).unwrap(), text, "{name}");
        }
    }
}
