//! The classes in sigma form: Euler, Heun, DPM-Solver++ and EDM's Euler.

use super::grids::{clip, floats, kind, steps_or_timesteps};
use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::grid::{exponential, karras, trailing};
use crate::guide::Clip;
use crate::sample::{Churn, ChurnOrder, DpmSolverPp, Euler, Heun, LowerFinal, Move, Planned};
use crate::schedule::linear::linspace;
use crate::schedule::{Point, Table};

/// The noise levels `σ̂ = √((1 − ᾱ)/ᾱ)` of a table in f32, as f64.
fn table_sigmas(table: &Table) -> Vec<f64> {
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
fn interpolate(sigmas: &[f64], t: f64) -> f64 {
    let t = t.clamp(0.0, (sigmas.len() - 1) as f64);
    let low = t.floor() as usize;
    let high = (low + 1).min(sigmas.len() - 1);
    sigmas[low] + (t - low as f64) * (sigmas[high] - sigmas[low])
}

/// The fractional index of a noise level: linear in `ln σ̂`, clamped to the table.
fn sigma_to_t(sigma: f64, log_sigmas: &[f32]) -> f64 {
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

fn logs(sigmas: &[f64]) -> Vec<f32> {
    sigmas.iter().map(|s| s.ln() as f32).collect()
}

/// Timesteps of the classes in sigma form, f32 where fractional.
fn fractional(config: &Config, table: &Table, request: &Request) -> Result<Vec<f64>> {
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

/// Timesteps and levels (without the final one) of Euler and Heun.
fn sigma_form(config: &Config, table: &Table, request: &Request) -> Result<(Vec<f64>, Vec<f64>)> {
    let sigmas = table_sigmas(table);
    let log_sigmas = logs(&sigmas);
    let mut timesteps = fractional(config, table, request)?;
    let n = timesteps.len();
    let mut levels: Vec<f64> =
        if config.interpolation_type == "log_linear" && config.class == "EulerDiscreteScheduler" {
            let (top, bottom) = (sigmas[sigmas.len() - 1].ln(), sigmas[0].ln());
            linspace(top, bottom, n + 1)
                .into_iter()
                .map(f64::exp)
                .collect()
        } else {
            timesteps.iter().map(|t| interpolate(&sigmas, *t)).collect()
        };
    let own = config.class == "EulerDiscreteScheduler";
    let low = config
        .sigma_min
        .filter(|_| own)
        .unwrap_or(levels[levels.len() - 1]);
    let high = config.sigma_max.filter(|_| own).unwrap_or(levels[0]);
    if config.use_karras_sigmas || config.use_exponential_sigmas {
        levels = if config.use_karras_sigmas {
            karras(low, high, n, 7.0)
        } else {
            exponential(low, high, n)
        };
        timesteps = levels
            .iter()
            .map(|s| f64::from(sigma_to_t(*s, &log_sigmas) as f32))
            .collect();
    }
    Ok((timesteps, levels))
}

fn final_sigma(config: &Config, table: &Table) -> f64 {
    if config.final_sigmas_type == "sigma_min" {
        table_sigmas(table)[0]
    } else {
        0.0
    }
}

fn round_f32(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|v| f64::from(v as f32)).collect()
}

/// Factor on the first noise: spacings that start at the noisiest step start from pure noise.
fn init_sigma(config: &Config, sigmas: &[f64]) -> f64 {
    let top = sigmas.iter().fold(0.0f64, |a, b| a.max(*b));
    if matches!(config.spacing(), "linspace" | "trailing") {
        top
    } else {
        top.hypot(1.0)
    }
}

fn churn(request: &Request, order: ChurnOrder) -> Churn {
    Churn {
        s_churn: request.s_churn,
        s_min: request.s_tmin,
        s_max: request.s_tmax,
        s_noise: request.s_noise.unwrap_or(1.0),
        order,
        schedule: None,
    }
}

fn along(timesteps: &[f64], sigmas: &[f64], point: impl Fn(f64, f64) -> Point) -> Vec<Move> {
    (0..timesteps.len())
        .map(|i| {
            let t_next = timesteps.get(i + 1).copied().unwrap_or(0.0);
            Move::Denoise(point(timesteps[i], sigmas[i]), point(t_next, sigmas[i + 1]))
        })
        .collect()
}

pub fn euler(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let (mut timesteps, mut sigmas) = sigma_form(config, table, request)?;
    sigmas.push(final_sigma(config, table));
    let sigmas = round_f32(sigmas);
    if config.timestep_type == "continuous" && config.prediction_type == "v_prediction" {
        timesteps = sigmas[..timesteps.len()]
            .iter()
            .map(|s| f64::from((0.25 * s.ln()) as f32))
            .collect();
    }
    let order = match config.prediction_type.as_str() {
        "v_prediction" => ChurnOrder::BeforeNoiseAtOldLevel,
        _ => ChurnOrder::BeforeNoise,
    };
    let mut churn = churn(request, order);
    // The library divides by the number of levels, which is one more than the steps when they are
    // log-linear.
    churn.s_churn *= timesteps.len() as f64 / (sigmas.len() - 1) as f64;
    let moves = along(&timesteps, &sigmas, |t, s| Point::new(t, 1.0, s));
    let solver = Planned::with_moves(Euler { churn }, moves);
    Ok(Plan {
        init_noise_sigma: init_sigma(config, &sigmas),
        timesteps,
        integer_timesteps: false,
        sigmas: Some(sigmas),
        frame: Frame::VpInVe,
        kind: kind(config),
        clip: Clip::None,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}

pub fn heun(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let (timesteps, mut sigmas) = sigma_form(config, table, request)?;
    sigmas.push(0.0);
    let sigmas = round_f32(sigmas);
    let moves = along(&timesteps, &sigmas, |t, s| Point::new(t, 1.0, s));
    let solver = Planned::with_moves(Heun::default(), moves);
    let twice = |values: &[f64]| -> Vec<f64> {
        values
            .iter()
            .enumerate()
            .flat_map(|(i, v)| std::iter::repeat_n(*v, if i == 0 { 1 } else { 2 }))
            .collect()
    };
    let mut listed = twice(&sigmas[..sigmas.len() - 1]);
    listed.push(0.0);
    // Clipping belongs to this class alone among those in sigma form; it never thresholds.
    let clip = clip(
        &Config {
            thresholding: false,
            ..config.clone()
        },
        false,
    )?;
    Ok(Plan {
        init_noise_sigma: init_sigma(config, &sigmas),
        timesteps: twice(&timesteps),
        integer_timesteps: false,
        sigmas: Some(listed),
        frame: Frame::VpInVe,
        kind: kind(config),
        clip,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}

pub fn dpm_solver(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let sigmas = table_sigmas(table);
    let log_sigmas = logs(&sigmas);
    let total = table.betas().len();
    // λ = −ln σ̂ below the clip is not visited.
    let clipped = sigmas
        .iter()
        .filter(|s| -s.ln() < config.lambda_min_clipped)
        .count();
    let last = total - clipped;
    let mut timesteps = match (&request.timesteps, request.steps) {
        (Some(list), None) if !list.is_empty() => floats(list),
        (None, Some(n)) if n > 0 => match config.spacing() {
            "leading" => (1..=n)
                .rev()
                .map(|k| (k * (last / (n + 1))) as f64 + config.steps_offset as f64)
                .collect(),
            "trailing" => floats(&trailing(last as f64, total as f64 / n as f64)),
            _ => {
                let mut all = linspace(0.0, last as f64 - 1.0, n + 1);
                all.remove(0);
                all.into_iter().rev().map(f64::round_ties_even).collect()
            }
        },
        _ => return Err(steps_or_timesteps()),
    };
    let n = timesteps.len();
    let mut levels = if config.use_karras_sigmas || config.use_exponential_sigmas {
        let (low, high) = (sigmas[0], sigmas[total - 1]);
        let levels = if config.use_karras_sigmas {
            karras(low, high, n, 7.0)
        } else {
            exponential(low, high, n)
        };
        let rounds = config.use_karras_sigmas && config.beta_schedule != "squaredcos_cap_v2";
        timesteps = levels
            .iter()
            .map(|s| {
                let t = sigma_to_t(*s, &log_sigmas);
                if rounds {
                    t.round_ties_even()
                } else {
                    t.trunc()
                }
            })
            .collect();
        levels
    } else {
        timesteps.iter().map(|t| interpolate(&sigmas, *t)).collect()
    };
    levels.push(final_sigma(config, table));
    let levels = round_f32(levels);
    let moves = along(&timesteps, &levels, |t, s| {
        let alpha = s.hypot(1.0).recip();
        Point::new(t, alpha, s * alpha)
    });
    let lower_final = match (config.euler_at_final, config.lower_order_final) {
        (true, _) => LowerFinal::Always,
        (false, true) => LowerFinal::FewSteps,
        (false, false) => LowerFinal::Never,
    };
    let solver = Planned::with_moves(
        DpmSolverPp {
            multistep: config.solver_order == 2,
            lower_final,
        },
        moves,
    );
    let clip = clip(
        &Config {
            clip_sample: Some(false),
            ..config.clone()
        },
        false,
    )?;
    Ok(Plan {
        timesteps,
        integer_timesteps: true,
        sigmas: Some(levels),
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: kind(config),
        clip,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}

pub fn edm_euler(config: &Config, request: &Request) -> Result<Plan> {
    let Some(n) = request
        .steps
        .filter(|n| *n > 0 && request.timesteps.is_none())
    else {
        return Err(Report::new("request", format!("steps {:?}", request.steps))
            .expected("a number of steps of at least 1 and no timesteps")
            .config());
    };
    let (low, high) = (
        config.sigma_min.unwrap_or(0.002),
        config.sigma_max.unwrap_or(80.0),
    );
    let mut sigmas = match config.sigma_schedule.as_str() {
        "exponential" if n == 1 => vec![low],
        "exponential" => exponential(low, high, n),
        _ => karras(low, high, n, config.rho),
    };
    sigmas.push(if config.final_sigmas_type == "sigma_min" {
        sigmas[n - 1]
    } else {
        0.0
    });
    let sigmas = round_f32(sigmas);
    let timesteps: Vec<f64> = sigmas[..n]
        .iter()
        .map(|s| f64::from((0.25 * s.ln()) as f32))
        .collect();
    let moves = along(&timesteps, &sigmas, |t, s| Point::new(t, 1.0, s));
    let solver = Planned::with_moves(
        Euler {
            churn: churn(request, ChurnOrder::BeforeNoise),
        },
        moves,
    );
    let kind = kind(config);
    Ok(Plan {
        timesteps,
        integer_timesteps: false,
        sigmas: Some(sigmas),
        init_noise_sigma: high.hypot(1.0),
        frame: Frame::Edm {
            sigma_data: config.sigma_data,
            negative: config.prediction_type == "v_prediction",
        },
        kind,
        clip: Clip::None,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}
