//! EDM's churn: raising the noise a little before each step (Karras et al. 2022, algorithm 2).

use super::Ctx;
use crate::error::Result;
use crate::predict::Prediction;
use crate::schedule::{Point, Schedule};
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// When the network is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChurnOrder {
    /// After the noise was raised, as the paper says.
    #[default]
    AfterNoise,
    /// Before, its raw output then read at the raised level (diffusers' EDM Euler, and its Euler
    /// for `ε`).
    BeforeNoise,
    /// Before, its raw output read on the raised sample but at the old level (diffusers' Euler
    /// for `v`).
    BeforeNoiseAtOldLevel,
}

/// The churn of a run.
///
/// ```text
/// γ = min(S_churn/n, √2 − 1) if S_min ≤ σ̂ ≤ S_max, else 0
/// σ̂' = σ̂ (1 + γ),   x̂' = x̂ + √(σ̂'² − σ̂²) S_noise z
/// ```
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Churn {
    /// Total amount, 0 for none.
    pub s_churn: f64,
    /// Smallest noise level at which it acts.
    pub s_min: f64,
    /// Largest noise level at which it acts; none means any.
    pub s_max: Option<f64>,
    /// Factor on the added noise, slightly above 1.
    pub s_noise: f64,
    /// When the network is asked.
    pub order: ChurnOrder,
    /// Where a raised level stands in time. Without one, time is the level itself (EDM).
    #[serde(skip)]
    pub schedule: Option<Arc<dyn Schedule + Send + Sync>>,
}

impl Default for Churn {
    fn default() -> Self {
        Self {
            s_churn: 0.0,
            s_min: 0.0,
            s_max: None,
            s_noise: 1.0,
            order: ChurnOrder::AfterNoise,
            schedule: None,
        }
    }
}

impl Churn {
    /// The raise `γ` of a step of a run of `steps`.
    pub fn gamma(&self, sigma_hat: f64, steps: usize) -> f64 {
        if self.s_churn > 0.0
            && (self.s_min..=self.s_max.unwrap_or(f64::INFINITY)).contains(&sigma_hat)
        {
            (self.s_churn / steps as f64).min(std::f64::consts::SQRT_2 - 1.0)
        } else {
            0.0
        }
    }

    /// The raised sample, where it stands, and the network's belief about it.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn raise(
        &self,
        x: &Tensor,
        from: &Point,
        ctx: &mut Ctx<'_>,
    ) -> Result<(Tensor, Point, Prediction)> {
        let gamma = self.gamma(from.sigma_hat(), ctx.total);
        if gamma == 0.0 {
            let said = ctx.denoise(x, from)?;
            return Ok((x.clone(), *from, said));
        }
        if self.order != ChurnOrder::AfterNoise {
            let mut said = ctx.denoise(x, from)?;
            let raised = Point {
                sigma: from.sigma * (1.0 + gamma),
                ..*from
            };
            let x = self.add_noise(x, from, &raised, ctx)?;
            if self.order == ChurnOrder::BeforeNoiseAtOldLevel {
                said.x0 = Some(said.raw_x0(&x, At::All(*from))?);
            }
            return Ok((x, raised, said));
        }
        let sigma_hat = from.sigma_hat() * (1.0 + gamma);
        let raised = match &self.schedule {
            Some(schedule) => schedule.at_log_snr(-2.0 * sigma_hat.ln()),
            None => Point {
                t: sigma_hat,
                alpha: from.alpha,
                sigma: from.alpha * sigma_hat,
            },
        };
        let x = self.add_noise(x, from, &raised, ctx)?;
        let said = ctx.denoise(&x, &raised)?;
        Ok((x, raised, said))
    }

    fn add_noise(
        &self,
        x: &Tensor,
        from: &Point,
        raised: &Point,
        ctx: &mut Ctx<'_>,
    ) -> Result<Tensor> {
        let added = (raised.sigma_hat().powi(2) - from.sigma_hat().powi(2))
            .max(0.0)
            .sqrt();
        lincomb(
            raised.alpha / from.alpha,
            x,
            raised.alpha * added * self.s_noise,
            &ctx.noise.normal(x)?,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gamma_is_bounded_and_banded() {
        let churn = Churn {
            s_churn: 40.0,
            s_min: 0.05,
            s_max: Some(50.0),
            ..Churn::default()
        };
        assert_eq!(churn.gamma(1.0, 256), 40.0 / 256.0);
        assert_eq!(churn.gamma(1.0, 10), std::f64::consts::SQRT_2 - 1.0);
        assert_eq!(churn.gamma(0.04, 256), 0.0);
        assert_eq!(churn.gamma(50.1, 256), 0.0);
        assert_eq!(Churn::default().gamma(1.0, 256), 0.0);
    }
}
