//! The classes on variance-exploding samples with a preconditioned network: EDM's Euler and
//! DPM-Solver++, and consistency models.

use super::grids::{clip, kind};
use super::lambda_form::multistep;
use super::levels::{along, round_f32, ve_point};
use super::ve_form::churn;
use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::grid::{exponential, karras};
use crate::guide::Clip;
use crate::sample::{
    Boundary, ChurnOrder, Consistency, DpmMultistep, Euler, Planned, Solver, Step,
};

fn bounds(config: &Config) -> (f64, f64) {
    (
        config.sigma_min.unwrap_or(0.002),
        config.sigma_max.unwrap_or(80.0),
    )
}

/// Timesteps `¼ ln σ` and levels, the final one included.
fn levels(config: &Config, request: &Request) -> Result<(Vec<f64>, Vec<f64>)> {
    let Some(n) = request
        .steps
        .filter(|n| *n > 0 && request.timesteps.is_none())
    else {
        return Err(Report::new("request", format!("steps {:?}", request.steps))
            .expected("a number of steps of at least 1 and no timesteps")
            .config());
    };
    let (low, high) = bounds(config);
    let mut sigmas = match config.sigma_schedule.as_str() {
        "exponential" if n == 1 => vec![low],
        "exponential" => exponential(low, high, n),
        _ => karras(low, high, n, config.rho),
    };
    let euler = config.class == "EDMEulerScheduler";
    sigmas.push(match (config.final_sigmas_type.as_str(), euler) {
        ("sigma_min", true) => sigmas[n - 1],
        ("sigma_min", false) => low,
        _ => 0.0,
    });
    let sigmas = round_f32(sigmas);
    let timesteps = sigmas[..n]
        .iter()
        .map(|s| f64::from((0.25 * s.ln()) as f32))
        .collect();
    Ok((timesteps, sigmas))
}

fn plan<S: Step + 'static>(
    config: &Config,
    step: S,
    (timesteps, sigmas): (Vec<f64>, Vec<f64>),
    clip: Clip,
) -> Plan
where
    Planned<S>: Solver,
{
    let moves = along(&timesteps, &sigmas, ve_point);
    let solver = Planned::with_moves(step, moves);
    Plan {
        timesteps,
        integer_timesteps: false,
        sigmas: Some(sigmas),
        init_noise_sigma: bounds(config).1.hypot(1.0),
        frame: Frame::Edm {
            sigma_data: config.sigma_data,
            negative: config.prediction_type == "v_prediction",
        },
        kind: kind(config),
        clip,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    }
}

pub fn euler(config: &Config, request: &Request) -> Result<Plan> {
    let step = Euler {
        churn: churn(request, ChurnOrder::BeforeNoise),
    };
    Ok(plan(config, step, levels(config, request)?, Clip::None))
}

pub fn dpm(config: &Config, request: &Request) -> Result<Plan> {
    let step = DpmMultistep {
        // The library's third order has no noise.
        stochastic: multistep(config).stochastic,
        ..multistep(config)
    };
    let clip = clip(
        &Config {
            clip_sample: Some(false),
            ..config.clone()
        },
        false,
    )?;
    Ok(plan(config, step, levels(config, request)?, clip))
}

pub fn consistency(config: &Config, request: &Request) -> Result<Plan> {
    let total = config.num_train_timesteps;
    let indices: Vec<i64> = match (&request.timesteps, request.steps) {
        (Some(list), None) if !list.is_empty() => {
            let falling = list.windows(2).all(|w| w[0] > w[1]);
            if !falling || list.iter().any(|t| !(0..total as i64).contains(t)) {
                return Err(Report::new("timesteps", format!("{list:?}"))
                    .expected(format!("falling indices from 0 to {}", total - 1))
                    .config());
            }
            list.clone()
        }
        (None, Some(n)) if (1..=total).contains(&n) => {
            (0..n).rev().map(|k| (k * (total / n)) as i64).collect()
        }
        _ => return Err(super::grids::steps_or_timesteps()),
    };
    let (low, high) = bounds(config);
    let (a, b) = (high.powf(1.0 / config.rho), low.powf(1.0 / config.rho));
    // The cleanest index is the noisiest level.
    let levels: Vec<f64> = indices
        .iter()
        .rev()
        .map(|i| (a + *i as f64 / (total - 1).max(1) as f64 * (b - a)).powf(config.rho))
        .collect();
    let timesteps = levels.iter().map(|s| 250.0 * s.ln()).collect();
    let mut sigmas = levels;
    sigmas.push(low);
    let step = Consistency {
        boundary: Boundary::Edm {
            sigma_data: config.sigma_data,
            sigma_min: low,
        },
        // As the last level is stored.
        sigma_min: f64::from(low as f32),
        clip: config.clip_denoised.then_some(1.0),
        s_noise: config.s_noise,
    };
    let plan = plan(config, step, (timesteps, round_f32(sigmas)), Clip::None);
    Ok(Plan {
        init_noise_sigma: high,
        ..plan
    })
}
