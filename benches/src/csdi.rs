//! The residual network of CSDI (Tashiro et al. 2021) at its published size, on the grid of the
//! air-quality data: 36 stations, 36 hours.

use crate::case::{Spec, normal};
use crate::network::{self, Forward, Plan};
use anyhow::Result;
use candle_core::Tensor;
use diffusion_nn::layer::{
    Activation, Conv1d, Conv1dConfig, Linear, TransformerEncoderLayer,
    TransformerEncoderLayerConfig,
};
use diffusion_nn::{Mode, Scope};
use diffusion_ops::{add, gated_tanh, relu, silu};
use serde_json::{Value, json};

const FEATURES: usize = 36;
const LENGTH: usize = 36;
const CHANNELS: usize = 64;
const LAYERS: usize = 4;
const HEADS: usize = 8;
/// 128 of the time, 16 of the feature, 1 of the mask.
const SIDE: usize = 145;
const STEP: usize = 128;

pub(crate) fn specs() -> Vec<Spec> {
    network::specs("timeseries/csdi-transformer", Csdi, 16, &[16, 1])
}

struct Csdi;

impl Plan for Csdi {
    fn network(&self) -> &'static str {
        "csdi"
    }

    fn config(&self) -> Value {
        json!({ "channels": CHANNELS, "layers": LAYERS, "heads": HEADS, "side": SIDE,
                "step": STEP })
    }

    fn build(&self, scope: &Scope) -> diffusion_nn::Result<Forward> {
        let net = Network::new(scope)?;
        Ok(Box::new(move |inputs| {
            net.forward(&inputs[0], &inputs[1], &inputs[2])
        }))
    }

    /// The side information is a fixed tensor: its tables cost nothing beside the network.
    fn inputs(&self, batch: usize) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(vec![
            ("x", normal(1, &[batch, 2, FEATURES, LENGTH])?),
            ("side", normal(2, &[batch, SIDE, FEATURES, LENGTH])?),
            ("step", normal(3, &[batch, STEP])?),
        ])
    }

    fn shape(&self, batch: usize) -> Vec<usize> {
        vec![batch, FEATURES, LENGTH]
    }
}

fn pointwise(scope: &Scope, name: &str, from: usize, to: usize) -> diffusion_nn::Result<Conv1d> {
    Conv1d::new(&scope.sub(name), Conv1dConfig::same(from, to, 1, 1))
}

/// ```text
/// h = x + W_e e
/// h = feature(time(h))                       transformer layers over L, over K
/// a, b = W_m h + W_s side                    halves of the channels
/// r, s = W_o (tanh(a) ⊙ σ(b));    x ← (x + r)/√2,    skip ← s
/// ```
struct Residual {
    diffusion_projection: Linear,
    cond_projection: Conv1d,
    mid_projection: Conv1d,
    output_projection: Conv1d,
    time_layer: TransformerEncoderLayer,
    feature_layer: TransformerEncoderLayer,
}

impl Residual {
    fn new(scope: &Scope) -> diffusion_nn::Result<Self> {
        // Dropout is off: the two libraries' masks would differ, and with them the results.
        let config = TransformerEncoderLayerConfig {
            dim_feedforward: 64,
            dropout: 0.0,
            activation: Activation::Gelu,
            ..TransformerEncoderLayerConfig::new(CHANNELS, HEADS)
        };
        let layer = |name: &str| {
            TransformerEncoderLayer::new(&scope.sub(name).sub("layers").sub(0), config)
        };
        Ok(Self {
            diffusion_projection: Linear::new(
                &scope.sub("diffusion_projection"),
                STEP,
                CHANNELS,
                true,
            )?,
            cond_projection: pointwise(scope, "cond_projection", SIDE, 2 * CHANNELS)?,
            mid_projection: pointwise(scope, "mid_projection", CHANNELS, 2 * CHANNELS)?,
            output_projection: pointwise(scope, "output_projection", CHANNELS, 2 * CHANNELS)?,
            time_layer: layer("time_layer")?,
            feature_layer: layer("feature_layer")?,
        })
    }

    /// `x [B, C, K L]`, `side [B, S, K L]`, `step [B, E]`.
    fn forward(
        &self,
        x: &Tensor,
        side: &Tensor,
        step: &Tensor,
    ) -> diffusion_nn::Result<(Tensor, Tensor)> {
        let (b, c, cells) = x.dims3()?;
        let (k, l) = (FEATURES, LENGTH);
        let h = x.broadcast_add(&self.diffusion_projection.forward(step)?.unsqueeze(2)?)?;
        let h = h
            .reshape((b, c, k, l))?
            .permute((0, 2, 3, 1))?
            .contiguous()?
            .reshape((b * k, l, c))?;
        let h = self.time_layer.forward(&h, None, Mode::Eval)?;
        let h = h
            .reshape((b, k, l, c))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((b * l, k, c))?;
        let h = self.feature_layer.forward(&h, None, Mode::Eval)?;
        let h = h
            .reshape((b, l, k, c))?
            .permute((0, 3, 2, 1))?
            .contiguous()?
            .reshape((b, c, cells))?;
        let side = self.cond_projection.forward(side)?;
        let h = add(&self.mid_projection.forward(&h)?, &side)?;
        let h = self.output_projection.forward(&gated_tanh(&h, 1)?)?;
        let residual = ((x + h.narrow(1, 0, c)?)? * std::f64::consts::FRAC_1_SQRT_2)?;
        Ok((residual, h.narrow(1, c, c)?))
    }
}

struct Network {
    input_projection: Conv1d,
    projection1: Linear,
    projection2: Linear,
    residual_layers: Vec<Residual>,
    output_projection1: Conv1d,
    output_projection2: Conv1d,
}

impl Network {
    fn new(scope: &Scope) -> diffusion_nn::Result<Self> {
        let step = scope.sub("diffusion_embedding");
        let layers = scope.sub("residual_layers");
        Ok(Self {
            input_projection: pointwise(scope, "input_projection", 2, CHANNELS)?,
            projection1: Linear::new(&step.sub("projection1"), STEP, STEP, true)?,
            projection2: Linear::new(&step.sub("projection2"), STEP, STEP, true)?,
            residual_layers: (0..LAYERS)
                .map(|i| Residual::new(&layers.sub(i)))
                .collect::<Result<_, _>>()?,
            output_projection1: pointwise(scope, "output_projection1", CHANNELS, CHANNELS)?,
            output_projection2: pointwise(scope, "output_projection2", CHANNELS, 1)?,
        })
    }

    fn forward(&self, x: &Tensor, side: &Tensor, step: &Tensor) -> diffusion_nn::Result<Tensor> {
        let (b, channels, k, l) = x.dims4()?;
        let mut h = relu(
            &self
                .input_projection
                .forward(&x.reshape((b, channels, k * l))?)?,
        )?;
        let step = silu(&self.projection1.forward(step)?)?;
        let step = silu(&self.projection2.forward(&step)?)?;
        let side = side.flatten_from(2)?;
        let mut skips: Option<Tensor> = None;
        for layer in &self.residual_layers {
            let (next, skip) = layer.forward(&h, &side, &step)?;
            h = next;
            skips = Some(match skips {
                Some(sum) => add(&sum, &skip)?,
                None => skip,
            });
        }
        let h = (skips.unwrap_or(h) / (LAYERS as f64).sqrt())?;
        let h = relu(&self.output_projection1.forward(&h)?)?;
        Ok(self.output_projection2.forward(&h)?.reshape((b, k, l))?)
    }
}
