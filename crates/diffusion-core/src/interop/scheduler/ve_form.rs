//! The classes whose state is `x/α`: Euler, its ancestral variant, Heun, LMS, DPM2 and DPM-SDE.

use super::grids::{clip, kind};
use super::levels::{
    Spread, along, fractional, interpolate, logs, round_f32, sigma_to_t, table_sigmas, twice,
    ve_point,
};
use super::{Config, Frame, Plan, Request};
use crate::error::Result;
use crate::guide::Clip;
use crate::sample::kdpm2::ancestral_levels;
use crate::sample::{
    Churn, ChurnOrder, Ddim, Deis, Direction, DpmPpSde, Euler, Heun, Kdpm2, Move, Planned, Solver,
    Step,
};
use crate::schedule::linear::linspace;
use crate::schedule::{Point, Table};

/// A run in this form: timesteps, levels with the final one, and how levels become timesteps.
struct Run {
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    log_sigmas: Vec<f32>,
}

/// Timesteps and levels (without the final one).
fn run(config: &Config, table: &Table, request: &Request) -> Result<Run> {
    let sigmas = table_sigmas(table);
    let log_sigmas = logs(&sigmas);
    let mut timesteps = fractional(config, table, request)?;
    let n = timesteps.len();
    let euler = config.class == "EulerDiscreteScheduler";
    let mut levels: Vec<f64> = if config.interpolation_type == "log_linear" && euler {
        let (top, bottom) = (sigmas[sigmas.len() - 1].ln(), sigmas[0].ln());
        linspace(top, bottom, n + 1)
            .into_iter()
            .map(f64::exp)
            .collect()
    } else {
        timesteps.iter().map(|t| interpolate(&sigmas, *t)).collect()
    };
    let low = config
        .sigma_min
        .filter(|_| euler)
        .unwrap_or(levels[levels.len() - 1]);
    let high = config.sigma_max.filter(|_| euler).unwrap_or(levels[0]);
    let spread = Spread::of(config).filter(|_| config.class != "EulerAncestralDiscreteScheduler");
    if let Some(spread) = spread {
        levels = spread.levels(low, high, n);
        let rounds = spread == Spread::Karras && config.class.starts_with("KDPM2");
        timesteps = levels
            .iter()
            .map(|s| {
                let t = sigma_to_t(*s, &log_sigmas);
                match rounds {
                    true => t.round_ties_even(),
                    false => f64::from(t as f32),
                }
            })
            .collect();
    }
    Ok(Run {
        timesteps,
        sigmas: levels,
        log_sigmas,
    })
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

fn plan<S: Step + 'static>(
    config: &Config,
    step: S,
    (timesteps, sigmas): (Vec<f64>, Vec<f64>),
    moves: Vec<Move>,
) -> Plan
where
    Planned<S>: Solver,
{
    let solver = Planned::with_moves(step, moves);
    Plan {
        init_noise_sigma: init_sigma(config, &sigmas),
        timesteps,
        integer_timesteps: false,
        sigmas: Some(sigmas),
        frame: Frame::VpInVe,
        kind: kind(config),
        clip: Clip::None,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    }
}

/// Churn as the request has it.
pub fn churn(request: &Request, order: ChurnOrder) -> Churn {
    Churn {
        s_churn: request.s_churn,
        s_min: request.s_tmin,
        s_max: request.s_tmax,
        s_noise: request.s_noise.unwrap_or(1.0),
        order,
        schedule: None,
    }
}

pub fn euler(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let Run {
        mut timesteps,
        mut sigmas,
        ..
    } = run(config, table, request)?;
    sigmas.push(match config.final_sigmas_type.as_str() {
        "sigma_min" => table_sigmas(table)[0],
        _ => 0.0,
    });
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
    let moves = along(&timesteps, &sigmas, ve_point);
    Ok(plan(config, Euler { churn }, (timesteps, sigmas), moves))
}

pub fn euler_ancestral(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let Run {
        timesteps,
        mut sigmas,
        ..
    } = run(config, table, request)?;
    sigmas.push(0.0);
    let sigmas = round_f32(sigmas);
    let moves = along(&timesteps, &sigmas, ve_point);
    let step = Ddim {
        eta: 1.0,
        direction: Direction::Rederived,
    };
    Ok(plan(config, step, (timesteps, sigmas), moves))
}

pub fn heun(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let Run {
        timesteps,
        mut sigmas,
        ..
    } = run(config, table, request)?;
    sigmas.push(0.0);
    let sigmas = round_f32(sigmas);
    let moves = along(&timesteps, &sigmas, ve_point);
    let mut listed = twice(&sigmas[..sigmas.len() - 1]);
    listed.push(0.0);
    // Clipping belongs to this class alone among those in this form; it never thresholds.
    let clip = clip(
        &Config {
            thresholding: false,
            ..config.clone()
        },
        false,
    )?;
    Ok(Plan {
        clip,
        ..plan(config, Heun::default(), (twice(&timesteps), listed), moves)
    })
}

pub fn lms(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let Run {
        timesteps,
        mut sigmas,
        ..
    } = run(config, table, request)?;
    sigmas.push(0.0);
    let sigmas = round_f32(sigmas);
    let moves = along(&timesteps, &sigmas, ve_point);
    let step = Deis::lms(request.order.unwrap_or(4));
    Ok(plan(config, step, (timesteps, sigmas), moves))
}

/// A run with a point between every two, as `middle(from, to)` has its level.
fn with_middles(run: &Run, middle: impl Fn(&Point, &Point) -> f64) -> (Vec<f64>, Vec<Point>) {
    let n = run.timesteps.len();
    let mut timesteps = Vec::new();
    let mut points = Vec::new();
    for i in 0..n {
        let from = ve_point(run.timesteps[i], run.sigmas[i]);
        timesteps.push(from.t);
        points.push(from);
        if i + 1 < n {
            let sigma = middle(&from, &ve_point(run.timesteps[i + 1], run.sigmas[i + 1]));
            let t = sigma_to_t(sigma, &run.log_sigmas);
            timesteps.push(t);
            points.push(ve_point(t, sigma));
        }
    }
    points.push(ve_point(0.0, 0.0));
    (timesteps, points)
}

fn between(points: &[Point]) -> Vec<Move> {
    points
        .windows(2)
        .map(|w| Move::Denoise(w[0], w[1]))
        .collect()
}

fn rounded_run(config: &Config, table: &Table, request: &Request) -> Result<Run> {
    let run = run(config, table, request)?;
    Ok(Run {
        sigmas: round_f32(run.sigmas),
        ..run
    })
}

pub fn kdpm2(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let eta = match config.class.as_str() {
        "KDPM2AncestralDiscreteScheduler" => 1.0,
        _ => 0.0,
    };
    let run = rounded_run(config, table, request)?;
    let (timesteps, points) = with_middles(&run, |from, to| {
        (from.sigma * ancestral_levels(from, to, eta).0).sqrt()
    });
    let mut listed = twice(&run.sigmas);
    listed.extend([0.0, 0.0, 0.0]);
    Ok(plan(
        config,
        Kdpm2 { eta },
        (timesteps, listed),
        between(&points),
    ))
}

pub fn dpm_sde(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let run = rounded_run(config, table, request)?;
    let (timesteps, points) = with_middles(&run, |from, to| (from.sigma * to.sigma).sqrt());
    let mut listed = twice(&run.sigmas);
    listed.push(0.0);
    let step = DpmPpSde {
        s_noise: request.s_noise.unwrap_or(1.0),
    };
    Ok(plan(config, step, (timesteps, listed), between(&points)))
}
