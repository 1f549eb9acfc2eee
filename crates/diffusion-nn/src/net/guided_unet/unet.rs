//! The U-Net that predicts the noise, and the one that enlarges pictures.

use super::config::{GROUPS, GuidedConfig};
use super::parts::{Builder, EPS, Pass, Sequence, TimeEmbed, Trunk};
use crate::error::{Error, Result};
use crate::layer::{Activation, Conv2d, Conv2dConfig, Embedding, GroupNorm, Initial, Resample};
use crate::mode::Mode;
use crate::net::input::{exactly, halving, maps, times};
use crate::store::Scope;
use candle_core::{DType, Tensor};
use diffusion_ops::{concat, resize_bilinear2d};

/// The authors' `UNetModel`.
///
/// ```text
/// e = MLP(embed(t)) + label_emb(y),   out = conv(silu(norm(up(mid(down(conv(x), e), e), e))))
/// ```
///
/// With twice as many output channels as input channels, the second half is the `v` that mixes the
/// two bounds of the variance (Nichol and Dhariwal 2021, eq. 15). Names: `time_embed`, `label_emb`,
/// `input_blocks`, `middle_block`, `output_blocks`, `out`.
#[derive(Clone, Debug)]
pub struct GuidedUNet {
    config: GuidedConfig,
    in_channels: usize,
    dtype: DType,
    time_embed: TimeEmbed,
    label_emb: Option<Embedding>,
    trunk: Trunk,
    output_blocks: Vec<Sequence>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl GuidedUNet {
    /// A network of this configuration, whose parameters lie in `scope`. The last convolution of
    /// each branch begins with 0.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such network.
    pub fn new(config: &GuidedConfig, scope: &Scope) -> Result<Self> {
        Self::of_channels(config, scope, config.in_channels)
    }

    fn of_channels(config: &GuidedConfig, scope: &Scope, in_channels: usize) -> Result<Self> {
        config.check()?;
        if let Some(pool) = config.pool {
            return Err(Error::config(
                "pool",
                format!("{pool:?} in a U-Net"),
                "none",
                "leave it out, or build a classifier",
            ));
        }
        let trunk = Trunk::new(scope, config, in_channels)?;
        let build = Builder {
            config,
            upward: true,
        };
        let blocks = scope.sub("output_blocks");
        let mut output_blocks = Vec::new();
        let mut channels = trunk.channels();
        let mut kept = trunk.kept.clone();
        for level in (0..config.levels()).rev() {
            for i in 0..=config.num_res_blocks {
                let scope = blocks.sub(output_blocks.len());
                let from = channels + kept.pop().unwrap_or(0);
                let to = config.channels(level);
                let mut parts = vec![build.residual(&scope.sub(0), from, to, Resample::Keep)?];
                channels = to;
                if config.attends(level) {
                    parts.push(build.attention(&scope.sub(1), channels)?);
                }
                if level > 0 && i == config.num_res_blocks {
                    parts.push(build.up(&scope.sub(parts.len()), channels)?);
                }
                output_blocks.push(Sequence(parts));
            }
        }
        let out = scope.sub("out");
        let last = Conv2dConfig::same(channels, config.out_channels, 3).begun(Initial::Zero);
        let table = |n| Embedding::new(&scope.sub("label_emb"), n, config.time_embed_dim());
        Ok(Self {
            config: config.clone(),
            in_channels,
            dtype: scope.dtype(),
            time_embed: TimeEmbed::new(scope, config)?,
            label_emb: config.num_classes.map(table).transpose()?,
            trunk,
            output_blocks,
            norm_out: GroupNorm::new(&out.sub(0), GROUPS, channels, EPS)?,
            conv_out: Conv2d::new(&out.sub(2), last)?,
        })
    }

    /// What the network was built from.
    pub fn config(&self) -> &GuidedConfig {
        &self.config
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Runs the network.
    ///
    /// # Shapes
    /// `x [B, in_channels, H, W]`; `timesteps` a scalar, `[1]` or `[B]`, of any number type and not
    /// necessarily whole; `y [B]`, classes, given exactly where the network has them. The result
    /// is `[B, out_channels, H, W]`.
    ///
    /// # Errors
    /// [`Error::Input`] if an input does not have such a shape, or height and width do not halve
    /// evenly at every step down.
    pub fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        y: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let (batch, height, width) = maps("x", x, self.in_channels)?;
        halving("x", (height, width), self.config.levels() - 1)?;
        let t = times("timesteps", timesteps, batch)?;
        let x = x.to_dtype(self.dtype)?;
        let mut emb = self.time_embed.forward(&t, &x)?;
        let y = exactly("y", self.label_emb.is_some(), y)?;
        if let (Some(table), Some(y)) = (&self.label_emb, y) {
            emb = (emb + table.forward(&times("y", y, batch)?)?)?;
        }
        let pass = Pass {
            emb: &emb,
            mode,
            recompute: self.config.use_checkpoint,
        };
        let mut h = x;
        let mut kept = Vec::with_capacity(self.trunk.input_blocks.len());
        for block in &self.trunk.input_blocks {
            h = block.forward(&h, pass)?;
            kept.push(h.clone());
        }
        h = self.trunk.middle_block.forward(&h, pass)?;
        for block in &self.output_blocks {
            if let Some(skip) = kept.pop() {
                h = concat(&h, &skip, 1)?;
            }
            h = block.forward(&h, pass)?;
        }
        self.conv_out
            .forward(&self.norm_out.forward_act(&h, Activation::Silu)?)
    }
}

/// The authors' `SuperResModel`: a [`GuidedUNet`] that sees a small picture enlarged beside `x`.
#[derive(Clone, Debug)]
pub struct GuidedSuperRes {
    net: GuidedUNet,
}

impl GuidedSuperRes {
    /// A network of this configuration; `in_channels` counts the channels of the picture, and the
    /// first convolution sees twice as many.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such network.
    pub fn new(config: &GuidedConfig, scope: &Scope) -> Result<Self> {
        let net = GuidedUNet::of_channels(config, scope, 2 * config.in_channels)?;
        Ok(Self { net })
    }

    /// What the network was built from.
    pub fn config(&self) -> &GuidedConfig {
        &self.net.config
    }

    /// Runs the network.
    ///
    /// # Shapes
    /// Those of [`GuidedUNet::forward`]; `low_res [B, in_channels, h, w]` of any size, enlarged by
    /// linear interpolation.
    ///
    /// # Errors
    /// As [`GuidedUNet::forward`].
    pub fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        low_res: &Tensor,
        y: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let channels = self.net.config.in_channels;
        let (batch, height, width) = maps("x", x, channels)?;
        let (found, ..) = maps("low_res", low_res, channels)?;
        if found != batch {
            return Err(Error::Input {
                name: "low_res",
                found: format!("a batch of {found}"),
                expected: format!("one picture for each of the {batch} of `x`"),
            });
        }
        let large = resize_bilinear2d(&low_res.to_dtype(x.dtype())?, height, width)?;
        let both = concat(x, &large, 1)?;
        self.net.forward(&both, timesteps, y, mode)
    }
}
