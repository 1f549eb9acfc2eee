//! The configuration of a [`super::UNet2D`], in the words of `diffusers`' `config.json`.

use crate::error::{Error, Result};
use crate::layer::{Activation, TimeEmbeddingNorm};
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// The side of the maps, as a record; any size that halves evenly can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SampleSize {
    /// Square maps.
    Side(usize),
    /// Height and width.
    HeightWidth([usize; 2]),
}

/// How the time is embedded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeEmbeddingType {
    /// Sines and cosines of the time.
    Positional,
    /// Random Fourier features of its logarithm; the output is divided by the time.
    Fourier,
    /// A table.
    Learned,
}

/// How a class is embedded, where it is not by a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassEmbedType {
    /// As a time.
    Timestep,
    /// Not at all: labels are embeddings already.
    Identity,
}

/// How attention blocks change the resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResampleType {
    /// By a convolution.
    Conv,
    /// Within a residual block.
    Resnet,
}

/// The blocks on the way down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum DownBlockType {
    #[serde(alias = "UNetResDownBlock2D")]
    DownBlock2D,
    #[serde(alias = "UNetResAttnDownBlock2D")]
    AttnDownBlock2D,
    #[serde(alias = "UNetResResnetDownsampleBlock2D")]
    ResnetDownsampleBlock2D,
    #[serde(alias = "UNetResSkipDownBlock2D")]
    SkipDownBlock2D,
    #[serde(alias = "UNetResAttnSkipDownBlock2D")]
    AttnSkipDownBlock2D,
}

/// The block at the lowest resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum MidBlockType {
    UNetMidBlock2D,
}

/// The blocks on the way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum UpBlockType {
    #[serde(alias = "UNetResUpBlock2D")]
    UpBlock2D,
    #[serde(alias = "UNetResAttnUpBlock2D")]
    AttnUpBlock2D,
    #[serde(alias = "UNetResResnetUpsampleBlock2D")]
    ResnetUpsampleBlock2D,
    #[serde(alias = "UNetResSkipUpBlock2D")]
    SkipUpBlock2D,
    #[serde(alias = "UNetResAttnSkipUpBlock2D")]
    AttnSkipUpBlock2D,
}

impl DownBlockType {
    pub(super) fn attends(self) -> bool {
        matches!(self, Self::AttnDownBlock2D | Self::AttnSkipDownBlock2D)
    }

    pub(super) fn skips(self) -> bool {
        matches!(self, Self::SkipDownBlock2D | Self::AttnSkipDownBlock2D)
    }
}

impl UpBlockType {
    pub(super) fn attends(self) -> bool {
        matches!(self, Self::AttnUpBlock2D | Self::AttnSkipUpBlock2D)
    }

    pub(super) fn skips(self) -> bool {
        matches!(self, Self::SkipUpBlock2D | Self::AttnSkipUpBlock2D)
    }
}

/// What `EMAModel.save_pretrained` writes among a network's sizes: how the average was made.
const AVERAGE: [&str; 7] = [
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
];

/// Stands for the keys that say nothing about the network and are passed over: those that begin
/// with an underscore (`_class_name`, `_diffusers_version`, ...), and those of a moving average
/// (`decay`, `optimization_step`, ...) that was saved as a model; other unknown keys are refused by
/// name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Annotations;

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let rest = BTreeMap::<String, IgnoredAny>::deserialize(deserializer)?;
        let known = |key: &str| key.starts_with('_') || AVERAGE.contains(&key);
        match rest.keys().find(|key| !known(key)) {
            Some(key) => Err(D::Error::custom(format!(
                "unknown field `{key}` in the configuration of a UNet2DModel; remove it"
            ))),
            None => Ok(Self),
        }
    }
}

/// The configuration of a [`super::UNet2D`], with the names and defaults of `UNet2DModel`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2DConfig {
    /// Side of the maps, as a record.
    pub sample_size: Option<SampleSize>,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Whether the input `x` in `[0, 1]` becomes `2x − 1`.
    pub center_input_sample: bool,
    /// How the time is embedded.
    pub time_embedding_type: TimeEmbeddingType,
    /// Features of the time embedding; four times the first block's channels if absent.
    pub time_embedding_dim: Option<usize>,
    /// Frequency shift of the sinusoidal embedding.
    pub freq_shift: f64,
    /// Whether cosines come first.
    pub flip_sin_to_cos: bool,
    /// The blocks on the way down.
    pub down_block_types: Vec<DownBlockType>,
    /// The block at the lowest resolution.
    pub mid_block_type: Option<MidBlockType>,
    /// The blocks on the way up.
    pub up_block_types: Vec<UpBlockType>,
    /// Channels of each block.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks in each block on the way down (one more on the way up).
    pub layers_per_block: usize,
    /// What the middle block's sums are divided by.
    pub mid_block_scale_factor: f64,
    /// Padding of the downsampling convolution; 0 pads the right and the bottom by one.
    pub downsample_padding: usize,
    /// How attention blocks go down.
    pub downsample_type: ResampleType,
    /// How attention blocks go up.
    pub upsample_type: ResampleType,
    /// Probability of dropout.
    pub dropout: f64,
    /// The nonlinearity.
    pub act_fn: Activation,
    /// Features of one attention head; one head if absent.
    pub attention_head_dim: Option<usize>,
    /// Groups of the norms; only skip blocks can do without it.
    pub norm_num_groups: Option<usize>,
    /// Groups of the middle attention's norm.
    pub attn_norm_num_groups: Option<usize>,
    /// ε of the norms.
    pub norm_eps: f64,
    /// How the time enters a residual block.
    pub resnet_time_scale_shift: TimeEmbeddingNorm,
    /// Whether the middle block attends.
    pub add_attention: bool,
    /// How a class is embedded.
    pub class_embed_type: Option<ClassEmbedType>,
    /// Number of classes of the table, where a class is embedded by a table.
    pub num_class_embeds: Option<usize>,
    /// Number of times of the table, where the time is embedded by a table.
    pub num_train_timesteps: Option<usize>,
    /// Keys that say nothing about the network.
    #[serde(flatten, skip_serializing)]
    pub annotations: Annotations,
}

impl Default for UNet2DConfig {
    fn default() -> Self {
        use DownBlockType::{AttnDownBlock2D, DownBlock2D};
        use UpBlockType::{AttnUpBlock2D, UpBlock2D};
        Self {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_type: TimeEmbeddingType::Positional,
            time_embedding_dim: None,
            freq_shift: 0.0,
            flip_sin_to_cos: true,
            down_block_types: vec![
                DownBlock2D,
                AttnDownBlock2D,
                AttnDownBlock2D,
                AttnDownBlock2D,
            ],
            mid_block_type: Some(MidBlockType::UNetMidBlock2D),
            up_block_types: vec![AttnUpBlock2D, AttnUpBlock2D, AttnUpBlock2D, UpBlock2D],
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            downsample_type: ResampleType::Conv,
            upsample_type: ResampleType::Conv,
            dropout: 0.0,
            act_fn: Activation::Silu,
            attention_head_dim: Some(8),
            norm_num_groups: Some(32),
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: TimeEmbeddingNorm::Default,
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
            num_train_timesteps: None,
            annotations: Annotations,
        }
    }
}

impl UNet2DConfig {
    /// Features of the time embedding.
    pub fn time_embed_dim(&self) -> usize {
        let first = self.block_out_channels.first().copied().unwrap_or(0);
        self.time_embedding_dim.unwrap_or(4 * first)
    }

    /// What the middle block uses where `norm_num_groups` is absent.
    pub(super) fn groups_or(&self, channels: usize) -> usize {
        self.norm_num_groups.unwrap_or((channels / 4).min(32))
    }

    /// Whether there is such a network.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong. Groups and heads that don't divide
    /// the channels are found when the network is built.
    pub fn check(&self) -> Result<()> {
        let blocks = self.block_out_channels.len();
        let same = format!("{blocks}, the length of `block_out_channels`");
        let remedy = "give one entry for each resolution";
        if blocks == 0 {
            return Err(Error::config(
                "block_out_channels",
                "empty",
                "at least one block",
                remedy,
            ));
        }
        for (field, length) in [
            ("length of `down_block_types`", self.down_block_types.len()),
            ("length of `up_block_types`", self.up_block_types.len()),
        ] {
            if length != blocks {
                return Err(Error::config(field, length, same, remedy));
            }
        }
        for (field, value) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("layers_per_block", self.layers_per_block),
            (
                "block_out_channels",
                self.block_out_channels.iter().copied().min().unwrap_or(0),
            ),
            ("time_embedding_dim", self.time_embed_dim()),
            ("attention_head_dim", self.attention_head_dim.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(Error::config(
                    field,
                    0,
                    "at least 1",
                    "give a positive number",
                ));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "at least 0 and less than 1";
            return Err(Error::config(
                "dropout",
                self.dropout,
                expected,
                "use 0 for none",
            ));
        }
        if !self.norm_eps.is_finite() || self.norm_eps <= 0.0 {
            let remedy = "1e-5 is usual";
            return Err(Error::config(
                "norm_eps",
                self.norm_eps,
                "a positive number",
                remedy,
            ));
        }
        if self.mid_block_scale_factor == 0.0 || !self.mid_block_scale_factor.is_finite() {
            let found = self.mid_block_scale_factor;
            return Err(Error::config(
                "mid_block_scale_factor",
                found,
                "not 0",
                "1 is usual",
            ));
        }
        if self.norm_num_groups.is_none()
            && !(self.down_block_types.iter().all(|b| b.skips())
                && self.up_block_types.iter().all(|b| b.skips()))
        {
            let remedy = "give `norm_num_groups`, which only skip blocks can do without";
            return Err(Error::config("norm_num_groups", "null", "a number", remedy));
        }
        if self.time_embedding_type == TimeEmbeddingType::Learned
            && self.num_train_timesteps.is_none()
        {
            let remedy = "give the length of the table of times";
            return Err(Error::config(
                "num_train_timesteps",
                "null",
                "a number",
                remedy,
            ));
        }
        let down_skips = self.down_block_types[..blocks - 1]
            .iter()
            .any(|b| b.skips());
        let up_skips = self.up_block_types.iter().any(|b| b.skips());
        for (field, used, channels) in [
            ("in_channels", down_skips, self.in_channels),
            ("out_channels", up_skips, self.out_channels),
        ] {
            if used && channels != 3 {
                let remedy = "skip blocks carry colour images along; use other blocks";
                return Err(Error::config(field, channels, "3 with skip blocks", remedy));
            }
        }
        Ok(())
    }
}
