//! DPM-Solver++ of orders 1 and 2M (Lu et al. 2022, "DPM-Solver++", algorithm 2).

use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use diffusion_ops::combine;
use serde::{Deserialize, Serialize};

/// Whether the last step falls back to order 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LowerFinal {
    /// Only where it must: into the data.
    Never,
    /// When there are fewer than 15 steps, where it is steadier.
    #[default]
    FewSteps,
    /// Always.
    Always,
}

/// The data-prediction solver in half log-SNR, `λ = ln(α/σ)`, `h = λ_to − λ_from`.
///
/// ```text
/// x_to = (σ_to/σ) x + α_to (1 − e^{−h}) D
/// order 1:  D = x̂₀
/// order 2M: D = (1 + 1/(2r)) x̂₀ − 1/(2r) x̂₀_prev,   r = h_prev/h
/// ```
///
/// Order 1 equals DDIM with η = 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpmSolverPp {
    /// Use the previous step's `x̂₀` (2M); otherwise order 1.
    pub multistep: bool,
    /// What happens at the end.
    pub lower_final: LowerFinal,
}

impl Default for DpmSolverPp {
    fn default() -> Self {
        Self {
            multistep: true,
            lower_final: LowerFinal::FewSteps,
        }
    }
}

/// The previous step's belief and length.
#[derive(Default)]
pub struct Memory(Option<(Tensor, f64)>);

impl Step for DpmSolverPp {
    type Memory = Memory;

    fn order(&self) -> Order {
        Order::Exactly(if self.multistep { 2 } else { 1 })
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Memory,
    ) -> Result<Tensor> {
        let x0 = ctx.denoise(x, from)?.x0(x, At::All(*from))?;
        let h = to.lambda() - from.lambda();
        let last = ctx.index + 1 == ctx.total;
        let lower = match self.lower_final {
            LowerFinal::Never => false,
            LowerFinal::FewSteps => ctx.total < 15,
            LowerFinal::Always => true,
        };
        let first_order = !self.multistep || to.sigma == 0.0 || (last && lower);
        let (keep, step) = (to.sigma / from.sigma, -to.alpha * (-h).exp_m1());
        let next = match &memory.0 {
            Some((previous, h_previous)) if !first_order => {
                let weight = 0.5 * h / h_previous;
                combine(&[
                    (keep, x),
                    (step * (1.0 + weight), &x0),
                    (-step * weight, previous),
                ])?
            }
            _ => lincomb(keep, x, step, &x0)?,
        };
        memory.0 = Some((x0, h));
        Ok(next)
    }
}
