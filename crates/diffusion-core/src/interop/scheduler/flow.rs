//! The classes on straight paths: flow matching by Euler and Heun.

use super::levels::{Spread, along, flow_point, round_f32, twice};
use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::guide::Clip;
use crate::predict::Kind;
use crate::sample::{Consistency, Euler, FlowHeun, Move, Planned, Solver, Step};
use crate::schedule::linear::linspace;

/// Shifts levels towards noise: by a factor, or by the request's `mu` where the shift is dynamic
/// (Esser et al. 2024, eq. 23).
///
/// ```text
/// σ' = s σ/(1 + (s − 1) σ),      dynamic: s = e^μ (exponential) or μ (linear)
/// ```
///
/// # Errors
/// `Config` when a dynamic shift has no `mu`.
pub fn shift(config: &Config, request: &Request, sigmas: &mut [f64]) -> Result<()> {
    let by = if config.use_dynamic_shifting {
        let Some(mu) = request.mu else {
            return Err(Report::new("mu", "none, with use_dynamic_shifting")
                .expected("the shift of this run")
                .config());
        };
        match config.time_shift_type.as_str() {
            "linear" => mu,
            _ => mu.exp(),
        }
    } else if config.class.starts_with("FlowMatch") {
        config.shift
    } else {
        request.mu.map_or(config.flow_shift, f64::exp)
    };
    for sigma in sigmas.iter_mut() {
        *sigma = by * *sigma / (1.0 + (by - 1.0) * *sigma);
    }
    if let (Some(end), Some(last)) = (config.shift_terminal.filter(|s| *s != 0.0), sigmas.last()) {
        let scale = (1.0 - last) / (1.0 - end);
        for sigma in sigmas.iter_mut() {
            *sigma = 1.0 - (1.0 - *sigma) / scale;
        }
    }
    Ok(())
}

/// Timesteps and levels (without the final one).
fn levels(config: &Config, request: &Request) -> Result<(Vec<f64>, Vec<f64>)> {
    let total = config.num_train_timesteps as f64;
    let fixed = |sigma: f64| match config.use_dynamic_shifting {
        true => sigma,
        false => config.shift * sigma / (1.0 + (config.shift - 1.0) * sigma),
    };
    let (high, low) = (fixed(1.0), fixed(1.0 / total));
    let given = request
        .timesteps
        .as_ref()
        .map(|list| super::grids::floats(list));
    let mut sigmas = match (&request.sigmas, &given, request.steps) {
        (Some(sigmas), ..) => sigmas.clone(),
        (None, Some(list), _) => list.iter().map(|t| t / total).collect(),
        (None, None, Some(n)) if n > 0 => linspace(high * total, low * total, n)
            .into_iter()
            .map(|t| t / total)
            .collect(),
        _ => return Err(super::grids::steps_or_timesteps()),
    };
    if sigmas.is_empty() {
        return Err(super::grids::steps_or_timesteps());
    }
    shift(config, request, &mut sigmas)?;
    if let Some(spread) = Spread::of(config) {
        let n = sigmas.len();
        sigmas = spread.levels(sigmas[n - 1], sigmas[0], n);
    }
    let sigmas = round_f32(sigmas);
    let timesteps = given.unwrap_or_else(|| sigmas.iter().map(|s| s * total).collect());
    Ok((timesteps, sigmas))
}

fn plan<S: Step + 'static>(
    step: S,
    (timesteps, sigmas): (Vec<f64>, Vec<f64>),
    moves: Vec<Move>,
) -> Plan
where
    Planned<S>: Solver,
{
    let solver = Planned::with_moves(step, moves);
    Plan {
        timesteps: round_f32(timesteps),
        integer_timesteps: false,
        sigmas: Some(sigmas),
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: Kind::Flow,
        clip: Clip::None,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    }
}

pub fn euler(config: &Config, request: &Request) -> Result<Plan> {
    let (mut timesteps, mut sigmas) = levels(config, request)?;
    if config.invert_sigmas {
        sigmas = round_f32(sigmas.into_iter().map(|s| 1.0 - s).collect());
        let total = config.num_train_timesteps as f64;
        timesteps = sigmas.iter().map(|s| s * total).collect();
        sigmas.push(1.0);
    } else {
        sigmas.push(0.0);
    }
    let moves = along(&timesteps, &sigmas, flow_point);
    if config.stochastic_sampling {
        return Ok(plan(Consistency::default(), (timesteps, sigmas), moves));
    }
    Ok(plan(Euler::default(), (timesteps, sigmas), moves))
}

pub fn heun(config: &Config, request: &Request) -> Result<Plan> {
    let (timesteps, mut sigmas) = levels(config, request)?;
    let n = timesteps.len() as f64;
    sigmas.push(0.0);
    let moves = along(&timesteps, &sigmas, flow_point);
    let step = FlowHeun {
        // The library divides by the number of calls.
        s_churn: request.s_churn * n / (2.0 * n - 1.0),
        s_min: request.s_tmin,
        s_max: request.s_tmax.unwrap_or(f64::MAX),
        s_noise: request.s_noise.unwrap_or(1.0),
    };
    let mut listed = twice(&sigmas[..sigmas.len() - 1]);
    listed.push(0.0);
    Ok(plan(step, (twice(&timesteps), listed), moves))
}
