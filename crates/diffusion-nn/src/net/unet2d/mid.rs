//! The block at the lowest resolution.

use super::config::UNet2DConfig;
use super::parts::{Pass, attention, resnet_config};
use crate::error::Result;
use crate::layer::{Attention, ResnetBlock2D, ResnetBlock2DConfig, TimeEmbeddingNorm};
use crate::store::Scope;
use candle_core::Tensor;

/// A residual block, perhaps attention, and a residual block.
#[derive(Clone, Debug)]
pub(super) struct MidBlock {
    first: ResnetBlock2D,
    attention: Option<Attention>,
    second: ResnetBlock2D,
}

impl MidBlock {
    pub fn new(scope: &Scope, config: &UNet2DConfig, channels: usize) -> Result<Self> {
        let factor = config.mid_block_scale_factor;
        let block = ResnetBlock2DConfig {
            output_scale_factor: factor,
            ..resnet_config(config, channels, channels)
        };
        // With scale and shift the attention has no norm unless one is asked for.
        let groups = config.attn_norm_num_groups.or_else(|| {
            (config.resnet_time_scale_shift == TimeEmbeddingNorm::Default)
                .then(|| config.groups_or(channels))
        });
        let attend = || {
            attention(
                &scope.sub("attentions").sub(0),
                config,
                channels,
                groups,
                factor,
            )
        };
        let resnets = scope.sub("resnets");
        Ok(Self {
            first: ResnetBlock2D::new(&resnets.sub(0), block.clone())?,
            attention: config.add_attention.then(attend).transpose()?,
            second: ResnetBlock2D::new(&resnets.sub(1), block)?,
        })
    }

    pub fn forward(&self, h: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
        let h = pass.residual(h, None, &self.first, self.attention.as_ref())?;
        pass.residual(&h, None, &self.second, None)
    }
}
