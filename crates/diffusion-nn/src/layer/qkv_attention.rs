//! Self-attention of maps with one projection to queries, keys and values.

use crate::error::{Error, Result};
use crate::layer::attention::rescaled;
use crate::layer::{GroupNorm, Initial};
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::{add, attention, attention_heads, linear};

/// How the rows of the projection are laid out, the slowest index first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvOrder {
    /// (head, {q, k, v}, channel): improved-diffusion and the first order of guided-diffusion.
    HeadsFirst,
    /// ({q, k, v}, head, channel): the new order of guided-diffusion.
    QkvFirst,
    /// (head, channel, {q, k, v}): EDM.
    QkvLast,
}

impl QkvOrder {
    /// Attention among tokens that are projected already, `[B, N, 3C] -> [B, N, C]`; with `first`
    /// only the first token asks, and the result is `[B, 1, C]`.
    pub(crate) fn attend(self, qkv: &Tensor, heads: usize, first: bool) -> Result<Tensor> {
        let (batch, tokens, width) = qkv.dims3()?;
        let channels = width / 3;
        let asked = if first { 1 } else { tokens };
        if self == Self::QkvFirst {
            let part = |i: usize, n: usize| qkv.narrow(2, i * channels, channels)?.narrow(1, 0, n);
            let (q, k, v) = (part(0, asked)?, part(1, tokens)?, part(2, tokens)?);
            return Ok(attention_heads(&q, &k, &v, heads, None, None)?);
        }
        let d = channels / heads;
        let (shape, axis) = match self {
            Self::HeadsFirst => ([batch, tokens, heads, 3, d], 3),
            _ => ([batch, tokens, heads, d, 3], 4),
        };
        let split = qkv.reshape(&shape[..])?;
        let part = |i: usize, n: usize| {
            let part = split.narrow(axis, i, 1)?.squeeze(axis)?.narrow(1, 0, n)?;
            part.transpose(1, 2)
        };
        let (q, k, v) = (part(0, asked)?, part(1, tokens)?, part(2, tokens)?);
        let y = attention(&q, &k, &v, None, None)?;
        Ok(y.transpose(1, 2)?.reshape((batch, asked, channels))?)
    }
}

/// Sizes and names of a [`QkvAttention`].
#[derive(Clone, Copy, Debug)]
pub struct QkvAttentionConfig {
    /// Channels of the map.
    pub channels: usize,
    /// Number of heads.
    pub heads: usize,
    /// Layout of the projection.
    pub order: QkvOrder,
    /// Groups of the norm in front.
    pub groups: usize,
    /// ε of the norm.
    pub eps: f64,
    /// Axes of one that the projections' weights `[K, C, 1, …]` end with: 1 or 2.
    pub trailing_axes: usize,
    /// Names of the norm, the projection, and the map after attention.
    pub names: [&'static str; 3],
    /// What the sum is divided by.
    pub output_scale_factor: f64,
    /// How the projection begins.
    pub initial: Initial,
    /// How the map after attention begins.
    pub initial_last: Initial,
}

/// Self-attention of the pixels of a map.
///
/// ```text
/// y = (x + W_o attention(Q, K, V) + β_o)/r,   [Q, K, V] = W N(x) + β
/// ```
///
/// where `N` is a group norm and `r` the output factor.
#[derive(Clone, Debug)]
pub struct QkvAttention {
    norm: GroupNorm,
    qkv: Pointwise,
    proj: Pointwise,
    config: QkvAttentionConfig,
}

impl QkvAttention {
    /// A layer of these sizes.
    ///
    /// # Errors
    /// If the heads or groups don't divide the channels, or a name is taken.
    pub fn new(scope: &Scope, config: QkvAttentionConfig) -> Result<Self> {
        let QkvAttentionConfig {
            channels,
            heads,
            trailing_axes,
            names: [norm, qkv, proj],
            ..
        } = config;
        if heads == 0 || !channels.is_multiple_of(heads) {
            return Err(Error::config(
                format!("heads of `{}`", scope.path()),
                heads,
                format!("a divisor of its {channels} channels"),
                "choose the number or the width of heads so that they fill the channels",
            ));
        }
        let point = |name, to, initial| {
            Pointwise::new(&scope.sub(name), channels, to, trailing_axes, initial)
        };
        Ok(Self {
            norm: GroupNorm::new(&scope.sub(norm), config.groups, channels, config.eps)?,
            qkv: point(qkv, 3 * channels, config.initial)?,
            proj: point(proj, channels, config.initial_last)?,
            config,
        })
    }

    /// `[B, C, H, W] -> [B, C, H, W]`.
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?;
        let qkv = self.qkv.forward(&tokens)?;
        let y = self.config.order.attend(&qkv, self.config.heads, false)?;
        let y = self.proj.forward(&y)?.transpose(1, 2)?.reshape(x.shape())?;
        rescaled(add(x, &y)?, self.config.output_scale_factor)
    }
}

/// A convolution of kernel 1 in one or two dimensions, applied to tokens. Names: `weight`, `bias`.
#[derive(Clone, Debug)]
pub(crate) struct Pointwise {
    weight: Tensor,
    bias: Tensor,
}

impl Pointwise {
    /// A map from `inputs` to `outputs` channels whose weight ends with this many axes of one.
    pub fn new(
        scope: &Scope,
        inputs: usize,
        outputs: usize,
        trailing_axes: usize,
        initial: Initial,
    ) -> Result<Self> {
        let mut shape = vec![outputs, inputs];
        shape.resize(2 + trailing_axes, 1);
        Ok(Self {
            weight: scope.param("weight", shape, initial.weight(inputs, outputs))?,
            bias: scope.param("bias", outputs, initial.bias(inputs))?,
        })
    }

    /// `[…, I] -> […, O]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.flatten_from(1)?;
        Ok(linear(x, &weight, Some(&self.bias))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, Strictness};
    use candle_core::{DType, Device};
    use diffusion_ops::gradcheck::{max_abs_difference, max_relative_error, normal};
    use std::collections::BTreeMap;

    fn config(order: QkvOrder) -> QkvAttentionConfig {
        QkvAttentionConfig {
            channels: 12,
            heads: 3,
            order,
            groups: 3,
            eps: 1e-5,
            trailing_axes: 1,
            names: ["norm", "qkv", "proj_out"],
            output_scale_factor: 2.0,
            initial: Initial::FanIn,
            initial_last: Initial::FanIn,
        }
    }

    /// Row `(which, head, channel)` of the projection in this layout.
    fn row(order: QkvOrder, which: usize, head: usize, channel: usize) -> usize {
        match order {
            QkvOrder::HeadsFirst => (head * 3 + which) * 4 + channel,
            QkvOrder::QkvFirst => (which * 3 + head) * 4 + channel,
            QkvOrder::QkvLast => (head * 4 + channel) * 3 + which,
        }
    }

    #[test]
    fn the_orders_are_one_function_with_the_rows_moved() {
        let x = normal(1, (2, 12, 3, 4)).unwrap();
        let mut results = Vec::new();
        let mut first: Option<BTreeMap<String, Tensor>> = None;
        for order in [QkvOrder::QkvFirst, QkvOrder::HeadsFirst, QkvOrder::QkvLast] {
            let store = Store::new(3, DType::F64, &Device::Cpu);
            let layer = QkvAttention::new(&store.root(), config(order)).unwrap();
            let weights = first.get_or_insert_with(|| store.frozen().unwrap()).clone();
            let mut index = vec![0u32; 36];
            for which in 0..3 {
                for head in 0..3 {
                    for channel in 0..4 {
                        index[row(order, which, head, channel)] =
                            row(QkvOrder::QkvFirst, which, head, channel) as u32;
                    }
                }
            }
            let index = Tensor::new(index, &Device::Cpu).unwrap();
            let moved = weights.into_iter().map(|(name, value)| {
                let qkv = name.starts_with("qkv");
                let value = if qkv {
                    value.index_select(&index, 0).unwrap()
                } else {
                    value
                };
                (name, value)
            });
            store.load(&moved.collect(), Strictness::Exact).unwrap();
            results.push(layer.forward(&x).unwrap());
        }
        for other in &results[1..] {
            assert!(max_abs_difference(other, &results[0]).unwrap() < 1e-13);
        }
    }

    #[test]
    fn the_first_token_alone_is_the_first_of_all() {
        let qkv = normal(1, (2, 5, 36)).unwrap();
        for order in [QkvOrder::QkvFirst, QkvOrder::HeadsFirst, QkvOrder::QkvLast] {
            let all = order
                .attend(&qkv, 3, false)
                .unwrap()
                .narrow(1, 0, 1)
                .unwrap();
            let one = order.attend(&qkv, 3, true).unwrap();
            assert!(max_abs_difference(&all, &one).unwrap() < 1e-14);
        }
    }

    #[test]
    fn gradients_are_right() {
        for order in [QkvOrder::QkvFirst, QkvOrder::HeadsFirst, QkvOrder::QkvLast] {
            let f = |t: &[Tensor]| {
                order
                    .attend(&t[0], 3, false)
                    .map_err(candle_core::Error::wrap)
            };
            let error = max_relative_error(f, &[normal(2, (2, 3, 18)).unwrap()]).unwrap();
            assert!(error < 1e-6, "{order:?}: {error}");
        }
    }

    #[test]
    fn heads_that_do_not_fill_the_channels_are_refused() {
        let store = Store::new(0, DType::F32, &Device::Cpu);
        let bad = QkvAttentionConfig {
            heads: 5,
            ..config(QkvOrder::QkvFirst)
        };
        let said = QkvAttention::new(&store.root(), bad).unwrap_err();
        assert!(said.to_string().contains("12 channels"), "{said}");
    }
}
