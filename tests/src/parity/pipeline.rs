//! Saved model folders, from the files to the images.

use super::compare::Check;
use super::fixture::{Fixture, number, values};
use super::unsupported;
use crate::unet::{SavedUNet, as_images};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use diffusion_core::interop::scheduler::Request;
use diffusion_core::noise::RecordedNoise;
use diffusion_core::sample::{Ctx, Progress};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::ops::ControlFlow;

/// Arguments of the pipeline call that are known.
const KNOWN: &[&str] = &[
    "batch_size",
    "num_inference_steps",
    "eta",
    "output_type",
    "use_clipped_model_output",
    "return_dict",
];

/// A pipeline of a `UNet2DModel` and a scheduler that starts from plain noise; a network with
/// classes is given the stored `labels`.
///
/// # Errors
/// `Unsupported` for other pipelines and arguments, and anything that goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let saved = SavedUNet::open(&fixture.path)?;
    if !["DDPMPipeline", "DDIMPipeline"].contains(&saved.pipeline.as_str()) {
        return Err(unsupported(format!("the pipeline {}", saved.pipeline)));
    }
    let empty = Map::new();
    let args = fixture
        .call
        .get("args")
        .and_then(Value::as_object)
        .unwrap_or(&empty);
    if let Some(other) = args.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(unsupported(format!("the argument {other}")));
    }
    let default_steps = if saved.pipeline == "DDPMPipeline" {
        1000
    } else {
        50
    };
    let steps = args.get("num_inference_steps").and_then(Value::as_u64);
    let clipped = args
        .get("use_clipped_model_output")
        .and_then(Value::as_bool);
    let request = Request {
        steps: Some(steps.map_or(default_steps, |n| n as usize)),
        eta: number(args.get("eta"), "eta")?.unwrap_or(0.0),
        use_clipped_model_output: clipped.unwrap_or(false),
        ..Request::default()
    };
    let plan = saved.scheduler.plan(&request)?;

    let mut noises = fixture.numbered("noise").into_iter();
    let x = noises.next().context("no tensor `noise.0`")?;
    let outputs = RefCell::new(Vec::new());
    let labels = fixture.inputs.get("labels");
    let denoiser = plan.network(DType::F32, |x, t| {
        let said = saved.predict(x, t, labels)?;
        outputs.borrow_mut().push(said.clone());
        Ok(said)
    });
    let mut states: Vec<Tensor> = Vec::new();
    let mut watch = |progress: &Progress<'_>| {
        states.push(progress.x.clone());
        ControlFlow::Continue(())
    };
    let mut noise = RecordedNoise::new(noises);
    let items = 0..x.dim(0)? as u64;
    let last = plan
        .solver
        .solve(x, &mut Ctx::new(&*denoiser, &mut noise, items), &mut watch)?;

    let stored = &fixture.inputs;
    let timesteps = stored.get("timesteps").context("no tensor `timesteps`")?;
    check.integers("timesteps", &plan.timesteps, &values(timesteps)?, 0.0);
    check.stack(stored, "xs", &states)?;
    check.stack(stored, "model_outputs", &outputs.borrow())?;
    check.stored(stored, "images", &as_images(&last)?)
}
