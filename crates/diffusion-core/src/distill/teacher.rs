//! One step of a teacher along its probability flow, every item between its own two points.

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::{At, combine};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How a teacher makes a step.
///
/// ```text
/// euler:  x_s = α_s x̂₀ + σ_s ε̂,   both at (x_t, t)             (DDIM)
/// heun:   x_s = (α_s/α_t) x_t + α_s (σ̂_s − σ̂_t) (ε̂ + ε̂')/2,    ε̂' at the end of the Euler step
/// ```
///
/// These are the steps of [`crate::sample::Ddim`] and [`crate::sample::Heun`], which move a batch
/// as a whole. A step that starts without signal or ends in the data is an Euler step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ode {
    /// One call, first order.
    Euler,
    /// Two calls, second order.
    #[default]
    Heun,
}

impl Ode {
    /// The samples at `to`, given `x`, `[B, …]`, at `from`; no gradient flows through the step.
    ///
    /// # Errors
    /// When there is not one point an item; whatever the teacher refuses.
    pub fn step(
        self,
        teacher: &dyn Denoiser,
        x: &Tensor,
        from: &[Point],
        to: &[Point],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let mut call = untracked(call);
        let (here, there) = (At::Each(from), At::Each(to));
        let said = teacher.predict(x, here, &mut call)?;
        let slope = said.epsilon_of_x0(x, here)?;
        let x0 = said.x0(x, here)?;
        let euler = combine(
            &there.coef(|p| p.alpha),
            &x0,
            &there.coef(|p| p.sigma),
            &slope,
        )?
        .detach();
        // Item by item: an Euler step stands where a second slope has no meaning.
        let second: Vec<bool> = from
            .iter()
            .zip(to)
            .map(|(from, to)| self == Ode::Heun && from.alpha > 0.0 && to.sigma > 0.0)
            .collect();
        if !second.contains(&true) {
            return Ok(euler);
        }
        // Items that stay as they are need some point at which the teacher can be asked.
        let asked: Vec<Point> = second
            .iter()
            .zip(from.iter().zip(to))
            .map(|(second, (from, to))| if *second { *to } else { *from })
            .collect();
        let after = teacher
            .predict(&euler, At::Each(&asked), &mut call)?
            .epsilon_of_x0(&euler, At::Each(&asked))?;
        // x_s = euler + ½ α_s (σ̂_s − σ̂_t) (ε̂' − ε̂), the correction being 0 for Euler items.
        let half = crate::tensor::Coef::Each(
            second
                .iter()
                .zip(from.iter().zip(to))
                .map(|(second, (from, to))| match second {
                    true => 0.5 * (to.sigma - to.alpha * from.sigma_hat()),
                    false => 0.0,
                })
                .collect(),
        );
        let bend = half.times(&(after - slope)?)?;
        Ok((euler + bend)?.detach())
    }
}

/// The same call without gradients: what a teacher or a target says is a constant.
pub(super) fn untracked<'a>(call: &'a mut Call<'_>) -> Call<'a> {
    Call {
        noise: &mut *call.noise,
        items: call.items.clone(),
        tracked: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::sample::{Ctx, Ddim, Heun, Step};
    use crate::schedule::{Schedule, Vp};
    use candle_core::Device;

    /// Items at their own points move as whole batches do at each of them.
    #[test]
    fn each_item_moves_as_the_samplers_move_it() {
        let oracle = Gaussian::new(vec![0.5, -1.0], vec![0.3, 2.0]);
        let vp = Vp::default();
        let from = [
            vp.at(1.0),
            vp.at(0.6),
            vp.at(0.2),
            Point::new(1.0, 0.0, 1.0),
        ];
        let to = [vp.at(0.7), vp.at(0.1), Point::data(0.0), vp.at(0.5)];
        let rows = [[0.3, -1.0], [1.2, 0.1], [0.0, 0.7], [-0.4, 0.9f64]];
        let x = Tensor::new(&rows, &Device::Cpu).unwrap();
        for ode in [Ode::Euler, Ode::Heun] {
            let mut noise = CounterNoise::new(0, 0..4);
            let mut call = Call {
                noise: &mut noise,
                items: 0..4,
                tracked: true,
            };
            let moved = ode.step(&oracle, &x, &from, &to, &mut call).unwrap();
            let moved = moved.to_vec2::<f64>().unwrap();
            for i in 0..4 {
                let row = x.narrow(0, i, 1).unwrap();
                let mut noise = CounterNoise::new(0, 0..1);
                let mut ctx = Ctx::new(&oracle, &mut noise, 0..1);
                let alone = match ode {
                    Ode::Euler => Ddim::default().step(&row, &from[i], &to[i], &mut ctx, &mut ()),
                    Ode::Heun => Heun::default().step(&row, &from[i], &to[i], &mut ctx, &mut ()),
                };
                let alone = alone.unwrap().to_vec2::<f64>().unwrap();
                for (a, b) in moved[i].iter().zip(&alone[0]) {
                    assert!((a - b).abs() < 1e-12, "{ode:?} {i}: {a} {b}");
                }
            }
        }
    }
}
