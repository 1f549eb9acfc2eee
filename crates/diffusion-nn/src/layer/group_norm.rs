//! Trainable group normalisation.

use crate::error::{Error, Result};
use crate::layer::Activation;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::Init;

/// Group normalisation: see [`diffusion_ops::group_norm`]. Names: `weight`, `bias`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// A normalisation that begins with scale 1 and shift 0.
    ///
    /// # Errors
    /// If `groups` does not divide `channels`, or a name is taken.
    pub fn new(scope: &Scope, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::config(
                format!("number of groups of `{}`", scope.path()),
                groups,
                format!("a divisor of its {channels} channels"),
                "choose `norm_num_groups` so that it divides every block's channels",
            ));
        }
        let weight = scope.param("weight", channels, Init::Const(1.0))?;
        let bias = scope.param("bias", channels, Init::Const(0.0))?;
        Ok(Self {
            weight,
            bias,
            groups,
            eps,
        })
    }

    /// `[B, C, ...] -> [B, C, ...]`.
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(diffusion_ops::group_norm(
            x,
            &self.weight,
            &self.bias,
            self.groups,
            self.eps,
        )?)
    }

    /// The normalisation and a nonlinearity after it, in one pass.
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let op = activation.op();
        let y =
            diffusion_ops::group_norm_act(x, &self.weight, &self.bias, self.groups, self.eps, op)?;
        finished(y, activation)
    }

    /// `a(norm(x) (1 + scale) + shift)`, with `scale` and `shift` of shape `[B, C]`: see
    /// [`diffusion_ops::group_norm_scale_shift`].
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward_scale_shift(
        &self,
        x: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        activation: Activation,
    ) -> Result<Tensor> {
        let op = activation.op();
        let y = diffusion_ops::group_norm_scale_shift(
            x,
            &self.weight,
            &self.bias,
            scale,
            shift,
            self.groups,
            self.eps,
            op,
        )?;
        finished(y, activation)
    }
}

/// The nonlinearity, where the norm did not include it.
fn finished(y: Tensor, activation: Activation) -> Result<Tensor> {
    match activation.op() {
        Some(_) => Ok(y),
        None => activation.forward(&y),
    }
}
