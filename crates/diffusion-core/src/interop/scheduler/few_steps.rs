//! The classes with rules of their own on integer indices: PNDM, iPNDM, LCM, TCD, unCLIP and the
//! inverse of DDIM.

use super::grids::{clip, end_point, floats, kind, steps_or_timesteps};
use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::grid::trailing;
use crate::guide::Clip;
use crate::predict::Kind;
use crate::sample::{
    Ancestral, Boundary, Consistency, Ddim, Direction, Ipndm, Move, Planned, Pndm, Solver, Start,
    Step, Tcd, Variance,
};
use crate::schedule::linear::linspace;
use crate::schedule::{Point, Table};

fn plan<S: Step + 'static>(
    config: &Config,
    solver: Planned<S>,
    timesteps: &[i64],
    clip: Clip,
) -> Plan
where
    Planned<S>: Solver,
{
    Plan {
        timesteps: floats(timesteps),
        integer_timesteps: true,
        sigmas: None,
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: kind(config),
        clip,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    }
}

fn count(request: &Request, least: usize, most: usize) -> Result<usize> {
    match (request.steps, &request.timesteps) {
        (Some(n), None) if (least..=most).contains(&n) => Ok(n),
        (Some(n), None) => Err(Report::new("steps", n)
            .expected(format!("{least} to {most}"))
            .config()),
        _ => Err(steps_or_timesteps()),
    }
}

/// Indices from the cleanest, by the class's spacing.
fn rising(config: &Config, n: usize) -> Vec<i64> {
    let total = config.num_train_timesteps;
    match config.spacing() {
        "linspace" => linspace(0.0, (total - 1) as f64, n)
            .into_iter()
            .map(|t| t.round_ties_even() as i64)
            .collect(),
        "trailing" => {
            let mut all = trailing(total as f64, total as f64 / n as f64);
            all.reverse();
            all
        }
        _ => (0..n)
            .map(|k| (k * (total / n)) as i64 + config.steps_offset)
            .collect(),
    }
}

pub fn pndm(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let total = config.num_train_timesteps;
    let n = count(request, if config.skip_prk_steps { 1 } else { 4 }, total)?;
    let stride = (total / n) as i64;
    let rising = rising(config, n);
    let last = end_point(config, table);
    let at = |i: i64| {
        if i < 0 {
            last
        } else {
            table.index(i.min(total as i64 - 1))
        }
    };
    let mut timesteps: Vec<i64> = Vec::new();
    let mut moves = Vec::new();
    let mut step = Pndm::default();
    let rest: Vec<i64> = if config.skip_prk_steps {
        let falling: Vec<i64> = rising.iter().rev().copied().collect();
        if let [first, second, ..] = falling[..] {
            timesteps.extend([first, second]);
            moves.push(Move::Denoise(at(first), at(first - stride)));
            // The step is repeated from a stride above the second timestep, whichever the first is.
            moves.push(Move::Denoise(at(second), at(second)));
            step.restart = Some(at(second + stride));
            step.start_moves = 2;
            falling[1..].to_vec()
        } else {
            falling
        }
    } else {
        step.start = Start::RungeKutta;
        let half = stride / 2;
        // The noisiest four timesteps, each followed by the middle below the next.
        let mut doubled: Vec<i64> = rising[n - 4..]
            .iter()
            .flat_map(|t| [*t, *t + half])
            .collect();
        doubled.pop();
        let mut repeated: Vec<i64> = doubled.iter().flat_map(|t| [*t, *t]).collect();
        repeated.pop();
        repeated.remove(0);
        repeated.reverse();
        for (k, t) in repeated.iter().enumerate() {
            let down = if k % 2 == 0 { half } else { 0 };
            moves.push(Move::Denoise(at(*t), at(t - down)));
        }
        timesteps.extend(&repeated);
        step.start_moves = repeated.len();
        rising[..n - 3].iter().rev().copied().collect()
    };
    for t in &rest {
        timesteps.push(*t);
        moves.push(Move::Denoise(at(*t), at(t - stride)));
    }
    Ok(plan(
        config,
        Planned::with_moves(step, moves),
        &timesteps,
        Clip::None,
    ))
}

/// `σ = sin²(πu/2)`, `α = √(1 − σ²)` over even `u`.
pub fn ipndm(config: &Config, request: &Request) -> Result<Plan> {
    let n = count(request, 1, 1_000_000)?;
    let mut points: Vec<Point> = linspace(1.0, 0.0, n + 1)
        .into_iter()
        .map(|u| {
            let sigma = (0.5 * std::f64::consts::PI * u).sin().powi(2);
            let alpha = (1.0 - sigma * sigma).max(0.0).sqrt();
            let t = sigma.atan2(alpha) * 2.0 / std::f64::consts::PI;
            Point::new(t, alpha, sigma)
        })
        .collect();
    if let Some(last) = points.last_mut() {
        *last = Point::data(0.0);
    }
    let solver = Planned::new(Ipndm::default(), &points);
    let mut plan = plan(config, solver, &[], Clip::None);
    plan.timesteps = points[..n].iter().map(|p| p.t).collect();
    plan.integer_timesteps = false;
    plan.kind = Kind::Velocity;
    Ok(plan)
}

/// Timesteps of latent consistency models: every so many of those that were distilled.
fn distilled(config: &Config, request: &Request) -> Result<Vec<i64>> {
    let total = config.num_train_timesteps;
    let origin = config.original_inference_steps;
    if origin == 0 || origin > total {
        return Err(Report::new("scheduler: original_inference_steps", origin)
            .expected(format!("1 to {total}"))
            .config());
    }
    if let (Some(list), None) = (&request.timesteps, request.steps) {
        let falling = list.windows(2).all(|w| w[0] > w[1]);
        let inside = list.iter().all(|t| (0..total as i64).contains(t));
        if list.is_empty() || !falling || !inside {
            return Err(Report::new("timesteps", format!("{list:?}"))
                .expected(format!("falling indices from 0 to {}", total - 1))
                .config());
        }
        return Ok(list.clone());
    }
    let n = count(request, 1, origin)?;
    let k = total / origin;
    Ok((0..n)
        .map(|i| {
            let index = (i as f64 * (origin as f64 / n as f64)).floor() as usize;
            ((origin - index.min(origin - 1)) * k) as i64 - 1
        })
        .collect())
}

pub fn lcm(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let list = distilled(config, request)?;
    let mut points: Vec<Point> = list.iter().map(|t| table.index(*t)).collect();
    // The last jump is the result.
    points.push(Point::data(0.0));
    let step = Consistency {
        boundary: Boundary::Time {
            sigma_data: 0.5,
            scaling: config.timestep_scaling,
        },
        ..Consistency::default()
    };
    let solver = Planned::new(step, &points);
    Ok(plan(config, solver, &list, clip(config, false)?))
}

pub fn tcd(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let list = distilled(config, request)?;
    let gamma = request.gamma.unwrap_or(0.3);
    if !(0.0..=1.0).contains(&gamma) {
        return Err(Report::new("gamma", gamma).expected("0 to 1").config());
    }
    // The run ends at the cleanest index, not in the data.
    let ends: Vec<i64> = list.iter().skip(1).copied().chain([0]).collect();
    let below = |t: &i64| table.index(((1.0 - gamma) * *t as f64).floor() as i64);
    let step = Tcd {
        gamma,
        below: ends.iter().map(below).collect(),
    };
    let moves = list
        .iter()
        .zip(&ends)
        .map(|(from, to)| Move::Denoise(table.index(*from), table.index(*to)))
        .collect();
    let solver = Planned::with_moves(step, moves);
    Ok(plan(config, solver, &list, Clip::None))
}

pub fn unclip(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let total = config.num_train_timesteps;
    let n = count(request, 2, total)?;
    let ratio = (total - 1) as f64 / (n - 1) as f64;
    let list: Vec<i64> = (0..n)
        .rev()
        .map(|k| (k as f64 * ratio).round_ties_even() as i64)
        .collect();
    let mut points: Vec<Point> = list.iter().map(|t| table.index(*t)).collect();
    points.push(table.index(-1));
    let step = Ancestral {
        variance: match config.variance_type.as_deref() {
            Some("learned_range") => Variance::LearnedRange,
            _ => Variance::FixedSmallLog,
        },
        noise_into_data: true,
        ..Ancestral::default()
    };
    let solver = Planned::new(step, &points);
    Ok(plan(config, solver, &list, clip(config, true)?))
}

/// From data to noise. The network is told the timestep that the step ends at.
pub fn ddim_inverse(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let total = config.num_train_timesteps;
    let n = count(request, 1, total)?;
    let list = rising(config, n);
    let stride = (total / n) as i64;
    let first = end_point(config, table);
    let moves = list
        .iter()
        .map(|t| {
            let from = match (t - stride).min(total as i64 - 1) {
                below if below < 0 => first,
                index => table.index(index),
            };
            let told = Point {
                t: *t as f64,
                ..from
            };
            Move::Denoise(told, table.index(*t))
        })
        .collect();
    let step = Ddim {
        eta: 0.0,
        direction: Direction::Predicted,
    };
    let solver = Planned::with_moves(step, moves);
    Ok(plan(config, solver, &list, clip(config, true)?))
}
