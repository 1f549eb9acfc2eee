//! The classes on integer indices: DDPM and DDIM.

use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::grid::Grid;
use crate::guide::Clip;
use crate::predict::Kind;
use crate::sample::{Ancestral, Ddim, Direction, Move, Planned, Variance};
use crate::schedule::{Point, Table};

/// What a network of this configuration predicts, in its own frame.
pub fn kind(config: &Config) -> Kind {
    match (config.class.as_str(), config.prediction_type.as_str()) {
        (
            "EDMEulerScheduler"
            | "EDMDPMSolverMultistepScheduler"
            | "CMStochasticIterativeScheduler",
            prediction,
        ) => Kind::Edm {
            sigma_data: config.sigma_data,
            negative: prediction == "v_prediction",
        },
        ("FlowMatchEulerDiscreteScheduler" | "FlowMatchHeunDiscreteScheduler", _) => Kind::Flow,
        ("IPNDMScheduler", _) => Kind::Velocity,
        ("ScoreSdeVeScheduler", _) => Kind::Score,
        (_, "flow_prediction") => Kind::Flow,
        (_, "sample" | "original_sample") => Kind::X0,
        (_, "v_prediction") => Kind::Velocity,
        _ => Kind::Epsilon,
    }
}

pub fn clip(config: &Config, default: bool) -> Result<Clip> {
    if config.thresholding {
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        return Clip::Dynamic {
            ratio,
            max: max.max(1.0),
        }
        .check();
    }
    if config.clip_sample.unwrap_or(default) {
        return Clip::Static {
            range: config.clip_sample_range,
        }
        .check();
    }
    Ok(Clip::None)
}

/// Integer timesteps of DDPM and DDIM, noisiest first.
fn indices(config: &Config, table: &Table, request: &Request) -> Result<Vec<i64>> {
    let total = table.betas().len();
    let list = match (&request.timesteps, request.steps) {
        (Some(list), None) => {
            if list.is_empty() || list.windows(2).any(|w| w[0] <= w[1]) {
                return Err(Report::new("timesteps", format!("{list:?}"))
                    .expected("falling indices")
                    .config());
            }
            list.clone()
        }
        (None, Some(n)) => match config.spacing() {
            "leading" => {
                let offset = config.steps_offset;
                Grid::Leading { offset: 0 }
                    .indices(total, n)?
                    .into_iter()
                    .map(|i| i + offset)
                    .collect()
            }
            "trailing" => Grid::Trailing.indices(total, n)?,
            _ => Grid::Linspace.indices(total, n)?,
        },
        _ => return Err(steps_or_timesteps()),
    };
    match list.iter().find(|i| **i < 0 || **i >= total as i64) {
        Some(bad) => Err(Report::new("timestep", bad)
            .expected(format!("0 to {}", total - 1))
            .remedy("check steps_offset and the number of steps")
            .config()),
        None => Ok(list),
    }
}

/// Where runs end (or inverse ones begin): the data, or the level of index 0 again.
pub fn end_point(config: &Config, table: &Table) -> Point {
    if config.set_alpha_to_one {
        Point::data(-1.0)
    } else {
        Point {
            t: -1.0,
            ..table.index(0)
        }
    }
}

pub fn steps_or_timesteps() -> crate::error::Error {
    Report::new("request", "steps and timesteps")
        .expected("exactly one of them")
        .config()
}

pub fn floats(indices: &[i64]) -> Vec<f64> {
    indices.iter().map(|i| *i as f64).collect()
}

pub fn ddpm(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let list = indices(config, table, request)?;
    let points: Vec<Point> = list.iter().chain([&-1]).map(|i| table.index(*i)).collect();
    let variance = match config.variance_type.as_deref() {
        Some("fixed_large") => Variance::FixedLarge,
        Some("fixed_small_log") => Variance::FixedSmallLog,
        Some("learned_range") => Variance::LearnedRange,
        _ => Variance::FixedSmall,
    };
    let solver = Planned::new(
        Ancestral {
            variance,
            noise_into_data: true,
            ..Ancestral::default()
        },
        &points,
    );
    Ok(Plan {
        timesteps: floats(&list),
        integer_timesteps: true,
        sigmas: None,
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: kind(config),
        clip: clip(config, true)?,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}

pub fn ddim(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let list = indices(config, table, request)?;
    // The library always goes back by ⌊T/n⌋, whether or not that is the next timestep.
    let back = (table.betas().len() / list.len()) as i64;
    let last = end_point(config, table);
    let moves = list
        .iter()
        .map(|i| {
            let to = if *i >= back {
                table.index(i - back)
            } else {
                last
            };
            Move::Denoise(table.index(*i), to)
        })
        .collect();
    let direction = if request.use_clipped_model_output {
        Direction::Rederived
    } else {
        Direction::Predicted
    };
    let solver = Planned::with_moves(
        Ddim {
            eta: request.eta,
            direction,
        },
        moves,
    );
    Ok(Plan {
        timesteps: floats(&list),
        integer_timesteps: true,
        sigmas: None,
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: kind(config),
        clip: clip(config, true)?,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}
