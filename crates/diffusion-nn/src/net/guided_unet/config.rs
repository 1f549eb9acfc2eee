//! The configuration of the guided U-Nets, in the words of the authors' constructors.

use crate::error::{Error, Result};
use crate::net::check::{positive, probability};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Groups of every norm.
pub(super) const GROUPS: usize = 32;

/// How a classifier makes logits of the last map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The mean over the pixels, then an affine map.
    #[default]
    Adaptive,
    /// Attention from the mean to the pixels.
    Attention,
    /// A small network with ReLU on the means of all blocks.
    Spatial,
    /// The same with a norm and SiLU.
    SpatialV2,
}

/// Sizes and choices of the U-Nets of improved-diffusion and guided-diffusion, under the names and
/// with the defaults of their constructors; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuidedConfig {
    /// Side of the maps. Only attention pooling depends on it; other networks take any size that
    /// halves evenly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Channels of the input (of the picture alone for super-resolution).
    pub in_channels: usize,
    /// Channels at the highest resolution, before their multiplier.
    pub model_channels: usize,
    /// Channels of the output (twice the picture's where the variance is learned), or classes.
    pub out_channels: usize,
    /// Residual blocks at each resolution.
    pub num_res_blocks: usize,
    /// The factors of downsampling at which attention follows each residual block.
    pub attention_resolutions: Vec<usize>,
    /// Probability of dropout.
    #[serde(default)]
    pub dropout: f64,
    /// Multipliers of the channels at each resolution; fractions are cut off.
    #[serde(default = "four_levels")]
    pub channel_mult: Vec<f64>,
    /// Whether the resolution changes with convolutions.
    #[serde(default = "yes")]
    pub conv_resample: bool,
    /// Axes of a map: 2.
    #[serde(default = "two")]
    pub dims: usize,
    /// Number of classes, if the network is told one.
    #[serde(default)]
    pub num_classes: Option<usize>,
    /// Whether training computes the insides of blocks again in the backward pass, instead of
    /// keeping them. Backward passes must then be those of [`diffusion_ops::backward`].
    #[serde(default)]
    pub use_checkpoint: bool,
    /// A record: the element type is that of the store.
    #[serde(default)]
    pub use_fp16: bool,
    /// Number of heads.
    #[serde(default = "one")]
    pub num_heads: usize,
    /// Channels of a head, in place of the number (−1 stands for none).
    #[serde(default, with = "minus_one")]
    pub num_head_channels: Option<usize>,
    /// Number of heads on the way up, if it is another (−1 stands for none).
    #[serde(default, with = "minus_one")]
    pub num_heads_upsample: Option<usize>,
    /// Whether the time scales and shifts, rather than being added.
    #[serde(default)]
    pub use_scale_shift_norm: bool,
    /// Whether residual blocks change the resolution.
    #[serde(default)]
    pub resblock_updown: bool,
    /// Whether queries, keys and values are split before the heads.
    #[serde(default)]
    pub use_new_attention_order: bool,
    /// How a classifier ends; only classifiers have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
}

fn four_levels() -> Vec<f64> {
    vec![1.0, 2.0, 4.0, 8.0]
}
fn yes() -> bool {
    true
}
fn one() -> usize {
    1
}
fn two() -> usize {
    2
}

/// Optional numbers for which the authors write −1.
mod minus_one {
    use super::*;

    pub fn serialize<S: Serializer>(
        value: &Option<usize>,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.serialize_u64(*value as u64),
            None => serializer.serialize_i64(-1),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Option<usize>, D::Error> {
        match Option::<i64>::deserialize(deserializer)? {
            None | Some(-1) => Ok(None),
            Some(value) => usize::try_from(value).map(Some).map_err(|_| {
                serde::de::Error::custom(format!("{value}; expected a positive number or -1"))
            }),
        }
    }
}

impl GuidedConfig {
    /// Refuses what no network can have.
    ///
    /// # Errors
    /// [`Error::Config`] with the field.
    pub fn check(&self) -> Result<()> {
        positive(&[
            ("in_channels", self.in_channels),
            ("model_channels", self.model_channels),
            ("out_channels", self.out_channels),
            ("num_res_blocks", self.num_res_blocks),
            ("length of `channel_mult`", self.channel_mult.len()),
            ("num_classes", self.num_classes.unwrap_or(1)),
            ("num_heads", self.num_heads),
            ("num_head_channels", self.num_head_channels.unwrap_or(1)),
            ("num_heads_upsample", self.num_heads_upsample.unwrap_or(1)),
        ])?;
        probability("dropout", self.dropout)?;
        if self.dims != 2 {
            let remedy = "only networks of pictures are built here";
            return Err(Error::config("dims", self.dims, "2", remedy));
        }
        for level in 0..self.channel_mult.len() {
            let channels = self.channels(level);
            if channels == 0 || !channels.is_multiple_of(GROUPS) {
                return Err(Error::config(
                    format!("`model_channels` times `channel_mult[{level}]`"),
                    channels,
                    format!("a multiple of {GROUPS}, the groups of every norm"),
                    "choose `model_channels` and `channel_mult` so that each product is one",
                ));
            }
        }
        Ok(())
    }

    /// Channels at a level.
    pub(super) fn channels(&self, level: usize) -> usize {
        let mult = self.channel_mult.get(level).copied().unwrap_or(0.0);
        // Casts cut off what is behind the point, as the authors' `int` does.
        (mult * self.model_channels as f64) as usize
    }

    /// Number of levels.
    pub(super) fn levels(&self) -> usize {
        self.channel_mult.len()
    }

    /// Features of the embedding of the time.
    pub(super) fn time_embed_dim(&self) -> usize {
        4 * self.model_channels
    }

    /// Whether attention follows the residual blocks of a level.
    pub(super) fn attends(&self, level: usize) -> bool {
        self.attention_resolutions
            .iter()
            .any(|factor| Some(*factor) == 1usize.checked_shl(level as u32))
    }
}
