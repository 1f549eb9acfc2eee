//! The residual block of U-Nets.

use crate::error::{Error, Result};
use crate::layer::attention::rescaled;
use crate::layer::upsample::nearest;
use crate::layer::{Activation, Conv2d, Conv2dConfig, Fir, GroupNorm, Initial, Linear, Nin};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::fnv1a;
use diffusion_ops::{add, avg_pool2d};
use serde::{Deserialize, Serialize};

/// How the time enters a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeEmbeddingNorm {
    /// It is added before the second norm.
    #[default]
    Default,
    /// It scales and shifts after the second norm.
    ScaleShift,
}

/// What a block does to the resolution.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Resample {
    /// Nothing.
    #[default]
    Keep,
    /// Doubles it by repetition.
    UpNearest,
    /// Halves it by averages.
    DownAverage,
    /// Doubles it by zero insertion and a filter.
    UpFir(Fir),
    /// Halves it by a filter and decimation.
    DownFir(Fir),
}

impl Resample {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Keep => Ok(x.clone()),
            Self::UpNearest => nearest(x),
            Self::DownAverage => Ok(avg_pool2d(x, 2)?),
            Self::UpFir(fir) => fir.upsample(x, 2, 1.0),
            Self::DownFir(fir) => fir.downsample(x, 2, 1.0),
        }
    }
}

/// The map from the input's channels to the output's beside the convolutions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Shortcut {
    /// A 1×1 convolution.
    #[default]
    Pointwise,
    /// A [`Nin`], begun as said.
    Nin(Initial),
}

/// The names of a block's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResnetNames {
    /// The first norm.
    pub norm1: &'static str,
    /// The first convolution.
    pub conv1: &'static str,
    /// The map of the time embedding.
    pub time: &'static str,
    /// The second norm.
    pub norm2: &'static str,
    /// The second convolution.
    pub conv2: &'static str,
    /// The shortcut.
    pub shortcut: &'static str,
}

impl ResnetNames {
    /// Those of `diffusers`.
    pub const DIFFUSERS: Self = Self {
        norm1: "norm1",
        conv1: "conv1",
        time: "time_emb_proj",
        norm2: "norm2",
        conv2: "conv2",
        shortcut: "conv_shortcut",
    };
}

/// Sizes and choices of a [`ResnetBlock2D`].
#[derive(Clone, Debug)]
pub struct ResnetBlock2DConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Features of the time embedding, if the block takes one.
    pub temb_channels: Option<usize>,
    /// Groups of the first norm.
    pub groups: usize,
    /// Groups of the second norm, if not `groups`.
    pub groups_out: Option<usize>,
    /// ε of the norms.
    pub eps: f64,
    /// The nonlinearity.
    pub non_linearity: Activation,
    /// How the time enters.
    pub time_embedding_norm: TimeEmbeddingNorm,
    /// What the sum is divided by.
    pub output_scale_factor: f64,
    /// Probability of dropout before the second convolution.
    pub dropout: f64,
    /// What happens to the resolution, before the first convolution.
    pub resample: Resample,
    /// Whether the shortcut has a 1×1 convolution; `None` means where the channels change.
    pub use_in_shortcut: Option<bool>,
    /// Whether the time embedding enters without the nonlinearity.
    pub skip_time_act: bool,
    /// What the shortcut is made of, where there is one.
    pub shortcut: Shortcut,
    /// How all but the last convolution begin.
    pub initial: Initial,
    /// How the last convolution begins.
    pub initial_last: Initial,
    /// The names of the parts.
    pub names: ResnetNames,
}

impl ResnetBlock2DConfig {
    /// The defaults of `diffusers`: 512 features of time, 32 groups, ε = 1e-6, SiLU.
    pub fn new(in_channels: usize, out_channels: usize) -> Self {
        Self {
            in_channels,
            out_channels,
            temb_channels: Some(512),
            groups: 32,
            groups_out: None,
            eps: 1e-6,
            non_linearity: Activation::Silu,
            time_embedding_norm: TimeEmbeddingNorm::Default,
            output_scale_factor: 1.0,
            dropout: 0.0,
            resample: Resample::Keep,
            use_in_shortcut: None,
            skip_time_act: false,
            shortcut: Shortcut::Pointwise,
            initial: Initial::FanIn,
            initial_last: Initial::FanIn,
            names: ResnetNames::DIFFUSERS,
        }
    }
}

/// A residual block (Ho et al. 2020, appendix B; Dhariwal and Nichol 2021, section 3.1).
///
/// ```text
/// h = conv₁(R(a(norm₁(x))))
/// h = norm₂(h + W a(e))                       default
/// h = norm₂(h) (1 + scale) + shift,  [scale, shift] = W a(e)     scale_shift
/// y = (shortcut(R(x)) + conv₂(dropout(a(h)))) / r
/// ```
///
/// where `a` is the nonlinearity, `R` the change of resolution, `e` the time embedding and `r`
/// the output factor. The names of the parts are those of [`ResnetNames`].
#[derive(Clone, Debug)]
pub struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Beside>,
    config: ResnetBlock2DConfig,
    /// Tells this block's dropout masks from those of other blocks.
    stream: u64,
}

#[derive(Clone, Debug)]
enum Beside {
    Pointwise(Conv2d),
    Nin(Nin),
}

impl ResnetBlock2D {
    /// A block of these sizes.
    ///
    /// # Errors
    /// If groups don't divide channels, the dropout is no probability, or a name is taken.
    pub fn new(scope: &Scope, config: ResnetBlock2DConfig) -> Result<Self> {
        let ResnetBlock2DConfig {
            in_channels,
            out_channels,
            groups,
            eps,
            ..
        } = config;
        if !(0.0..1.0).contains(&config.dropout) {
            return Err(Error::config(
                "dropout",
                config.dropout,
                "at least 0 and less than 1",
                "use 0 for no dropout",
            ));
        }
        if config.temb_channels.is_none()
            && config.time_embedding_norm == TimeEmbeddingNorm::ScaleShift
        {
            return Err(Error::config(
                "time_embedding_norm",
                "scale_shift without a time embedding",
                "`temb_channels` of at least 1",
                "give `temb_channels` or use `default`",
            ));
        }
        let width = match config.time_embedding_norm {
            TimeEmbeddingNorm::Default => out_channels,
            TimeEmbeddingNorm::ScaleShift => 2 * out_channels,
        };
        let names = config.names;
        let project =
            |temb| Linear::begun(&scope.sub(names.time), temb, width, true, config.initial);
        let conv = |name: &str, from, kernel, initial| {
            let config = Conv2dConfig::same(from, out_channels, kernel).begun(initial);
            Conv2d::new(&scope.sub(name), config)
        };
        let moved = config
            .use_in_shortcut
            .unwrap_or(in_channels != out_channels);
        let shortcut = match (moved, config.shortcut) {
            (false, _) => None,
            (true, Shortcut::Pointwise) => Some(Beside::Pointwise(conv(
                names.shortcut,
                in_channels,
                1,
                config.initial,
            )?)),
            (true, Shortcut::Nin(initial)) => Some(Beside::Nin(Nin::new(
                &scope.sub(names.shortcut),
                in_channels,
                out_channels,
                initial,
            )?)),
        };
        let groups_out = config.groups_out.unwrap_or(groups);
        Ok(Self {
            norm1: GroupNorm::new(&scope.sub(names.norm1), groups, in_channels, eps)?,
            conv1: conv(names.conv1, in_channels, 3, config.initial)?,
            time_emb_proj: config.temb_channels.map(project).transpose()?,
            norm2: GroupNorm::new(&scope.sub(names.norm2), groups_out, out_channels, eps)?,
            conv2: conv(names.conv2, out_channels, 3, config.initial_last)?,
            shortcut,
            config,
            stream: fnv1a(scope.path()),
        })
    }

    /// Runs the block.
    ///
    /// # Shapes
    /// `x [B, C, H, W]`, `temb [B, T]`; the result is `[B, K, H', W']`.
    ///
    /// # Errors
    /// If the shapes don't fit, or the time embedding is given where there is none or lacking
    /// where there is one.
    pub fn forward(&self, x: &Tensor, temb: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let act = self.config.non_linearity;
        let resample = &self.config.resample;
        let h = resample.apply(&self.norm1.forward_act(x, act)?)?;
        let temb = match (&self.time_emb_proj, temb) {
            (Some(project), Some(temb)) if self.config.skip_time_act => {
                Some(project.forward(temb)?)
            }
            (Some(project), Some(temb)) => Some(project.forward(&act.forward(temb)?)?),
            (None, None) => None,
            (expected, _) => {
                let say = |there: bool| if there { "given" } else { "absent" };
                return Err(Error::Input {
                    name: "temb",
                    found: say(expected.is_none()).into(),
                    expected: say(expected.is_some()).into(),
                });
            }
        };
        let h = self.timed(&h, temb.as_ref())?;
        let h = mode.dropout(h, self.config.dropout, self.stream)?;
        let h = self.conv2.forward(&h)?;
        let x = resample.apply(x)?;
        let x = match &self.shortcut {
            Some(Beside::Pointwise(conv)) => conv.forward(&x)?,
            Some(Beside::Nin(nin)) => nin.forward(&x)?,
            None => x,
        };
        rescaled(add(&x, &h)?, self.config.output_scale_factor)
    }

    /// The first convolution, the projected time, the second norm and the nonlinearity.
    fn timed(&self, h: &Tensor, temb: Option<&Tensor>) -> Result<Tensor> {
        let act = self.config.non_linearity;
        let Some(temb) = temb else {
            return self.norm2.forward_act(&self.conv1.forward(h)?, act);
        };
        match self.config.time_embedding_norm {
            TimeEmbeddingNorm::Default => {
                let h = self.conv1.forward_shifted(h, temb)?;
                self.norm2.forward_act(&h, act)
            }
            TimeEmbeddingNorm::ScaleShift => {
                let channels = temb.dim(1)? / 2;
                let scale = temb.narrow(1, 0, channels)?;
                let shift = temb.narrow(1, channels, channels)?;
                let h = self.conv1.forward(h)?;
                self.norm2.forward_scale_shift(&h, &scale, &shift, act)
            }
        }
    }
}
