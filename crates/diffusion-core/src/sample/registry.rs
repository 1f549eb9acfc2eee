//! Samplers by name, for configurations and command lines.

use super::{
    Ancestral, Churn, Ddim, Direction, DpmSolverPp, Euler, Heun, Planned, Solver, Variance,
};
use crate::error::{Report, Result};
use crate::schedule::Point;
use serde::{Deserialize, Serialize};

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
    /// [`DpmSolverPp`].
    DpmSolverPp(DpmSolverPp),
}

/// Every name that [`SamplerConfig::named`] knows, with what it is.
pub const SAMPLERS: [(&str, &str); 9] = [
    ("ddpm", "ancestral sampling with the small variance"),
    ("ddpm-large", "ancestral sampling with the large variance"),
    ("ddim", "deterministic DDIM"),
    ("ddim-eta1", "DDIM with eta = 1"),
    ("euler", "Euler in sigma/alpha"),
    ("heun", "Heun in sigma/alpha, two calls a step"),
    ("edm", "Heun with EDM's churn (40, 0.05 to 50, 1.003)"),
    ("dpmpp-1", "DPM-Solver++ of order 1"),
    ("dpmpp-2m", "DPM-Solver++ 2M"),
];

impl SamplerConfig {
    /// The sampler of this name with its usual parameters.
    ///
    /// # Errors
    /// `Config` listing the names.
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "ddpm" => Self::Ddpm(Ancestral::default()),
            "ddpm-large" => Self::Ddpm(Ancestral {
                variance: Variance::FixedLarge,
                ..Ancestral::default()
            }),
            "ddim" => Self::Ddim(Ddim {
                eta: 0.0,
                direction: Direction::Rederived,
            }),
            "ddim-eta1" => Self::Ddim(Ddim {
                eta: 1.0,
                direction: Direction::Rederived,
            }),
            "euler" => Self::Euler(Euler::default()),
            "heun" => Self::Heun(Heun::default()),
            "edm" => Self::Heun(Heun {
                churn: Churn {
                    s_churn: 40.0,
                    s_min: 0.05,
                    s_max: Some(50.0),
                    s_noise: 1.003,
                    ..Churn::default()
                },
            }),
            "dpmpp-1" => Self::DpmSolverPp(DpmSolverPp {
                multistep: false,
                ..DpmSolverPp::default()
            }),
            "dpmpp-2m" => Self::DpmSolverPp(DpmSolverPp::default()),
            other => {
                let names: Vec<&str> = SAMPLERS.iter().map(|s| s.0).collect();
                return Err(Report::new("sampler", other)
                    .expected(format!("one of {}", names.join(", ")))
                    .config());
            }
        })
    }

    /// The solver along the points of a grid, its state in f64 where the method asks for it.
    ///
    /// `schedule` tells churned samples their time; without one the time is the noise level.
    pub fn solver(
        &self,
        points: &[Point],
        schedule: Option<std::sync::Arc<dyn crate::schedule::Schedule + Send + Sync>>,
    ) -> Box<dyn Solver> {
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
            Self::DpmSolverPp(step) => Box::new(Planned::new(step, points)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_is_known_and_no_other() {
        for (name, _) in SAMPLERS {
            assert!(SamplerConfig::named(name).is_ok(), "{name}");
        }
        let error = SamplerConfig::named("dimm").err().unwrap().to_string();
        assert!(
            error.contains("dimm") && error.contains("dpmpp-2m"),
            "{error}"
        );
    }

    #[test]
    fn survives_a_round_trip_through_json() {
        for (name, _) in SAMPLERS {
            let config = SamplerConfig::named(name).unwrap();
            let text = serde_json::to_string(&config).unwrap();
            let back: SamplerConfig = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&back).unwrap(), text);
        }
    }
}
