//! The configurations of EDM's networks, in the words of the authors' constructors.

use crate::error::{Error, Result};
use crate::layer::Fir;
use crate::net::check::{positive, probability};
use serde::{Deserialize, Serialize};

/// How the noise level is embedded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingType {
    /// Sines and cosines: DDPM++.
    #[default]
    Positional,
    /// Random Fourier features: NCSN++.
    Fourier,
}

/// What the way down is given besides its own maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderType {
    /// Nothing: DDPM++.
    #[default]
    Standard,
    /// The picture, filtered and made smaller.
    Skip,
    /// A path of its own from picture to the lowest resolution: NCSN++.
    Residual,
}

/// Where the output is taken from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecoderType {
    /// The last map.
    #[default]
    Standard,
    /// A sum over the resolutions.
    Skip,
}

/// Sizes and choices of a [`super::SongUNet`], under the names and with the defaults of the
/// authors' constructor; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SongConfig {
    /// Side of the maps: it names the blocks and says where attention is.
    pub img_resolution: usize,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Length of a class label, 0 for none.
    #[serde(default)]
    pub label_dim: usize,
    /// Length of an augmentation label, 0 for none.
    #[serde(default)]
    pub augment_dim: usize,
    /// Channels before the multipliers.
    #[serde(default = "song::model_channels")]
    pub model_channels: usize,
    /// Multipliers of the channels at each resolution.
    #[serde(default = "song::channel_mult")]
    pub channel_mult: Vec<usize>,
    /// Multiplier of the embedding's features.
    #[serde(default = "four")]
    pub channel_mult_emb: usize,
    /// Residual blocks at each resolution.
    #[serde(default = "four")]
    pub num_blocks: usize,
    /// The sides of maps with attention.
    #[serde(default = "song::attn_resolutions")]
    pub attn_resolutions: Vec<usize>,
    /// Probability of dropout.
    #[serde(default = "dropout")]
    pub dropout: f64,
    /// Probability that training does not tell the class.
    #[serde(default)]
    pub label_dropout: f64,
    /// How the noise level is embedded.
    #[serde(default)]
    pub embedding_type: EmbeddingType,
    /// Multiplier of the features of the noise level: 1 for DDPM++, 2 for NCSN++.
    #[serde(default = "song::channel_mult_noise")]
    pub channel_mult_noise: usize,
    /// What the way down is given.
    #[serde(default)]
    pub encoder_type: EncoderType,
    /// Where the output is taken from.
    #[serde(default)]
    pub decoder_type: DecoderType,
    /// The filter of the changes of resolution: `[1, 1]` for DDPM++, `[1, 3, 3, 1]` for NCSN++.
    #[serde(default = "song::resample_filter")]
    pub resample_filter: Vec<f64>,
}

mod song {
    pub fn model_channels() -> usize {
        128
    }
    pub fn channel_mult() -> Vec<usize> {
        vec![1, 2, 2, 2]
    }
    pub fn attn_resolutions() -> Vec<usize> {
        vec![16]
    }
    pub fn channel_mult_noise() -> usize {
        1
    }
    pub fn resample_filter() -> Vec<f64> {
        vec![1.0, 1.0]
    }
}

/// Sizes and choices of a [`super::DhariwalUNet`], under the names and with the defaults of the
/// authors' constructor; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DhariwalConfig {
    /// Side of the maps: it names the blocks and says where attention is.
    pub img_resolution: usize,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Length of a class label, 0 for none.
    #[serde(default)]
    pub label_dim: usize,
    /// Length of an augmentation label, 0 for none.
    #[serde(default)]
    pub augment_dim: usize,
    /// Channels before the multipliers.
    #[serde(default = "dhariwal::model_channels")]
    pub model_channels: usize,
    /// Multipliers of the channels at each resolution.
    #[serde(default = "dhariwal::channel_mult")]
    pub channel_mult: Vec<usize>,
    /// Multiplier of the embedding's features.
    #[serde(default = "four")]
    pub channel_mult_emb: usize,
    /// Residual blocks at each resolution.
    #[serde(default = "dhariwal::num_blocks")]
    pub num_blocks: usize,
    /// The sides of maps with attention.
    #[serde(default = "dhariwal::attn_resolutions")]
    pub attn_resolutions: Vec<usize>,
    /// Probability of dropout.
    #[serde(default = "dropout")]
    pub dropout: f64,
    /// Probability that training does not tell the class.
    #[serde(default)]
    pub label_dropout: f64,
    /// Channels of a head of attention.
    #[serde(default = "dhariwal::channels_per_head")]
    pub channels_per_head: usize,
}

mod dhariwal {
    pub fn model_channels() -> usize {
        192
    }
    pub fn channel_mult() -> Vec<usize> {
        vec![1, 2, 3, 4]
    }
    pub fn num_blocks() -> usize {
        3
    }
    pub fn attn_resolutions() -> Vec<usize> {
        vec![32, 16, 8]
    }
    pub fn channels_per_head() -> usize {
        64
    }
}

fn four() -> usize {
    4
}
fn dropout() -> f64 {
    0.1
}

impl SongConfig {
    /// Refuses what no network can have.
    ///
    /// # Errors
    /// [`Error::Config`] with the field.
    pub fn check(&self) -> Result<()> {
        positive(&[
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("channel_mult_emb", self.channel_mult_emb),
            ("channel_mult_noise", self.channel_mult_noise),
        ])?;
        probability("dropout", self.dropout)?;
        probability("label_dropout", self.label_dropout)?;
        even(self.noise_channels())?;
        ladder(self.img_resolution, self.model_channels, &self.channel_mult)?;
        let taps = self.resample_filter.len();
        if taps % 2 == 1 {
            let remedy = "use [1, 1] or [1, 3, 3, 1]";
            return Err(Error::config(
                "length of `resample_filter`",
                taps,
                "an even number: others move the map by half a pixel",
                remedy,
            ));
        }
        Fir::new(&self.resample_filter).map(|_| ())
    }

    /// Features of the noise level.
    pub(super) fn noise_channels(&self) -> usize {
        self.model_channels * self.channel_mult_noise
    }
}

impl DhariwalConfig {
    /// Refuses what no network can have.
    ///
    /// # Errors
    /// [`Error::Config`] with the field.
    pub fn check(&self) -> Result<()> {
        positive(&[
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("channel_mult_emb", self.channel_mult_emb),
            ("channels_per_head", self.channels_per_head),
        ])?;
        probability("dropout", self.dropout)?;
        probability("label_dropout", self.label_dropout)?;
        even(self.model_channels)?;
        ladder(self.img_resolution, self.model_channels, &self.channel_mult)
    }
}

fn even(features: usize) -> Result<()> {
    if features.is_multiple_of(2) && features > 0 {
        return Ok(());
    }
    Err(Error::config(
        "features of the noise level",
        features,
        "an even number: sines and cosines",
        "choose another `model_channels`",
    ))
}

fn ladder(resolution: usize, channels: usize, mult: &[usize]) -> Result<()> {
    positive(&[
        ("model_channels", channels),
        ("length of `channel_mult`", mult.len()),
        ("channel_mult", mult.iter().copied().min().unwrap_or(0)),
    ])?;
    let smallest = resolution.checked_shr(mult.len() as u32 - 1).unwrap_or(0);
    if smallest == 0 {
        return Err(Error::config(
            "img_resolution",
            resolution,
            format!("at least 1 pixel after halving {} times", mult.len() - 1),
            "use larger pictures or fewer entries of `channel_mult`",
        ));
    }
    Ok(())
}
