//! DPM2 of k-diffusion: Karras et al.'s algorithm 2 with the midpoint rule of DPM-Solver-2, plain and
//! ancestral.

use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::forward::posterior;
use crate::schedule::{Point, Schedule};
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Pairs of moves in `x̂ = x/α` over `σ̂ = σ/α`: to a middle point, and from the first sample on with
/// the slope found there.
///
/// ```text
/// x̂_m = x̂ + (σ̂_m − σ̂) ε̂,   x̂' = x̂ + (σ̂_down − σ̂) ε̂(x̂_m, σ̂_m)  (+ σ̂_up z)
/// σ̂_up² = η² σ̂'² (σ̂² − σ̂'²)/σ̂²,   σ̂_down² = σ̂'² − σ̂_up²,   ln σ̂_m = ½ (ln σ̂ + ln σ̂_down)
/// ```
///
/// [`kdpm2_points`] puts the middle points into a grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kdpm2 {
    /// 0 for the probability flow, 1 for the ancestral variant.
    pub eta: f64,
}

/// The noise level to go down to before noise is added, and the noise added there, in the variables
/// of `to`.
///
/// `σ_up² = η² β̃` of the posterior `q(x_to | x_from, x₀)`.
pub fn ancestral_levels(from: &Point, to: &Point, eta: f64) -> (f64, f64) {
    let up2 = (eta * eta * posterior(from, to).variance).min(to.sigma * to.sigma);
    ((to.sigma * to.sigma - up2).max(0.0).sqrt(), up2.sqrt())
}

/// A grid with a middle point before every point but the data.
pub fn kdpm2_points(points: &[Point], schedule: &dyn Schedule, eta: f64) -> Vec<Point> {
    let mut out: Vec<Point> = points.first().copied().into_iter().collect();
    for pair in points.windows(2) {
        let (from, to) = (&pair[0], &pair[1]);
        if to.sigma > 0.0 {
            let down = ancestral_levels(from, to, eta).0 / to.alpha;
            // ln SNR = −2 ln σ̂, halfway.
            out.push(schedule.at_log_snr(-(from.sigma_hat().ln() + down.ln())));
        }
        out.push(*to);
    }
    out
}

impl Step for Kdpm2 {
    /// The first sample of the pair, between its two moves.
    type Memory = Option<(Tensor, Point)>;

    fn order(&self) -> Order {
        if self.eta == 0.0 {
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
        memory: &mut Self::Memory,
    ) -> Result<Tensor> {
        let said = ctx.denoise(x, from)?;
        let Some((first, start)) = memory.take() else {
            if to.sigma > 0.0 {
                *memory = Some((x.clone(), *from));
            }
            return said.along(x, from, to.alpha, to.sigma);
        };
        let epsilon = said.epsilon_of_x0(x, At::All(*from))?;
        let (down, up) = ancestral_levels(&start, to, self.eta);
        let slope = down - to.alpha * start.sigma_hat();
        let keep = to.alpha / start.alpha;
        if up == 0.0 {
            return lincomb(keep, &first, slope, &epsilon);
        }
        let z = ctx.noise_between(x, &start, to)?;
        Ok(diffusion_ops::combine(&[
            (keep, &first),
            (slope, &epsilon),
            (up, &z),
        ])?)
    }
}
