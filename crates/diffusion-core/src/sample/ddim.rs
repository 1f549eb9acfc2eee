//! DDIM (Song, Meng and Ermon 2020): a family from deterministic to DDPM.

use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::forward::posterior;
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use diffusion_ops::combine;
use serde::{Deserialize, Serialize};

/// Which noise the deterministic part points along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The network's own `ε`, whatever was done to `x̂₀`.
    #[default]
    Predicted,
    /// The `ε` that makes `x_t` out of the clipped `x̂₀`.
    Rederived,
}

/// The DDIM sampler (eq. 12), for any two points.
///
/// ```text
/// s² = η² β̃,   x_s = α_s x̂₀ + √(σ_s² − s²) ε̂ + s z
/// ```
///
/// η = 0 is deterministic and equals Euler in `(x/α, σ/α)`; η = 1 has the mean and variance of
/// DDPM's `β̃` for any stride.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ddim {
    /// Stochasticity, from 0 to 1.
    pub eta: f64,
    /// Which noise is kept.
    pub direction: Direction,
}

impl Step for Ddim {
    type Memory = ();

    fn order(&self) -> Order {
        if self.eta == 0.0 {
            Order::Exactly(1)
        } else {
            Order::Unstated
        }
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
        let at = At::All(*from);
        if self.eta == 0.0 && (said.x0.is_none() || self.direction == Direction::Rederived) {
            return said.along(x, from, to.alpha, to.sigma);
        }
        let x0 = said.x0(x, at)?;
        let epsilon = match self.direction {
            Direction::Predicted => said.epsilon(x, at)?,
            Direction::Rederived => said.epsilon_of_x0(x, at)?,
        };
        let variance = match self.eta {
            // Also from data up to noise, where the posterior is none.
            0.0 => 0.0,
            eta => eta.powi(2) * posterior(from, to).variance,
        };
        let along = (to.sigma.powi(2) - variance).max(0.0).sqrt();
        if variance == 0.0 {
            return lincomb(to.alpha, &x0, along, &epsilon);
        }
        let z = ctx.noise_between(x, from, to)?;
        Ok(combine(&[
            (to.alpha, &x0),
            (along, &epsilon),
            (variance.sqrt(), &z),
        ])?)
    }
}
