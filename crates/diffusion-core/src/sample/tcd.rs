//! Trajectory consistency sampling (Zheng et al. 2024, "Trajectory Consistency Distillation",
//! algorithm 4: strategic stochastic sampling).

use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::forward::transition;
use crate::schedule::{Point, Schedule};
use crate::tensor::lincomb;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Down the flow to a cleaner time, then up again with fresh noise.
///
/// ```text
/// s = (1 − γ) t',   x_s = α_s x̂₀ + σ_s ε̂,   x' = α_{t'|s} x_s + σ_{t'|s} z
/// ```
///
/// γ = 0 is DDIM, γ = 1 the multistep consistency sampler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tcd {
    /// How far below each point the flow is followed, from 0 to 1.
    pub gamma: f64,
    /// The points `s` of the moves of a run.
    #[serde(skip)]
    pub below: Vec<Point>,
}

impl Default for Tcd {
    fn default() -> Self {
        Self {
            gamma: 0.3,
            below: Vec::new(),
        }
    }
}

impl Tcd {
    /// For a run over these points.
    pub fn along(gamma: f64, points: &[Point], schedule: &dyn Schedule) -> Self {
        let low = schedule.span().0;
        let below = |to: &Point| match to.sigma == 0.0 || gamma == 0.0 {
            true => *to,
            false => schedule.at(((1.0 - gamma) * to.t).max(low)),
        };
        Self {
            gamma,
            below: points.iter().skip(1).map(below).collect(),
        }
    }
}

impl Step for Tcd {
    type Memory = ();

    fn order(&self) -> Order {
        if self.gamma == 0.0 {
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
        let s = self.below.get(ctx.index).copied().unwrap_or(*to);
        let x_s = said.along(x, from, s.alpha, s.sigma)?;
        let up = transition(&s, to);
        if self.gamma == 0.0 || up.variance <= 0.0 {
            return Ok(x_s);
        }
        lincomb(up.alpha, &x_s, up.variance.sqrt(), &ctx.noise.normal(x)?)
    }
}
