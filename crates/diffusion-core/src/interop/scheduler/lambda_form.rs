//! The classes that step in `λ`: DPM-Solver (multistep, singlestep, inverse), DEIS, UniPC and
//! SA-Solver.

use super::grids::{clip, floats, kind, steps_or_timesteps};
use super::levels::{
    Spread, along, flow_point, interpolate, logs, round_f32, sigma_to_t, table_sigmas, vp_point,
};
use super::{Config, Frame, Plan, Request};
use crate::error::{Report, Result};
use crate::grid::trailing;
use crate::sample::{
    Basis, Belief, Deis, DpmMultistep, DpmSinglestep, Planned, Rule, SaSolver, Solver, Step, Tau,
    Third, UniPc, UniPcB,
};
use crate::schedule::Table;
use crate::schedule::linear::linspace;

/// Timesteps and levels of a run, the final level included.
struct Run {
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
}

/// How a class differs from the others.
struct Rules {
    /// Leaves out levels with `λ` below the bound.
    clips_lambda: bool,
    /// Rounds the timesteps of these spreads; the others are truncated.
    rounds: fn(&Config, Spread) -> bool,
    /// Repeats the last level where it was spread.
    repeats_last: bool,
    /// Ends at the table's smallest level whatever is asked.
    ends_at_least: bool,
}

const DPM: Rules = Rules {
    clips_lambda: true,
    rounds: |config, spread| {
        matches!(spread, Spread::Karras | Spread::Lu) && config.beta_schedule != "squaredcos_cap_v2"
    },
    repeats_last: false,
    ends_at_least: false,
};
const SINGLE: Rules = Rules {
    rounds: |_, spread| spread == Spread::Karras,
    ..DPM
};
const DEIS: Rules = Rules {
    clips_lambda: false,
    rounds: |_, spread| spread == Spread::Karras,
    repeats_last: true,
    ends_at_least: true,
};
const SA: Rules = Rules {
    clips_lambda: true,
    ..DEIS
};
const UNIPC: Rules = Rules {
    clips_lambda: false,
    rounds: |_, spread| spread == Spread::Karras,
    repeats_last: true,
    ends_at_least: false,
};

/// Index below which the table is used: `λ = −ln σ̂` under the bound is not visited.
fn visited(config: &Config, sigmas: &[f64]) -> usize {
    let clipped = sigmas
        .iter()
        .filter(|s| -s.ln() < config.lambda_min_clipped)
        .count();
    sigmas.len() - clipped
}

fn indices(config: &Config, last: usize, total: usize, request: &Request) -> Result<Vec<f64>> {
    Ok(match (&request.timesteps, request.steps) {
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
    })
}

/// Levels of a straight path, shifted towards noise.
fn flow_levels(config: &Config, request: &Request, n: usize) -> Result<Vec<f64>> {
    let unipc = config.class == "UniPCMultistepScheduler";
    let total = config.num_train_timesteps as f64;
    let mut sigmas = match (&request.sigmas, unipc) {
        (Some(sigmas), _) => sigmas.clone(),
        (None, true) => linspace(1.0, 1.0 / total, n + 1)[..n].to_vec(),
        (None, false) => {
            let mut sigmas: Vec<f64> = linspace(1.0, 1.0 / total, n + 1)
                .into_iter()
                .map(|alpha| 1.0 - alpha)
                .rev()
                .collect();
            sigmas.truncate(n);
            sigmas
        }
    };
    super::flow::shift(config, request, &mut sigmas)?;
    if let (true, Some(first)) = (unipc, sigmas.first_mut()) {
        // λ of pure noise is −∞.
        if (*first - 1.0).abs() < 1e-6 {
            *first -= 1e-6;
        }
    }
    Ok(sigmas)
}

fn run(config: &Config, table: &Table, request: &Request, rules: &Rules) -> Result<Run> {
    let table_levels = table_sigmas(table);
    let log_sigmas = logs(&table_levels);
    let total = table_levels.len();
    let last = if rules.clips_lambda {
        visited(config, &table_levels)
    } else {
        total
    };
    let request = &match &request.sigmas {
        Some(sigmas) => Request {
            steps: Some(sigmas.len()),
            ..request.clone()
        },
        None => request.clone(),
    };
    let mut timesteps = indices(config, last, total, request)?;
    let n = timesteps.len();
    let spread = Spread::of(config);
    let mut levels = match spread {
        Some(spread) => {
            let (low, high) = (
                config.sigma_min.unwrap_or(table_levels[0]),
                config.sigma_max.unwrap_or(table_levels[total - 1]),
            );
            let levels = spread.levels(low, high, n);
            let rounds = (rules.rounds)(config, spread);
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
        }
        None if config.use_flow_sigmas => flow_levels(config, request, n)?,
        None => timesteps
            .iter()
            .map(|t| interpolate(&table_levels, *t))
            .collect(),
    };
    if config.use_flow_sigmas {
        if spread.is_some() {
            levels.iter_mut().for_each(|s| *s /= *s + 1.0);
        }
        let scale = config.num_train_timesteps as f64;
        timesteps = levels.iter().map(|s| (s * scale).trunc()).collect();
    }
    let least = config.final_sigmas_type == "sigma_min" || rules.ends_at_least;
    let spread_out = spread.is_some() || config.use_flow_sigmas;
    levels.push(match (least, spread_out && rules.repeats_last) {
        (false, _) => 0.0,
        (true, false) => table_levels[0],
        (true, true) => levels[n - 1],
    });
    Ok(Run {
        timesteps,
        sigmas: round_f32(levels),
    })
}

fn plan<S: Step + 'static>(config: &Config, step: S, run: Run) -> Result<Plan>
where
    Planned<S>: Solver,
{
    let point = if config.use_flow_sigmas {
        flow_point
    } else {
        vp_point
    };
    let solver = Planned::with_moves(step, along(&run.timesteps, &run.sigmas, point));
    let clip = clip(
        &Config {
            clip_sample: Some(false),
            ..config.clone()
        },
        false,
    )?;
    Ok(Plan {
        timesteps: run.timesteps,
        integer_timesteps: true,
        sigmas: Some(run.sigmas),
        init_noise_sigma: 1.0,
        frame: Frame::Vp,
        kind: kind(config),
        clip,
        moves: solver.moves.clone(),
        solver: Box::new(solver),
    })
}

/// What `algorithm_type` says: the belief, and whether the SDE is solved.
pub fn algorithm(config: &Config) -> (Belief, bool) {
    match config.algorithm_type.as_deref() {
        Some("dpmsolver") => (Belief::Epsilon, false),
        Some("sde-dpmsolver") => (Belief::Epsilon, true),
        Some("sde-dpmsolver++") => (Belief::X0, true),
        _ => (Belief::X0, false),
    }
}

/// What `solver_type` says of DPM-Solver.
pub fn rule(config: &Config) -> Rule {
    match config.solver_type.as_deref() {
        Some("heun") => Rule::Exact,
        _ => Rule::Midpoint,
    }
}

/// The multistep solver of a configuration.
pub fn multistep(config: &Config) -> DpmMultistep {
    let (belief, stochastic) = algorithm(config);
    DpmMultistep {
        belief,
        order: config.solver_order,
        rule: rule(config),
        third: Third::Published,
        stochastic,
        lower_order_final: config.lower_order_final,
        euler_at_final: config.euler_at_final,
    }
}

pub fn dpm_multistep(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    plan(
        config,
        multistep(config),
        run(config, table, request, &DPM)?,
    )
}

pub fn dpm_singlestep(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    // This class has no spacing.
    let spaced = Config {
        timestep_spacing: None,
        ..config.clone()
    };
    let (belief, stochastic) = algorithm(config);
    let step = DpmSinglestep {
        belief,
        order: config.solver_order,
        rule: rule(config),
        stochastic,
        lower_order_final: config.lower_order_final,
        published: true,
    };
    plan(config, step, run(&spaced, table, request, &SINGLE)?)
}

/// From data to noise.
pub fn dpm_inverse(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let levels = table_sigmas(table);
    let log_sigmas = logs(&levels);
    let total = levels.len();
    let noisiest = visited(config, &levels).saturating_sub(1);
    let Some(n) = request
        .steps
        .filter(|n| *n > 0 && request.timesteps.is_none())
    else {
        return Err(steps_or_timesteps());
    };
    let mut timesteps: Vec<f64> = match config.spacing() {
        "leading" => (0..n)
            .map(|k| (k * ((noisiest + 1) / (n + 1))) as f64 + config.steps_offset as f64)
            .collect(),
        "trailing" => {
            let mut all = floats(&trailing((noisiest + 1) as f64, total as f64 / n as f64));
            all.reverse();
            all
        }
        _ => linspace(0.0, noisiest as f64, n + 1)[..n]
            .iter()
            .map(|t| t.round_ties_even())
            .collect(),
    };
    let mut sigmas: Vec<f64> = match Spread::of(config) {
        Some(spread) => {
            // The library gives its conversion the table upside down, so that levels rise.
            let (low, high) = (levels[total - 1], levels[0]);
            let spread_out = spread.levels(low, high, n);
            timesteps = spread_out
                .iter()
                .map(|s| {
                    let t = sigma_to_t(*s, &log_sigmas);
                    match spread {
                        Spread::Karras => t.round_ties_even(),
                        _ => t.trunc(),
                    }
                })
                .collect();
            let mut sigmas = spread_out;
            sigmas.push(sigmas[n - 1]);
            sigmas
        }
        None if config.use_flow_sigmas => {
            let mut sigmas = flow_levels(config, request, n)?;
            let scale = config.num_train_timesteps as f64;
            timesteps = sigmas.iter().map(|s| (s * scale).trunc()).collect();
            sigmas.push(sigmas[n - 1]);
            sigmas
        }
        None => {
            let mut sigmas: Vec<f64> = timesteps.iter().map(|t| interpolate(&levels, *t)).collect();
            sigmas.push(levels[noisiest]);
            sigmas
        }
    };
    sigmas = round_f32(sigmas);
    // Repeated timesteps are visited once; levels keep their places.
    let mut seen = Vec::new();
    timesteps.retain(|t| {
        let first = !seen.contains(&t.to_bits());
        seen.push(t.to_bits());
        first
    });
    plan(config, multistep(config), Run { timesteps, sigmas })
}

pub fn deis(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let step = Deis {
        order: config.solver_order,
        basis: Basis::LogRho,
        lower_order_final: config.lower_order_final,
        schedule: None,
    };
    plan(config, step, run(config, table, request, &DEIS)?)
}

pub fn unipc(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    if config.solver_p.as_ref().is_some_and(|p| !p.is_null()) {
        return Err(Report::new("scheduler: solver_p", "another scheduler")
            .expected("none: UniPC's own predictor")
            .remedy("remove the option")
            .unsupported());
    }
    let step = UniPc {
        belief: if config.predict_x0 {
            Belief::X0
        } else {
            Belief::Epsilon
        },
        order: config.solver_order,
        b: match config.solver_type.as_deref() {
            Some("bh1") => UniPcB::Bh1,
            _ => UniPcB::Bh2,
        },
        lower_order_final: config.lower_order_final,
        corrector: true,
        skip_corrector: config.disable_corrector.clone(),
    };
    plan(config, step, run(config, table, request, &UNIPC)?)
}

pub fn sa(config: &Config, table: &Table, request: &Request) -> Result<Plan> {
    let step = SaSolver {
        belief: match config.algorithm_type.as_deref() {
            Some("noise_prediction") => Belief::Epsilon,
            _ => Belief::X0,
        },
        predictor_order: config.predictor_order,
        corrector_order: config.corrector_order,
        tau: Tau {
            value: 1.0,
            low: 200.0,
            high: 800.0,
        },
        lower_order_final: config.lower_order_final,
    };
    plan(config, step, run(config, table, request, &SA)?)
}
