//! Fixtures of the original authors' code.
//!
//! Their fixtures name a system and a case; [`run`] finds the case in [`CASES`] by the beginning of
//! its name, so that the same case with other settings finds the same function.

pub mod analytic;
pub mod gaussian;
pub mod networks;

use super::compare::Check;
use super::fixture::Fixture;
use super::{Runner, unsupported};
use anyhow::Result;

/// Which function runs which (system, beginning of the name).
const CASES: &[(&str, &str, Runner)] = &[
    ("openai", "schedule_", gaussian::schedule),
    ("openai", "loss_helpers", gaussian::helpers),
    ("openai", "loss_second_moment", gaussian::resampler),
    ("openai", "respacing", gaussian::respacing),
    ("openai", "p_mean_variance", gaussian::p_mean_variance),
    ("openai", "training_losses", gaussian::training_losses),
    ("openai", "single_steps", gaussian::single_steps),
    ("openai", "calc_bpd_loop", gaussian::bound),
    ("analytic_dpm", "reverse_", analytic::run),
    ("openai", "sample_loop", gaussian::sample_loop),
    ("openai", "guided_unet", networks::unet),
    ("openai", "improved_unet", networks::unet),
    ("openai", "guided_superres", networks::super_resolution),
    ("openai", "improved_superres", networks::super_resolution),
    ("openai", "guided_classifier", networks::classifier),
];

/// Runs a fixture of the authors' code.
///
/// # Errors
/// `Unsupported` for cases that are not known here, and anything that goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let case = CASES
        .iter()
        .filter(|(system, name, _)| *system == fixture.system && fixture.name.starts_with(name))
        .max_by_key(|(_, name, _)| name.len());
    match case {
        Some((_, _, runner)) => runner(fixture, check),
        None => Err(unsupported(format!(
            "no case {} of the system {}",
            fixture.name, fixture.system
        ))),
    }
}
