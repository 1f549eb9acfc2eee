//! SA-Solver (Xue et al. 2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion
//! Models", algorithm 1).

use super::exponential::Belief;
use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::quadrature::{gauss_legendre, lagrange};
use crate::schedule::Point;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// How stochastic the process is: `τ(t)`, 0 for the probability flow, 1 for the reverse SDE.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tau {
    /// The value inside the window, 0 outside.
    pub value: f64,
    /// Where the window begins, in the times of the schedule.
    pub low: f64,
    /// Where it ends.
    pub high: f64,
}

impl Default for Tau {
    fn default() -> Self {
        Self {
            value: 1.0,
            low: f64::MIN,
            high: f64::MAX,
        }
    }
}

impl Tau {
    /// The value at a time.
    pub fn at(&self, t: f64) -> f64 {
        if (self.low..=self.high).contains(&t) {
            self.value
        } else {
            0.0
        }
    }
}

/// Stochastic Adams and Bashforth predictor, Adams and Moulton corrector with the same noise.
///
/// ```text
/// k = 1 + τ²
/// x_to = w x + Σ_j c_j m_j + s z
/// x̂₀:  w = e^{−τ² h} σ_to/σ,  c_j = α_to ∫ k e^{k(λ − λ_to)} L_j dλ,    s = σ_to √(1 − e^{−2τ² h})
/// ε̂:   w = α_to/α,            c_j = −σ_to ∫ k e^{λ_to − λ} L_j dλ,      s = τ σ_to √(e^{2h} − 1)
/// ```
///
/// `L_j` is the Lagrange basis on the last beliefs in `λ`; the corrector's includes the belief at the
/// predicted sample. On the data with two nodes the first moment is replaced by `k h²/2` (predictor)
/// and `k h/2` (corrector), as in the authors' code.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SaSolver {
    /// Which belief is integrated.
    pub belief: Belief,
    /// Order of the predictor, 1 to 4.
    pub predictor_order: usize,
    /// Order of the corrector, 1 to 4; 0 for none.
    pub corrector_order: usize,
    /// How stochastic.
    pub tau: Tau,
    /// Lower the orders towards the end.
    pub lower_order_final: bool,
}

impl Default for SaSolver {
    fn default() -> Self {
        Self {
            belief: Belief::X0,
            predictor_order: 2,
            corrector_order: 2,
            tau: Tau::default(),
            lower_order_final: true,
        }
    }
}

/// Beliefs with their points, latest first, and the step to be corrected.
#[derive(Default)]
pub struct Memory {
    held: Vec<(Tensor, Point)>,
    last: Option<Last>,
}

struct Last {
    x: Tensor,
    noise: Option<Tensor>,
    corrector_order: usize,
}

impl SaSolver {
    /// Nodes that are kept.
    fn keep(&self) -> usize {
        self.predictor_order
            .max(self.corrector_order.saturating_sub(1))
            .max(1)
    }

    /// The step from `from` to `to` with beliefs at `nodes`; `corrects` when the first node is the
    /// end of the step.
    fn update(
        &self,
        (from, to): (&Point, &Point),
        x: &Tensor,
        nodes: &[(&Tensor, Point)],
        noise: Option<&Tensor>,
        corrects: bool,
    ) -> Result<Tensor> {
        let tau2 = self.tau.at(from.t).powi(2);
        let k = 1.0 + tau2;
        let (start, end) = (from.lambda(), to.lambda());
        let h = end - start;
        let lambdas: Vec<f64> = nodes.iter().map(|(_, p)| p.lambda()).collect();
        let (keep, scale, kernel): (f64, f64, Box<dyn Fn(f64) -> f64>) = match self.belief {
            Belief::X0 => (
                (-tau2 * h).exp() * to.sigma / from.sigma,
                to.alpha,
                Box::new(move |l: f64| k * (k * (l - end)).exp()),
            ),
            Belief::Epsilon => (
                to.alpha / from.alpha,
                -to.sigma,
                Box::new(move |l: f64| k * (end - l).exp()),
            ),
        };
        let mut c: Vec<f64> = if h.is_infinite() {
            // Into the data the exponential picks the belief alone.
            let mut only = vec![0.0; nodes.len()];
            only[0] = 1.0;
            only
        } else {
            (0..nodes.len())
                .map(|j| gauss_legendre(start, end, |l| kernel(l) * lagrange(&lambdas, j, l)))
                .collect()
        };
        if let (Belief::X0, [a, b], true) = (self.belief, lambdas.as_slice(), h.is_finite()) {
            let moment = (k * h + (-k * h).exp_m1()) / (k * k);
            let change = if corrects {
                k * (0.5 * h - moment / h)
            } else {
                k * (0.5 * h * h - moment) / (a - b)
            };
            c[0] += change;
            c[1] -= change;
        }
        let mut terms = vec![(keep, x)];
        terms.extend(
            c.iter()
                .zip(nodes)
                .map(|(c, (belief, _))| (scale * c, *belief)),
        );
        if let Some(z) = noise {
            terms.push((self.noise_scale(tau2, h, to), z));
        }
        Ok(diffusion_ops::combine(&terms)?)
    }

    fn noise_scale(&self, tau2: f64, h: f64, to: &Point) -> f64 {
        match self.belief {
            Belief::X0 => to.sigma * (-(-2.0 * tau2 * h).exp_m1()).max(0.0).sqrt(),
            Belief::Epsilon => tau2.sqrt() * to.sigma * (2.0 * h).exp_m1().max(0.0).sqrt(),
        }
    }
}

impl Step for SaSolver {
    type Memory = Memory;

    fn order(&self) -> Order {
        Order::Unstated
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Memory,
    ) -> Result<Tensor> {
        let said = ctx.denoise(x, from)?;
        let belief = self.belief.of(&said, x, from)?;
        let mut x = x.clone();
        if let (Some(last), Some((_, start))) = (&memory.last, memory.held.first())
            && last.corrector_order > 0
        {
            let mut nodes = vec![(&belief, *from)];
            let earlier = memory.held.iter().take(last.corrector_order - 1);
            nodes.extend(earlier.map(|(belief, p)| (belief, *p)));
            x = self.update((start, from), &last.x, &nodes, last.noise.as_ref(), true)?;
        }
        memory.held.insert(0, (belief, *from));
        memory.held.truncate(self.keep());
        let known = memory.held.len();
        let left = if self.lower_order_final {
            ctx.total.saturating_sub(ctx.index)
        } else {
            usize::MAX - 1
        };
        let mut p = self.predictor_order.min(left).min(known).max(1);
        if to.sigma == 0.0 {
            p = 1;
        }
        // One node more is known when it corrects; history only grows to `keep`.
        let c = self.corrector_order.min(left + 1).min(known + 1);
        // Outside the window noise is drawn and weighs nothing, so that the window moves no draws.
        let noise = (self.tau.value > 0.0)
            .then(|| ctx.noise_between(&x, from, to))
            .transpose()?;
        let nodes: Vec<(&Tensor, Point)> = memory.held[..p].iter().map(|(b, q)| (b, *q)).collect();
        let next = self.update((from, to), &x, &nodes, noise.as_ref(), false)?;
        memory.last = Some(Last {
            x,
            noise,
            corrector_order: c,
        });
        Ok(next)
    }
}
