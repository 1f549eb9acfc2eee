//! The latent of data: DDIM's path walked from the data up to the noise (Song, Meng and Ermon 2020,
//! section 5.4; the fixed point as in Pan et al. 2023, "Effective Real Image Editing with Accelerated
//! Iterative Diffusion Inversion").

use super::{Ctx, Move, Order, Planned, Step};
use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The deterministic DDIM step from a noisier `x_t` down to `x_s`, solved for `x_t`.
///
/// ```text
/// x_t = (α_t/α_s) x_s + (σ_t − σ_s α_t/α_s) ε̂(x_t, t)
/// ```
///
/// Both sides know `x_t`: it is found by iterating from the last step's noise. Each iteration is a
/// network call; the more, the nearer sampling back comes to where it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Inversion {
    /// Network calls a step, from 1.
    pub iterations: usize,
}

impl Default for Inversion {
    fn default() -> Self {
        Self { iterations: 1 }
    }
}

impl Inversion {
    /// The way back over the points of a run, which DDIM goes down.
    pub fn along(iterations: usize, points: &[Point]) -> Planned<Self> {
        let up = points.windows(2).rev();
        let moves = up.map(|pair| Move::Denoise(pair[1], pair[0])).collect();
        Planned::with_moves(Self { iterations }, moves)
    }
}

impl Step for Inversion {
    /// The noise that the last step found.
    type Memory = Option<Tensor>;

    fn order(&self) -> Order {
        Order::Exactly(1)
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        last: &mut Option<Tensor>,
    ) -> Result<Tensor> {
        let keep = to.alpha / from.alpha;
        let land = |epsilon: &Tensor| lincomb(keep, x, to.sigma - keep * from.sigma, epsilon);
        let mut there = match last {
            Some(epsilon) => land(epsilon)?,
            None => x.affine(keep, 0.0)?,
        };
        for _ in 0..self.iterations.max(1) {
            let epsilon = ctx
                .denoise(&there, to)?
                .epsilon_of_x0(&there, At::All(*to))?;
            there = land(&epsilon)?;
            *last = Some(epsilon);
        }
        Ok(there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Grid;
    use crate::noise::CounterNoise;
    use crate::oracle::{Gaussian, Mixture, order};
    use crate::sample::{Ddim, Solver, sample};
    use crate::schedule::Vp;
    use candle_core::Device;

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        let gap = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        gap.max(0).unwrap().to_scalar().unwrap()
    }

    fn solve(solver: &dyn Solver, model: &dyn crate::denoiser::Denoiser, x: &Tensor) -> Tensor {
        let mut noise = CounterNoise::new(0, 0..3);
        sample(solver, model, x.clone(), &mut noise, 0..3).unwrap()
    }

    fn data() -> Tensor {
        Tensor::new(&[[-1.1f64], [0.2], [1.4]], &Device::Cpu).unwrap()
    }

    /// There and back: the more iterations, the nearer, down to rounding.
    #[test]
    fn sampling_comes_back_to_where_it_began() {
        let oracle = Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4]);
        let oracle = oracle.unwrap();
        let points = Grid::UniformLogSnr.points(&Vp::default(), 60).unwrap();
        let there_and_back = |iterations| {
            let latent = solve(&Inversion::along(iterations, &points), &oracle, &data());
            let back = solve(&Planned::new(Ddim::default(), &points), &oracle, &latent);
            worst(&back, &data())
        };
        let [one, four, many] = [1, 4, 60].map(there_and_back);
        assert!(one < 0.1 && one > 1e-5, "{one:e}");
        assert!(four < 0.02 * one, "{four:e} after {one:e}");
        assert!(many < 1e-9, "{many:e}");
    }

    /// The latent converges to the exact flow's, at first order.
    #[test]
    fn the_latent_is_that_of_the_flow() {
        let oracle = Gaussian::new(vec![0.3], vec![0.4]);
        let vp = Vp::default();
        let slope = order::measure(&[100, 200, 400], |n| {
            let mut points = Grid::UniformLogSnr.points(&vp, n)?;
            points.pop();
            let (noisy, clean) = (points[0], points[points.len() - 1]);
            let exact = oracle.flow(&data(), &clean, &noisy)?;
            let latent = solve(&Inversion::along(1, &points), &oracle, &data());
            Ok(worst(&latent, &exact))
        });
        let slope = slope.unwrap();
        assert!((slope - 1.0).abs() < 0.15, "{slope:.3}");
    }
}
