//! Noise levels and timesteps in the arithmetic of the library.

use super::grids::{floats, steps_or_timesteps};
use super::{Config, Request};
use crate::error::Result;
use crate::grid::{beta_spaced, exponential, karras, trailing};
use crate::sample::Move;
use crate::schedule::linear::linspace;
use crate::schedule::{Point, Table};

/// The noise levels `σ̂ = √((1 − ᾱ)/ᾱ)` of a table in f32, as f64.
pub fn table_sigmas(table: &Table) -> Vec<f64> {
    table
        .alpha_bar()
        .iter()
        .map(|a| {
            let a = *a as f32;
            f64::from(((1.0 - a) / a).sqrt())
        })
        .collect()
}

/// Linear interpolation of the levels at fractional indices.
pub fn interpolate(sigmas: &[f64], t: f64) -> f64 {
    let t = t.clamp(0.0, (sigmas.len() - 1) as f64);
    let low = t.floor() as usize;
    let high = (low + 1).min(sigmas.len() - 1);
    sigmas[low] + (t - low as f64) * (sigmas[high] - sigmas[low])
}

/// The fractional index of a noise level: linear in `ln σ̂`, clamped to the table.
pub fn sigma_to_t(sigma: f64, log_sigmas: &[f32]) -> f64 {
    let log_sigma = sigma.max(1e-10).ln();
    let at = |i: usize| f64::from(log_sigmas[i]);
    let below = log_sigmas
        .iter()
        .rposition(|l| log_sigma - f64::from(*l) >= 0.0)
        .unwrap_or(0);
    if log_sigmas.len() < 2 {
        return 0.0;
    }
    let low = below.min(log_sigmas.len() - 2);
    let w = ((at(low) - log_sigma) / (at(low) - at(low + 1))).clamp(0.0, 1.0);
    (1.0 - w) * low as f64 + w * (low + 1) as f64
}

pub fn logs(sigmas: &[f64]) -> Vec<f32> {
    sigmas.iter().map(|s| s.ln() as f32).collect()
}

/// Timesteps of the classes in sigma form, f32 where fractional.
pub fn fractional(config: &Config, table: &Table, request: &Request) -> Result<Vec<f64>> {
    let total = table.betas().len();
    match (&request.timesteps, request.steps) {
        (Some(list), None) if !list.is_empty() => Ok(floats(list)),
        (None, Some(n)) if n > 0 => Ok(match config.spacing() {
            "leading" => (0..n)
                .rev()
                .map(|k| (k * (total / n)) as f64 + config.steps_offset as f64)
                .collect(),
            "trailing" => floats(&trailing(total as f64, total as f64 / n as f64)),
            _ => linspace(0.0, (total - 1) as f64, n)
                .into_iter()
                .rev()
                .map(|t| f64::from(t as f32))
                .collect(),
        }),
        _ => Err(steps_or_timesteps()),
    }
}

/// Where levels come from when they are not read off the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Karras et al.'s powers.
    Karras,
    /// Even logarithms.
    Exponential,
    /// Quantiles of Beta(0.6, 0.6).
    Beta,
    /// Lu et al.'s even `λ`.
    Lu,
}

impl Spread {
    /// What a configuration asks for.
    pub fn of(config: &Config) -> Option<Self> {
        if config.use_karras_sigmas {
            Some(Self::Karras)
        } else if config.use_lu_lambdas {
            Some(Self::Lu)
        } else if config.use_exponential_sigmas {
            Some(Self::Exponential)
        } else if config.use_beta_sigmas {
            Some(Self::Beta)
        } else {
            None
        }
    }

    /// The `n` levels between two ends, largest first.
    pub fn levels(self, low: f64, high: f64, n: usize) -> Vec<f64> {
        match self {
            Self::Karras => karras(low, high, n, 7.0),
            // Even in ln σ, as λ = −ln σ̂ is: the two differ in how timesteps are rounded.
            Self::Exponential | Self::Lu => exponential(low, high, n),
            Self::Beta => beta_spaced(low, high, n, (0.6, 0.6)),
        }
    }
}

/// f64 values rounded through f32, as the library stores them.
pub fn round_f32(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|v| f64::from(v as f32)).collect()
}

/// Every value but the first twice.
pub fn twice(values: &[f64]) -> Vec<f64> {
    values
        .iter()
        .enumerate()
        .flat_map(|(i, v)| std::iter::repeat_n(*v, if i == 0 { 1 } else { 2 }))
        .collect()
}

/// Denoising moves along levels; `sigmas` has one more than `timesteps`.
pub fn along(timesteps: &[f64], sigmas: &[f64], point: impl Fn(f64, f64) -> Point) -> Vec<Move> {
    (0..timesteps.len())
        .map(|i| {
            let t_next = timesteps.get(i + 1).copied().unwrap_or(0.0);
            Move::Denoise(point(timesteps[i], sigmas[i]), point(t_next, sigmas[i + 1]))
        })
        .collect()
}

/// A variance-exploding point.
pub fn ve_point(t: f64, sigma: f64) -> Point {
    Point::new(t, 1.0, sigma)
}

/// The variance-preserving point of a level `σ̂`.
pub fn vp_point(t: f64, sigma: f64) -> Point {
    let alpha = sigma.hypot(1.0).recip();
    Point::new(t, alpha, sigma * alpha)
}

/// The point of a straight path.
pub fn flow_point(t: f64, sigma: f64) -> Point {
    Point::new(t, 1.0 - sigma, sigma)
}
