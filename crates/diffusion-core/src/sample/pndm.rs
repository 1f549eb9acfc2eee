//! PNDM and iPNDM (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds";
//! Zhang and Chen 2022): classical multistep rules with DDIM's step as the transfer.

use super::{Ctx, Move, Order, Planned, Step};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::schedule::{Point, Schedule};
use crate::tensor::At;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// DDIM's step with any noise in place of the network's: `φ(x, ε, from, to)`, eq. 11, the noise being a
/// weighted sum.
fn transfer(x: &Tensor, epsilon: &[(f64, &Tensor)], from: &Point, to: &Point) -> Result<Tensor> {
    // Without signal only the noise goes on; x − σ ε then is zero but for rounding.
    let keep = to.alpha / from.alpha.max(1e-8);
    let turn = to.sigma - keep * from.sigma;
    let mut terms = vec![(keep, x)];
    terms.extend(epsilon.iter().map(|(w, e)| (turn * w, *e)));
    Ok(diffusion_ops::combine(&terms)?)
}

/// Slopes with their weights.
fn weighted<'a>(weights: &[f64], slopes: &'a [Tensor]) -> Vec<(f64, &'a Tensor)> {
    weights.iter().copied().zip(slopes).collect()
}

/// Adams and Bashforth's weights of up to four slopes, latest first.
///
/// ```text
/// e,  (3e − e₁)/2,  (23e − 16e₁ + 5e₂)/12,  (55e − 59e₁ + 37e₂ − 9e₃)/24
/// ```
pub fn adams_bashforth(slopes: usize) -> &'static [f64] {
    match slopes {
        0 | 1 => &[1.0],
        2 => &[3.0 / 2.0, -1.0 / 2.0],
        3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    }
}

/// iPNDM: DDIM with the noise extrapolated by [`adams_bashforth`], starting from lower orders.
///
/// Not fourth order on a general grid: its coefficients take the steps for equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ipndm {
    /// Slopes used, 1 to 4.
    pub order: usize,
}

impl Default for Ipndm {
    fn default() -> Self {
        Self { order: 4 }
    }
}

impl Step for Ipndm {
    type Memory = Vec<Tensor>;

    fn order(&self) -> Order {
        if self.order == 1 {
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
        memory: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let epsilon = ctx.denoise(x, from)?.epsilon_of_x0(x, At::All(*from))?;
        memory.insert(0, epsilon);
        memory.truncate(self.order.clamp(1, 4));
        let epsilon = weighted(adams_bashforth(memory.len()), memory);
        transfer(x, &epsilon, from, to)
    }
}

/// How PNDM starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Three pseudo Runge and Kutta steps of four calls each (F-PNDM).
    RungeKutta,
    /// One pseudo Heun step (S-PNDM's start, used by Stable Diffusion's PLMS).
    #[default]
    Heun,
}

/// PNDM; [`Pndm::along`] plans its moves.
///
/// ```text
/// F-PNDM   e₁ at n,  e₂ at φ(x, e₁, n, mid),  e₃ at φ(x, e₂, n, mid),  e₄ at φ(x, e₃, n, m)
///          three steps with e' = (e₁ + 2e₂ + 2e₃ + e₄)/6, then Adams and Bashforth of order 4
/// PLMS     one step with e' = (e₁ + e₂)/2, then Adams and Bashforth of orders 2, 3, 4
/// ```
///
/// Slopes are combined as the network says them, so that a velocity is combined as one, and read as
/// noise where the step starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pndm {
    /// How it starts.
    pub start: Start,
    /// How many moves belong to the start; a multiple of 4 or 2.
    #[serde(skip)]
    pub start_moves: usize,
    /// Where the first step is taken to begin when it is repeated, if not where it did.
    #[serde(skip)]
    pub restart: Option<Point>,
}

/// Number of pseudo Runge and Kutta steps of F-PNDM.
const RK_STEPS: usize = 3;

impl Pndm {
    /// The moves over a grid: the start asks more than once a step, at points between and at the same
    /// point again.
    pub fn along(start: Start, points: &[Point], schedule: &dyn Schedule) -> Planned<Self> {
        let mut moves = Vec::new();
        let mut start_moves = 0;
        for (i, pair) in points.windows(2).enumerate() {
            let (from, to) = (pair[0], pair[1]);
            match start {
                Start::RungeKutta if i < RK_STEPS && to.sigma > 0.0 => {
                    let middle = schedule.at(0.5 * (from.t + to.t));
                    moves.extend([(from, middle), (middle, middle), (middle, to), (to, to)]);
                    start_moves = moves.len();
                }
                Start::Heun if i == 0 && to.sigma > 0.0 => {
                    moves.extend([(from, to), (to, to)]);
                    start_moves = moves.len();
                }
                _ => moves.push((from, to)),
            }
        }
        let moves = moves.into_iter().map(|(a, b)| Move::Denoise(a, b));
        Planned::with_moves(
            Self {
                start,
                start_moves,
                restart: None,
            },
            moves.collect(),
        )
    }
}

/// What PNDM remembers: slopes as said, latest first; where the step of the start began; its slopes.
#[derive(Default)]
pub struct Slopes {
    past: Vec<Tensor>,
    begun: Option<(Tensor, Point)>,
    stages: Vec<Tensor>,
}

impl Step for Pndm {
    type Memory = Slopes;

    fn order(&self) -> Order {
        Order::Unstated
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Slopes,
    ) -> Result<Tensor> {
        let said = ctx.denoise(x, from)?;
        // A corrected x₀ counts through the noise that it implies.
        let said = match said.x0 {
            Some(_) => Prediction::new(Kind::Epsilon, said.epsilon_of_x0(x, At::All(*from))?),
            None => said,
        };
        let go = |slopes: &[(f64, &Tensor)], x: &Tensor, from: &Point| -> Result<Tensor> {
            if said.kind == Kind::Epsilon {
                return transfer(x, slopes, from, to);
            }
            let said = Prediction::new(said.kind, diffusion_ops::combine(slopes)?);
            let epsilon = said.epsilon(x, At::All(*from))?;
            transfer(x, &[(1.0, &epsilon)], from, to)
        };
        if ctx.index >= self.start_moves || memory.stages.is_empty() {
            memory.past.insert(0, said.value.clone());
            memory.past.truncate(4);
        }
        if ctx.index >= self.start_moves {
            let past = weighted(adams_bashforth(memory.past.len()), &memory.past);
            return go(&past, x, from);
        }
        if memory.stages.is_empty() {
            memory.begun = Some((x.clone(), *from));
        }
        memory.stages.push(said.value.clone());
        let (first, begin) = memory.begun.clone().unwrap_or((x.clone(), *from));
        let weights: &[f64] = match self.start {
            Start::RungeKutta => &[1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0],
            Start::Heun => &[0.5, 0.5],
        };
        if memory.stages.len() < weights.len() {
            return go(&[(1.0, &said.value)], &first, &begin);
        }
        let begin = self.restart.unwrap_or(begin);
        let stages = std::mem::take(&mut memory.stages);
        go(&weighted(weights, &stages), &first, &begin)
    }
}
