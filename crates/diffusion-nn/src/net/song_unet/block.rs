//! The residual block of EDM's networks: `UNetBlock`.

use crate::error::Result;
use crate::layer::{
    Fir, Initial, QkvAttention, QkvAttentionConfig, QkvOrder, Resample, ResnetBlock2D,
    ResnetBlock2DConfig, ResnetNames, TimeEmbeddingNorm,
};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::Tensor;

const NAMES: ResnetNames = ResnetNames {
    norm1: "norm0",
    conv1: "conv0",
    time: "affine",
    norm2: "norm1",
    conv2: "conv1",
    shortcut: "skip",
};

/// The buffer beside a convolution that changes the resolution.
pub(super) const FILTER: &str = "resample_filter";

/// Groups of a norm.
pub(super) fn groups(channels: usize) -> usize {
    (channels / 4).min(32)
}

/// What all blocks of a network have in common.
pub(super) struct Style {
    pub emb_channels: usize,
    /// Channels of a head; `None` means one head.
    pub channels_per_head: Option<usize>,
    pub dropout: f64,
    /// What sums are divided by.
    pub factor: f64,
    pub eps: f64,
    pub fir: Fir,
    /// Whether the shortcut of a change of resolution has a convolution.
    pub resample_proj: bool,
    pub adaptive_scale: bool,
    pub init: Initial,
    pub init_zero: Initial,
    pub init_attn: Initial,
}

/// What a block does to the resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Keep,
    Up,
    Down,
}

/// A residual block, perhaps with attention.
#[derive(Clone, Debug)]
pub(super) struct Block {
    resnet: ResnetBlock2D,
    attention: Option<QkvAttention>,
}

impl Block {
    /// A block from `from` to `to` channels.
    pub fn new(
        scope: &Scope,
        style: &Style,
        (from, to): (usize, usize),
        change: Change,
        attends: bool,
    ) -> Result<Self> {
        let config = ResnetBlock2DConfig {
            temb_channels: Some(style.emb_channels),
            groups: groups(from),
            groups_out: Some(groups(to)),
            eps: style.eps,
            time_embedding_norm: if style.adaptive_scale {
                TimeEmbeddingNorm::ScaleShift
            } else {
                TimeEmbeddingNorm::Default
            },
            output_scale_factor: style.factor,
            dropout: style.dropout,
            resample: match change {
                Change::Keep => Resample::Keep,
                Change::Up => Resample::UpFir(style.fir.clone()),
                // The authors correlate with the filter here, and convolve on the way up.
                Change::Down => Resample::DownFir(style.fir.reversed()),
            },
            use_in_shortcut: Some(from != to || (style.resample_proj && change != Change::Keep)),
            skip_time_act: true,
            initial: style.init,
            initial_last: style.init_zero,
            names: NAMES,
            ..ResnetBlock2DConfig::new(from, to)
        };
        if change != Change::Keep {
            keep_filter(&scope.sub(NAMES.conv1), &style.fir)?;
            keep_filter(&scope.sub(NAMES.shortcut), &style.fir)?;
        }
        let heads = match style.channels_per_head {
            _ if !attends => 0,
            Some(width) => to / width,
            None => 1,
        };
        let attention = || {
            let config = QkvAttentionConfig {
                channels: to,
                heads,
                order: QkvOrder::QkvLast,
                groups: groups(to),
                eps: style.eps,
                trailing_axes: 2,
                names: ["norm2", "qkv", "proj"],
                output_scale_factor: style.factor,
                initial: style.init_attn,
                initial_last: style.init_zero,
            };
            QkvAttention::new(scope, config)
        };
        Ok(Self {
            resnet: ResnetBlock2D::new(scope, config)?,
            // Fewer channels than one head has mean no attention, as with the authors.
            attention: (heads > 0).then(attention).transpose()?,
        })
    }

    pub fn forward(&self, x: &Tensor, emb: &Tensor, mode: Mode) -> Result<Tensor> {
        let h = self.resnet.forward(x, Some(emb), mode)?;
        match &self.attention {
            Some(attention) => attention.forward(&h),
            None => Ok(h),
        }
    }
}

/// The buffer of a filter.
pub(super) fn keep_filter(scope: &Scope, fir: &Fir) -> Result<()> {
    let side = fir.taps().len();
    scope.constant(FILTER, (1, 1, side, side), &fir.plane())
}
