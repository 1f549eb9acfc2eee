//! DDPM's ancestral sampling (Ho, Jain and Abbeel 2020, algorithm 2).

use super::{Ctx, Order, Step};
use crate::error::{Report, Result};
use crate::forward::{posterior, transition};
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The variance of the reverse step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// `β̃`, the posterior's: right for data that is one point.
    #[default]
    FixedSmall,
    /// `β̃` through its logarithm, bounded below by 1e-20.
    FixedSmallLog,
    /// `β = σ²_{t|s}`: right for data that is standard normal.
    FixedLarge,
    /// `exp(½(v+1) ln β + ½(1−v) ln β̃)` with `v` from the network (Nichol and Dhariwal 2021,
    /// eq. 15).
    LearnedRange,
}

/// The ancestral sampler.
///
/// ```text
/// x_s = c_x x_t + c_{x0} x̂₀ + std z,   (c_x, c_{x0}) of the posterior q(x_s | x_t, x̂₀)
/// ```
///
/// No noise is added when `s` is the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ancestral {
    /// The variance of a step.
    pub variance: Variance,
    /// Add noise even to the data when the last step does not start from index 0. Diffusers does;
    /// with [`Variance::FixedLarge`] on a coarse grid the result is then visibly noisy.
    pub noise_into_data: bool,
}

impl Step for Ancestral {
    type Memory = ();

    fn order(&self) -> Order {
        Order::Unstated
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        (): &mut (),
    ) -> Result<Tensor> {
        let said = ctx.denoise(x, from)?;
        let p = posterior(from, to);
        let mean = lincomb(p.x, x, p.x0, &said.x0(x, At::All(*from))?)?;
        let into_data = to.sigma == 0.0;
        if into_data && !(self.noise_into_data && from.t > 0.0) {
            return Ok(mean);
        }
        let beta = transition(to, from).variance;
        let small = p.variance.max(1e-20);
        let variance = match self.variance {
            Variance::FixedSmall | Variance::FixedSmallLog => small,
            Variance::FixedLarge => beta,
            Variance::LearnedRange => {
                let Some(v) = &said.var_mix else {
                    return Err(Report::new(
                        "variance",
                        "learned_range, but the network predicts no variance",
                    )
                    .expected("a network with twice the output channels")
                    .remedy("use fixed_small or fixed_large")
                    .config());
                };
                let (high, low) = (beta.ln(), small.ln());
                // ½ of the log-variance, to get the deviation.
                let std = v.affine(0.25 * (high - low), 0.25 * (high + low))?.exp()?;
                return Ok((mean + (std * ctx.noise.normal(x)?)?)?);
            }
        };
        lincomb(1.0, &mean, variance.sqrt(), &ctx.noise.normal(x)?)
    }
}
