//! The way down and up of EDM's networks.

use super::block::{Block, Change, Style, groups, keep_filter};
use super::config::{DecoderType, EncoderType};
use crate::error::Result;
use crate::layer::{Activation, Conv2d, Conv2dConfig, Fir, GroupNorm};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::{add, concat};
use std::f64::consts::SQRT_2;

/// Sizes of a ladder.
pub(super) struct Plan<'a> {
    pub resolution: usize,
    pub in_channels: usize,
    /// Channels of the first convolution.
    pub first: usize,
    /// Channels of each resolution.
    pub widths: Vec<usize>,
    pub num_blocks: usize,
    pub attn_resolutions: &'a [usize],
    /// Whether only the last block of a resolution attends on the way up.
    pub attend_once_up: bool,
    pub style: Style,
    pub encoder: EncoderType,
    /// Where auxiliary outputs are taken, and how many channels they have.
    pub outputs: Option<(DecoderType, usize)>,
}

/// A network's way down and up. Names: `enc.<side>x<side>_<part>`, `dec.<side>x<side>_<part>`.
#[derive(Clone, Debug)]
pub(super) struct Ladder {
    down: Vec<Down>,
    up: Vec<Up>,
    fir: Fir,
}

#[derive(Clone, Debug)]
struct Down {
    entry: Entry,
    aux: Option<AuxIn>,
    blocks: Vec<Block>,
}

#[derive(Clone, Debug)]
enum Entry {
    Conv(Conv2d),
    Block(Box<Block>),
}

/// What the way down is given besides its own maps.
#[derive(Clone, Debug)]
enum AuxIn {
    Skip(Conv2d),
    Residual { weight: Tensor, bias: Tensor },
}

#[derive(Clone, Debug)]
struct Up {
    entry: Vec<Block>,
    blocks: Vec<Block>,
    aux: Option<AuxOut>,
}

/// What a resolution adds to the output.
#[derive(Clone, Debug)]
struct AuxOut {
    norm: GroupNorm,
    conv: Conv2d,
}

impl Ladder {
    /// The ladder of a plan, with its parameters in `scope`.
    pub fn new(scope: &Scope, plan: &Plan<'_>) -> Result<Self> {
        let style = &plan.style;
        let mut kept = Vec::new();
        let mut channels = plan.first;
        let mut aux_channels = plan.in_channels;
        let mut down = Vec::new();
        for (level, width) in plan.widths.iter().copied().enumerate() {
            let side = plan.resolution >> level;
            let at = |part: &str| scope.sub("enc").sub(format!("{side}x{side}_{part}"));
            let entry = if level == 0 {
                let conv = Conv2dConfig::same(plan.in_channels, channels, 3).begun(style.init);
                Entry::Conv(Conv2d::new(&at("conv"), conv)?)
            } else {
                let both = (channels, channels);
                let block = Block::new(&at("down"), style, both, Change::Down, false)?;
                Entry::Block(Box::new(block))
            };
            kept.push(channels);
            let aux = match plan.encoder {
                _ if level == 0 => None,
                EncoderType::Standard => None,
                EncoderType::Skip => {
                    keep_filter(&at("aux_down"), &style.fir)?;
                    let conv = Conv2dConfig::same(aux_channels, channels, 1).begun(style.init);
                    Some(AuxIn::Skip(Conv2d::new(&at("aux_skip"), conv)?))
                }
                EncoderType::Residual => {
                    let scope = at("aux_residual");
                    keep_filter(&scope, &style.fir)?;
                    let fans = (9 * aux_channels, 9 * channels);
                    let shape = (channels, aux_channels, 3, 3);
                    let weight = scope.param("weight", shape, style.init.weight(fans.0, fans.1))?;
                    let bias = scope.param("bias", channels, style.init.bias(fans.0))?;
                    aux_channels = channels;
                    Some(AuxIn::Residual { weight, bias })
                }
            };
            let mut blocks = Vec::new();
            for i in 0..plan.num_blocks {
                let attends = plan.attn_resolutions.contains(&side);
                let both = (channels, width);
                let scope = at(&format!("block{i}"));
                blocks.push(Block::new(&scope, style, both, Change::Keep, attends)?);
                channels = width;
                kept.push(channels);
            }
            down.push(Down { entry, aux, blocks });
        }
        let mut up = Vec::new();
        for (level, width) in plan.widths.iter().copied().enumerate().rev() {
            let side = plan.resolution >> level;
            let at = |part: &str| scope.sub("dec").sub(format!("{side}x{side}_{part}"));
            let lowest = level + 1 == plan.widths.len();
            let both = (channels, channels);
            let entry = if lowest {
                vec![
                    Block::new(&at("in0"), style, both, Change::Keep, true)?,
                    Block::new(&at("in1"), style, both, Change::Keep, false)?,
                ]
            } else {
                vec![Block::new(&at("up"), style, both, Change::Up, false)?]
            };
            let mut blocks = Vec::new();
            for i in 0..=plan.num_blocks {
                let attends = plan.attn_resolutions.contains(&side)
                    && (i == plan.num_blocks || !plan.attend_once_up);
                let both = (channels + kept.pop().unwrap_or(0), width);
                let scope = at(&format!("block{i}"));
                blocks.push(Block::new(&scope, style, both, Change::Keep, attends)?);
                channels = width;
            }
            let aux = match plan.outputs {
                Some((kind, to)) if kind == DecoderType::Skip || level == 0 => {
                    if kind == DecoderType::Skip && !lowest {
                        keep_filter(&at("aux_up"), &style.fir)?;
                    }
                    let conv = Conv2dConfig::same(channels, to, 3).begun(style.init_zero);
                    let norm = at("aux_norm");
                    Some(AuxOut {
                        norm: GroupNorm::new(&norm, groups(channels), channels, style.eps)?,
                        conv: Conv2d::new(&at("aux_conv"), conv)?,
                    })
                }
                _ => None,
            };
            up.push(Up { entry, blocks, aux });
        }
        Ok(Self {
            down,
            up,
            fir: style.fir.clone(),
        })
    }

    /// The last map, and the sum of the auxiliary outputs if there are any.
    pub fn forward(
        &self,
        x: &Tensor,
        emb: &Tensor,
        mode: Mode,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let mut aux = x.clone();
        let mut x = x.clone();
        let mut kept = Vec::new();
        for level in &self.down {
            x = match &level.entry {
                Entry::Conv(conv) => conv.forward(&x)?,
                Entry::Block(block) => block.forward(&x, emb, mode)?,
            };
            match &level.aux {
                None => {}
                Some(AuxIn::Skip(conv)) => {
                    aux = self.fir.reversed().downsample(&aux, 2, 1.0)?;
                    x = add(&x, &conv.forward(&aux)?)?;
                }
                Some(AuxIn::Residual { weight, bias }) => {
                    let fir = self.fir.reversed();
                    let part = fir.downsample_after(&aux, weight, Some(bias), 2)?;
                    x = (add(&x, &part)? / SQRT_2)?;
                    aux = x.clone();
                }
            }
            kept.push(x.clone());
            for block in &level.blocks {
                x = block.forward(&x, emb, mode)?;
                kept.push(x.clone());
            }
        }
        let mut aux: Option<Tensor> = None;
        for level in &self.up {
            for block in &level.entry {
                x = block.forward(&x, emb, mode)?;
            }
            for block in &level.blocks {
                if let Some(skip) = kept.pop() {
                    x = concat(&x, &skip, 1)?;
                }
                x = block.forward(&x, emb, mode)?;
            }
            if let Some(out) = &level.aux {
                let part = out.norm.forward_act(&x, Activation::Silu)?;
                let part = out.conv.forward(&part)?;
                aux = Some(match aux {
                    Some(smaller) => add(&part, &self.fir.upsample(&smaller, 2, 1.0)?)?,
                    None => part,
                });
            }
        }
        Ok((x, aux))
    }
}
