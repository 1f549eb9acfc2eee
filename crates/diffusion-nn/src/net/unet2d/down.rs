//! A block on the way down.

use super::config::{DownBlockType, ResampleType, UNet2DConfig};
use super::parts::{
    Pass, SKIP_ATTENTION_GROUPS, SKIP_FACTOR, attention, resnet_config, skip_groups, skip_resample,
};
use crate::error::{Error, Result};
use crate::layer::{
    Attention, Conv2d, Conv2dConfig, Downsample2D, Fir, Resample, ResnetBlock2D,
    ResnetBlock2DConfig, fir_downsample2d,
};
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::add;

/// How a block leaves its resolution.
#[derive(Clone, Debug)]
enum Exit {
    Stay,
    Conv(Downsample2D),
    Resnet(Box<ResnetBlock2D>),
    Skip {
        resnet: Box<ResnetBlock2D>,
        conv: Conv2d,
    },
}

/// Residual blocks, each perhaps with attention, and a step down.
#[derive(Clone, Debug)]
pub(super) struct DownBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Attention>,
    exit: Exit,
}

impl DownBlock {
    pub fn new(
        scope: &Scope,
        kind: DownBlockType,
        config: &UNet2DConfig,
        from: usize,
        to: usize,
        last: bool,
    ) -> Result<Self> {
        let skips = kind.skips();
        let factor = if skips { SKIP_FACTOR } else { 1.0 };
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for i in 0..config.layers_per_block {
            let channels = if i == 0 { from } else { to };
            let mut block = ResnetBlock2DConfig {
                output_scale_factor: factor,
                ..resnet_config(config, channels, to)
            };
            if skips {
                block.groups = skip_groups(channels);
                block.groups_out = Some(skip_groups(to));
            }
            resnets.push(ResnetBlock2D::new(&scope.sub("resnets").sub(i), block)?);
            if kind.attends() {
                let groups = if skips {
                    SKIP_ATTENTION_GROUPS
                } else {
                    config.groups_or(to)
                };
                let scope = scope.sub("attentions").sub(i);
                attentions.push(attention(&scope, config, to, Some(groups), factor)?);
            }
        }
        let down = scope.sub("downsamplers").sub(0);
        let exit = match kind {
            _ if last => Exit::Stay,
            DownBlockType::SkipDownBlock2D | DownBlockType::AttnSkipDownBlock2D => {
                let resnet = skip_resample(
                    &scope.sub("resnet_down"),
                    config,
                    to,
                    Resample::DownFir(Fir::default()),
                )?;
                let conv = Conv2dConfig::same(config.in_channels, to, 1);
                let conv = Conv2d::new(&scope.sub("skip_conv"), conv)?;
                Exit::Skip {
                    resnet: Box::new(resnet),
                    conv,
                }
            }
            DownBlockType::AttnDownBlock2D if config.downsample_type == ResampleType::Conv => {
                Exit::Conv(Downsample2D::new(&down, to, to, config.downsample_padding)?)
            }
            DownBlockType::DownBlock2D => {
                Exit::Conv(Downsample2D::new(&down, to, to, config.downsample_padding)?)
            }
            DownBlockType::AttnDownBlock2D | DownBlockType::ResnetDownsampleBlock2D => {
                let block = ResnetBlock2DConfig {
                    resample: Resample::DownAverage,
                    ..resnet_config(config, to, to)
                };
                Exit::Resnet(Box::new(ResnetBlock2D::new(&down, block)?))
            }
        };
        Ok(Self {
            resnets,
            attentions,
            exit,
        })
    }

    /// Runs the block, keeps its results for the way up, and takes the small image along.
    pub fn forward(
        &self,
        mut h: Tensor,
        pass: Pass<'_>,
        image: &mut Tensor,
        kept: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            h = pass.residual(&h, None, resnet, self.attentions.get(i))?;
            kept.push(h.clone());
        }
        let (_, _, height, width) = h.dims4()?;
        if !matches!(self.exit, Exit::Stay) && (height % 2 != 0 || width % 2 != 0) {
            return Err(Error::Input {
                name: "sample",
                found: format!("a map that becomes {height}x{width} on the way down"),
                expected: "height and width that halve evenly at every step".into(),
            });
        }
        h = match &self.exit {
            Exit::Stay => return Ok(h),
            Exit::Conv(conv) => conv.forward(&h)?,
            Exit::Resnet(resnet) => pass.residual(&h, None, resnet, None)?,
            Exit::Skip { resnet, conv } => {
                *image = fir_downsample2d(image)?;
                add(
                    &conv.forward(image)?,
                    &pass.residual(&h, None, resnet, None)?,
                )?
            }
        };
        kept.push(h.clone());
        Ok(h)
    }
}
