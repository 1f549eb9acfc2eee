//! The configuration of the score SDE networks, in the words of the authors' configuration files.

use crate::error::{Error, Result};
use crate::layer::{Activation, Fir};
use crate::net::check::{positive, probability};
use serde::{Deserialize, Serialize};

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoreNetwork {
    /// NCSN++ and DDPM++.
    Ncsnpp,
    /// DDPM: of the model's fields it knows the sizes, `conditional`, `dropout`,
    /// `resamp_with_conv`, `scale_by_sigma`, the noise levels and the nonlinearity.
    Ddpm,
}

/// How the time is embedded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeEmbedding {
    /// Sines and cosines of the time.
    #[default]
    Positional,
    /// Random Fourier features of the logarithm of the noise level.
    Fourier,
}

/// The residual block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResBlockType {
    /// DDPM's; layers of their own change the resolution.
    Ddpm,
    /// BigGAN's, which changes the resolution itself.
    #[default]
    Biggan,
}

/// What the output is built from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progressive {
    /// The last map.
    #[default]
    None,
    /// A sum of pictures over the resolutions.
    OutputSkip,
    /// A path of its own from the lowest resolution, added to the maps.
    Residual,
}

/// What the way down is given besides its own maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgressiveInput {
    /// Nothing.
    #[default]
    None,
    /// The picture, made smaller.
    InputSkip,
    /// A path of its own from the picture to the lowest resolution.
    Residual,
}

/// How the picture and a map are put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Combine {
    /// Added.
    #[default]
    Sum,
    /// One after the other.
    Cat,
}

/// The configuration of a [`super::ScoreUNet`]; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreConfig {
    /// The network.
    pub model: ScoreModelConfig,
    /// What it sees.
    pub data: ScoreDataConfig,
}

/// The part of the configuration that describes pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreDataConfig {
    /// Side of the pictures: it says where attention is.
    pub image_size: usize,
    /// Channels of the pictures.
    pub num_channels: usize,
    /// Whether pictures lie in [−1, 1]; if not, they are mapped there from [0, 1].
    #[serde(default)]
    pub centered: bool,
    /// A record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// A record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub random_flip: Option<bool>,
    /// A record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uniform_dequantization: Option<bool>,
}

/// The part of the configuration that describes the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreModelConfig {
    /// Which network.
    pub name: ScoreNetwork,
    /// Channels before the multipliers.
    pub nf: usize,
    /// Multipliers of the channels at each resolution.
    pub ch_mult: Vec<usize>,
    /// Residual blocks at each resolution.
    pub num_res_blocks: usize,
    /// The sides of maps with attention.
    pub attn_resolutions: Vec<usize>,
    /// Probability of dropout.
    #[serde(default)]
    pub dropout: f64,
    /// Whether changes of resolution that are layers of their own have a convolution.
    #[serde(default = "yes")]
    pub resamp_with_conv: bool,
    /// Whether the network is told the time.
    #[serde(default = "yes")]
    pub conditional: bool,
    /// The nonlinearity.
    #[serde(default = "swish")]
    pub nonlinearity: Activation,
    /// Whether the output is divided by the noise level.
    #[serde(default)]
    pub scale_by_sigma: bool,
    /// Largest noise level of the table.
    #[serde(default = "sigma_max")]
    pub sigma_max: f64,
    /// Smallest noise level of the table.
    #[serde(default = "sigma_min")]
    pub sigma_min: f64,
    /// Length of the table of noise levels.
    #[serde(default = "thousand")]
    pub num_scales: usize,
    /// Whether changes of resolution are filtered.
    #[serde(default)]
    pub fir: bool,
    /// The filter.
    #[serde(default = "fir_kernel")]
    pub fir_kernel: Vec<f64>,
    /// Whether sums are divided by √2.
    #[serde(default)]
    pub skip_rescale: bool,
    /// The residual block.
    #[serde(default)]
    pub resblock_type: ResBlockType,
    /// What the output is built from.
    #[serde(default)]
    pub progressive: Progressive,
    /// What the way down is given.
    #[serde(default)]
    pub progressive_input: ProgressiveInput,
    /// How the picture and a map are put together.
    #[serde(default)]
    pub progressive_combine: Combine,
    /// How the time is embedded.
    #[serde(default)]
    pub embedding_type: TimeEmbedding,
    /// Standard deviation of the frequencies of the Fourier features.
    #[serde(default = "fourier_scale")]
    pub fourier_scale: f64,
    /// Scale of the first weights of a branch's last layer; 0 stands for 1e-10.
    #[serde(default)]
    pub init_scale: f64,
    /// A record of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_min: Option<f64>,
    /// A record of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_max: Option<f64>,
    /// A record: attention is DDPM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_type: Option<String>,
    /// A record: norms are group norms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalization: Option<String>,
    /// A record: convolutions are 3×3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conv_size: Option<usize>,
    /// A record of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_rate: Option<f64>,
}

fn yes() -> bool {
    true
}
fn swish() -> Activation {
    Activation::Swish
}
fn sigma_max() -> f64 {
    50.0
}
fn sigma_min() -> f64 {
    0.01
}
fn thousand() -> usize {
    1000
}
fn fir_kernel() -> Vec<f64> {
    vec![1.0, 3.0, 3.0, 1.0]
}
fn fourier_scale() -> f64 {
    16.0
}

impl ScoreConfig {
    /// Refuses what no network can have.
    ///
    /// # Errors
    /// [`Error::Config`] with the field.
    pub fn check(&self) -> Result<()> {
        let (model, data) = (&self.model, &self.data);
        positive(&[
            ("data.image_size", data.image_size),
            ("data.num_channels", data.num_channels),
            ("model.nf", model.nf),
            ("length of `model.ch_mult`", model.ch_mult.len()),
            (
                "model.ch_mult",
                model.ch_mult.iter().copied().min().unwrap_or(0),
            ),
            ("model.num_res_blocks", model.num_res_blocks),
            ("model.num_scales", model.num_scales),
        ])?;
        probability("model.dropout", model.dropout)?;
        if !(model.sigma_min > 0.0 && model.sigma_max > 0.0 && model.sigma_max.is_finite()) {
            return Err(Error::config(
                "model.sigma_min and model.sigma_max",
                format!("{} and {}", model.sigma_min, model.sigma_max),
                "positive numbers",
                "0.01 and 50 are usual for small pictures",
            ));
        }
        if model.init_scale < 0.0 || !model.init_scale.is_finite() {
            let remedy = "0 begins with branches that do almost nothing";
            return Err(Error::config(
                "model.init_scale",
                model.init_scale,
                "at least 0",
                remedy,
            ));
        }
        if model.fir && model.name == ScoreNetwork::Ncsnpp {
            let taps = Fir::new(&model.fir_kernel)?.taps().len();
            if taps < 2 {
                return Err(Error::config(
                    "length of `model.fir_kernel`",
                    taps,
                    "at least 2",
                    "use [1, 3, 3, 1]",
                ));
            }
        }
        let smallest = data
            .image_size
            .checked_shr(model.ch_mult.len() as u32 - 1)
            .unwrap_or(0);
        if smallest == 0 {
            return Err(Error::config(
                "data.image_size",
                data.image_size,
                format!(
                    "at least 1 pixel after halving {} times",
                    model.ch_mult.len() - 1
                ),
                "use larger pictures or fewer entries of `model.ch_mult`",
            ));
        }
        Ok(())
    }

    /// The noise levels of the discrete process, the largest first.
    ///
    /// ```text
    /// σ_i = σ_max (σ_min/σ_max)^{i/(N−1)}
    /// ```
    pub fn sigmas(&self) -> Vec<f64> {
        let (high, low) = (self.model.sigma_max.ln(), self.model.sigma_min.ln());
        let steps = self.model.num_scales;
        let last = steps.saturating_sub(1).max(1) as f64;
        (0..steps)
            .map(|i| (high + (low - high) * i as f64 / last).exp())
            .collect()
    }
}
