//! Fixtures of the original authors' code.
//!
//! Their fixtures name a system and a case; [`run`] finds the case in [`CASES`] by the beginning of
//! its name, so that the same case with other settings finds the same function.
//!
//! | file | cases |
//! |---|---|
//! | `score_sde`, `score_samplers`, `score_losses` | score_sde: SDEs, samplers, likelihoods, losses |
//! | `edm_ablation` | edm: the sampler of the ablation |

mod edm_ablation;
mod score_losses;
mod score_samplers;
mod score_sde;

use super::compare::Check;
use super::fixture::Fixture;
use super::{Runner, unsupported};
use anyhow::Result;

/// Which function runs which (system, beginning of the name).
const CASES: &[(&str, &str, Runner)] = &[
    ("score_sde", "sde_", score_sde::sde),
    (
        "score_sde",
        "predictor_corrector_steps_",
        score_sde::predictor_corrector_steps,
    ),
    ("score_sde", "pc_sampler_", score_samplers::pc_sampler),
    ("score_sde", "pc_inpainting_", score_samplers::pc_inpainting),
    ("score_sde", "ode_sampler_", score_samplers::ode_sampler),
    ("score_sde", "likelihood_", score_samplers::likelihood),
    ("score_sde", "losses_", score_losses::run),
    ("edm", "ablation_sampler", edm_ablation::run),
];

/// The function of a fixture of the authors' code, if it is one that is known here.
pub fn find(fixture: &Fixture) -> Option<Runner> {
    CASES
        .iter()
        .filter(|(system, name, _)| *system == fixture.system && fixture.name.starts_with(name))
        .max_by_key(|(_, name, _)| name.len())
        .map(|(_, _, runner)| *runner)
}

/// Runs a fixture of the authors' code.
///
/// # Errors
/// `Unsupported` for cases that are not known here, and anything that goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    match find(fixture) {
        Some(runner) => runner(fixture, check),
        None => Err(unsupported(format!(
            "no case {} of the system {}",
            fixture.name, fixture.system
        ))),
    }
}
