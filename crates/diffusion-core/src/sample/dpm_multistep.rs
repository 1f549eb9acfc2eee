//! Multistep DPM-Solver and DPM-Solver++, ODE and SDE (Lu et al. 2022, "DPM-Solver" and
//! "DPM-Solver++", algorithm 2).

use super::exponential::{Belief, Held, Rule, finish, weights};
use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Which second difference the step of order 3 uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Third {
    /// `h² D'' = 2 (A − B)/(r₀ + r₁)`, which makes the step third order.
    #[default]
    Corrected,
    /// The same without the factor 2, as in the authors' code and its ports, where the order
    /// measures 2.2 to 2.5. For the SDE, ports also weigh it by `w_2 − α_to`; so does this.
    Published,
}

/// One network call a step, the beliefs of earlier steps giving the derivatives.
///
/// ```text
/// r₀ = h_prev/h,  r₁ = h_prev2/h,  A = (D₀ − D₁)/r₀,  B = (D₁ − D₂)/r₁
/// order 1   x_to = w_x x + w_0 D₀
/// order 2   … + w_1 A
/// order 3   … + w_1 (A + r₀/(r₀ + r₁) (A − B)) + w_2 · 2 (A − B)/(r₀ + r₁)
/// ```
///
/// with the weights of [`weights`]. Order 1 on the data equals DDIM with η = 0; its SDE equals DDPM
/// with `β̃` for any stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpmMultistep {
    /// Which belief is integrated.
    pub belief: Belief,
    /// 1, 2 or 3.
    pub order: usize,
    /// How order 2 is weighted.
    pub rule: Rule,
    /// How order 3 takes its second difference.
    pub third: Third,
    /// Solve the reverse SDE in place of the probability flow.
    pub stochastic: bool,
    /// With fewer than 15 steps the last one is of order 1 and the one before at most of order 2:
    /// steadier.
    pub lower_order_final: bool,
    /// The last step is of order 1 whatever their number. Into the data it always is.
    pub euler_at_final: bool,
}

impl Default for DpmMultistep {
    fn default() -> Self {
        Self {
            belief: Belief::X0,
            order: 2,
            rule: Rule::Midpoint,
            third: Third::Corrected,
            stochastic: false,
            lower_order_final: true,
            euler_at_final: false,
        }
    }
}

impl DpmMultistep {
    /// The deterministic solver of this order, without its cautious end: for measurements.
    pub fn plain(belief: Belief, order: usize) -> Self {
        Self {
            belief,
            order,
            lower_order_final: false,
            ..Self::default()
        }
    }

    /// The order of the present step, given how many beliefs there are.
    fn order_now(&self, known: usize, to: &Point, ctx: &Ctx<'_>) -> usize {
        let left = ctx.total.saturating_sub(ctx.index);
        let few = self.lower_order_final && ctx.total < 15;
        let most = match left {
            _ if to.sigma == 0.0 => 1,
            1 if few || self.euler_at_final => 1,
            2 if few => 2,
            _ => 3,
        };
        self.order.min(known).min(most)
    }
}

impl Step for DpmMultistep {
    /// Beliefs with the `λ` where they were held, latest first.
    type Memory = Vec<(Held, f64)>;

    fn order(&self) -> Order {
        match (self.stochastic, self.order, self.third) {
            (true, ..) => Order::Unstated,
            (false, 3, Third::Published) => Order::AtLeast(2),
            // On the noise it measures up to 3.5.
            (false, 3, _) if self.belief == Belief::Epsilon => Order::AtLeast(3),
            (false, order, _) => Order::Exactly(order as u32),
        }
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Vec<(Held, f64)>,
    ) -> Result<Tensor> {
        let said = ctx.denoise(x, from)?;
        if self.order == 1 && !self.stochastic {
            // DDIM: one pass over the data.
            return said.along(x, from, to.alpha, to.sigma);
        }
        memory.insert(0, (self.belief.hold(&said, x, from)?, from.lambda()));
        memory.truncate(self.order.max(1));
        let order = self.order_now(memory.len(), to, ctx);
        let w = weights(from, to, self.belief, self.stochastic);
        let h = to.lambda() - from.lambda();
        let past = &*memory;
        let ratio = |k: usize| (past[k].1 - past[k + 1].1) / h;
        // The weights of the beliefs, latest first.
        let beliefs = match order {
            1 => vec![w.d0],
            2 => {
                let a = self.rule.of(&w) / ratio(0);
                vec![w.d0 + a, -a]
            }
            _ => {
                let (r0, r1) = (ratio(0), ratio(1));
                let second = match (self.third, self.stochastic) {
                    (Third::Corrected, _) => 2.0 * w.d2,
                    (Third::Published, false) => w.d2,
                    (Third::Published, true) => w.d2 - to.alpha,
                } / (r0 + r1);
                let turn = w.d1 * r0 / (r0 + r1) + second;
                let (a, b) = ((w.d1 + turn) / r0, turn / r1);
                vec![w.d0 + a, -a - b, b]
            }
        };
        let mut terms = vec![(w.x, x)];
        for (weight, (belief, _)) in beliefs.into_iter().zip(past) {
            belief.add(weight, &mut terms);
        }
        finish(terms, w.noise, x, (from, to), ctx)
    }
}
