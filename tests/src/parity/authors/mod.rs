//! Fixtures of the original authors' code.
//!
//! Their fixtures name a system and a case; [`run`] finds the case in `CASES` by the beginning of
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

pub mod analytic;
pub mod gaussian;
pub mod networks;
pub mod sampling;
pub mod vdm;

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
    ("edm", "songunet", networks::edm::raw),
    ("edm", "dhariwal_unet", networks::edm::raw),
    ("edm", "precond", networks::edm::preconditioned),
    ("edm", "edm_sampler", networks::edm::sampler),
    ("edm", "losses", networks::edm::losses),
    ("openai", "schedule_", gaussian::schedule),
    ("openai", "loss_helpers", gaussian::helpers),
    ("openai", "loss_second_moment", gaussian::resampler),
    ("openai", "respacing", gaussian::respacing),
    ("openai", "p_mean_variance", gaussian::p_mean_variance),
    ("openai", "training_losses", gaussian::training_losses),
    ("openai", "single_steps", sampling::single_steps),
    ("openai", "calc_bpd_loop", sampling::bound),
    ("analytic_dpm", "reverse_", analytic::run),
    ("vdm", "vdm_", vdm::run),
    ("openai", "sample_loop", sampling::sample_loop),
    ("openai", "guided_unet", networks::unet),
    ("openai", "improved_unet", networks::unet),
    ("openai", "guided_superres", networks::super_resolution),
    ("openai", "improved_superres", networks::super_resolution),
    ("openai", "guided_classifier", networks::classifier),
    ("score_sde", "ddpm", networks::score_sde::network),
    ("score_sde", "ncsnpp", networks::score_sde::network),
    (
        "score_sde",
        "fir_resampling",
        networks::score_sde::fir_resampling,
    ),
    ("score_sde", "ema", networks::score_sde::ema),
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
