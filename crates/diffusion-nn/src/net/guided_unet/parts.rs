//! What the blocks of the guided U-Nets are made of.

use super::config::{GROUPS, GuidedConfig};
use crate::error::{Error, Result};
use crate::layer::{
    Conv2d, Conv2dConfig, Initial, Linear, QkvAttention, QkvAttentionConfig, QkvOrder, Resample,
    ResnetBlock2D, ResnetBlock2DConfig, ResnetNames, TimeEmbeddingNorm, Upsample2D, nearest,
    timestep_embedding,
};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::{Result as CandleResult, Tensor};
use diffusion_ops::{avg_pool2d, checkpointed, silu};
use std::sync::Arc;

/// ε of every norm.
pub(super) const EPS: f64 = 1e-5;

/// The names of a residual block: places in the authors' sequences.
const NAMES: ResnetNames = ResnetNames {
    norm1: "in_layers.0",
    conv1: "in_layers.2",
    time: "emb_layers.1",
    norm2: "out_layers.0",
    conv2: "out_layers.3",
    shortcut: "skip_connection",
};

/// Where a network stands while it is built: the place of the next block, and its channels.
pub(super) struct Builder<'a> {
    pub config: &'a GuidedConfig,
    /// Which heads attention has.
    pub upward: bool,
}

impl Builder<'_> {
    /// A residual block.
    pub fn residual(
        &self,
        scope: &Scope,
        from: usize,
        to: usize,
        resample: Resample,
    ) -> Result<Part> {
        let config = ResnetBlock2DConfig {
            temb_channels: Some(self.config.time_embed_dim()),
            groups: GROUPS,
            eps: EPS,
            time_embedding_norm: if self.config.use_scale_shift_norm {
                TimeEmbeddingNorm::ScaleShift
            } else {
                TimeEmbeddingNorm::Default
            },
            dropout: self.config.dropout,
            resample,
            initial_last: Initial::Zero,
            names: NAMES,
            ..ResnetBlock2DConfig::new(from, to)
        };
        Ok(Part::Residual(Box::new(ResnetBlock2D::new(scope, config)?)))
    }

    /// Attention among the pixels.
    pub fn attention(&self, scope: &Scope, channels: usize) -> Result<Part> {
        let config = self.config;
        let heads = match (config.num_head_channels, config.num_heads_upsample) {
            (Some(width), _) if channels.is_multiple_of(width) => channels / width,
            (Some(width), _) => {
                return Err(Error::config(
                    "num_head_channels",
                    width,
                    format!("a divisor of the {channels} channels of `{}`", scope.path()),
                    "choose another width of heads, or give `num_heads`",
                ));
            }
            (None, Some(upward)) if self.upward => upward,
            (None, _) => config.num_heads,
        };
        let config = QkvAttentionConfig {
            channels,
            heads,
            order: if config.use_new_attention_order {
                QkvOrder::QkvFirst
            } else {
                QkvOrder::HeadsFirst
            },
            groups: GROUPS,
            eps: EPS,
            trailing_axes: 1,
            names: ["norm", "qkv", "proj_out"],
            output_scale_factor: 1.0,
            initial: Initial::FanIn,
            initial_last: Initial::Zero,
        };
        Ok(Part::Attention(Box::new(QkvAttention::new(scope, config)?)))
    }

    /// Half the resolution.
    pub fn down(&self, scope: &Scope, channels: usize) -> Result<Part> {
        if self.config.resblock_updown {
            return self.residual(scope, channels, channels, Resample::DownAverage);
        }
        if !self.config.conv_resample {
            return Ok(Part::Average);
        }
        let config = Conv2dConfig {
            stride: 2,
            ..Conv2dConfig::same(channels, channels, 3)
        };
        Ok(Part::Conv(Conv2d::new(&scope.sub("op"), config)?))
    }

    /// Twice the resolution.
    pub fn up(&self, scope: &Scope, channels: usize) -> Result<Part> {
        if self.config.resblock_updown {
            return self.residual(scope, channels, channels, Resample::UpNearest);
        }
        if !self.config.conv_resample {
            return Ok(Part::Repeat);
        }
        Ok(Part::Up(Upsample2D::new(scope, channels, channels)?))
    }
}

/// A member of a sequence.
#[derive(Clone, Debug)]
pub(super) enum Part {
    Conv(Conv2d),
    Residual(Box<ResnetBlock2D>),
    Attention(Box<QkvAttention>),
    Up(Upsample2D),
    Average,
    Repeat,
}

impl Part {
    fn forward(&self, h: &Tensor, emb: &Tensor, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward(h),
            Self::Residual(block) => block.forward(h, Some(emb), mode),
            Self::Attention(attention) => attention.forward(h),
            Self::Up(up) => up.forward(h),
            Self::Average => Ok(avg_pool2d(h, 2)?),
            Self::Repeat => nearest(h),
        }
    }
}

/// What all blocks share while the network runs once.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub emb: &'a Tensor,
    pub mode: Mode,
    /// Whether training computes the insides of blocks twice instead of keeping them.
    pub recompute: bool,
}

/// A sequence of parts: one of the authors' `TimestepEmbedSequential`.
#[derive(Clone, Debug)]
pub(super) struct Sequence(pub Vec<Part>);

impl Sequence {
    pub fn forward(&self, h: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
        let mut h = h.clone();
        for part in &self.0 {
            let heavy = matches!(part, Part::Residual(_) | Part::Attention(_));
            h = if heavy && pass.recompute && pass.mode != Mode::Eval {
                let (part, mode) = (part.clone(), pass.mode);
                let again = move |t: &[Tensor]| -> CandleResult<Tensor> {
                    part.forward(&t[0], &t[1], mode)
                        .map_err(candle_core::Error::wrap)
                };
                checkpointed(&[&h, pass.emb], Arc::new(again))?
            } else {
                part.forward(&h, pass.emb, pass.mode)?
            };
        }
        Ok(h)
    }
}

/// The embedding of the time. Names: `time_embed.0`, `time_embed.2`.
///
/// ```text
/// e = W₂ silu(W₁ [cos(t ω), sin(t ω)] + β₁) + β₂
/// ```
#[derive(Clone, Debug)]
pub(super) struct TimeEmbed {
    features: usize,
    first: Linear,
    second: Linear,
}

impl TimeEmbed {
    pub fn new(scope: &Scope, config: &GuidedConfig) -> Result<Self> {
        let (features, width) = (config.model_channels, config.time_embed_dim());
        let scope = scope.sub("time_embed");
        Ok(Self {
            features,
            first: Linear::new(&scope.sub(0), features, width, true)?,
            second: Linear::new(&scope.sub(2), width, width, true)?,
        })
    }

    /// `[B] -> [B, 4 model_channels]`.
    pub fn forward(&self, t: &Tensor, like: &Tensor) -> Result<Tensor> {
        let waves = timestep_embedding(t, self.features, true, 0.0, 1.0, 1e4)?;
        let hidden = self.first.forward(&waves.to_dtype(like.dtype())?)?;
        self.second.forward(&silu(&hidden)?)
    }
}

/// The way down and the middle, which the U-Net and the classifier have in common. Names:
/// `input_blocks.N.M`, `middle_block.M`.
#[derive(Clone, Debug)]
pub(super) struct Trunk {
    pub input_blocks: Vec<Sequence>,
    pub middle_block: Sequence,
    /// Channels of what each input block leaves.
    pub kept: Vec<usize>,
}

impl Trunk {
    /// The trunk for maps of `in_channels`.
    pub fn new(scope: &Scope, config: &GuidedConfig, in_channels: usize) -> Result<Self> {
        let build = Builder {
            config,
            upward: false,
        };
        let blocks = scope.sub("input_blocks");
        let mut channels = config.channels(0);
        let first = Conv2dConfig::same(in_channels, channels, 3);
        let first = Conv2d::new(&blocks.sub(0).sub(0), first)?;
        let mut input_blocks = vec![Sequence(vec![Part::Conv(first)])];
        let mut kept = vec![channels];
        for level in 0..config.levels() {
            for _ in 0..config.num_res_blocks {
                let scope = blocks.sub(input_blocks.len());
                let to = config.channels(level);
                let keep = Resample::Keep;
                let mut parts = vec![build.residual(&scope.sub(0), channels, to, keep)?];
                channels = to;
                if config.attends(level) {
                    parts.push(build.attention(&scope.sub(1), channels)?);
                }
                input_blocks.push(Sequence(parts));
                kept.push(channels);
            }
            if level + 1 < config.levels() {
                let scope = blocks.sub(input_blocks.len()).sub(0);
                input_blocks.push(Sequence(vec![build.down(&scope, channels)?]));
                kept.push(channels);
            }
        }
        let middle = scope.sub("middle_block");
        let keep = || Resample::Keep;
        let middle_block = Sequence(vec![
            build.residual(&middle.sub(0), channels, channels, keep())?,
            build.attention(&middle.sub(1), channels)?,
            build.residual(&middle.sub(2), channels, channels, keep())?,
        ]);
        Ok(Self {
            input_blocks,
            middle_block,
            kept,
        })
    }

    /// Channels of the lowest resolution.
    pub fn channels(&self) -> usize {
        self.kept.last().copied().unwrap_or(0)
    }
}
