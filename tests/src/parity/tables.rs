//! Timesteps and noise levels of many classes and step counts.

use super::compare::Check;
use super::fixture::{Fixture, values};
use anyhow::{Context, Result};
use diffusion_core::interop::scheduler::{Request, Scheduler};
use serde_json::{Value, json};

/// Runs `call.cases`, a list of `[class, config, key]`, for every count in `call.ns`. A combination
/// without stored tables is one that the library refuses.
///
/// # Errors
/// When the fixture is incomplete, or a stored combination is refused here.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let list = |name: &str| {
        let value = fixture.call.get(name).and_then(Value::as_array);
        value.with_context(|| format!("call.{name}: expected a list"))
    };
    let slack = fixture.call.get("timestep_slack");
    for case in list("cases")? {
        let (Some(class), Some(config), Some(key)) = (
            case.get(0).and_then(Value::as_str),
            case.get(1).and_then(Value::as_object),
            case.get(2).and_then(Value::as_str),
        ) else {
            anyhow::bail!("call.cases: expected [class, config, key]");
        };
        let mut config = config.clone();
        config.insert("_class_name".into(), json!(class));
        let text = Value::Object(config).to_string();
        for n in list("ns")? {
            let n = n.as_u64().context("call.ns: expected whole numbers")? as usize;
            let name = format!("{key}.n{n}.timesteps");
            let Some(stored) = fixture.outputs.get(&name) else {
                continue;
            };
            let (timesteps, integer, sigmas) = if class == "VQDiffusionScheduler" {
                // It counts down, whatever the process.
                ((0..n).rev().map(|t| t as f64).collect(), true, None)
            } else {
                let plan = Scheduler::from_json(&text, key)
                    .and_then(|scheduler| scheduler.plan(&Request::steps(n)))
                    .with_context(|| format!("{key} with {n} steps"))?;
                (plan.timesteps, plan.integer_timesteps, plan.sigmas)
            };
            let allowed = slack.and_then(|s| s.get(&name).or_else(|| s.get(key)));
            if integer || stored.dtype() == candle_core::DType::I64 {
                let allowed = allowed.and_then(Value::as_f64).unwrap_or(0.0);
                check.integers(&name, &timesteps, &values(stored)?, allowed);
            } else {
                check.values(&name, &timesteps, &values(stored)?);
            }
            let name = format!("{key}.n{n}.sigmas");
            if let (Some(stored), Some(ours)) = (fixture.outputs.get(&name), sigmas) {
                check.values(&name, &ours, &values(stored)?);
            }
        }
    }
    Ok(())
}
