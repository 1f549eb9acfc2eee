//! The pure functions of training: decays of the moving average, learning rates.

use super::compare::Check;
use super::fixture::{Fixture, number, values};
use super::unsupported;
use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Tensor, Var};
use diffusion_core::train::{Ema, EmaRule, LrSchedule};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The decay at each step, or the average after each of a list of parameters.
///
/// # Errors
/// `Unsupported` for options that are not known, and anything that goes wrong.
pub fn ema(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let rule = ema_rule(&kwargs(&fixture.call, "kwargs")?)?;
    if fixture.text("function") == "ema_decay" {
        let steps = values(fixture.input("steps")?)?;
        let ours: Vec<f64> = steps.iter().map(|step| rule.decay(*step as u64)).collect();
        let stored = fixture
            .outputs
            .get("decay")
            .context("no output tensor `decay`")?;
        check.values("decay", &ours, &values(stored)?);
        return Ok(());
    }
    check.stored(
        &fixture.outputs,
        "shadow",
        &averages(rule, fixture.input("params")?)?,
    )
}

/// The average after each row of `params [N, D]` but the first, which begins it: `[N − 1, D]`.
///
/// # Errors
/// Those of the average.
pub fn averages(rule: EmaRule, params: &Tensor) -> Result<Tensor> {
    let rows = params.to_dtype(DType::F32)?;
    let count = rows.dim(0)?;
    let var = Var::from_tensor(&rows.get(0)?)?;
    let params = BTreeMap::from([("p".to_string(), var.clone())]);
    let mut average = Ema::new(rule, &params)?.context("no average")?;
    let mut states = Vec::new();
    for row in 1..count {
        var.set(&rows.get(row)?)?;
        average.update(&params)?;
        let shadow = average.weights()?.remove("p");
        states.push(shadow.context("the average lost its parameter")?);
    }
    Ok(Tensor::stack(&states, 0)?)
}

fn ema_rule(kwargs: &Map<String, Value>) -> Result<EmaRule> {
    let known = [
        "decay",
        "min_decay",
        "update_after_step",
        "use_ema_warmup",
        "inv_gamma",
        "power",
    ];
    refuse_others(kwargs, &known)?;
    let given = |name: &str, default: f64| -> Result<f64> {
        Ok(number(kwargs.get(name), name)?.unwrap_or(default))
    };
    let (decay, min_decay) = (given("decay", 0.9999)?, given("min_decay", 0.0)?);
    let update_after_step = given("update_after_step", 0.0)? as u64;
    if !kwargs
        .get("use_ema_warmup")
        .and_then(Value::as_bool)
        .unwrap_or(false)
    {
        return Ok(EmaRule::Plain {
            decay,
            update_after_step,
            min_decay,
        });
    }
    let (inv_gamma, power) = (given("inv_gamma", 1.0)?, given("power", 2.0 / 3.0)?);
    Ok(EmaRule::Warmup {
        decay,
        inv_gamma,
        power,
        update_after_step,
        min_decay,
    })
}

/// The learning rate before each optimiser step.
///
/// # Errors
/// `Unsupported` for schedules and options that are not known, and anything that goes wrong.
pub fn learning_rates(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let base = fixture
        .number("base_lr")?
        .context("call.base_lr is missing")?;
    let steps = fixture.count("steps")?.context("call.steps is missing")? as u64;
    for (name, kwargs) in &kwargs(&fixture.call, "schedules")? {
        let kwargs = kwargs
            .as_object()
            .with_context(|| format!("call.schedules.{name}"))?;
        let schedule = schedule(name, kwargs)?;
        let total = number(kwargs.get("num_training_steps"), "num_training_steps")?;
        let total = total.map_or(steps, |total| total as u64);
        let ours: Vec<f64> = (0..steps)
            .map(|step| schedule.rate(base, step, total))
            .collect();
        let stored = fixture
            .outputs
            .get(name)
            .with_context(|| format!("no output `{name}`"))?;
        check.values(name, &ours, &values(stored)?);
    }
    Ok(())
}

fn schedule(name: &str, kwargs: &Map<String, Value>) -> Result<LrSchedule> {
    let known = [
        "num_warmup_steps",
        "num_training_steps",
        "num_cycles",
        "power",
        "lr_end",
    ];
    refuse_others(kwargs, &known)?;
    let given = |name: &str, default: f64| -> Result<f64> {
        Ok(number(kwargs.get(name), name)?.unwrap_or(default))
    };
    let warmup = given("num_warmup_steps", 0.0)? as u64;
    Ok(match name {
        "constant" => LrSchedule::Constant {},
        "constant_with_warmup" => LrSchedule::ConstantWithWarmup { warmup },
        "linear" => LrSchedule::Linear { warmup },
        "cosine" => LrSchedule::Cosine {
            warmup,
            cycles: given("num_cycles", 0.5)?,
        },
        "cosine_with_restarts" => LrSchedule::CosineWithRestarts {
            warmup,
            cycles: given("num_cycles", 1.0)? as u64,
        },
        "polynomial" => LrSchedule::Polynomial {
            warmup,
            end: given("lr_end", 1e-7)?,
            power: given("power", 1.0)?,
        },
        other => return Err(unsupported(format!("the learning-rate schedule {other}"))),
    })
}

fn kwargs(call: &Map<String, Value>, name: &str) -> Result<Map<String, Value>> {
    match call.get(name) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(other) => Err(anyhow!("call.{name}: {other}; expected an object")),
    }
}

fn refuse_others(kwargs: &Map<String, Value>, known: &[&str]) -> Result<()> {
    match kwargs.keys().find(|key| !known.contains(&key.as_str())) {
        Some(other) => Err(unsupported(format!("the argument {other}"))),
        None => Ok(()),
    }
}
