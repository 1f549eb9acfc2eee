//! DDPM++ and NCSN++ as EDM builds them.

use super::block::Style;
use super::config::{EmbeddingType, SongConfig};
use super::ladder::{Ladder, Plan};
use crate::error::{Error, Result};
use crate::layer::{Fir, GaussianFourier, Initial, Linear, timestep_embedding};
use crate::mode::Mode;
use crate::net::input::{halving, maps, times};
use crate::net::labels::{dropped, rows};
use crate::store::Scope;
use candle_core::{DType, Tensor};
use diffusion_ops::init::fnv1a;
use diffusion_ops::silu;
use std::f64::consts::SQRT_2;

/// Standard deviation of the frequencies of the Fourier embedding.
const FOURIER_SCALE: f64 = 16.0;
/// ε of every norm.
const EPS: f64 = 1e-6;

/// The authors' `SongUNet`: `F(x; c_noise)` with one head of attention, sums divided by √2 and the
/// noise level added before the second norm.
///
/// ```text
/// e = silu(W₁ silu(W₀ (embed(c_noise) + W_l √L l + W_a a)))
/// ```
///
/// where `l` is the class label of length `L` and `a` the augmentation label. Names: `map_noise`,
/// `map_label`, `map_augment`, `map_layer0`, `map_layer1`, `enc`, `dec`.
#[derive(Clone, Debug)]
pub struct SongUNet {
    config: SongConfig,
    dtype: DType,
    map_noise: Option<GaussianFourier>,
    map_label: Option<Linear>,
    map_augment: Option<Linear>,
    map_layer0: Linear,
    map_layer1: Linear,
    ladder: Ladder,
    /// Tells the drawing of dropped labels from that of other masks.
    stream: u64,
}

impl SongUNet {
    /// A network of this configuration, whose parameters lie in `scope`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such network.
    pub fn new(config: &SongConfig, scope: &Scope) -> Result<Self> {
        config.check()?;
        let (noise, emb) = (
            config.noise_channels(),
            config.model_channels * config.channel_mult_emb,
        );
        let init = Initial::Xavier { gain: 1.0 };
        let linear =
            |name: &str, from, to, bias| Linear::begun(&scope.sub(name), from, to, bias, init);
        let fourier = || {
            let scope = scope.sub("map_noise");
            let size = noise / 2;
            GaussianFourier::named(&scope, "freqs", size, FOURIER_SCALE, false, false)
        };
        let plan = Plan {
            resolution: config.img_resolution,
            in_channels: config.in_channels,
            first: config.model_channels,
            widths: config
                .channel_mult
                .iter()
                .map(|mult| mult * config.model_channels)
                .collect(),
            num_blocks: config.num_blocks,
            attn_resolutions: &config.attn_resolutions,
            attend_once_up: true,
            style: Style {
                emb_channels: emb,
                channels_per_head: None,
                dropout: config.dropout,
                factor: SQRT_2,
                eps: EPS,
                fir: Fir::new(&config.resample_filter)?,
                resample_proj: true,
                adaptive_scale: false,
                init,
                init_zero: Initial::Xavier { gain: 1e-5 },
                init_attn: Initial::Xavier {
                    gain: 0.2f64.sqrt(),
                },
            },
            encoder: config.encoder_type,
            outputs: Some((config.decoder_type, config.out_channels)),
        };
        let (labels, augment) = (config.label_dim, config.augment_dim);
        Ok(Self {
            config: config.clone(),
            dtype: scope.dtype(),
            map_noise: (config.embedding_type == EmbeddingType::Fourier)
                .then(fourier)
                .transpose()?,
            map_label: (labels > 0)
                .then(|| linear("map_label", labels, noise, true))
                .transpose()?,
            map_augment: (augment > 0)
                .then(|| linear("map_augment", augment, noise, false))
                .transpose()?,
            map_layer0: linear("map_layer0", noise, emb, true)?,
            map_layer1: linear("map_layer1", emb, emb, true)?,
            ladder: Ladder::new(scope, &plan)?,
            stream: fnv1a(&scope.name("label_dropout")),
        })
    }

    /// What the network was built from.
    pub fn config(&self) -> &SongConfig {
        &self.config
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Runs the network.
    ///
    /// # Shapes
    /// `x [B, in_channels, H, W]`; `noise_labels` (`c_noise`) a scalar, `[1]` or `[B]`;
    /// `class_labels [B, label_dim]` or `[1, label_dim]`, usually one-hot, a row of zeros (or none
    /// at all) for no class; `augment_labels [B, augment_dim]` likewise. The result is
    /// `[B, out_channels, H, W]`.
    ///
    /// # Errors
    /// [`Error::Input`] if an input does not have such a shape, or height and width do not halve
    /// evenly at every step down.
    pub fn forward(
        &self,
        x: &Tensor,
        noise_labels: &Tensor,
        class_labels: Option<&Tensor>,
        augment_labels: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let config = &self.config;
        let (batch, height, width) = maps("x", x, config.in_channels)?;
        halving("x", (height, width), config.channel_mult.len() - 1)?;
        let noise = times("noise_labels", noise_labels, batch)?;
        let x = x.to_dtype(self.dtype)?;
        let mut emb = match &self.map_noise {
            Some(fourier) => fourier.forward(&noise)?,
            None => timestep_embedding(&noise, config.noise_channels(), false, 1.0, 1.0, 1e4)?
                .to_dtype(self.dtype)?,
        };
        let label = rows("class_labels", class_labels, config.label_dim, &x)?;
        if let Some(map) = &self.map_label {
            let label = dropped(label, config.label_dropout, self.stream, mode)?;
            let scale = (config.label_dim as f64).sqrt();
            emb = emb.broadcast_add(&map.forward(&label.affine(scale, 0.0)?)?)?;
        }
        let augment = rows("augment_labels", augment_labels, config.augment_dim, &x)?;
        if let Some(map) = &self.map_augment {
            emb = emb.broadcast_add(&map.forward(&augment)?)?;
        }
        let emb = silu(&self.map_layer0.forward(&emb)?)?;
        let emb = silu(&self.map_layer1.forward(&emb)?)?;
        match self.ladder.forward(&x, &emb, mode)? {
            (_, Some(out)) => Ok(out),
            (last, None) => Err(Error::Input {
                name: "x",
                found: format!("a last map {:?} without an output", last.dims()),
                expected: "an output at the highest resolution".into(),
            }),
        }
    }
}
