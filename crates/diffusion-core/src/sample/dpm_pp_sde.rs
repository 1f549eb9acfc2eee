//! DPM-Solver++ (SDE) of k-diffusion: two ancestral half steps a step.

use super::kdpm2::ancestral_levels;
use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Pairs of moves: an ancestral step to the middle in `λ`, and one over the whole way with the data
/// believed there.
///
/// ```text
/// x_m = α_m D + σ_{m,down} (x − α D)/σ + σ_{m,up} z₁,            D  = x̂₀(x)
/// x'  = α' D_m + σ'_{down} (x − α D_m)/σ + σ'_{up} z₂,           D_m = x̂₀(x_m)
/// ```
///
/// Both noises belong to one Brownian path over `λ`. [`kdpm2_points`](super::kdpm2::kdpm2_points)
/// with η = 0 puts the middle points into a grid.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpmPpSde {
    /// Factor on the noise.
    pub s_noise: f64,
}

impl Default for DpmPpSde {
    fn default() -> Self {
        Self { s_noise: 1.0 }
    }
}

impl Step for DpmPpSde {
    /// The first sample of the pair, between its two moves.
    type Memory = Option<(Tensor, Point)>;

    fn order(&self) -> Order {
        Order::Unstated
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Self::Memory,
    ) -> Result<Tensor> {
        let x0 = ctx.denoise(x, from)?.x0(x, At::All(*from))?;
        let (first, start) = match memory.take() {
            Some(begun) => begun,
            None => {
                if to.sigma > 0.0 {
                    *memory = Some((x.clone(), *from));
                }
                (x.clone(), *from)
            }
        };
        let (down, up) = ancestral_levels(&start, to, 1.0);
        let keep = down / start.sigma;
        let data = to.alpha - keep * start.alpha;
        if up == 0.0 {
            return lincomb(keep, &first, data, &x0);
        }
        let z = ctx.noise_between(x, &start, to)?;
        Ok(diffusion_ops::combine(&[
            (keep, &first),
            (data, &x0),
            (up * self.s_noise, &z),
        ])?)
    }
}
