//! The network that widens an embedding of the time.

use crate::error::Result;
use crate::layer::{Activation, Linear};
use crate::store::Scope;
use candle_core::Tensor;

/// Sizes of a [`TimestepEmbedding`].
#[derive(Clone, Copy, Debug)]
pub struct TimestepEmbeddingConfig {
    /// Features of the input.
    pub in_channels: usize,
    /// Features between the two maps.
    pub time_embed_dim: usize,
    /// Nonlinearity between the two maps.
    pub act_fn: Activation,
    /// Features of the output, if not `time_embed_dim`.
    pub out_dim: Option<usize>,
}

impl TimestepEmbeddingConfig {
    /// With SiLU, and as many features out as between.
    pub fn new(in_channels: usize, time_embed_dim: usize) -> Self {
        Self {
            in_channels,
            time_embed_dim,
            act_fn: Activation::Silu,
            out_dim: None,
        }
    }
}

/// Two affine maps with a nonlinearity between. Names: `linear_1`, `linear_2`.
///
/// ```text
/// y = W₂ a(W₁ x + β₁) + β₂
/// ```
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    act: Activation,
}

impl TimestepEmbedding {
    /// A network of these sizes.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, config: TimestepEmbeddingConfig) -> Result<Self> {
        let TimestepEmbeddingConfig {
            in_channels,
            time_embed_dim,
            act_fn,
            out_dim,
        } = config;
        let out = out_dim.unwrap_or(time_embed_dim);
        Ok(Self {
            linear_1: Linear::new(&scope.sub("linear_1"), in_channels, time_embed_dim, true)?,
            linear_2: Linear::new(&scope.sub("linear_2"), time_embed_dim, out, true)?,
            act: act_fn,
        })
    }

    /// `[B, I] -> [B, O]`.
    ///
    /// # Errors
    /// If the features don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2
            .forward(&self.act.forward(&self.linear_1.forward(x)?)?)
    }
}
