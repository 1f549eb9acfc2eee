//! What the score SDE networks are made of.

use super::config::{
    Combine, Progressive, ProgressiveInput, ResBlockType, ScoreConfig, ScoreNetwork, TimeEmbedding,
};
use crate::error::Result;
use crate::layer::{
    Activation, Conv2d, Conv2dConfig, Fir, GroupNorm, Initial, Linear, Nin, Resample,
    ResnetBlock2D, ResnetBlock2DConfig, ResnetNames, Shortcut,
};
use crate::layer::{nearest, rescaled};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::{Padding, add, attention_heads, avg_pool2d};
use std::f64::consts::SQRT_2;

/// ε of every norm.
pub(super) const EPS: f64 = 1e-6;

/// The choices of a configuration, with those that DDPM does not know at what it does.
pub(super) struct Style {
    pub ddpm: bool,
    pub temb: usize,
    pub conditional: bool,
    pub dropout: f64,
    pub act: Activation,
    pub fir: Option<Fir>,
    /// What sums are divided by.
    pub factor: f64,
    pub blocks: ResBlockType,
    pub progressive: Progressive,
    pub input: ProgressiveInput,
    pub combine: Combine,
    pub embedding: TimeEmbedding,
    pub with_conv: bool,
    /// How the last layer of a branch begins.
    pub last: Initial,
}

/// How weights begin unless said otherwise.
pub(super) const BEGIN: Initial = Initial::Xavier { gain: 1.0 };

/// How a [`Nin`] begins: with a tenth of the variance.
fn nin_begin() -> Initial {
    Initial::Xavier {
        gain: 0.1f64.sqrt(),
    }
}

impl Style {
    pub fn new(config: &ScoreConfig) -> Result<Self> {
        let model = &config.model;
        let ddpm = model.name == ScoreNetwork::Ddpm;
        let scale = match model.init_scale {
            _ if ddpm => 1e-10,
            0.0 => 1e-10,
            scale => scale,
        };
        let fir = (model.fir && !ddpm).then(|| Fir::new(&model.fir_kernel));
        Ok(Self {
            ddpm,
            temb: 4 * model.nf,
            conditional: model.conditional,
            dropout: model.dropout,
            act: model.nonlinearity,
            fir: fir.transpose()?,
            factor: if model.skip_rescale && !ddpm {
                SQRT_2
            } else {
                1.0
            },
            blocks: if ddpm {
                ResBlockType::Ddpm
            } else {
                model.resblock_type
            },
            progressive: if ddpm {
                Progressive::None
            } else {
                model.progressive
            },
            input: if ddpm {
                ProgressiveInput::None
            } else {
                model.progressive_input
            },
            combine: model.progressive_combine,
            embedding: if ddpm {
                TimeEmbedding::Positional
            } else {
                model.embedding_type
            },
            with_conv: model.resamp_with_conv,
            last: Initial::Xavier { gain: scale.sqrt() },
        })
    }

    /// Groups of a norm.
    pub fn groups(&self, channels: usize) -> usize {
        if self.ddpm {
            32
        } else {
            (channels / 4).min(32)
        }
    }

    /// A norm.
    pub fn norm(&self, scope: &Scope, channels: usize) -> Result<GroupNorm> {
        GroupNorm::new(scope, self.groups(channels), channels, EPS)
    }

    /// A residual block.
    pub fn block(
        &self,
        scope: &Scope,
        (from, to): (usize, usize),
        change: Change,
    ) -> Result<ResnetBlock2D> {
        let biggan = self.blocks == ResBlockType::Biggan;
        let resample = match (change, &self.fir) {
            (Change::Keep, _) => Resample::Keep,
            (Change::Up, Some(fir)) => Resample::UpFir(fir.clone()),
            (Change::Up, None) => Resample::UpNearest,
            (Change::Down, Some(fir)) => Resample::DownFir(fir.clone()),
            (Change::Down, None) => Resample::DownAverage,
        };
        if !self.conditional {
            // The authors' blocks have the map of the time even where nothing is told: their
            // weights keep it.
            Linear::begun(&scope.sub("Dense_0"), self.temb, to, true, BEGIN)?;
        }
        let config = ResnetBlock2DConfig {
            temb_channels: self.conditional.then_some(self.temb),
            groups: self.groups(from),
            groups_out: Some(self.groups(to)),
            eps: EPS,
            non_linearity: self.act,
            output_scale_factor: self.factor,
            dropout: self.dropout,
            resample,
            use_in_shortcut: Some(from != to || (biggan && change != Change::Keep)),
            shortcut: if biggan {
                Shortcut::Pointwise
            } else {
                Shortcut::Nin(nin_begin())
            },
            initial: BEGIN,
            initial_last: self.last,
            names: ResnetNames {
                norm1: "GroupNorm_0",
                conv1: "Conv_0",
                time: "Dense_0",
                norm2: "GroupNorm_1",
                conv2: "Conv_1",
                shortcut: if biggan { "Conv_2" } else { "NIN_0" },
            },
            ..ResnetBlock2DConfig::new(from, to)
        };
        ResnetBlock2D::new(scope, config)
    }

    /// A change of resolution by a layer of its own, or for a pyramid.
    pub fn resampler(
        &self,
        scope: &Scope,
        (from, to): (usize, usize),
        up: bool,
        with_conv: bool,
    ) -> Result<Resampler> {
        let conv = match (with_conv, &self.fir) {
            (false, _) => Conv::None,
            (true, None) => {
                let mut config = Conv2dConfig::same(from, to, 3).begun(BEGIN);
                if !up {
                    config.stride = 2;
                    config.padding = Padding {
                        top: 0,
                        bottom: 1,
                        left: 0,
                        right: 1,
                    };
                }
                Conv::Plain(Conv2d::new(&scope.sub("Conv_0"), config)?)
            }
            (true, Some(_)) => {
                let scope = scope.sub("Conv2d_0");
                let init = BEGIN.weight(9 * from, 9 * to);
                Conv::Filtered {
                    weight: scope.param("weight", (to, from, 3, 3), init)?,
                    bias: scope.param("bias", to, BEGIN.bias(9 * from))?,
                }
            }
        };
        Ok(Resampler {
            up,
            fir: self.fir.clone(),
            conv,
        })
    }
}

/// What a block does to the resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Keep,
    Up,
    Down,
}

/// The authors' `Upsample` and `Downsample`. Names: `Conv_0`, or `Conv2d_0` behind a filter.
#[derive(Clone, Debug)]
pub(super) struct Resampler {
    up: bool,
    fir: Option<Fir>,
    conv: Conv,
}

#[derive(Clone, Debug)]
enum Conv {
    None,
    Plain(Conv2d),
    Filtered { weight: Tensor, bias: Tensor },
}

impl Resampler {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (&self.fir, &self.conv, self.up) {
            (Some(fir), Conv::Filtered { weight, bias }, true) => {
                fir.conv_upsample(x, weight, Some(bias), 2, 1.0)
            }
            (Some(fir), Conv::Filtered { weight, bias }, false) => {
                fir.conv_downsample(x, weight, Some(bias), 2, 1.0)
            }
            (Some(fir), _, true) => fir.upsample(x, 2, 1.0),
            (Some(fir), _, false) => fir.downsample(x, 2, 1.0),
            (None, Conv::Plain(conv), true) => conv.forward(&nearest(x)?),
            (None, Conv::Plain(conv), false) => conv.forward(x),
            (None, _, true) => nearest(x),
            (None, _, false) => Ok(avg_pool2d(x, 2)?),
        }
    }
}

/// Self-attention with one head. Names: `GroupNorm_0`, `NIN_0` (queries), `NIN_1` (keys), `NIN_2`
/// (values), `NIN_3`.
///
/// ```text
/// y = (x + W₃ᵀ attention(W₀ᵀ n, W₁ᵀ n, W₂ᵀ n) + b₃)/r,   n = norm(x)
/// ```
#[derive(Clone, Debug)]
pub(super) struct AttnBlock {
    norm: GroupNorm,
    nins: [Nin; 4],
    factor: f64,
}

impl AttnBlock {
    pub fn new(scope: &Scope, style: &Style, channels: usize) -> Result<Self> {
        let nin = |name: &str, initial| Nin::new(&scope.sub(name), channels, channels, initial);
        Ok(Self {
            norm: style.norm(&scope.sub("GroupNorm_0"), channels)?,
            nins: [
                nin("NIN_0", nin_begin())?,
                nin("NIN_1", nin_begin())?,
                nin("NIN_2", nin_begin())?,
                nin("NIN_3", style.last)?,
            ],
            factor: style.factor,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v, out] = &self.nins;
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?;
        let (q, k, v) = (
            q.forward(&tokens)?,
            k.forward(&tokens)?,
            v.forward(&tokens)?,
        );
        let y = out.forward(&attention_heads(&q, &k, &v, 1, None, None)?)?;
        let y = y.transpose(1, 2)?.reshape(x.shape())?;
        rescaled(add(x, &y)?, self.factor)
    }
}

/// A norm, the nonlinearity, and a convolution.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub norm: GroupNorm,
    pub conv: Conv2d,
    pub act: Activation,
}

impl Output {
    pub fn forward(&self, h: &Tensor) -> Result<Tensor> {
        self.conv.forward(&self.norm.forward_act(h, self.act)?)
    }
}

/// A change of resolution on the way.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Block(Box<ResnetBlock2D>),
    Layer(Resampler),
}

impl Step {
    pub fn forward(&self, h: &Tensor, temb: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Block(block) => block.forward(h, temb, mode),
            Self::Layer(layer) => layer.forward(h),
        }
    }
}
