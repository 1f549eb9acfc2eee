//! The half U-Net that names the class of a noisy picture.

use super::config::{GROUPS, GuidedConfig, Pool};
use super::parts::{EPS, Pass, TimeEmbed, Trunk};
use crate::error::{Error, Result};
use crate::layer::{
    Activation, Conv2d, Conv2dConfig, GroupNorm, Initial, Linear, Pointwise, QkvOrder,
};
use crate::mode::Mode;
use crate::net::input::{maps, times};
use crate::store::Scope;
use candle_core::{D, DType, Tensor, Var};
use diffusion_ops::init::Init;
use diffusion_ops::{concat, relu, silu};

/// Features between the two maps of the spatial heads.
const HIDDEN: usize = 2048;

/// The authors' `EncoderUNetModel`: logits `[B, out_channels]` of a noisy picture (Dhariwal and
/// Nichol 2021, section 4). Names: `time_embed`, `input_blocks`, `middle_block`, `out`.
#[derive(Clone, Debug)]
pub struct GuidedClassifier {
    config: GuidedConfig,
    dtype: DType,
    time_embed: TimeEmbed,
    trunk: Trunk,
    head: Head,
}

#[derive(Clone, Debug)]
enum Head {
    Adaptive {
        norm: GroupNorm,
        conv: Conv2d,
    },
    Attention {
        norm: GroupNorm,
        pool: AttentionPool,
    },
    Spatial {
        first: Linear,
        last: Linear,
    },
    SpatialV2 {
        first: Linear,
        norm: GroupNorm,
        last: Linear,
    },
}

impl GuidedClassifier {
    /// A classifier of this configuration, whose parameters lie in `scope`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such network.
    pub fn new(config: &GuidedConfig, scope: &Scope) -> Result<Self> {
        config.check()?;
        if let Some(classes) = config.num_classes {
            return Err(Error::config(
                "num_classes",
                classes,
                "none: a classifier is not told the class",
                "give the number of classes as `out_channels`",
            ));
        }
        let trunk = Trunk::new(scope, config, config.in_channels)?;
        let (channels, classes) = (trunk.channels(), config.out_channels);
        let out = scope.sub("out");
        let norm = |channels| GroupNorm::new(&out.sub(0), GROUPS, channels, EPS);
        // The middle block's output is the last of the features.
        let features = trunk.kept.iter().sum::<usize>() + channels;
        let head = match config.pool.unwrap_or_default() {
            Pool::Adaptive => {
                let last = Conv2dConfig::same(channels, classes, 1).begun(Initial::Zero);
                Head::Adaptive {
                    norm: norm(channels)?,
                    conv: Conv2d::new(&out.sub(3), last)?,
                }
            }
            Pool::Attention => Head::Attention {
                norm: norm(channels)?,
                pool: AttentionPool::new(&out.sub(2), config, channels)?,
            },
            Pool::Spatial => Head::Spatial {
                first: Linear::new(&out.sub(0), features, HIDDEN, true)?,
                last: Linear::new(&out.sub(2), HIDDEN, classes, true)?,
            },
            Pool::SpatialV2 => Head::SpatialV2 {
                first: Linear::new(&out.sub(0), features, HIDDEN, true)?,
                norm: GroupNorm::new(&out.sub(1), GROUPS, HIDDEN, EPS)?,
                last: Linear::new(&out.sub(3), HIDDEN, classes, true)?,
            },
        };
        Ok(Self {
            config: config.clone(),
            dtype: scope.dtype(),
            time_embed: TimeEmbed::new(scope, config)?,
            trunk,
            head,
        })
    }

    /// What the classifier was built from.
    pub fn config(&self) -> &GuidedConfig {
        &self.config
    }

    /// Logits.
    ///
    /// # Shapes
    /// `x [B, in_channels, H, W]`, `timesteps` a scalar, `[1]` or `[B]`; the result is
    /// `[B, out_channels]`.
    ///
    /// # Errors
    /// [`Error::Input`] if an input does not have such a shape; with attention pooling also if the
    /// side of the maps is not `image_size`.
    pub fn forward(&self, x: &Tensor, timesteps: &Tensor, mode: Mode) -> Result<Tensor> {
        let (batch, ..) = maps("x", x, self.config.in_channels)?;
        let t = times("timesteps", timesteps, batch)?;
        let mut h = x.to_dtype(self.dtype)?;
        let emb = self.time_embed.forward(&t, &h)?;
        let pass = Pass {
            emb: &emb,
            mode,
            recompute: self.config.use_checkpoint,
        };
        let spatial = matches!(self.head, Head::Spatial { .. } | Head::SpatialV2 { .. });
        let mut means = Vec::new();
        let blocks = self.trunk.input_blocks.iter();
        for block in blocks.chain([&self.trunk.middle_block]) {
            h = block.forward(&h, pass)?;
            if spatial {
                means.push(h.flatten_from(2)?.mean(D::Minus1)?);
            }
        }
        let act = Activation::Silu;
        match &self.head {
            Head::Adaptive { norm, conv } => {
                let mean = norm.forward_act(&h, act)?.mean_keepdim((2, 3))?;
                Ok(conv.forward(&mean)?.flatten_from(1)?)
            }
            Head::Attention { norm, pool } => pool.forward(&norm.forward_act(&h, act)?),
            Head::Spatial { first, last } => {
                last.forward(&relu(&first.forward(&Tensor::cat(&means, 1)?)?)?)
            }
            Head::SpatialV2 { first, norm, last } => {
                let hidden = first.forward(&Tensor::cat(&means, 1)?)?;
                last.forward(&silu(&norm.forward(&hidden)?)?)
            }
        }
    }

    /// `log p(y|x)` of each picture, `[B]`.
    ///
    /// ```text
    /// log p(y|x) = logits[y] − ln Σ_k exp(logits[k])
    /// ```
    ///
    /// # Errors
    /// As [`GuidedClassifier::forward`], and if `y [B]` is not of such classes.
    pub fn log_prob(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        y: &Tensor,
        mode: Mode,
    ) -> Result<Tensor> {
        let logits = self.forward(x, timesteps, mode)?;
        let (batch, classes) = logits.dims2()?;
        let y = times("y", y, batch)?.to_dtype(DType::I64)?;
        if let Some(wrong) = y
            .to_vec1::<i64>()?
            .into_iter()
            .find(|y| !(0..classes as i64).contains(y))
        {
            return Err(Error::Input {
                name: "y",
                found: format!("the class {wrong}"),
                expected: format!("0 to {}", classes - 1),
            });
        }
        let largest = logits.max_keepdim(1)?.detach();
        let shifted = logits.broadcast_sub(&largest)?;
        let normaliser = shifted.exp()?.sum_keepdim(1)?.log()?;
        let y = y.to_device(logits.device())?.unsqueeze(1)?;
        Ok((shifted.gather(&y, 1)? - normaliser)?.squeeze(1)?)
    }

    /// The gradient that guides a sample towards classes: `∇_x Σ log p(y|x)`, shaped as `x`, in
    /// evaluation.
    ///
    /// # Errors
    /// As [`GuidedClassifier::log_prob`].
    pub fn grad_log_prob(&self, x: &Tensor, timesteps: &Tensor, y: &Tensor) -> Result<Tensor> {
        let x = Var::from_tensor(&x.detach())?;
        let sum = self.log_prob(&x, timesteps, y, Mode::Eval)?.sum_all()?;
        let grads = diffusion_ops::backward(&sum)?;
        match grads.get(x.as_tensor()) {
            Some(grad) => Ok(grad.clone()),
            None => Ok(x.as_tensor().zeros_like()?),
        }
    }
}

/// Attention from the mean of all pixels to the pixels (Radford et al. 2021). Names:
/// `positional_embedding`, `qkv_proj`, `c_proj`.
///
/// ```text
/// z = [mean(x), x₁, …, x_N] + P,   y = W_c attention(W z + β)₀ + β_c
/// ```
#[derive(Clone, Debug)]
struct AttentionPool {
    positional_embedding: Tensor,
    qkv_proj: Pointwise,
    c_proj: Pointwise,
    heads: usize,
}

impl AttentionPool {
    fn new(scope: &Scope, config: &GuidedConfig, channels: usize) -> Result<Self> {
        let remedy = "attention pooling depends on both `image_size` and `num_head_channels`";
        let Some(side) = config.image_size else {
            return Err(Error::config(
                "image_size",
                "null",
                "the side of the pictures",
                remedy,
            ));
        };
        let Some(width) = config
            .num_head_channels
            .filter(|w| channels.is_multiple_of(*w))
        else {
            return Err(Error::config(
                "num_head_channels",
                format!("{:?}", config.num_head_channels),
                format!("a divisor of the {channels} channels of the last map"),
                remedy,
            ));
        };
        let side = side >> (config.levels() - 1);
        let std = 1.0 / (channels as f64).sqrt();
        let initial = Initial::FanIn;
        Ok(Self {
            positional_embedding: scope.param(
                "positional_embedding",
                (channels, side * side + 1),
                Init::Normal { std },
            )?,
            qkv_proj: Pointwise::new(&scope.sub("qkv_proj"), channels, 3 * channels, 1, initial)?,
            c_proj: Pointwise::new(
                &scope.sub("c_proj"),
                channels,
                config.out_channels,
                1,
                initial,
            )?,
            heads: channels / width,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let pixels = x.flatten_from(2)?;
        let known = self.positional_embedding.dim(1)? - 1;
        let found = pixels.dim(2)?;
        if found != known {
            return Err(Error::Input {
                name: "x",
                found: format!("{found} pixels at the lowest resolution"),
                expected: format!("{known}, as `image_size` says"),
            });
        }
        let tokens = concat(&pixels.mean_keepdim(2)?, &pixels, 2)?;
        let tokens = tokens.broadcast_add(&self.positional_embedding.unsqueeze(0)?)?;
        let qkv = self.qkv_proj.forward(&tokens.transpose(1, 2)?)?;
        let first = QkvOrder::QkvFirst.attend(&qkv, self.heads, true)?;
        Ok(self.c_proj.forward(&first)?.squeeze(1)?)
    }
}
