//! The classes of the score SDEs: predictor and corrector on VE, Euler and Maruyama on VP.

use super::grids::{kind, steps_or_timesteps};
use super::tables::linspace;
use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::guide::Clip;
use crate::sample::{EulerMaruyama, Langevin, Move, Norms, Planned, ReverseDiffusion, StepSize};
use crate::schedule::{Point, Schedule, Vp};
use crate::sde::Discretisation;
use std::sync::Arc;

/// Times from 1 to the end, in the library's f32.
fn times(config: &Config, request: &Request, end: f64) -> Result<Vec<f64>> {
    let end = config.sampling_eps.unwrap_or(end);
    match (request.steps, &request.timesteps) {
        (Some(n), None) if n > 0 && end > 0.0 && end < 1.0 => {
            Ok(linspace(1.0, end, n).into_iter().map(f64::from).collect())
        }
        (Some(n), None) => Err(Report::new("steps", format!("{n}, to {end}"))
            .expected("at least 1, and a sampling_eps between 0 and 1")
            .config()),
        _ => Err(steps_or_timesteps()),
    }
}

/// At every time a Langevin correction, then a step of reverse diffusion on the table of as many
/// levels as there are steps. The last noise stays in the sample; the last mean is the result that
/// pipelines use.
pub fn ve(config: &Config, request: &Request) -> Result<Plan> {
    let times = times(config, request, 1e-5)?;
    let n = times.len();
    let (low, high) = (
        config.sigma_min.unwrap_or(0.01),
        config.sigma_max.unwrap_or(1348.0),
    );
    if !(low > 0.0 && high > low) {
        return Err(
            Report::new("scheduler: sigma_min, sigma_max", format!("{low}, {high}"))
                .expected("0 < sigma_min < sigma_max")
                .config(),
        );
    }
    let levels: Vec<Point> = linspace(low.ln(), high.ln(), n)
        .into_iter()
        .map(|l| Point::new(0.0, 1.0, f64::from(l.exp())))
        .collect();
    let chain = Discretisation::Chain(levels);
    let last = (n - 1) as f32;
    let points: Vec<Point> = times
        .iter()
        .map(|t| {
            // The library truncates in f32; the middle of the cell is truncated to the same.
            let index = (*t as f32 * last) as usize;
            let place = (index as f64 + 0.5) / f64::from(last.max(1.0));
            Point::new(place, 1.0, f64::from((low * (high / low).powf(*t)) as f32))
        })
        .collect();
    let mut moves = Vec::new();
    for (i, point) in points.iter().enumerate() {
        if config.correct_steps > 0 {
            moves.extend(std::iter::repeat_n(
                Move::Correct(*point),
                config.correct_steps,
            ));
        }
        let to = points.get(i + 1).copied().unwrap_or(Point::data(0.0));
        moves.push(Move::Denoise(*point, to));
    }
    let step = ReverseDiffusion {
        noise_into_data: true,
        ..ReverseDiffusion::of(chain)
    };
    let mut solver = Planned::with_moves(step, moves);
    solver.corrector = Some(Box::new(Langevin {
        size: StepSize::SignalToNoise {
            ratio: config.snr,
            norms: Norms::BatchMean,
        },
        steps: 1,
        chain: None,
    }));
    Ok(Plan {
        timesteps: times,
        integer_timesteps: false,
        sigmas: Some(points.iter().map(|p| p.sigma).collect()),
        init_noise_sigma: high,
        frame: Frame::Ve,
        kind: kind(config),
        clip: Clip::None,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}

/// Steps of `1/n` whatever lies between the times.
pub fn vp(config: &Config, request: &Request) -> Result<Plan> {
    let times = times(config, request, 1e-3)?;
    let schedule = Vp {
        beta_min: config.beta_min,
        beta_max: config.beta_max,
        ..Vp::default()
    };
    let mut points: Vec<Point> = times.iter().map(|t| schedule.at(*t)).collect();
    points.push(Point::data(0.0));
    let step = EulerMaruyama {
        steps: Some(times.len()),
        noise_into_data: true,
        ..EulerMaruyama::new(Arc::new(schedule))
    };
    let solver = Planned::new(step, &points);
    Ok(Plan {
        timesteps: times,
        integer_timesteps: false,
        sigmas: None,
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: kind(config),
        clip: Clip::None,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}
