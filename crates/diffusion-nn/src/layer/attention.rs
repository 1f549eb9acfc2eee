//! Multi-head attention on tokens or on maps.

use crate::error::{Error, Result};
use crate::layer::{GroupNorm, Linear};
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::add;

/// Sizes of an [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionConfig {
    /// Features of the queries' source, and of the result.
    pub query_dim: usize,
    /// Features of the keys' source; `None` means self-attention.
    pub cross_attention_dim: Option<usize>,
    /// Number of heads.
    pub heads: usize,
    /// Features of one head.
    pub dim_head: usize,
    /// Whether the maps to queries, keys and values have a bias.
    pub bias: bool,
    /// Groups of the normalisation in front, if there is one.
    pub norm_num_groups: Option<usize>,
    /// ε of that normalisation.
    pub eps: f64,
    /// Whether the input is added to the result.
    pub residual_connection: bool,
    /// What the result is divided by.
    pub rescale_output_factor: f64,
}

impl AttentionConfig {
    /// Self-attention without bias, norm and residual connection.
    pub fn new(query_dim: usize, heads: usize, dim_head: usize) -> Self {
        Self {
            query_dim,
            cross_attention_dim: None,
            heads,
            dim_head,
            bias: false,
            norm_num_groups: None,
            eps: 1e-5,
            residual_connection: false,
            rescale_output_factor: 1.0,
        }
    }
}

/// Multi-head attention. Names: `group_norm`, `to_q`, `to_k`, `to_v`, `to_out.0`.
///
/// ```text
/// y = (W_o attention(W_q n, W_k c, W_v c) + β_o + x) / r
/// ```
///
/// where `n` is the normalised input, `c` the context (or `n`), and the residual `x` and the
/// divisor `r` are as configured; see [`diffusion_ops::attention_heads`].
#[derive(Clone, Debug)]
pub struct Attention {
    group_norm: Option<GroupNorm>,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    config: AttentionConfig,
}

impl Attention {
    /// An attention layer of these sizes.
    ///
    /// # Errors
    /// If there are no heads, the groups don't divide the features, or a name is taken.
    pub fn new(scope: &Scope, config: AttentionConfig) -> Result<Self> {
        if config.heads == 0 || config.dim_head == 0 {
            return Err(Error::config(
                format!("heads of `{}`", scope.path()),
                format!("{} of {} features", config.heads, config.dim_head),
                format!("at least one head within {} features", config.query_dim),
                "choose `attention_head_dim` no larger than the block's channels",
            ));
        }
        let inner = config.heads * config.dim_head;
        let context = config.cross_attention_dim.unwrap_or(config.query_dim);
        let norm = |groups| {
            GroupNorm::new(
                &scope.sub("group_norm"),
                groups,
                config.query_dim,
                config.eps,
            )
        };
        Ok(Self {
            group_norm: config.norm_num_groups.map(norm).transpose()?,
            to_q: Linear::new(&scope.sub("to_q"), config.query_dim, inner, config.bias)?,
            to_k: Linear::new(&scope.sub("to_k"), context, inner, config.bias)?,
            to_v: Linear::new(&scope.sub("to_v"), context, inner, config.bias)?,
            to_out: Linear::new(&scope.sub("to_out").sub(0), inner, config.query_dim, true)?,
            config,
        })
    }

    /// Attends from `x` to `context` (or to itself).
    ///
    /// # Shapes
    /// `x [B, N, D]` or `[B, D, H, W]`, `context [B, S, E]`, `mask` anything that broadcasts to
    /// `[B, heads, N, S]` and is added to the scores; the result has the shape of `x`.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn forward(
        &self,
        x: &Tensor,
        context: Option<&Tensor>,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let tokens = if x.rank() == 4 {
            x.flatten_from(2)?.transpose(1, 2)?
        } else {
            x.clone()
        };
        let tokens = match &self.group_norm {
            Some(norm) => norm.forward(&tokens.transpose(1, 2)?)?.transpose(1, 2)?,
            None => tokens,
        };
        let context = context.unwrap_or(&tokens);
        let q = self.to_q.forward(&tokens)?;
        let k = self.to_k.forward(context)?;
        let v = self.to_v.forward(context)?;
        let y = diffusion_ops::attention_heads(&q, &k, &v, self.config.heads, mask, None)?;
        let y = self.to_out.forward(&y)?;
        let y = if x.rank() == 4 {
            y.transpose(1, 2)?.reshape(x.shape())?
        } else {
            y
        };
        let y = if self.config.residual_connection {
            add(&y, x)?
        } else {
            y
        };
        rescaled(y, self.config.rescale_output_factor)
    }
}

/// `x / factor`, without work where the factor is 1.
pub(crate) fn rescaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        Ok(x)
    } else {
        Ok((x / factor)?)
    }
}
