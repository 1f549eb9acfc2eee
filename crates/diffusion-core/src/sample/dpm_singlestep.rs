//! Singlestep DPM-Solver and DPM-Solver++ (Lu et al. 2022, "DPM-Solver" algorithms 1 and 2 and
//! appendix D, "DPM-Solver++" algorithm 1).

use super::exponential::{Belief, History, Rule, finish, weights};
use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Blocks of as many moves as the order, each block starting afresh from its first sample.
///
/// Inside a block the points of the grid are the intermediate points, so that a grid of `n` points
/// costs `n` network calls. On an even grid in `λ` these are the paper's `r = ½` and
/// `r = ⅓, ⅔`.
///
/// ```text
/// from the block's first sample x and belief D, h = λ_to − λ, r = (λ_i − λ)/h:
/// order 2   x_to = w_x x + w_0 D + w_1 (D₁ − D)/r₁
/// order 3   … with (D₂ − D)/r₂ in its place (midpoint), or both through their parabola
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpmSinglestep {
    /// Which belief is integrated.
    pub belief: Belief,
    /// 1, 2 or 3.
    pub order: usize,
    /// How the derivatives are weighted: the midpoint rule, or the exact integral through a
    /// parabola.
    pub rule: Rule,
    /// Solve the reverse SDE in place of the probability flow.
    pub stochastic: bool,
    /// End with lower orders. Where the grid ends in the data, or its length is no multiple of the
    /// order, it is done anyway.
    pub lower_order_final: bool,
    /// For the SDE: weigh the parabola's second derivative by `w_2 − α_to` as ports of the
    /// published code do.
    pub published: bool,
}

impl Default for DpmSinglestep {
    fn default() -> Self {
        Self {
            belief: Belief::X0,
            order: 2,
            rule: Rule::Midpoint,
            stochastic: false,
            lower_order_final: true,
            published: false,
        }
    }
}

impl DpmSinglestep {
    /// The order of every move of a run (appendix D's "DPM-Solver-fast").
    pub fn orders(&self, moves: usize, into_data: bool) -> Vec<usize> {
        let order = self.order.clamp(1, 3);
        let lower = self.lower_order_final || into_data || !moves.is_multiple_of(order);
        let tail: &[usize] = match (lower, order, moves % order) {
            (true, 3, 0) => &[1, 2, 1],
            (true, 3, 1) => &[1],
            (true, 3, 2) => &[1, 2],
            (true, 2, 0) => &[1, 1],
            (true, 2, 1) => &[1],
            _ => &[],
        };
        let mut orders: Vec<usize> = (1..=order)
            .cycle()
            .take(moves.saturating_sub(tail.len()))
            .collect();
        orders.extend(tail);
        if let (true, Some(last)) = (into_data, orders.last_mut()) {
            *last = 1;
        }
        orders
    }
}

/// The first sample of the present block, and the beliefs since, oldest last.
#[derive(Default)]
pub struct Block {
    base: Option<(Tensor, Point)>,
    beliefs: History,
    orders: Vec<usize>,
}

impl Step for DpmSinglestep {
    type Memory = Block;

    fn order(&self) -> Order {
        if self.stochastic {
            Order::Unstated
        } else {
            Order::Exactly(self.order as u32)
        }
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Block,
    ) -> Result<Tensor> {
        if memory.orders.len() != ctx.total {
            memory.orders = self.orders(ctx.total, ctx.ends_in_data);
        }
        let order = memory.orders.get(ctx.index).copied().unwrap_or(1);
        let said = ctx.denoise(x, from)?;
        let belief = self.belief.of(&said, x, from)?;
        if order == 1 || memory.base.is_none() {
            memory.base = Some((x.clone(), *from));
            memory.beliefs = History::default();
        }
        memory.beliefs.push(belief, from.lambda(), self.order);
        let Some((start, base)) = &memory.base else {
            return Ok(x.clone());
        };
        let w = weights(base, to, self.belief, self.stochastic);
        let h = to.lambda() - base.lambda();
        let held = &memory.beliefs.items;
        let first = &held[held.len() - 1].0;
        let r = |k: usize| (held[k].1 - base.lambda()) / h;
        let mut terms = vec![(w.x, start)];
        match held.len() {
            1 => terms.push((w.d0, first)),
            2 => {
                let a = self.rule.of(&w) / r(0);
                terms.extend([(w.d0 - a, first), (a, &held[0].0)]);
            }
            _ if self.rule == Rule::Midpoint => {
                let a = w.d1 / r(0);
                terms.extend([(w.d0 - a, first), (a, &held[0].0)]);
            }
            _ => {
                // h D' and h² D'' of the parabola through (0, D), (r₁, D₁), (r₂, D₂).
                let (r2, r1) = (r(0), r(1));
                let d2 = if self.published && self.stochastic {
                    w.d2 - to.alpha
                } else {
                    w.d2
                };
                let late = (-w.d1 * r1 + 2.0 * d2) / ((r2 - r1) * r2);
                let early = (w.d1 * r2 - 2.0 * d2) / ((r2 - r1) * r1);
                terms.extend([
                    (w.d0 - late - early, first),
                    (late, &held[0].0),
                    (early, &held[1].0),
                ]);
            }
        }
        finish(terms, w.noise, x, (base, to), ctx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Appendix D: the orders add up to the calls, and the last block is lowered.
    #[test]
    fn orders_of_a_run() {
        let third = DpmSinglestep {
            order: 3,
            ..DpmSinglestep::default()
        };
        assert_eq!(third.orders(9, false), [1, 2, 3, 1, 2, 3, 1, 2, 1]);
        assert_eq!(third.orders(10, false), [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(third.orders(8, false), [1, 2, 3, 1, 2, 3, 1, 2]);
        assert_eq!(third.orders(8, true), [1, 2, 3, 1, 2, 3, 1, 1]);
        let second = DpmSinglestep::default();
        assert_eq!(second.orders(6, true), [1, 2, 1, 2, 1, 1]);
        assert_eq!(second.orders(5, true), [1, 2, 1, 2, 1]);
        let plain = DpmSinglestep {
            order: 3,
            lower_order_final: false,
            ..DpmSinglestep::default()
        };
        assert_eq!(plain.orders(6, false), [1, 2, 3, 1, 2, 3]);
        for n in 1..30 {
            for into_data in [false, true] {
                assert_eq!(third.orders(n, into_data).len(), n);
            }
        }
    }
}
