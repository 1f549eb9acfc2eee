//! ADM as EDM builds it.

use super::block::{Style, groups};
use super::config::{DhariwalConfig, EncoderType};
use super::ladder::{Ladder, Plan};
use crate::error::Result;
use crate::layer::{
    Activation, Conv2d, Conv2dConfig, Fir, GroupNorm, Initial, Linear, timestep_embedding,
};
use crate::mode::Mode;
use crate::net::input::{halving, maps, times};
use crate::net::labels::{dropped, rows};
use crate::store::Scope;
use candle_core::{DType, Tensor};
use diffusion_ops::init::fnv1a;
use diffusion_ops::silu;

/// ε of every norm.
const EPS: f64 = 1e-5;

/// The authors' `DhariwalUNet`: `F(x; c_noise)` whose noise level scales and shifts after the second
/// norm of each block, with heads of a fixed width.
///
/// ```text
/// e = silu(W₁ silu(W₀ (embed(c_noise) + W_a a)) + W_l l)
/// ```
///
/// where `l` is the class label and `a` the augmentation label. Names: `map_label`, `map_augment`,
/// `map_layer0`, `map_layer1`, `enc`, `dec`, `out_norm`, `out_conv`.
#[derive(Clone, Debug)]
pub struct DhariwalUNet {
    config: DhariwalConfig,
    dtype: DType,
    map_label: Option<Linear>,
    map_augment: Option<Linear>,
    map_layer0: Linear,
    map_layer1: Linear,
    ladder: Ladder,
    out_norm: GroupNorm,
    out_conv: Conv2d,
    /// Tells the drawing of dropped labels from that of other masks.
    stream: u64,
}

impl DhariwalUNet {
    /// A network of this configuration, whose parameters lie in `scope`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if there is no such network.
    pub fn new(config: &DhariwalConfig, scope: &Scope) -> Result<Self> {
        config.check()?;
        let (model, emb) = (
            config.model_channels,
            config.model_channels * config.channel_mult_emb,
        );
        let linear = |name: &str, from, to, bias, initial| {
            Linear::begun(&scope.sub(name), from, to, bias, initial)
        };
        let widths: Vec<usize> = config.channel_mult.iter().map(|m| m * model).collect();
        // The first width is the last one, too.
        let first = widths.first().copied().unwrap_or(model);
        let plan = Plan {
            resolution: config.img_resolution,
            in_channels: config.in_channels,
            first,
            widths,
            num_blocks: config.num_blocks,
            attn_resolutions: &config.attn_resolutions,
            attend_once_up: false,
            style: Style {
                emb_channels: emb,
                channels_per_head: Some(config.channels_per_head),
                dropout: config.dropout,
                factor: 1.0,
                eps: EPS,
                fir: Fir::box_of(2),
                resample_proj: false,
                adaptive_scale: true,
                init: Initial::FanIn,
                init_zero: Initial::Zero,
                init_attn: Initial::FanIn,
            },
            encoder: EncoderType::Standard,
            outputs: None,
        };
        let (labels, augment) = (config.label_dim, config.augment_dim);
        let by_label = Initial::Normal {
            gain: (labels as f64).sqrt(),
        };
        Ok(Self {
            config: config.clone(),
            dtype: scope.dtype(),
            map_label: (labels > 0)
                .then(|| linear("map_label", labels, emb, false, by_label))
                .transpose()?,
            map_augment: (augment > 0)
                .then(|| linear("map_augment", augment, model, false, Initial::Zero))
                .transpose()?,
            map_layer0: linear("map_layer0", model, emb, true, Initial::FanIn)?,
            map_layer1: linear("map_layer1", emb, emb, true, Initial::FanIn)?,
            ladder: Ladder::new(scope, &plan)?,
            out_norm: GroupNorm::new(&scope.sub("out_norm"), groups(first), first, EPS)?,
            out_conv: Conv2d::new(
                &scope.sub("out_conv"),
                Conv2dConfig::same(first, config.out_channels, 3).begun(Initial::Zero),
            )?,
            stream: fnv1a(&scope.name("label_dropout")),
        })
    }

    /// What the network was built from.
    pub fn config(&self) -> &DhariwalConfig {
        &self.config
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Runs the network.
    ///
    /// # Shapes
    /// Those of [`super::SongUNet::forward`].
    ///
    /// # Errors
    /// Those of [`super::SongUNet::forward`].
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
        let mut emb = timestep_embedding(&noise, config.model_channels, true, 0.0, 1.0, 1e4)?
            .to_dtype(self.dtype)?;
        let augment = rows("augment_labels", augment_labels, config.augment_dim, &x)?;
        if let Some(map) = &self.map_augment {
            emb = emb.broadcast_add(&map.forward(&augment)?)?;
        }
        emb = self
            .map_layer1
            .forward(&silu(&self.map_layer0.forward(&emb)?)?)?;
        let label = rows("class_labels", class_labels, config.label_dim, &x)?;
        if let Some(map) = &self.map_label {
            let label = dropped(label, config.label_dropout, self.stream, mode)?;
            emb = emb.broadcast_add(&map.forward(&label)?)?;
        }
        let (last, _) = self.ladder.forward(&x, &silu(&emb)?, mode)?;
        self.out_conv
            .forward(&self.out_norm.forward_act(&last, Activation::Silu)?)
    }
}
