//! Heun's method on the probability flow: EDM's sampler (Karras et al. 2022, algorithms 1 and 2).

use super::{Churn, Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::Tensor;
use diffusion_ops::combine;
use serde::{Deserialize, Serialize};

/// Heun in `x̂ = x/α` over `σ̂ = σ/α`.
///
/// ```text
/// x̂' = x̂ + (σ̂_to − σ̂) d,   x̂'' = x̂ + (σ̂_to − σ̂) (d + d')/2,   d' = ε̂ at (x̂', σ̂_to)
/// ```
///
/// The last step, into the data, and a step that starts without signal stay Euler steps:
/// `2n − 1` network calls in all.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Heun {
    /// Noise raised before each step.
    pub churn: Churn,
}

impl Step for Heun {
    type Memory = ();

    fn order(&self) -> Order {
        if self.churn.s_churn == 0.0 {
            Order::Exactly(2)
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
        let (x, from, said) = self.churn.raise(x, from, ctx)?;
        let at = At::All(from);
        let slope = said.epsilon_of_x0(&x, at)?;
        let euler = said.along(&x, &from, to.alpha, to.sigma)?;
        if to.sigma == 0.0 || from.alpha == 0.0 {
            return Ok(euler);
        }
        let there = ctx
            .denoise(&euler, to)?
            .epsilon_of_x0(&euler, At::All(*to))?;
        let half = 0.5 * (to.sigma - to.alpha * from.sigma_hat());
        Ok(combine(&[
            (to.alpha / from.alpha, &x),
            (half, &slope),
            (half, &there),
        ])?)
    }
}
