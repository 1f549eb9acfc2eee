//! Euler's method on the probability flow, in the variables in which it is straightest.

use super::{Churn, Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Euler in `x̂ = x/α` over `σ̂ = σ/α` (Karras et al. 2022, eq. 1 with `dx̂/dσ̂ = ε`).
///
/// ```text
/// x̂' = x̂ + (σ̂_to − σ̂) ε̂,   that is   x' = α_to x̂₀ + σ_to ε̂
/// ```
///
/// The second form is used: it needs no division by α, so that a start without signal is legal.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Euler {
    /// Noise raised before each step.
    pub churn: Churn,
}

impl Step for Euler {
    type Memory = ();

    fn order(&self) -> Order {
        if self.churn.s_churn == 0.0 {
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
        let (x, from, said) = self.churn.raise(x, from, ctx)?;
        said.along(&x, &from, to.alpha, to.sigma)
    }
}
