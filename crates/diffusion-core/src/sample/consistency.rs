//! Few-step sampling by jumps to the data: consistency models (Song et al. 2023, algorithm 1) and
//! latent consistency models (Luo et al. 2023).

use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::schedule::Point;
use crate::tensor::{At, combine, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How the jump `f(x, t)` to the data is made of the network's `x̂₀`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Boundary {
    /// `f = x̂₀`: any denoiser; a consistency model whose network keeps the boundary itself.
    #[default]
    None,
    /// `f = c_skip x + c_out x̂₀` over scaled time (LCM).
    ///
    /// ```text
    /// s = scaling · t,   c_skip = s_d²/(s² + s_d²),   c_out = s/√(s² + s_d²)
    /// ```
    Time {
        /// Standard deviation of the data.
        sigma_data: f64,
        /// Factor on the time.
        scaling: f64,
    },
    /// `f = c_skip x + c_out F`, `F` being the raw output of an EDM network (consistency models,
    /// eq. 5 with `ε = sigma_min`).
    ///
    /// ```text
    /// c_skip = s_d²/((σ − ε)² + s_d²),   c_out = s_d (σ − ε)/√(σ² + s_d²)
    /// ```
    Edm {
        /// Standard deviation of the data.
        sigma_data: f64,
        /// The smallest noise level `ε`, at which `f` is the identity.
        sigma_min: f64,
    },
}

impl Boundary {
    /// The jump `f(x, t)`, `[B, …]`, of what the network says about `x`, `[B, …]`.
    ///
    /// Under [`Boundary::Edm`] a prediction of another kind is read as the `F` that means the same;
    /// with unit data and variance-preserving noise that is the velocity with its sign changed.
    ///
    /// # Errors
    /// `Numeric` when the prediction cannot be read this way at a point.
    pub fn jump(&self, said: &Prediction, x: &Tensor, at: At<'_>) -> Result<Tensor> {
        match *self {
            Boundary::None => said.x0(x, at),
            Boundary::Time {
                sigma_data,
                scaling,
            } => {
                let root = |p: &Point| (scaling * p.t).hypot(sigma_data);
                combine(
                    &at.coef(|p| (sigma_data / root(p)).powi(2)),
                    x,
                    &at.coef(|p| scaling * p.t / root(p)),
                    &said.x0(x, at)?,
                )
            }
            Boundary::Edm {
                sigma_data,
                sigma_min,
            } => {
                let away = |p: &Point| p.sigma_hat() - sigma_min;
                let raw = Kind::Edm {
                    sigma_data,
                    negative: false,
                };
                let value = match said.kind {
                    Kind::Edm { .. } => said.value.clone(),
                    _ => said.clone().into_kind(raw, x, at)?.value,
                };
                combine(
                    &at.coef(|p| {
                        sigma_data.powi(2) / (away(p).powi(2) + sigma_data.powi(2)) / p.alpha
                    }),
                    x,
                    &at.coef(|p| sigma_data * away(p) / p.sigma_hat().hypot(sigma_data)),
                    &value,
                )
            }
        }
    }
}

/// Jump to the data, add noise, and again.
///
/// ```text
/// x̂ = f(x, t),   x' = α' x̂ + √(σ'² − σ_min²) z       (x̂ itself where σ' = 0)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Consistency {
    /// How the jump is made.
    pub boundary: Boundary,
    /// Noise that the jump leaves in the data: `ε` of consistency models, 0 elsewhere.
    pub sigma_min: f64,
    /// Bound on the jump's absolute value, where there is one.
    pub clip: Option<f64>,
    /// Factor on the noise.
    pub s_noise: f64,
}

impl Default for Consistency {
    fn default() -> Self {
        Self {
            boundary: Boundary::None,
            sigma_min: 0.0,
            clip: None,
            s_noise: 1.0,
        }
    }
}

impl Step for Consistency {
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
        let jump = self.boundary.jump(&said, x, At::All(*from))?;
        let jump = match self.clip {
            Some(bound) => jump.clamp(-bound, bound)?,
            None => jump,
        };
        let std = (to.sigma.powi(2) - self.sigma_min.powi(2)).max(0.0).sqrt() * self.s_noise;
        if std == 0.0 {
            return lincomb(to.alpha, &jump, 0.0, &jump);
        }
        lincomb(to.alpha, &jump, std, &ctx.noise.normal(x)?)
    }
}
