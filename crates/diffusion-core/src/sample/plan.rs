//! A fixed list of moves, and the loop that makes them.

use super::{Ctx, Observer, Progress, Solver, Step};
use crate::error::{Error, Report, Result};
use crate::forward::transition;
use crate::noise::Noise;
use crate::schedule::Point;
use crate::tensor::{all_finite, lincomb};
use candle_core::{DType, Tensor};

/// One move of a plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Move {
    /// From a noisier point to a cleaner one, by the sampler's rule.
    Denoise(Point, Point),
    /// From a cleaner point to a noisier one, by the forward process (RePaint).
    Renoise(Point, Point),
    /// Stay, and let the corrector improve the sample (predictor-corrector).
    Correct(Point),
}

impl Move {
    /// The point at which the move ends.
    pub fn end(&self) -> Point {
        match self {
            Move::Denoise(_, to) | Move::Renoise(_, to) | Move::Correct(to) => *to,
        }
    }
}

/// A condition that changes the sample itself, applied after every move (inpainting).
pub trait Constraint {
    /// The constrained sample at a point.
    ///
    /// # Errors
    /// Whatever the constraint refuses.
    fn apply(&self, x: Tensor, at: &Point, noise: &mut dyn Noise) -> Result<Tensor>;
}

/// Improves a sample without leaving its point (Langevin dynamics).
pub trait Corrector {
    /// The corrected sample.
    ///
    /// # Errors
    /// Whatever the model refuses.
    fn correct(&self, x: &Tensor, at: &Point, ctx: &mut Ctx<'_>) -> Result<Tensor>;
}

/// A step applied along a list of moves.
pub struct Planned<S> {
    /// The update rule.
    pub step: S,
    /// What to do, in order.
    pub moves: Vec<Move>,
    /// Applied after every move.
    pub constraint: Option<Box<dyn Constraint>>,
    /// What [`Move::Correct`] does.
    pub corrector: Option<Box<dyn Corrector>>,
    /// The dtype of the state when it is not the model's: EDM samples in f64.
    pub state: Option<DType>,
}

impl<S: Step> Planned<S> {
    /// Straight along the points of a grid.
    pub fn new(step: S, points: &[Point]) -> Self {
        Self::with_moves(
            step,
            points
                .windows(2)
                .map(|w| Move::Denoise(w[0], w[1]))
                .collect(),
        )
    }

    /// Along any list of moves.
    pub fn with_moves(step: S, moves: Vec<Move>) -> Self {
        Self {
            step,
            moves,
            constraint: None,
            corrector: None,
            state: None,
        }
    }

    /// Keeps the state in f64, whatever the model computes in.
    pub fn in_f64(self) -> Self {
        Self {
            state: Some(DType::F64),
            ..self
        }
    }
}

impl<S: Step> Solver for Planned<S> {
    fn solve(&self, x: Tensor, ctx: &mut Ctx<'_>, watch: &mut dyn Observer) -> Result<Tensor> {
        let dtype = x.dtype();
        let mut x = x.to_dtype(self.state.unwrap_or(dtype))?;
        let mut memory = S::Memory::default();
        ctx.total = self.moves.len();
        ctx.ends_in_data = self.moves.last().is_some_and(|m| m.end().sigma == 0.0);
        for (index, planned) in self.moves.iter().enumerate() {
            ctx.index = index;
            x = match planned {
                Move::Denoise(from, to) => self.step.step(&x, from, to, ctx, &mut memory)?,
                Move::Renoise(from, to) => {
                    // What a multistep method remembers belongs to the way down.
                    memory = S::Memory::default();
                    renoise(&x, from, to, ctx.noise)?
                }
                Move::Correct(at) => match &self.corrector {
                    Some(corrector) => corrector.correct(&x, at, ctx)?,
                    None => {
                        return Err(Report::new("plan", "a correcting move without a corrector")
                            .expected("Planned::corrector to be set")
                            .config());
                    }
                },
            };
            let at = planned.end();
            if let Some(constraint) = &self.constraint {
                x = constraint.apply(x, &at, ctx.noise)?;
            }
            // The graph of a step must not outlive it: memory, and very long graphs overflow
            // the stack when dropped.
            x = x.detach();
            if !all_finite(&x)? {
                return Err(Report::new(
                    format!("sampling, move {} of {}", index + 1, self.moves.len()),
                    format!(
                        "NaN or infinity at t = {}, alpha = {}, sigma = {}",
                        at.t, at.alpha, at.sigma
                    ),
                )
                .remedy("check the model's weights, lower the guidance, or clip x0")
                .numeric());
            }
            let progress = Progress {
                done: index + 1,
                total: self.moves.len(),
                calls: ctx.calls,
                at,
                x: &x,
            };
            if watch.step(&progress).is_break() {
                return Err(Error::Interrupted);
            }
        }
        Ok(x.to_dtype(dtype)?)
    }
}

/// A draw of `q(x_t | x_s)`: `α_{t|s} x_s + σ_{t|s} z`.
fn renoise(x: &Tensor, from: &Point, to: &Point, noise: &mut dyn Noise) -> Result<Tensor> {
    let q = transition(from, to);
    lincomb(q.alpha, x, q.variance.max(0.0).sqrt(), &noise.normal(x)?)
}
