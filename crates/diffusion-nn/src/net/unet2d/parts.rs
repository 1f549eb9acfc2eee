//! What the blocks of the U-Net have in common.

use super::config::UNet2DConfig;
use crate::error::Result;
use crate::layer::{Attention, AttentionConfig, Resample, ResnetBlock2D, ResnetBlock2DConfig};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::{Result as CandleResult, Tensor};
use diffusion_ops::concat;
use std::sync::Arc;

/// What all blocks share while the network runs once.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub temb: &'a Tensor,
    pub mode: Mode,
    /// Whether training computes the insides of residual blocks twice instead of keeping them.
    pub recompute: bool,
}

impl Pass<'_> {
    /// A residual block, perhaps with attention after it, on the channels of `h` and then `skip`.
    pub fn residual(
        &self,
        h: &Tensor,
        skip: Option<&Tensor>,
        resnet: &ResnetBlock2D,
        attention: Option<&Attention>,
    ) -> Result<Tensor> {
        if !self.recompute || self.mode == Mode::Eval {
            return residual(h, skip, self.temb, resnet, attention, self.mode);
        }
        let (resnet, attention, mode) = (resnet.clone(), attention.cloned(), self.mode);
        let with_skip = skip.is_some();
        let part = move |t: &[Tensor]| -> CandleResult<Tensor> {
            let skip = with_skip.then(|| &t[2]);
            residual(&t[0], skip, &t[1], &resnet, attention.as_ref(), mode)
                .map_err(candle_core::Error::wrap)
        };
        let inputs: Vec<&Tensor> = [h, self.temb].into_iter().chain(skip).collect();
        Ok(diffusion_ops::checkpointed(&inputs, Arc::new(part))?)
    }
}

fn residual(
    h: &Tensor,
    skip: Option<&Tensor>,
    temb: &Tensor,
    resnet: &ResnetBlock2D,
    attention: Option<&Attention>,
    mode: Mode,
) -> Result<Tensor> {
    let h = match skip {
        Some(skip) => resnet.forward(&concat(h, skip, 1)?, Some(temb), mode)?,
        None => resnet.forward(h, Some(temb), mode)?,
    };
    match attention {
        Some(attention) => attention.forward(&h, None, None),
        None => Ok(h),
    }
}

/// √2, by which skip blocks divide their sums.
pub(super) const SKIP_FACTOR: f64 = std::f64::consts::SQRT_2;
/// Groups of the norm in front of a skip block's attention.
pub(super) const SKIP_ATTENTION_GROUPS: usize = 32;

/// Groups of a skip block's norm.
pub(super) fn skip_groups(channels: usize) -> usize {
    (channels / 4).min(32)
}

/// A residual block, but for what differs between the types of blocks.
pub(super) fn resnet_config(
    config: &UNet2DConfig,
    in_channels: usize,
    out_channels: usize,
) -> ResnetBlock2DConfig {
    ResnetBlock2DConfig {
        temb_channels: Some(config.time_embed_dim()),
        groups: config.groups_or(out_channels),
        eps: config.norm_eps,
        non_linearity: config.act_fn,
        time_embedding_norm: config.resnet_time_scale_shift,
        dropout: config.dropout,
        ..ResnetBlock2DConfig::new(in_channels, out_channels)
    }
}

/// The residual block with a filtered change of resolution of a skip block.
pub(super) fn skip_resample(
    scope: &Scope,
    config: &UNet2DConfig,
    channels: usize,
    resample: Resample,
) -> Result<ResnetBlock2D> {
    let block = ResnetBlock2DConfig {
        groups: skip_groups(channels),
        output_scale_factor: SKIP_FACTOR,
        resample,
        use_in_shortcut: Some(true),
        ..resnet_config(config, channels, channels)
    };
    ResnetBlock2D::new(scope, block)
}

/// Self-attention within a block.
pub(super) fn attention(
    scope: &Scope,
    config: &UNet2DConfig,
    channels: usize,
    groups: Option<usize>,
    factor: f64,
) -> Result<Attention> {
    let dim_head = config.attention_head_dim.unwrap_or(channels);
    let config = AttentionConfig {
        bias: true,
        norm_num_groups: groups,
        eps: config.norm_eps,
        residual_connection: true,
        rescale_output_factor: factor,
        ..AttentionConfig::new(channels, channels / dim_head, dim_head)
    };
    Attention::new(scope, config)
}
