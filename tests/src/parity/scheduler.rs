//! Whole sampling runs on the model in closed form.
//!
//! The run goes freely, in f64, from the stored first sample and the stored noise; timesteps, noise
//! levels, every state and every denoised estimate are compared.

use super::compare::Check;
use super::fixture::{Fixture, number, values};
use super::model::{Asked, ClosedForm, Coefficients, Recorder, of_one_item};
use super::unsupported;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use diffusion_core::interop::scheduler::{Frame, Plan, Request, Scheduler};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::sample::{Ctx, Move, Progress};
use diffusion_core::schedule::Table;
use diffusion_core::tensor::{At, lincomb};
use serde_json::Value;
use std::ops::ControlFlow;

/// What may stand in `call`; anything else changes the run in a way that is not known here.
const KNOWN: &[&str] = &[
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "mu",
    "clean_start",
    "timestep_slack",
    "step",
    "coefficients",
    "loop",
    "noise_count",
    "learned_variance",
    "seed",
];

/// Runs a scheduler fixture.
///
/// # Errors
/// `Unsupported` from the library for what it does not do, and anything that goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let scheduler = Scheduler::from_json(&fixture.config_text(), "config")?;
    if !matches!(
        fixture.text("loop"),
        "" | "standard" | "score_ve" | "score_vp"
    ) {
        return Err(unsupported(format!("the loop {}", fixture.text("loop"))));
    }
    let unknown = fixture.unknown_in_call(KNOWN);
    if !unknown.is_empty() {
        return Err(unsupported(format!("call.{}", unknown.join(", call."))));
    }
    let request = request(fixture)?;
    let plan = scheduler.plan(&request)?;
    let x = fixture.input_f64("x_init")?;
    let model = closed_form(fixture, &scheduler, &plan)?;

    let stored = &fixture.outputs;
    if !stored.contains_key("xs") {
        bail!("no output tensor `xs`; the fixture is incomplete");
    }
    let slack = fixture.number("timestep_slack")?.unwrap_or(0.0);
    timesteps(check, "timesteps", &plan, stored.get("timesteps"), slack)?;
    if let (Some(stored), Some(ours)) = (stored.get("sigmas"), &plan.sigmas) {
        check.values("sigmas", ours, &values(stored)?);
    }
    if let Some(stored) = stored.get("init_noise_sigma") {
        check.values(
            "init_noise_sigma",
            &[plan.init_noise_sigma],
            &values(stored)?,
        );
    }
    if let (Some(stored), Some(table)) = (stored.get("alphas_cumprod"), scheduler.table()) {
        check.values("alphas_cumprod", table.alpha_bar(), &values(stored)?);
    }

    let noises = fixture.numbered("noise");
    let mut noise = RecordedNoise::new(noises.clone());
    let recorder = Recorder::new(plan.wrap(model));
    let mut states = Vec::new();
    let items = 0..x.dim(0)? as u64;
    let mut watch = |progress: &Progress<'_>| {
        states.push(progress.x.clone());
        ControlFlow::Continue(())
    };
    plan.solver
        .solve(x, &mut Ctx::new(&recorder, &mut noise, items), &mut watch)?;
    let calls = recorder.calls();

    // Where a step asks twice, the state between is the second question.
    let two_stages = calls.len() > states.len();
    let states = if two_stages {
        let mut all: Vec<Tensor> = calls.iter().skip(1).map(|call| call.x.clone()).collect();
        all.extend(states.last().cloned());
        all
    } else {
        states
    };
    check.stack(stored, "xs", &states)?;
    let x0s = match (fixture.system.as_str(), scheduler.table()) {
        ("tcd", Some(table)) => down_the_flow(&plan, &request, &calls, table)?,
        ("lcm", _) => jumps(&plan, &calls, &states)?,
        ("score_sde_ve" | "score_sde_vp", _) => means(fixture, &plan, &states, &noises)?,
        _ => denoised(&plan, &request, &calls, &states, &noises)?,
    };
    check.stack(stored, "x0s", &x0s)
}

/// What the fixture asks of the scheduler.
fn request(fixture: &Fixture) -> Result<Request> {
    let mut request = Request {
        steps: fixture.count("num_inference_steps")?,
        ..Request::default()
    };
    if let Some(list) = fixture.call.get("timesteps").filter(|v| !v.is_null()) {
        let list = list.as_array().context("call.timesteps: expected a list")?;
        let whole = list.iter().map(Value::as_i64).collect::<Option<Vec<_>>>();
        request.timesteps = Some(whole.context("call.timesteps: expected whole numbers")?);
        request.steps = None;
    }
    if let Some(list) = fixture.call.get("sigmas").filter(|v| !v.is_null()) {
        let list = list.as_array().context("call.sigmas: expected a list")?;
        let all = list.iter().map(Value::as_f64).collect::<Option<Vec<_>>>();
        request.sigmas = Some(all.context("call.sigmas: expected numbers")?);
        request.steps = None;
    }
    request.mu = fixture.number("mu")?;
    let Some(step) = fixture.call.get("step").and_then(Value::as_object) else {
        return Ok(request);
    };
    for (name, value) in step {
        let given = || number(Some(value), name);
        match name.as_str() {
            "eta" if fixture.system == "tcd" => request.gamma = given()?,
            "eta" => request.eta = given()?.unwrap_or(0.0),
            "order" => request.order = value.as_u64().map(|order| order as usize),
            "s_churn" => request.s_churn = given()?.unwrap_or(0.0),
            "s_tmin" => request.s_tmin = given()?.unwrap_or(0.0),
            "s_tmax" => request.s_tmax = given()?,
            "s_noise" => request.s_noise = given()?,
            "use_clipped_model_output" => {
                request.use_clipped_model_output = value.as_bool().unwrap_or(false);
            }
            other => return Err(unsupported(format!("call.step.{other}"))),
        }
    }
    Ok(request)
}

fn closed_form(fixture: &Fixture, scheduler: &Scheduler, plan: &Plan) -> Result<ClosedForm> {
    let coefficients = match (fixture.text("coefficients"), scheduler.table(), plan.frame) {
        ("sigma_vp", ..) if fixture.system == "kdpm2_ancestral" => {
            let stored = |name: &str| -> Result<Vec<f64>> {
                let tensor = fixture.outputs.get(name);
                values(tensor.with_context(|| format!("no output tensor `{name}`"))?)
            };
            let pairs = stored("model_a")?.into_iter().zip(stored("model_b")?);
            Coefficients::Recorded(pairs.collect())
        }
        ("alphas_cumprod", Some(table), Frame::Vp) => Coefficients::AlphaBar(table.clone()),
        ("sigma_vp", _, Frame::VpInVe)
        | ("edm", _, Frame::Edm { .. })
        | ("sigma_ve", _, Frame::Ve)
        | ("sigma_flow" | "ipndm" | "sde_vp", _, Frame::Vp) => Coefficients::Point,
        (other, ..) => return Err(unsupported(format!("the coefficients {other:?}"))),
    };
    let learned = fixture
        .call
        .get("learned_variance")
        .and_then(Value::as_bool)
        .unwrap_or(false);
    Ok(ClosedForm {
        mu: of_one_item(&fixture.input_f64("mu")?)?,
        variance: of_one_item(&fixture.input_f64("s")?.sqr()?)?,
        kind: plan.kind,
        coefficients,
        var_mix: match learned {
            true => Some(of_one_item(&fixture.input_f64("model_var")?)?),
            false => None,
        },
        calls: Default::default(),
    })
}

/// Compares timesteps: whole ones exactly, up to the slack of the fixture.
///
/// # Errors
/// Those of the tensor library.
pub fn timesteps(
    check: &mut Check,
    what: &str,
    plan: &Plan,
    stored: Option<&Tensor>,
    slack: f64,
) -> Result<()> {
    match stored {
        Some(stored) if plan.integer_timesteps || stored.dtype() == DType::I64 => {
            check.integers(what, &plan.timesteps, &values(stored)?, slack);
        }
        Some(stored) => check.values(what, &plan.timesteps, &values(stored)?),
        None => bail!("no output tensor `{what}`; the fixture is incomplete"),
    }
    Ok(())
}

/// What TCD gives beside its samples: the sample before it is noised again.
fn down_the_flow(
    plan: &Plan,
    request: &Request,
    calls: &[Asked],
    table: &Table,
) -> Result<Vec<Tensor>> {
    let gamma = request.gamma.unwrap_or(0.3);
    let of = |(call, planned): (&Asked, &Move)| {
        let s = table.index(((1.0 - gamma) * planned.end().t).floor() as i64);
        let at = At::All(call.at);
        let epsilon = call.said.epsilon_of_x0(&call.x, at)?;
        Ok(lincomb(s.alpha, &call.x0, s.sigma, &epsilon)?)
    };
    calls.iter().zip(&plan.moves).map(of).collect()
}

/// The means of the predictors: their samples without their noise.
fn means(
    fixture: &Fixture,
    plan: &Plan,
    states: &[Tensor],
    noises: &[Tensor],
) -> Result<Vec<Tensor>> {
    let n = plan.timesteps.len() as f64;
    let levels = match fixture.outputs.get("discrete_sigmas") {
        Some(levels) => values(levels)?,
        None => Vec::new(),
    };
    let mut out = Vec::new();
    let moves = plan.moves.iter().zip(states).zip(noises);
    for ((planned, state), z) in moves {
        let Move::Denoise(from, _) = planned else {
            continue;
        };
        let std = if levels.is_empty() {
            let number = |name: &str| {
                let value = fixture.config.get(name).and_then(Value::as_f64);
                value.with_context(|| format!("config.{name} is missing"))
            };
            let (low, high) = (number("beta_min")?, number("beta_max")?);
            ((low + from.t * (high - low)) / n).sqrt()
        } else {
            // Points stand in the middle of their level's cell.
            let index = (from.t * (n - 1.0).max(1.0)) as usize;
            let below = match index {
                0 => 0.0,
                _ => levels[index - 1],
            };
            (levels[index].powi(2) - below * below).sqrt()
        };
        out.push(lincomb(1.0, state, -std, &z.to_dtype(state.dtype())?)?);
    }
    Ok(out)
}

/// What LCM gives beside its samples: the jump to the data, `c_skip x + c_out x̂₀` over ten times the
/// timestep.
fn jumps(plan: &Plan, calls: &[Asked], states: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut out = Vec::new();
    for (call, t) in calls.iter().zip(&plan.timesteps) {
        let root = (10.0 * t).hypot(0.5);
        out.push(lincomb(
            (0.5 / root).powi(2),
            &call.x,
            10.0 * t / root,
            &call.x0,
        )?);
    }
    // The last one is the result itself.
    if let (Some(last), Some(state)) = (out.last_mut(), states.last()) {
        *last = state.clone();
    }
    Ok(out)
}

/// The denoised estimate of each call, as the step used it.
///
/// With churn the estimate belongs to the raised sample, which no call has seen; it follows from
/// where the step ended:
///
/// ```text
/// x' = x + √(σ'² − σ²) s_noise z,   x_next = x' + (σ_next − σ')/σ' (x' − x₀)
/// ```
fn denoised(
    plan: &Plan,
    request: &Request,
    calls: &[Asked],
    states: &[Tensor],
    noises: &[Tensor],
) -> Result<Vec<Tensor>> {
    let sigmas = match &plan.sigmas {
        Some(sigmas) if request.s_churn > 0.0 => sigmas,
        _ if calls.len() == plan.moves.len() => {
            // Where the move starts, whatever the network was told.
            let of = |(call, planned): (&Asked, &Move)| {
                let from = match planned {
                    Move::Denoise(from, _) => *from,
                    _ => call.at,
                };
                Ok(call.said.x0(&call.x, At::All(from))?)
            };
            return calls.iter().zip(&plan.moves).map(of).collect();
        }
        _ => return Ok(calls.iter().map(|call| call.x0.clone()).collect()),
    };
    let raise = (request.s_churn / (sigmas.len() - 1) as f64).min(2f64.sqrt() - 1.0);
    let mut noises = noises.iter();
    let mut out = Vec::new();
    for (i, (call, next)) in calls.iter().zip(states).enumerate() {
        let sigma = call.at.sigma;
        if sigma < request.s_tmin || request.s_tmax.is_some_and(|max| sigma > max) {
            out.push(call.x0.clone());
            continue;
        }
        let raised = sigma * (1.0 + raise);
        let z = noises
            .next()
            .context("more raised levels than noise")?
            .to_dtype(call.x.dtype())?;
        let added = (raised * raised - sigma * sigma).sqrt() * request.s_noise.unwrap_or(1.0);
        let x = lincomb(1.0, &call.x, added, &z)?;
        let slope = lincomb(1.0, next, -1.0, &x)?.affine(1.0 / (sigmas[i + 1] - raised), 0.0)?;
        out.push(lincomb(1.0, &x, -raised, &slope)?);
    }
    Ok(out)
}
