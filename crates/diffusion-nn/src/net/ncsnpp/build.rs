//! The list of modules in the authors' order.

use super::config::{
    Combine, Progressive, ProgressiveInput, ResBlockType, ScoreConfig, TimeEmbedding,
};
use super::parts::{AttnBlock, BEGIN, Change, Output, Resampler, Step, Style};
use crate::error::Result;
use crate::layer::{Activation, Conv2d, Conv2dConfig, GaussianFourier, Linear, ResnetBlock2D};
use crate::store::Scope;
use candle_core::DType;

/// The authors' `NCSNpp` or `DDPM`.
///
/// ```text
/// e = W₁ a(W₀ embed(t)),   y = up(mid(down(conv(x), e), e), e),   y/σ with `scale_by_sigma`
/// ```
///
/// Pictures enter on the way down and leave on the way up by the paths that the configuration
/// names. Names: `all_modules.N`, in the order of use; the buffer `sigmas`.
#[derive(Clone, Debug)]
pub struct ScoreUNet {
    pub(super) config: ScoreConfig,
    pub(super) dtype: DType,
    pub(super) act: Activation,
    pub(super) factor: f64,
    pub(super) embedding: TimeEmbedding,
    pub(super) combine: Combine,
    pub(super) sigmas: Vec<f64>,
    pub(super) fourier: Option<GaussianFourier>,
    pub(super) mlp: Option<[Linear; 2]>,
    pub(super) conv_in: Conv2d,
    pub(super) down: Vec<DownLevel>,
    pub(super) mid: (ResnetBlock2D, AttnBlock, ResnetBlock2D),
    pub(super) up: Vec<UpLevel>,
    pub(super) out: Option<Output>,
}

/// A resolution on the way down.
#[derive(Clone, Debug)]
pub(super) struct DownLevel {
    pub blocks: Vec<(ResnetBlock2D, Option<AttnBlock>)>,
    pub exit: Option<(Step, Option<PyramidIn>)>,
}

/// How the picture enters.
#[derive(Clone, Debug)]
pub(super) enum PyramidIn {
    Skip { down: Resampler, combine: Conv2d },
    Residual(Resampler),
}

/// A resolution on the way up.
#[derive(Clone, Debug)]
pub(super) struct UpLevel {
    pub blocks: Vec<ResnetBlock2D>,
    pub attention: Option<AttnBlock>,
    pub pyramid: Option<PyramidOut>,
    pub exit: Option<Step>,
}

/// How a picture leaves.
#[derive(Clone, Debug)]
pub(super) enum PyramidOut {
    /// Added to the enlarged picture of the lower resolutions.
    Skip { up: Option<Resampler>, part: Output },
    /// The beginning of a path of its own.
    First(Output),
    /// Its continuation.
    Residual(Resampler),
}

/// Places in the list of modules, one after the other.
struct Modules {
    scope: Scope,
    next: usize,
}

impl Modules {
    fn place(&mut self) -> Scope {
        let scope = self.scope.sub(self.next);
        self.next += 1;
        scope
    }
}

impl ScoreUNet {
    /// A network of this configuration, whose parameters lie in `scope`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if there is no such network.
    pub fn new(config: &ScoreConfig, scope: &Scope) -> Result<Self> {
        config.check()?;
        let (model, data) = (&config.model, &config.data);
        let style = Style::new(config)?;
        let sigmas = config.sigmas();
        scope.constant("sigmas", sigmas.len(), &sigmas)?;
        let mut list = Modules {
            scope: scope.sub("all_modules"),
            next: 0,
        };
        let fourier = match style.embedding {
            TimeEmbedding::Positional => None,
            TimeEmbedding::Fourier => {
                let (at, scale) = (list.place(), model.fourier_scale);
                Some(GaussianFourier::named(
                    &at, "W", model.nf, scale, true, false,
                )?)
            }
        };
        let features = if fourier.is_some() { 2 } else { 1 } * model.nf;
        let mlp = match model.conditional {
            false => None,
            true => Some([
                Linear::begun(&list.place(), features, style.temb, true, BEGIN)?,
                Linear::begun(&list.place(), style.temb, style.temb, true, BEGIN)?,
            ]),
        };
        let conv_in = Conv2dConfig::same(data.num_channels, model.nf, 3).begun(BEGIN);
        let conv_in = Conv2d::new(&list.place(), conv_in)?;
        let (down, kept) = way_down(config, &style, &mut list)?;
        let bottom = kept.last().copied().unwrap_or(model.nf);
        let both = (bottom, bottom);
        let mid = (
            style.block(&list.place(), both, Change::Keep)?,
            AttnBlock::new(&list.place(), &style, bottom)?,
            style.block(&list.place(), both, Change::Keep)?,
        );
        let (up, channels) = way_up(config, &style, &mut list, kept)?;
        let out = match style.progressive {
            Progressive::OutputSkip => None,
            _ => Some(output(
                &mut list,
                &style,
                (channels, data.num_channels),
                true,
            )?),
        };
        Ok(Self {
            config: config.clone(),
            dtype: scope.dtype(),
            act: style.act,
            factor: style.factor,
            embedding: style.embedding,
            combine: style.combine,
            sigmas,
            fourier,
            mlp,
            conv_in,
            down,
            mid,
            up,
            out,
        })
    }

    /// What the network was built from.
    pub fn config(&self) -> &ScoreConfig {
        &self.config
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

fn attends(config: &ScoreConfig, level: usize) -> bool {
    let side = config.data.image_size >> level;
    config.model.attn_resolutions.contains(&side)
}

/// A norm and a convolution; with `last` it begins as the last layer of a branch.
fn output(
    list: &mut Modules,
    style: &Style,
    (from, to): (usize, usize),
    last: bool,
) -> Result<Output> {
    let norm = style.norm(&list.place(), from)?;
    let initial = if last { style.last } else { BEGIN };
    Ok(Output {
        norm,
        conv: Conv2d::new(
            &list.place(),
            Conv2dConfig::same(from, to, 3).begun(initial),
        )?,
        act: style.act,
    })
}

/// The levels of the way down, and the channels of the maps that are kept.
fn way_down(
    config: &ScoreConfig,
    style: &Style,
    list: &mut Modules,
) -> Result<(Vec<DownLevel>, Vec<usize>)> {
    let model = &config.model;
    let mut channels = model.nf;
    let mut picture = config.data.num_channels;
    let mut kept = vec![channels];
    let mut levels = Vec::new();
    for (level, mult) in model.ch_mult.iter().enumerate() {
        let mut blocks = Vec::new();
        for _ in 0..model.num_res_blocks {
            let both = (channels, model.nf * mult);
            let block = style.block(&list.place(), both, Change::Keep)?;
            channels = both.1;
            let attention = attends(config, level)
                .then(|| AttnBlock::new(&list.place(), style, channels))
                .transpose()?;
            blocks.push((block, attention));
            kept.push(channels);
        }
        let mut exit = None;
        if level + 1 < model.ch_mult.len() {
            let both = (channels, channels);
            let at = list.place();
            let step = match style.blocks {
                ResBlockType::Ddpm => {
                    Step::Layer(style.resampler(&at, both, false, style.with_conv)?)
                }
                ResBlockType::Biggan => {
                    Step::Block(Box::new(style.block(&at, both, Change::Down)?))
                }
            };
            let pyramid = match style.input {
                ProgressiveInput::None => None,
                ProgressiveInput::InputSkip => {
                    let at = list.place().sub("Conv_0");
                    let combine =
                        Conv2d::new(&at, Conv2dConfig::same(picture, channels, 1).begun(BEGIN))?;
                    let down = style.resampler(&at, (picture, picture), false, false)?;
                    if style.combine == Combine::Cat {
                        channels *= 2;
                    }
                    Some(PyramidIn::Skip { down, combine })
                }
                ProgressiveInput::Residual => {
                    let both = (picture, channels);
                    picture = channels;
                    let down = style.resampler(&list.place(), both, false, true)?;
                    Some(PyramidIn::Residual(down))
                }
            };
            kept.push(channels);
            exit = Some((step, pyramid));
        }
        levels.push(DownLevel { blocks, exit });
    }
    Ok((levels, kept))
}

/// The levels of the way up, the lowest first, and the channels of the last map.
fn way_up(
    config: &ScoreConfig,
    style: &Style,
    list: &mut Modules,
    mut kept: Vec<usize>,
) -> Result<(Vec<UpLevel>, usize)> {
    let (model, pictures) = (&config.model, config.data.num_channels);
    let mut channels = kept.last().copied().unwrap_or(model.nf);
    let mut path = 0;
    let mut levels = Vec::new();
    for (level, mult) in model.ch_mult.iter().enumerate().rev() {
        let mut blocks = Vec::new();
        for _ in 0..=model.num_res_blocks {
            let both = (channels + kept.pop().unwrap_or(0), model.nf * mult);
            blocks.push(style.block(&list.place(), both, Change::Keep)?);
            channels = both.1;
        }
        let attention = attends(config, level)
            .then(|| AttnBlock::new(&list.place(), style, channels))
            .transpose()?;
        let lowest = level + 1 == model.ch_mult.len();
        let pyramid = match style.progressive {
            Progressive::None => None,
            Progressive::OutputSkip => {
                let enlarge = || {
                    let both = (pictures, pictures);
                    style.resampler(&list.scope, both, true, false)
                };
                let up = (!lowest).then(enlarge).transpose()?;
                let part = output(list, style, (channels, pictures), true)?;
                Some(PyramidOut::Skip { up, part })
            }
            Progressive::Residual if lowest => {
                path = channels;
                let both = (channels, channels);
                Some(PyramidOut::First(output(list, style, both, false)?))
            }
            Progressive::Residual => {
                let both = (path, channels);
                path = channels;
                let up = style.resampler(&list.place(), both, true, true)?;
                Some(PyramidOut::Residual(up))
            }
        };
        let mut exit = None;
        if level > 0 {
            let both = (channels, channels);
            let at = list.place();
            exit = Some(match style.blocks {
                ResBlockType::Ddpm => {
                    Step::Layer(style.resampler(&at, both, true, style.with_conv)?)
                }
                ResBlockType::Biggan => {
                    Step::Block(Box::new(style.block(&at, both, Change::Up)?))
                }
            });
        }
        levels.push(UpLevel {
            blocks,
            attention,
            pyramid,
            exit,
        });
    }
    Ok((levels, channels))
}
