//! Samplers without their network: whole runs over a batch of 64 colour pictures of 32x32, the model's
//! answer being a tensor at hand.

use crate::case::{Case, Reference, Spec, Work, normal};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Denoiser, from_fn};
use diffusion_core::interop::scheduler::{Plan, Request, Scheduler};
use diffusion_core::noise::CounterNoise;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::sample;
use serde_json::{Value, json};

/// Batch, channels, height, width.
pub const SHAPE: [usize; 4] = [64, 3, 32, 32];
/// Steps of a run.
pub const STEPS: usize = 20;

/// Name, class of diffusers, and its options.
fn schedulers() -> Vec<(&'static str, Value)> {
    let class = |name: &str, more: Value| {
        let mut config = json!({ "_class_name": name, "clip_sample": false });
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        config
    };
    let dpm = |order: usize| {
        class(
            "DPMSolverMultistepScheduler",
            json!({ "solver_order": order }),
        )
    };
    vec![
        (
            "ddim",
            class("DDIMScheduler", json!({ "timestep_spacing": "trailing" })),
        ),
        ("euler", class("EulerDiscreteScheduler", json!({}))),
        (
            "heun",
            class(
                "HeunDiscreteScheduler",
                json!({ "beta_start": 1e-4, "beta_end": 0.02 }),
            ),
        ),
        ("dpmpp-2m", dpm(2)),
        ("dpmpp-3m", dpm(3)),
        (
            "deis-3",
            class("DEISMultistepScheduler", json!({ "solver_order": 3 })),
        ),
        ("unipc-2", class("UniPCMultistepScheduler", json!({}))),
        ("lms", class("LMSDiscreteScheduler", json!({}))),
        (
            "plms",
            class("PNDMScheduler", json!({ "skip_prk_steps": true })),
        ),
    ]
}

pub(crate) fn specs() -> Vec<Spec> {
    schedulers()
        .into_iter()
        .map(|(name, config)| {
            Spec::new(
                format!("sampling/{name}/run-{STEPS}"),
                Work::Call,
                move || Ok(Box::new(Run::new(config.clone())?)),
            )
        })
        .collect()
}

struct Run {
    config: Value,
    plan: Plan,
    x: Tensor,
    epsilon: Tensor,
}

impl Run {
    fn new(config: Value) -> Result<Self> {
        let scheduler = Scheduler::from_json(&config.to_string(), "config")?;
        let plan = scheduler.plan(&Request::steps(STEPS))?;
        Ok(Self {
            config,
            x: (normal(1, &SHAPE)? * plan.init_noise_sigma)?,
            epsilon: normal(2, &SHAPE)?,
            plan,
        })
    }

    fn run(&self) -> Result<Tensor> {
        let denoiser = self.plan.wrap(still(&self.epsilon));
        let mut noise = CounterNoise::new(0, 0..SHAPE[0] as u64);
        let x = self.x.clone();
        Ok(sample(
            &*self.plan.solver,
            &*denoiser,
            x,
            &mut noise,
            0..SHAPE[0] as u64,
        )?)
    }
}

/// A network that costs nothing.
pub fn still(epsilon: &Tensor) -> impl Denoiser + '_ {
    from_fn(move |x: &Tensor, _, _| {
        // As networks do whose state is wider than they are.
        let value = epsilon.to_dtype(x.dtype())?;
        Ok(Prediction::new(Kind::Epsilon, value))
    })
}

/// A batch of noise.
///
/// # Errors
/// Those of the tensor library.
pub fn batch(seed: u64) -> Result<Tensor> {
    normal(seed, &SHAPE)
}

/// A batch of zeros.
///
/// # Errors
/// Those of the tensor library.
pub fn zeros() -> Result<Tensor> {
    Ok(Tensor::zeros(&SHAPE, DType::F32, &Device::Cpu)?)
}

impl Case for Run {
    fn call(&mut self) -> Result<()> {
        std::hint::black_box(self.run()?);
        Ok(())
    }

    fn reference(&self) -> Result<Reference> {
        let config = json!({ "work": "run", "scheduler": self.config, "steps": STEPS });
        let mut reference = Reference::new(config);
        reference.put("inputs", "x", &self.x)?;
        reference.put("inputs", "epsilon", &self.epsilon)?;
        reference.put("outputs", "x", &self.run()?)?;
        Ok(reference)
    }
}
