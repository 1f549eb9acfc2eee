//! Networks of the authors' code, with gradients where they are stored.
//!
//! | file | systems |
//! |---|---|
//! | `edm` | EDM, with its preconditioners, losses and sampler |
//! | `openai` | improved-diffusion, guided-diffusion |
//! | `score_sde` | the score SDE code, with its resampling and average |

pub mod edm;
mod openai;
pub mod score_sde;

pub use openai::{classifier, openai_unet, super_resolution, unet};

use super::super::compare::Check;
use super::super::fixture::{Fixture, Tensors, values};
use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use diffusion_nn::{Scope, Store, Strictness};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Gradients that are zero but for rounding are compared within this.
const ZERO_GRADIENT: f64 = 1e-6;

/// A network on the fixture's weights, without variables.
fn serve<T>(weights: &Tensors, build: impl FnOnce(&Scope) -> diffusion_nn::Result<T>) -> Result<T> {
    Ok(Store::serve(weights, DType::F32, &Device::Cpu, build)?)
}

/// The network's part of the configuration as its own type.
fn config<T: DeserializeOwned>(map: &Map<String, Value>) -> Result<T> {
    serde_json::from_value(Value::Object(map.clone())).context("the network's configuration")
}

/// Compares the loss `mean((out − grad_target)²)` and its gradients with the stored ones, if there
/// are any. Gradients are compared relative to the largest entry of each.
fn gradients<T>(
    fixture: &Fixture,
    check: &mut Check,
    build: impl FnOnce(&Scope) -> diffusion_nn::Result<T>,
    forward: impl Fn(&T) -> Result<Tensor>,
) -> Result<()> {
    let stored = fixture.tensors("grads")?;
    if stored.is_empty() {
        return Ok(());
    }
    let store = Store::new(0, DType::F32, &Device::Cpu);
    let net = build(&store.root())?;
    store.load(&fixture.tensors("weights")?, Strictness::Exact)?;
    let loss = (forward(&net)? - fixture.input("grad_target")?)?
        .sqr()?
        .mean_all()?;
    check.stored(&stored, "loss", &loss)?;
    let grads = diffusion_ops::backward(&loss)?;
    let params = store.named();
    for (key, stored) in &stored {
        let Some(name) = key.strip_prefix("grad.") else {
            continue;
        };
        let var = params
            .get(name)
            .ok_or_else(|| anyhow!("a gradient is stored for `{name}`, which is no parameter"))?;
        let Some(ours) = grads.get(var.as_tensor()) else {
            check.failures.push(format!("no gradient of `{name}`"));
            continue;
        };
        let stored = values(stored)?;
        let largest = stored.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        let bound = (fixture.tolerance.rel * largest).max(ZERO_GRADIENT);
        check.within(key, &values(ours)?, &stored, |_| bound);
    }
    Ok(())
}

/// Compares the result of a whole sampling loop, relative to its largest entry.
fn whole(check: &mut Check, outputs: &Tensors, name: &str, ours: &Tensor) -> Result<()> {
    let stored = outputs
        .get(name)
        .ok_or_else(|| anyhow!("no output tensor `{name}`"))?;
    if ours.dims() != stored.dims() {
        return check.tensor(name, ours, stored);
    }
    let stored = values(stored)?;
    let largest = stored.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    let bound = check.relative() * largest;
    check.within(name, &values(ours)?, &stored, |_| bound);
    Ok(())
}
