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
use diffusion_core::sample::{Ctx, Progress};
use diffusion_core::tensor::lincomb;
use serde_json::Value;
use std::ops::ControlFlow;

/// What may stand in `call`; anything else changes the run in a way that is not known here.
const KNOWN: &[&str] = &[
    "num_inference_steps",
    "timesteps",
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
    if !matches!(fixture.text("loop"), "" | "standard") {
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
    let x0s = denoised(&plan, &request, &calls, &states, &noises)?;
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
    let Some(step) = fixture.call.get("step").and_then(Value::as_object) else {
        return Ok(request);
    };
    for (name, value) in step {
        let given = || number(Some(value), name);
        match name.as_str() {
            "eta" => request.eta = given()?.unwrap_or(0.0),
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
        ("alphas_cumprod", Some(table), Frame::Vp) => Coefficients::AlphaBar(table.clone()),
        ("sigma_vp", _, Frame::VpInVe) | ("edm", _, Frame::Edm { .. }) => Coefficients::Point,
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
