//! A block on the way up.

use super::config::{ResampleType, UNet2DConfig, UpBlockType};
use super::parts::{
    Pass, SKIP_ATTENTION_GROUPS, SKIP_FACTOR, attention, resnet_config, skip_groups, skip_resample,
};
use crate::error::Result;
use crate::layer::{
    Attention, Conv2d, Conv2dConfig, Fir, GroupNorm, Resample, ResnetBlock2D, ResnetBlock2DConfig,
    Upsample2D, fir_upsample2d,
};
use crate::store::Scope;
use candle_core::{Result as CandleResult, Tensor, bail};

/// How a block leaves its resolution.
#[derive(Clone, Debug)]
enum Exit {
    Stay,
    Conv(Upsample2D),
    Resnet(Box<ResnetBlock2D>),
    Skip {
        resnet: Box<ResnetBlock2D>,
        norm: GroupNorm,
        conv: Conv2d,
    },
}

/// Channels around an [`UpBlock`].
#[derive(Clone, Copy, Debug)]
pub(super) struct UpChannels {
    /// Of the block below.
    pub previous: usize,
    /// Of the last map that comes over from the way down.
    pub skip: usize,
    /// Of this block.
    pub to: usize,
}

/// Residual blocks on maps of both ways, each perhaps with attention, and a step up.
#[derive(Clone, Debug)]
pub(super) struct UpBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Attention>,
    exit: Exit,
    skips: bool,
}

impl UpBlock {
    pub fn new(
        scope: &Scope,
        kind: UpBlockType,
        config: &UNet2DConfig,
        channels: UpChannels,
        last: bool,
    ) -> Result<Self> {
        let UpChannels { previous, skip, to } = channels;
        let skips = kind.skips();
        let factor = if skips { SKIP_FACTOR } else { 1.0 };
        let layers = config.layers_per_block + 1;
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for i in 0..layers {
            let skip = if i + 1 == layers { skip } else { to };
            let from = if i == 0 { previous } else { to };
            let mut block = ResnetBlock2DConfig {
                output_scale_factor: factor,
                ..resnet_config(config, from + skip, to)
            };
            if skips {
                // Published weights have this grouping: with attention only the second term is
                // divided.
                block.groups = match kind {
                    UpBlockType::AttnSkipUpBlock2D => (from + skip / 4).min(32),
                    _ => skip_groups(from + skip),
                };
                block.groups_out = Some(skip_groups(to));
            }
            resnets.push(ResnetBlock2D::new(&scope.sub("resnets").sub(i), block)?);
            // A skip block attends once, after its residual blocks.
            if kind.attends() && (!skips || i == 0) {
                let groups = if skips {
                    SKIP_ATTENTION_GROUPS
                } else {
                    config.groups_or(to)
                };
                let scope = scope.sub("attentions").sub(i);
                attentions.push(attention(&scope, config, to, Some(groups), factor)?);
            }
        }
        let up = scope.sub("upsamplers").sub(0);
        let exit = match kind {
            _ if last => Exit::Stay,
            UpBlockType::SkipUpBlock2D | UpBlockType::AttnSkipUpBlock2D => {
                let resnet = skip_resample(
                    &scope.sub("resnet_up"),
                    config,
                    to,
                    Resample::UpFir(Fir::default()),
                )?;
                let conv = Conv2dConfig::same(to, config.out_channels, 3);
                let norm = scope.sub("skip_norm");
                Exit::Skip {
                    resnet: Box::new(resnet),
                    norm: GroupNorm::new(&norm, skip_groups(to), to, config.norm_eps)?,
                    conv: Conv2d::new(&scope.sub("skip_conv"), conv)?,
                }
            }
            UpBlockType::AttnUpBlock2D if config.upsample_type == ResampleType::Conv => {
                Exit::Conv(Upsample2D::new(&up, to, to)?)
            }
            UpBlockType::UpBlock2D => Exit::Conv(Upsample2D::new(&up, to, to)?),
            UpBlockType::AttnUpBlock2D | UpBlockType::ResnetUpsampleBlock2D => {
                let block = ResnetBlock2DConfig {
                    resample: Resample::UpNearest,
                    ..resnet_config(config, to, to)
                };
                Exit::Resnet(Box::new(ResnetBlock2D::new(&up, block)?))
            }
        };
        Ok(Self {
            resnets,
            attentions,
            exit,
            skips,
        })
    }

    /// Runs the block on the maps that were kept on the way down, and builds up the image.
    pub fn forward(
        &self,
        mut h: Tensor,
        pass: Pass<'_>,
        image: &mut Option<Tensor>,
        kept: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            let attention = self.attentions.get(i).filter(|_| !self.skips);
            h = pass.residual(&h, Some(&pop(kept)?), resnet, attention)?;
        }
        if self.skips {
            for attention in &self.attentions {
                h = attention.forward(&h, None, None)?;
            }
            *image = image
                .take()
                .map(|image| fir_upsample2d(&image))
                .transpose()?;
        }
        match &self.exit {
            Exit::Stay => Ok(h),
            Exit::Conv(conv) => conv.forward(&h),
            Exit::Resnet(resnet) => pass.residual(&h, None, resnet, None),
            Exit::Skip { resnet, norm, conv } => {
                let part = conv.forward(&diffusion_ops::silu(&norm.forward(&h)?)?)?;
                *image = Some(match image.take() {
                    Some(image) => (image + part)?,
                    None => part,
                });
                pass.residual(&h, None, resnet, None)
            }
        }
    }
}

fn pop(kept: &mut Vec<Tensor>) -> CandleResult<Tensor> {
    match kept.pop() {
        Some(h) => Ok(h),
        None => bail!("the way up takes more maps than the way down keeps"),
    }
}
