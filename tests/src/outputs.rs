//! What a saved pipeline makes of recorded noise, for other libraries to repeat.

use crate::unet::{SavedUNet, as_images};
use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use diffusion_core::interop::scheduler::Request;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::sample::{Ctx, Progress};
use diffusion_nn::net::unet2d::SampleSize;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// Noise that is written down as it is drawn.
struct Recording {
    source: CounterNoise,
    drawn: Vec<Tensor>,
}

impl Noise for Recording {
    fn normal(&mut self, like: &Tensor) -> diffusion_core::Result<Tensor> {
        let noise = self.source.normal(like)?;
        self.drawn.push(noise.clone());
        Ok(noise)
    }

    fn brownian(&mut self, like: &Tensor, from: f64, to: f64) -> diffusion_core::Result<Tensor> {
        self.source.brownian(like, from, to)
    }

    fn child(&mut self, label: u64) -> Box<dyn Noise> {
        self.source.child(label)
    }
}

/// Runs a pipeline from noise of a seed and gives `noise.0` (the first sample), `noise.1`, … (the
/// later draws), `timesteps [n]`, `xs [n, B, C, H, W]` after each step, `images [B, H, W, C]`, and
/// `labels [B]` where they were given: a network's own labels, the withheld one among them.
///
/// # Errors
/// When the scheduler refuses the number of steps, or the network its input.
pub fn outputs(
    saved: &SavedUNet,
    steps: usize,
    batch: usize,
    seed: u64,
    labels: Option<&[u32]>,
) -> Result<BTreeMap<String, Tensor>> {
    let plan = saved.scheduler.plan(&Request::steps(steps))?;
    let config = saved.net.config();
    let [height, width] = match config.sample_size {
        Some(SampleSize::Side(side)) => [side, side],
        Some(SampleSize::HeightWidth(sides)) => sides,
        None => bail!("unet/config.json: no sample_size; expected the side of the images"),
    };
    let like = Tensor::zeros(
        (batch, config.in_channels, height, width),
        DType::F32,
        &Device::Cpu,
    )?;
    let mut noise = Recording {
        source: CounterNoise::new(seed, 0..batch as u64),
        drawn: Vec::new(),
    };
    let labels = match labels {
        Some(labels) if labels.len() != batch => {
            bail!(
                "{} labels; expected one for each of {batch} images",
                labels.len()
            )
        }
        Some(labels) => Some(Tensor::new(labels, &Device::Cpu)?),
        None => None,
    };
    let x = noise.normal(&like)?;
    let denoiser = plan.network(DType::F32, |x, t| saved.predict(x, t, labels.as_ref()));
    let mut states: Vec<Tensor> = Vec::new();
    let mut watch = |progress: &Progress<'_>| {
        states.push(progress.x.clone());
        ControlFlow::Continue(())
    };
    let mut ctx = Ctx::new(&*denoiser, &mut noise, 0..batch as u64);
    let last = plan.solver.solve(x, &mut ctx, &mut watch)?;
    let mut out: BTreeMap<String, Tensor> = noise
        .drawn
        .into_iter()
        .enumerate()
        .map(|(k, tensor)| (format!("noise.{k}"), tensor))
        .collect();
    out.insert(
        "timesteps".into(),
        Tensor::new(plan.timesteps, &Device::Cpu)?,
    );
    if let Some(labels) = &labels {
        out.insert("labels".into(), labels.to_dtype(DType::I64)?);
    }
    out.insert("xs".into(), Tensor::stack(&states, 0)?);
    out.insert("images".into(), as_images(&last)?);
    Ok(out)
}
