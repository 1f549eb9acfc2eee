//! Heun's method on straight paths: rectified flow and flow matching (Liu et al. 2022; Lipman et al.
//! 2022).

use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::predict::Kind;
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Heun over the noise level `σ` of `x = (1 − σ) x₀ + σ ε`, whose velocity is `u = ε − x₀`.
///
/// ```text
/// x' = x + (σ_to − σ) u,   x'' = x + (σ_to − σ) (u + u')/2
/// ```
///
/// The last step, into the data, stays an Euler step. Euler itself is [`super::Euler`], which is exact
/// in these variables too.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlowHeun {
    /// Noise is raised before each step by at most this much a run.
    pub s_churn: f64,
    /// Smallest noise level at which it is.
    pub s_min: f64,
    /// Largest noise level at which it is.
    pub s_max: f64,
    /// Factor on the raised noise.
    pub s_noise: f64,
}

impl Default for FlowHeun {
    fn default() -> Self {
        Self {
            s_churn: 0.0,
            s_min: 0.0,
            s_max: f64::MAX,
            s_noise: 1.0,
        }
    }
}

impl Step for FlowHeun {
    type Memory = ();

    fn order(&self) -> Order {
        if self.s_churn == 0.0 {
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
        let raise = if self.s_churn > 0.0 && (self.s_min..=self.s_max).contains(&from.sigma) {
            (self.s_churn / ctx.total as f64).min(std::f64::consts::SQRT_2 - 1.0)
        } else {
            0.0
        };
        let velocity = |x: &Tensor, at: &Point, ctx: &mut Ctx<'_>| -> Result<Tensor> {
            let said = ctx.denoise(x, at)?;
            let said = match said.x0 {
                // A corrected x₀ counts through the noise that it implies.
                Some(_) => {
                    return Ok((said.epsilon_of_x0(x, At::All(*at))? - said.x0(x, At::All(*at))?)?);
                }
                None => said,
            };
            Ok(said.into_kind(Kind::Flow, x, At::All(*at))?.value)
        };
        let u = velocity(x, from, ctx)?;
        let raised = from.sigma * (1.0 + raise);
        let mut x = x.clone();
        let mut slope = u;
        if raise > 0.0 {
            let added = (raised * raised - from.sigma * from.sigma).sqrt() * self.s_noise;
            x = lincomb(1.0, &x, added, &ctx.noise.normal(&x)?)?;
            // The slope belongs to the level at which the network was asked.
            slope = slope.affine(from.sigma / raised, 0.0)?;
        }
        let dt = to.sigma - raised;
        let euler = lincomb(1.0, &x, dt, &slope)?;
        if to.sigma == 0.0 {
            return Ok(euler);
        }
        let there = velocity(&euler, to, ctx)?;
        Ok(diffusion_ops::combine(&[
            (1.0, &x),
            (0.5 * dt, &slope),
            (0.5 * dt, &there),
        ])?)
    }
}
