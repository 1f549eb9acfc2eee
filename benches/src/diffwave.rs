//! DiffWave BASE (Kong et al. 2021): 30 residual layers of 64 channels, conditioned on a mel
//! spectrogram that has been brought to the rate of the audio.

use crate::case::{Spec, normal};
use crate::network::{self, Forward, Plan};
use anyhow::Result;
use candle_core::Tensor;
use diffusion_nn::Scope;
use diffusion_nn::layer::{Conv1d, Conv1dConfig, Linear};
use diffusion_ops::{add, gated_tanh, relu, silu};
use serde_json::{Value, json};

const CHANNELS: usize = 64;
const LAYERS: usize = 30;
const CYCLE: usize = 10;
const MELS: usize = 80;
const STEP: usize = 128;
const EMBEDDING: usize = 512;
const SAMPLES: usize = 16_000;

pub(crate) fn specs() -> Vec<Spec> {
    network::specs("waveform/diffwave-base", DiffWave, 4, &[4, 1])
}

struct DiffWave;

impl Plan for DiffWave {
    fn network(&self) -> &'static str {
        "diffwave"
    }

    fn config(&self) -> Value {
        json!({ "channels": CHANNELS, "layers": LAYERS, "cycle": CYCLE, "mels": MELS,
                "step": STEP, "embedding": EMBEDDING })
    }

    fn build(&self, scope: &Scope) -> diffusion_nn::Result<Forward> {
        let net = Network::new(scope)?;
        Ok(Box::new(move |inputs| {
            net.forward(&inputs[0], &inputs[1], &inputs[2])
        }))
    }

    fn inputs(&self, batch: usize) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(vec![
            ("audio", normal(1, &[batch, 1, SAMPLES])?),
            ("mel", normal(2, &[batch, MELS, SAMPLES])?),
            ("step", normal(3, &[batch, STEP])?),
        ])
    }

    fn shape(&self, batch: usize) -> Vec<usize> {
        vec![batch, 1, SAMPLES]
    }
}

fn conv(
    scope: &Scope,
    name: &str,
    from: usize,
    to: usize,
    kernel: usize,
    dilation: usize,
) -> diffusion_nn::Result<Conv1d> {
    let config = Conv1dConfig::same(from, to, kernel, dilation);
    Conv1d::new(&scope.sub(name), config)
}

/// ```text
/// a, b = D(x + W_e e) + W_c mel              D: 3 taps, 2^(i mod 10) apart
/// r, s = W_o (tanh(a) ⊙ σ(b));    x ← (x + r)/√2,    skip ← s
/// ```
struct Residual {
    dilated_conv: Conv1d,
    diffusion_projection: Linear,
    conditioner_projection: Conv1d,
    output_projection: Conv1d,
}

impl Residual {
    fn new(scope: &Scope, dilation: usize) -> diffusion_nn::Result<Self> {
        let (c, wide) = (CHANNELS, 2 * CHANNELS);
        let project = scope.sub("diffusion_projection");
        Ok(Self {
            dilated_conv: conv(scope, "dilated_conv", c, wide, 3, dilation)?,
            diffusion_projection: Linear::new(&project, EMBEDDING, c, true)?,
            conditioner_projection: conv(scope, "conditioner_projection", MELS, wide, 1, 1)?,
            output_projection: conv(scope, "output_projection", c, wide, 1, 1)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        mel: &Tensor,
        step: &Tensor,
    ) -> diffusion_nn::Result<(Tensor, Tensor)> {
        let h = x.broadcast_add(&self.diffusion_projection.forward(step)?.unsqueeze(2)?)?;
        let mel = self.conditioner_projection.forward(mel)?;
        let h = add(&self.dilated_conv.forward(&h)?, &mel)?;
        let h = self.output_projection.forward(&gated_tanh(&h, 1)?)?;
        let residual = ((x + h.narrow(1, 0, CHANNELS)?)? * std::f64::consts::FRAC_1_SQRT_2)?;
        Ok((residual, h.narrow(1, CHANNELS, CHANNELS)?))
    }
}

struct Network {
    input_projection: Conv1d,
    projection1: Linear,
    projection2: Linear,
    residual_layers: Vec<Residual>,
    skip_projection: Conv1d,
    output_projection: Conv1d,
}

impl Network {
    fn new(scope: &Scope) -> diffusion_nn::Result<Self> {
        let step = scope.sub("diffusion_embedding");
        let layers = scope.sub("residual_layers");
        Ok(Self {
            input_projection: conv(scope, "input_projection", 1, CHANNELS, 1, 1)?,
            projection1: Linear::new(&step.sub("projection1"), STEP, EMBEDDING, true)?,
            projection2: Linear::new(&step.sub("projection2"), EMBEDDING, EMBEDDING, true)?,
            residual_layers: (0..LAYERS)
                .map(|i| Residual::new(&layers.sub(i), 1 << (i % CYCLE)))
                .collect::<Result<_, _>>()?,
            skip_projection: conv(scope, "skip_projection", CHANNELS, CHANNELS, 1, 1)?,
            output_projection: conv(scope, "output_projection", CHANNELS, 1, 1, 1)?,
        })
    }

    fn forward(&self, audio: &Tensor, mel: &Tensor, step: &Tensor) -> diffusion_nn::Result<Tensor> {
        let mut h = relu(&self.input_projection.forward(audio)?)?;
        let step = silu(&self.projection1.forward(step)?)?;
        let step = silu(&self.projection2.forward(&step)?)?;
        let mut skips: Option<Tensor> = None;
        for layer in &self.residual_layers {
            let (next, skip) = layer.forward(&h, mel, &step)?;
            h = next;
            skips = Some(match skips {
                Some(sum) => add(&sum, &skip)?,
                None => skip,
            });
        }
        let h = (skips.unwrap_or(h) / (LAYERS as f64).sqrt())?;
        let h = relu(&self.skip_projection.forward(&h)?)?;
        self.output_projection.forward(&h)
    }
}
