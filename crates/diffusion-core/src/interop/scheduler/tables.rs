//! Tables of betas in the arithmetic of the library: f32, with running products in f64.

use super::Config;
use crate::error::{Report, Result};
use crate::schedule::Table;
use crate::schedule::cosine::cosine_betas;

/// The smallest subnormal of half precision, `2⁻²⁴`: what sigma-form solvers put in place of a
/// last `ᾱ` of zero.
pub const SMALLEST_HALF: f64 = 1.0 / 16_777_216.0;

/// The table of a configuration.
///
/// # Errors
/// `Config` for betas outside `[0, 1]`.
pub fn table(config: &Config, at: &str) -> Result<Table> {
    let steps = config.num_train_timesteps;
    let (first, last) = match config.class.as_str() {
        "HeunDiscreteScheduler"
        | "LCMScheduler"
        | "TCDScheduler"
        | "KDPM2DiscreteScheduler"
        | "KDPM2AncestralDiscreteScheduler"
        | "DPMSolverSDEScheduler" => (0.00085, 0.012),
        _ => (1e-4, 0.02),
    };
    let start = config.beta_start.unwrap_or(first);
    let end = config.beta_end.unwrap_or(last);
    let betas: Vec<f32> = match (&config.trained_betas, config.beta_schedule.as_str()) {
        (Some(betas), _) => betas.iter().map(|b| *b as f32).collect(),
        (None, "scaled_linear") => linspace(start.sqrt(), end.sqrt(), steps)
            .into_iter()
            .map(|b| b * b)
            .collect(),
        (None, "squaredcos_cap_v2") => cosine_betas(steps).into_iter().map(|b| b as f32).collect(),
        (None, "exp") => betas_of(steps, |t| (-12.0 * t).exp()),
        (None, "laplace") => betas_of(steps, laplace_alpha_bar),
        (None, "sigmoid") => linspace(-6.0, 6.0, steps)
            .into_iter()
            .map(|z| (1.0 / (1.0 + (-z).exp())) * (end - start) as f32 + start as f32)
            .collect(),
        (None, _) => linspace(start, end, steps),
    };
    if betas.len() != steps && config.trained_betas.is_none() {
        return Err(Report::new(at, "betas of another length").config());
    }
    if let Some((i, beta)) = betas
        .iter()
        .enumerate()
        .find(|(_, b)| !(0.0..=1.0).contains(*b))
    {
        return Err(Report::new(format!("{at}: betas[{i}]"), beta)
            .expected("a value in [0, 1]")
            .remedy("choose other ends of the schedule")
            .config());
    }
    let betas = if config.rescale_betas_zero_snr {
        to_zero_terminal_snr(&betas)
    } else {
        betas
    };
    let table = Table::from_parts(
        betas.iter().map(|b| f64::from(*b)).collect(),
        products(&betas).into_iter().map(f64::from).collect(),
    )?;
    let sigma_form = matches!(
        config.class.as_str(),
        "EulerDiscreteScheduler"
            | "EulerAncestralDiscreteScheduler"
            | "DPMSolverMultistepScheduler"
            | "UniPCMultistepScheduler"
    );
    Ok(if config.rescale_betas_zero_snr && sigma_form {
        table.with_last_alpha_bar(SMALLEST_HALF)
    } else {
        table
    })
}

/// Betas of a function `ᾱ(t)` on `[0, 1]`, at most 0.999.
fn betas_of(steps: usize, alpha_bar: impl Fn(f64) -> f64) -> Vec<f32> {
    let at = |i: usize| alpha_bar(i as f64 / steps as f64);
    (0..steps)
        .map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32)
        .collect()
}

/// `√(SNR/(1 + SNR))` whose log-SNR is Laplace distributed over uniform `t` (Hang et al. 2024), as
/// the library has it.
fn laplace_alpha_bar(t: f64) -> f64 {
    let side = 0.5 - t;
    let sign = if side.is_sign_negative() { -1.0 } else { 1.0 };
    let snr = (-0.5 * sign * (1.0 - 2.0 * side.abs() + 1e-6).ln()).exp();
    (snr / (1.0 + snr)).sqrt()
}

/// Evenly spaced f32 values, counted from the nearer end with an f32 step, each rounded once (the
/// library's kernels fuse the product and the sum).
pub(super) fn linspace(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    if n == 1 {
        return vec![start];
    }
    let step = f64::from((end - start) / (n - 1) as f32);
    (0..n)
        .map(|i| {
            let value = if i < n / 2 {
                f64::from(start) + step * i as f64
            } else {
                f64::from(end) - step * (n - 1 - i) as f64
            };
            value as f32
        })
        .collect()
}

/// Running products of `1 − β`, accumulated in f64 and rounded once each.
fn products(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0f64;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

/// [`Table::rescaled_to_zero_terminal_snr`] in f32.
fn to_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let root: Vec<f32> = products(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (root[0], root[root.len() - 1]);
    let alpha_bar: Vec<f32> = root
        .iter()
        .map(|r| {
            let moved = (r - last) * (first / (first - last));
            moved * moved
        })
        .collect();
    (0..alpha_bar.len())
        .map(|i| {
            1.0 - if i == 0 {
                alpha_bar[0]
            } else {
                alpha_bar[i] / alpha_bar[i - 1]
            }
        })
        .collect()
}
