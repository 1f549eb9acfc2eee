//! The U-Net of DDPM, ADM and NCSN++ (Ho et al. 2020; Dhariwal and Nichol 2021; Song et al.
//! 2021), with the configuration and the parameter names of `diffusers`' `UNet2DModel`.

mod config;
mod down;
mod mid;
mod parts;
mod translate;
mod up;

pub use config::{
    Annotations, ClassEmbedType, DownBlockType, MidBlockType, ResampleType, SampleSize,
    TimeEmbeddingType, UNet2DConfig, UpBlockType,
};
pub use translate::translate_deprecated;

use crate::error::{Error, Result};
use crate::layer::{
    Activation, Conv2d, Conv2dConfig, Embedding, GaussianFourier, GroupNorm, TimestepEmbedding,
    TimestepEmbeddingConfig, timestep_embedding,
};
use crate::mode::Mode;
use crate::net::input::{maps, times};
use crate::store::Scope;
use candle_core::{DType, Tensor};
use down::DownBlock;
use mid::MidBlock;
use parts::Pass;
use up::{UpBlock, UpChannels};

/// Standard deviation of the frequencies of the Fourier embedding.
const FOURIER_SCALE: f64 = 16.0;

#[derive(Clone, Debug)]
enum TimeProj {
    Positional {
        dim: usize,
        flip_sin_to_cos: bool,
        freq_shift: f64,
    },
    Fourier(GaussianFourier),
    Learned(Embedding),
}

#[derive(Clone, Debug)]
enum ClassEmbedding {
    Table(Embedding),
    Timestep(TimestepEmbedding),
    Identity,
}

/// The two-dimensional U-Net.
///
/// ```text
/// e = MLP(embed(t)) + embed(c),   y = up(mid(down(conv(x), e), e), e)
/// ```
#[derive(Clone, Debug)]
pub struct UNet2D {
    config: UNet2DConfig,
    dtype: DType,
    gradient_checkpointing: bool,
    conv_in: Conv2d,
    time_proj: TimeProj,
    time_embedding: TimestepEmbedding,
    class_embedding: Option<ClassEmbedding>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet2D {
    /// A network of this configuration, whose parameters lie in `scope`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such network.
    pub fn new(config: &UNet2DConfig, scope: &Scope) -> Result<Self> {
        config.check()?;
        let channels = &config.block_out_channels;
        let (first, blocks, temb) = (channels[0], channels.len(), config.time_embed_dim());
        let bottom = channels[blocks - 1];
        let (time_proj, time_dim) = time_proj(config, &scope.sub("time_proj"), first)?;
        let mlp = TimestepEmbeddingConfig::new(time_dim, temb);
        let classes = scope.sub("class_embedding");
        let class_embedding = match (config.class_embed_type, config.num_class_embeds) {
            (Some(ClassEmbedType::Timestep), _) => Some(ClassEmbedding::Timestep(
                TimestepEmbedding::new(&classes, mlp)?,
            )),
            (Some(ClassEmbedType::Identity), _) => Some(ClassEmbedding::Identity),
            (None, Some(n)) => Some(ClassEmbedding::Table(Embedding::new(&classes, n, temb)?)),
            (None, None) => None,
        };
        let mut down_blocks = Vec::with_capacity(blocks);
        for (i, kind) in config.down_block_types.iter().enumerate() {
            let from = channels[i.saturating_sub(1)];
            let scope = scope.sub("down_blocks").sub(i);
            let last = i + 1 == blocks;
            down_blocks.push(DownBlock::new(
                &scope,
                *kind,
                config,
                from,
                channels[i],
                last,
            )?);
        }
        let mid = |_| MidBlock::new(&scope.sub("mid_block"), config, bottom);
        let mid_block = config.mid_block_type.map(mid).transpose()?;
        let mut up_blocks = Vec::with_capacity(blocks);
        for (i, kind) in config.up_block_types.iter().enumerate() {
            let level = blocks - 1 - i;
            let around = UpChannels {
                previous: channels[(level + 1).min(blocks - 1)],
                skip: channels[level.saturating_sub(1)],
                to: channels[level],
            };
            let scope = scope.sub("up_blocks").sub(i);
            up_blocks.push(UpBlock::new(
                &scope,
                *kind,
                config,
                around,
                i + 1 == blocks,
            )?);
        }
        let conv =
            |name: &str, from, to| Conv2d::new(&scope.sub(name), Conv2dConfig::same(from, to, 3));
        let norm = scope.sub("conv_norm_out");
        Ok(Self {
            config: config.clone(),
            dtype: scope.dtype(),
            gradient_checkpointing: false,
            conv_in: conv("conv_in", config.in_channels, first)?,
            time_proj,
            time_embedding: TimestepEmbedding::new(&scope.sub("time_embedding"), mlp)?,
            class_embedding,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: GroupNorm::new(&norm, config.groups_or(first), first, config.norm_eps)?,
            conv_out: conv("conv_out", first, config.out_channels)?,
        })
    }

    /// What the network was built from.
    pub fn config(&self) -> &UNet2DConfig {
        &self.config
    }

    /// Whether training keeps the inputs of residual blocks (with their attention) alone and
    /// computes the rest again in the backward pass: about a third more time for a fraction of the
    /// memory. Backward passes must then be those of [`diffusion_ops::backward`]. Off at first;
    /// no part of the saved configuration.
    pub fn set_gradient_checkpointing(&mut self, on: bool) {
        self.gradient_checkpointing = on;
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Runs the network.
    ///
    /// # Shapes
    /// `x [B, C, H, W]`; `timestep` a scalar, `[1]` or `[B]`, of any number type; `class_labels`
    /// `[B]` (or `[B, time_embed_dim]` where classes are embeddings already), given exactly where
    /// the network has classes. The result is `[B, C', H, W]`. Height and width must halve evenly
    /// at every step down.
    ///
    /// # Errors
    /// [`Error::Input`] if an input does not have such a shape.
    pub fn forward(
        &self,
        x: &Tensor,
        timestep: &Tensor,
        class_labels: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let (batch, ..) = maps("sample", x, self.config.in_channels)?;
        let t = times("timestep", timestep, batch)?;
        let temb = self.embed(&t, class_labels)?;
        let x = x.to_dtype(self.dtype)?;
        let x = if self.config.center_input_sample {
            ((x * 2.0)? - 1.0)?
        } else {
            x
        };

        let pass = Pass {
            temb: &temb,
            mode,
            recompute: self.gradient_checkpointing,
        };
        let mut h = self.conv_in.forward(&x)?;
        let mut kept = vec![h.clone()];
        let mut image = x;
        for block in &self.down_blocks {
            h = block.forward(h, pass, &mut image, &mut kept)?;
        }
        if let Some(mid) = &self.mid_block {
            h = mid.forward(&h, pass)?;
        }
        let mut image = None;
        for block in &self.up_blocks {
            h = block.forward(h, pass, &mut image, &mut kept)?;
        }
        h = self
            .conv_out
            .forward(&self.conv_norm_out.forward_act(&h, Activation::Silu)?)?;
        if let Some(image) = image {
            h = (h + image)?;
        }
        if let TimeProj::Fourier(_) = self.time_proj {
            h = h.broadcast_div(&t.to_dtype(self.dtype)?.reshape((batch, 1, 1, 1))?)?;
        }
        Ok(h)
    }

    fn embed(&self, t: &Tensor, class_labels: Option<&Tensor>) -> Result<Tensor> {
        let temb = self.time_embedding.forward(&self.project(t)?)?;
        let class = match (&self.class_embedding, class_labels) {
            (None, None) => return Ok(temb),
            (Some(ClassEmbedding::Table(table)), Some(labels)) => table.forward(labels)?,
            (Some(ClassEmbedding::Timestep(mlp)), Some(labels)) => {
                mlp.forward(&self.project(&labels.flatten_all()?)?)?
            }
            (Some(ClassEmbedding::Identity), Some(labels)) => labels.to_dtype(self.dtype)?,
            (embedding, _) => {
                let say = |there: bool| if there { "given" } else { "absent" };
                return Err(Error::Input {
                    name: "class_labels",
                    found: say(embedding.is_none()).into(),
                    expected: say(embedding.is_some()).into(),
                });
            }
        };
        Ok((temb + class)?)
    }

    fn project(&self, t: &Tensor) -> Result<Tensor> {
        Ok(match &self.time_proj {
            TimeProj::Positional {
                dim,
                flip_sin_to_cos,
                freq_shift,
            } => timestep_embedding(t, *dim, *flip_sin_to_cos, *freq_shift, 1.0, 1e4)?
                .to_dtype(self.dtype)?,
            TimeProj::Fourier(fourier) => fourier.forward(t)?,
            TimeProj::Learned(table) => table.forward(t)?,
        })
    }
}

/// The first embedding of the time, and its number of features.
fn time_proj(config: &UNet2DConfig, scope: &Scope, first: usize) -> Result<(TimeProj, usize)> {
    Ok(match config.time_embedding_type {
        TimeEmbeddingType::Positional => {
            let UNet2DConfig {
                flip_sin_to_cos,
                freq_shift,
                ..
            } = *config;
            (
                TimeProj::Positional {
                    dim: first,
                    flip_sin_to_cos,
                    freq_shift,
                },
                first,
            )
        }
        TimeEmbeddingType::Fourier => {
            let fourier = GaussianFourier::new(scope, first, FOURIER_SCALE, true, false)?;
            (TimeProj::Fourier(fourier), 2 * first)
        }
        TimeEmbeddingType::Learned => {
            let entries = config.num_train_timesteps.unwrap_or(0);
            (
                TimeProj::Learned(Embedding::new(scope, entries, first)?),
                first,
            )
        }
    })
}
