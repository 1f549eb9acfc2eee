//! Single formulas: forward noising, embeddings, EMA, learning rates, preconditioning, guidance.

use super::compare::Check;
use super::fixture::{Fixture, number, values};
use super::{scheduler, unsupported};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::TimeCode;
use diffusion_core::denoiser::edm::edm_in;
use diffusion_core::forward::marginal;
use diffusion_core::guide::{guide, rescale};
use diffusion_core::interop::scheduler::{Frame, Plan, Request, Scheduler};
use diffusion_core::predict::{Kind, Prediction, target};
use diffusion_core::sample::Move;
use diffusion_core::schedule::Point;
use diffusion_core::tensor::At;
use diffusion_nn::layer::{DiagonalGaussian, sincos_position_2d};

/// Runs a function fixture.
///
/// # Errors
/// `Unsupported` for functions and classes that this version does not have, and anything that
/// goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    match fixture.text("function") {
        "add_noise_vp" => noise_at_timesteps(fixture, check),
        "add_noise_index" | "scale_noise" => noise_at_indices(fixture, check),
        "diagonal_gaussian" => diagonal_gaussian(fixture, check),
        "get_2d_sincos_pos_embed" => positions(fixture, check),
        "get_timestep_embedding" => embedding(fixture, check),
        "edm_precondition" => precondition(fixture, check),
        "rescale_noise_cfg" => guidance(fixture, check),
        "ema_decay" | "ema_step" => super::training::ema(fixture, check),
        "lr_schedule" => super::training::learning_rates(fixture, check),
        other => Err(unsupported(format!("the function {other}"))),
    }
}

/// `x_t = α x₀ + σ ε` at integer timesteps, the training targets there, and the tables.
fn noise_at_timesteps(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let scheduler = Scheduler::from_json(&fixture.config_text(), "config")?;
    let Some(table) = scheduler.table() else {
        return Err(unsupported(format!("{} has no table", scheduler.class())));
    };
    let (x0, noise) = (fixture.input_f64("x0")?, fixture.input_f64("noise")?);
    let steps = fixture
        .input("timesteps")?
        .to_dtype(DType::I64)?
        .to_vec1::<i64>()?;
    let points: Vec<Point> = steps.iter().map(|t| table.index(*t)).collect();
    let at = At::Each(&points);
    let out = &fixture.outputs;
    check.stored(out, "noisy", &marginal(&x0, &noise, at)?)?;
    for (name, kind) in [
        ("epsilon", Kind::Epsilon),
        ("sample", Kind::X0),
        ("v_prediction", Kind::Velocity),
    ] {
        check.stored(
            out,
            &format!("target.{name}"),
            &target(kind, &x0, &noise, at)?,
        )?;
    }
    let snr: Vec<f64> = points.iter().map(Point::snr).collect();
    for (name, ours) in [
        ("snr", snr.as_slice()),
        ("betas", table.betas()),
        ("alphas_cumprod", table.alpha_bar()),
    ] {
        if let Some(stored) = out.get(name) {
            check.values(name, ours, &values(stored)?);
        }
    }
    Ok(())
}

/// The forward process at the timesteps of a sampling run.
fn noise_at_indices(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let scheduler = Scheduler::from_json(&fixture.config_text(), "config")?;
    let steps = fixture
        .count("num_inference_steps")?
        .context("call.num_inference_steps is missing")?;
    let plan = scheduler.plan(&Request {
        steps: Some(steps),
        ..Request::default()
    })?;
    let out = &fixture.outputs;
    scheduler::timesteps(
        check,
        "scheduler_timesteps",
        &plan,
        out.get("scheduler_timesteps"),
        0.0,
    )?;
    if let (Some(stored), Some(ours)) = (out.get("scheduler_sigmas"), &plan.sigmas) {
        check.values("scheduler_sigmas", ours, &values(stored)?);
    }
    let indices = fixture
        .input("step_indices")?
        .to_dtype(DType::I64)?
        .to_vec1::<i64>()?;
    let mut points = Vec::new();
    let mut used = Vec::new();
    for index in indices {
        let time = usize::try_from(index)
            .ok()
            .and_then(|i| plan.timesteps.get(i));
        let Some(&time) = time else {
            bail!("step_indices: {index} lies outside the run")
        };
        used.push(time);
        points.push(level(&plan, time)?);
    }
    if let Some(stored) = out.get("timesteps_used") {
        check.values("timesteps_used", &used, &values(stored)?);
    }
    let (x0, noise) = (fixture.input_f64("x0")?, fixture.input_f64("noise")?);
    let at = At::Each(&points);
    check.stored(out, "noisy", &marginal(&x0, &noise, at)?)?;
    check.stored(
        out,
        "target.velocity",
        &target(Kind::Flow, &x0, &noise, at)?,
    )
}

/// The posterior of an autoencoder.
fn diagonal_gaussian(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let p = DiagonalGaussian::new(&fixture.input_f64("moments")?)?;
    let out = &fixture.outputs;
    for (name, ours) in [
        ("mean", p.mean.clone()),
        ("mode", p.mean.clone()),
        ("logvar", p.logvar.clone()),
        ("std", p.std()?),
        ("var", p.var()?),
        ("sample", p.sample(&fixture.input_f64("noise")?)?),
        ("kl", p.kl()?),
        ("nll", p.nll(&fixture.input_f64("x")?)?),
    ] {
        check.stored(out, name, &ours)?;
    }
    Ok(())
}

/// The position table of a vision transformer.
fn positions(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let count = |name: &str| {
        fixture
            .count(name)?
            .with_context(|| format!("call.{name} is missing"))
    };
    let grid = match fixture.call.get("grid_size").and_then(|v| v.as_array()) {
        Some(sides) => {
            let side = |i: usize| sides.get(i).and_then(|v| v.as_u64()).map(|s| s as usize);
            side(0)
                .zip(side(1))
                .context("call.grid_size: expected two sides")?
        }
        None => (count("grid_size")?, count("grid_size")?),
    };
    let base = fixture.count("base_size")?.unwrap_or(16);
    let scale = fixture.number("interpolation_scale")?.unwrap_or(1.0);
    let ours = sincos_position_2d(count("embed_dim")?, grid, base, scale, &Device::Cpu)?;
    check.stored(&fixture.outputs, "pos_embed", &ours)
}

/// The level that belongs to a timestep of a run. Where several steps share the timestep it is
/// the second one's, as the library has it.
fn level(plan: &Plan, time: f64) -> Result<Point> {
    if plan.frame == Frame::Vp {
        let mut from = plan.moves.iter().filter_map(|planned| match planned {
            Move::Denoise(from, _) if (from.t - time).abs() <= 1e-6 * time.abs() => Some(*from),
            _ => None,
        });
        let first = from.next().context("no step starts at this timestep")?;
        return Ok(from.next().unwrap_or(first));
    }
    let sigmas = plan
        .sigmas
        .as_ref()
        .context("the scheduler has no noise levels")?;
    let mut same = plan
        .timesteps
        .iter()
        .zip(sigmas)
        .filter(|(t, _)| **t == time);
    let first = same.next().context("no step has this timestep")?;
    Ok(Point::new(time, 1.0, *same.next().unwrap_or(first).1))
}

fn embedding(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let kwargs = &fixture
        .call
        .get("kwargs")
        .and_then(|v| v.as_object())
        .cloned()
        .unwrap_or_default();
    let known = [
        "embedding_dim",
        "flip_sin_to_cos",
        "downscale_freq_shift",
        "scale",
        "max_period",
    ];
    if let Some(other) = kwargs.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(unsupported(format!("call.kwargs.{other}")));
    }
    let given = |name: &str, default: f64| -> Result<f64> {
        Ok(number(kwargs.get(name), name)?.unwrap_or(default))
    };
    let dim = kwargs
        .get("embedding_dim")
        .and_then(|v| v.as_u64())
        .context("no embedding_dim")?;
    let flip = kwargs
        .get("flip_sin_to_cos")
        .and_then(|v| v.as_bool())
        .unwrap_or(false);
    let ours = diffusion_ops::timestep_embedding(
        fixture.input("timesteps")?,
        dim as usize,
        flip,
        given("downscale_freq_shift", 1.0)?,
        given("scale", 1.0)?,
        given("max_period", 10_000.0)?,
    )?;
    check.stored(&fixture.outputs, "embedding", &ours)
}

/// EDM's three scalings, for each noise level.
fn precondition(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let scheduler = Scheduler::from_json(&fixture.config_text(), "config")?;
    let kind = scheduler.kind();
    let Kind::Edm { sigma_data, .. } = kind else {
        return Err(unsupported(format!(
            "{} is not preconditioned",
            scheduler.class()
        )));
    };
    let (x, raw) = (fixture.input_f64("x")?, fixture.input_f64("model_output")?);
    let mut scaled = Vec::new();
    let mut denoised = Vec::new();
    let mut codes = Vec::new();
    for sigma in values(fixture.input("sigma")?)? {
        let point = Point::new(sigma, 1.0, sigma);
        scaled.push(x.affine(edm_in(sigma, sigma_data), 0.0)?);
        codes.push(TimeCode::CNoise.encode(&point));
        denoised.push(Prediction::new(kind, raw.clone()).x0(&x, At::All(point))?);
    }
    let out = &fixture.outputs;
    check.stack(out, "scaled_input", &scaled)?;
    check.stack(out, "denoised", &denoised)?;
    check.stored(out, "c_noise", &Tensor::new(codes, &Device::Cpu)?)
}

fn guidance(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let (conditional, unconditional) = (fixture.input_f64("cond")?, fixture.input_f64("uncond")?);
    let weight = fixture
        .number("guidance_scale")?
        .context("call.guidance_scale is missing")?;
    let amount = fixture
        .number("guidance_rescale")?
        .context("call.guidance_rescale is missing")?;
    let guided = guide(&conditional, &unconditional, weight)?;
    let out = &fixture.outputs;
    check.stored(out, "guided", &guided)?;
    check.stored(out, "rescaled", &rescale(&guided, &conditional, amount)?)
}
