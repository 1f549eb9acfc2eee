//! diffusers' scheduler configurations as plans of this crate.
//!
//! A `scheduler_config.json` names a class that mixes schedule, grid, sampler, prediction kind and
//! clipping; [`Scheduler::plan`] takes it apart into these. Tables are built in the arithmetic of
//! the library (f32 betas, see [`tables`]), so that even indices that come from truncating a
//! rounded logarithm agree.

mod check;
mod config;
mod edm;
mod few_steps;
mod flow;
mod grids;
mod lambda_form;
mod levels;
mod score;
pub mod tables;
mod ve_form;

pub use config::Config;

use crate::denoiser::{Denoiser, EdmNetwork, Network, TimeCode, VpInVe};
use crate::error::{Report, Result};
use crate::guide::{Clip, Thresholded};
use crate::predict::Kind;
use crate::sample::{Move, Solver};
use crate::schedule::Table;
use candle_core::{DType, Tensor};

/// A parsed scheduler configuration.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: Config,
    table: Option<Table>,
}

/// What is asked of a scheduler at sampling time.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Number of inference steps.
    pub steps: Option<usize>,
    /// Explicit timesteps, noisiest first, instead of a number.
    pub timesteps: Option<Vec<i64>>,
    /// Explicit noise levels, noisiest first, for the classes on straight paths.
    pub sigmas: Option<Vec<f64>>,
    /// Dynamic shift of the classes on straight paths.
    pub mu: Option<f64>,
    /// DDIM's η.
    pub eta: f64,
    /// TCD's γ, 0.3 when absent (the library calls it `eta`).
    pub gamma: Option<f64>,
    /// LMS: the order, 4 when absent.
    pub order: Option<usize>,
    /// DDIM: take the noise from the clipped `x₀`.
    pub use_clipped_model_output: bool,
    /// Euler's churn.
    pub s_churn: f64,
    /// Smallest noise level with churn.
    pub s_tmin: f64,
    /// Largest noise level with churn.
    pub s_tmax: Option<f64>,
    /// Factor on churn noise, 1 when absent.
    pub s_noise: Option<f64>,
}

impl Request {
    /// `n` steps, everything else as the library defaults.
    pub fn steps(n: usize) -> Self {
        Self {
            steps: Some(n),
            ..Self::default()
        }
    }
}

/// In which variables the state of a run lives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Frame {
    /// `x = α x₀ + σ ε` with `α² + σ² = 1`.
    Vp,
    /// `x/α`, while the network sees `x`.
    VpInVe,
    /// `x₀ + σ ε`, the network being told `σ`.
    Ve,
    /// `x₀ + σ ε` with an EDM-preconditioned network.
    Edm {
        /// Standard deviation of the data.
        sigma_data: f64,
        /// Whether the network predicts a velocity.
        negative: bool,
    },
}

/// Everything that a run needs.
pub struct Plan {
    /// Timesteps as the library lists them (Heun repeats inner ones).
    pub timesteps: Vec<f64>,
    /// Whether they are integers.
    pub integer_timesteps: bool,
    /// Noise levels as the library lists them, the final one included, where it has them.
    pub sigmas: Option<Vec<f64>>,
    /// Factor on the first noise.
    pub init_noise_sigma: f64,
    /// Variables of the state.
    pub frame: Frame,
    /// What the network predicts.
    pub kind: Kind,
    /// What is done to `x₀`.
    pub clip: Clip,
    /// The sampler along its moves.
    pub solver: Box<dyn Solver>,
    /// The moves.
    pub moves: Vec<Move>,
}

impl Scheduler {
    /// Reads a configuration; `at` names it in messages.
    ///
    /// # Errors
    /// `Input` for malformed JSON, `Config` for impossible values, `Unsupported` for classes and
    /// tables that this version does not have. What the class's own runs need is checked by
    /// [`Scheduler::plan`]: a table is enough to sample in other ways.
    pub fn from_json(text: &str, at: &str) -> Result<Self> {
        let config = Config::from_json(text, at)?;
        let table = match config.has_table() {
            false => None,
            true => Some(tables::table(&config, at)?),
        };
        Ok(Self { config, table })
    }

    /// The class name.
    pub fn class(&self) -> &str {
        &self.config.class
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The table of training steps, where the class has one.
    pub fn table(&self) -> Option<&Table> {
        self.table.as_ref()
    }

    /// What the network of this scheduler predicts.
    pub fn kind(&self) -> Kind {
        grids::kind(&self.config)
    }

    /// The run that answers a request.
    ///
    /// # Errors
    /// `Config` when the number of steps or the timesteps are impossible, `Unsupported` for
    /// options that this version does not have.
    pub fn plan(&self, request: &Request) -> Result<Plan> {
        self.config.check_run("scheduler")?;
        let config = &self.config;
        match (config.class.as_str(), &self.table) {
            ("DDPMScheduler" | "DDPMParallelScheduler", Some(table)) => {
                grids::ddpm(config, table, request)
            }
            ("DDIMScheduler" | "DDIMParallelScheduler", Some(table)) => {
                grids::ddim(config, table, request)
            }
            ("DDIMInverseScheduler", Some(table)) => {
                few_steps::ddim_inverse(config, table, request)
            }
            ("PNDMScheduler", Some(table)) => few_steps::pndm(config, table, request),
            ("LCMScheduler", Some(table)) => few_steps::lcm(config, table, request),
            ("TCDScheduler", Some(table)) => few_steps::tcd(config, table, request),
            ("UnCLIPScheduler", Some(table)) => few_steps::unclip(config, table, request),
            ("IPNDMScheduler", _) => few_steps::ipndm(config, request),
            ("EulerDiscreteScheduler", Some(table)) => ve_form::euler(config, table, request),
            ("EulerAncestralDiscreteScheduler", Some(table)) => {
                ve_form::euler_ancestral(config, table, request)
            }
            ("HeunDiscreteScheduler", Some(table)) => ve_form::heun(config, table, request),
            ("LMSDiscreteScheduler", Some(table)) => ve_form::lms(config, table, request),
            ("KDPM2DiscreteScheduler" | "KDPM2AncestralDiscreteScheduler", Some(table)) => {
                ve_form::kdpm2(config, table, request)
            }
            ("DPMSolverSDEScheduler", Some(table)) => ve_form::dpm_sde(config, table, request),
            ("DPMSolverMultistepScheduler", Some(table)) => {
                lambda_form::dpm_multistep(config, table, request)
            }
            ("DPMSolverMultistepInverseScheduler", Some(table)) => {
                lambda_form::dpm_inverse(config, table, request)
            }
            ("DPMSolverSinglestepScheduler", Some(table)) => {
                lambda_form::dpm_singlestep(config, table, request)
            }
            ("DEISMultistepScheduler", Some(table)) => lambda_form::deis(config, table, request),
            ("UniPCMultistepScheduler", Some(table)) => lambda_form::unipc(config, table, request),
            ("SASolverScheduler", Some(table)) => lambda_form::sa(config, table, request),
            ("EDMEulerScheduler", _) => edm::euler(config, request),
            ("EDMDPMSolverMultistepScheduler", _) => edm::dpm(config, request),
            ("CMStochasticIterativeScheduler", _) => edm::consistency(config, request),
            ("FlowMatchEulerDiscreteScheduler", _) => flow::euler(config, request),
            ("FlowMatchHeunDiscreteScheduler", _) => flow::heun(config, request),
            ("ScoreSdeVeScheduler", _) => score::ve(config, request),
            ("ScoreSdeVpScheduler", _) => score::vp(config, request),
            (other, _) => Err(Report::new("scheduler", other)
                .expected(format!("one of {}", config::CLASSES.join(", ")))
                .unsupported()),
        }
    }
}

impl Plan {
    /// A denoiser for the solver out of one that speaks in the network's own frame.
    ///
    /// For [`Frame::Vp`] and [`Frame::VpInVe`] that is the variance-preserving frame; for
    /// [`Frame::Edm`] the inner denoiser is called with the unscaled sample and says
    /// [`Kind::Edm`].
    pub fn wrap<'a>(&self, network: impl Denoiser + 'a) -> Box<dyn Denoiser + 'a> {
        let clip = self.clip;
        match self.frame {
            Frame::Vp | Frame::Ve | Frame::Edm { .. } => Box::new(Thresholded {
                inner: network,
                clip,
            }),
            Frame::VpInVe => Box::new(Thresholded {
                inner: VpInVe(network),
                clip,
            }),
        }
    }

    /// A denoiser for the solver out of a network `f(scaled input, time codes [B])`.
    pub fn network<'a, F>(&self, dtype: DType, f: F) -> Box<dyn Denoiser + 'a>
    where
        F: Fn(&Tensor, &Tensor) -> Result<Tensor> + 'a,
    {
        match self.frame {
            Frame::Edm {
                sigma_data,
                negative,
            } => self.wrap(EdmNetwork {
                f,
                sigma_data,
                negative,
                dtype,
            }),
            Frame::Vp | Frame::VpInVe | Frame::Ve => self.wrap(Network {
                f,
                kind: self.kind,
                time: match self.frame {
                    Frame::Ve => TimeCode::Sigma,
                    _ => TimeCode::Index,
                },
                dtype,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str, steps: usize) -> Result<Plan> {
        Scheduler::from_json(text, "scheduler_config.json")?.plan(&Request::steps(steps))
    }

    #[test]
    fn the_bare_word_infinity_is_read() {
        let text =
            r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#;
        let plan = plan(text, 10).unwrap();
        assert_eq!(plan.timesteps.len(), 10);
        assert_eq!(plan.timesteps[0], 999.0);
    }

    #[test]
    fn a_class_that_is_not_run_still_has_a_table() {
        let read = |class: &str| {
            let text = format!(r#"{{"_class_name": "{class}"}}"#);
            Scheduler::from_json(&text, "scheduler_config.json").unwrap()
        };
        for class in config::TABLES {
            let betas = |class| read(class).table().unwrap().betas().to_vec();
            assert_eq!(betas(class), betas("DDPMScheduler"), "{class}");
            let error = read(class).plan(&Request::steps(5)).err().unwrap();
            assert!(matches!(error, crate::Error::Unsupported(_)), "{error}");
            assert!(error.to_string().contains(class), "{error}");
        }
    }

    #[test]
    fn every_class_is_planned_and_its_timesteps_fall() {
        for class in config::CLASSES {
            let text = format!(r#"{{"_class_name": "{class}"}}"#);
            let plan = plan(&text, 5).unwrap_or_else(|e| panic!("{class}: {e}"));
            assert!(!plan.moves.is_empty(), "{class}");
            let rising = class.contains("Inverse");
            let ordered = plan.timesteps.windows(2).all(|pair| {
                if rising {
                    pair[0] <= pair[1]
                } else {
                    pair[0] >= pair[1]
                }
            });
            // Pseudo Runge-Kutta steps ask at a place twice and go between places.
            assert!(
                ordered || class == "PNDMScheduler",
                "{class}: {:?}",
                plan.timesteps
            );
        }
    }

    #[test]
    fn ddim_steps_by_the_whole_ratio_even_when_it_does_not_divide() {
        let text = r#"{"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}"#;
        let plan = plan(text, 7).unwrap();
        let Move::Denoise(from, to) = plan.moves[0] else {
            panic!("a denoising move")
        };
        assert_eq!((from.t, to.t), (999.0, 999.0 - 142.0));
    }

    #[test]
    fn unknown_classes_options_and_values_are_named() {
        let message = |text: &str| plan(text, 5).err().unwrap().to_string();
        assert!(
            message(r#"{"_class_name": "VQDiffusionScheduler"}"#).contains("VQDiffusionScheduler")
        );
        assert!(
            message(r#"{"_class_name": "DDPMScheduler", "beta_schedule": "quartic"}"#)
                .contains("quartic")
        );
        assert!(
            message(r#"{"_class_name": "DDPMScheduler", "beta_start": "x"}"#)
                .contains("beta_start")
        );
        assert!(
            message(
                r#"{"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": true, "use_karras_sigmas": true}"#
            )
            .contains("use_beta_sigmas")
        );
        assert!(
            message(r#"{"_class_name": "DDPMScheduler", "num_train_timesteps": 0}"#)
                .contains("num_train_timesteps")
        );
        assert!(message("{").contains("scheduler_config.json"));
        assert!(message("[]").contains("scheduler_config.json"));
    }
}
