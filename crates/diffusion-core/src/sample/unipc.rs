//! UniPC (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
//! Diffusion Models", algorithms 5 to 8).

use super::exponential::{Belief, History};
use super::{Ctx, Order, Step};
use crate::error::{Report, Result};
use crate::schedule::Point;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The function `B(h)` that scales the differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniPcB {
    /// `B(h) = h`: the authors' choice without guidance.
    Bh1,
    /// `B(h) = e^h − 1`: the authors' choice with guidance.
    #[default]
    Bh2,
}

/// A predictor of order `p`, then a corrector of the same order that costs no call: the belief at the
/// predicted sample serves the next step too.
///
/// ```text
/// r_k = (λ_{i−k} − λ)/h  (k < p),  r_p = 1,  D_k = (m_{i−k} − m)/r_k,  hh = −h for x₀, h for ε
/// R_{kj} = r_j^{k−1},  b_k = φ_{k+1}(hh) k! …/B,   R ρ = b
/// predictor   x_to = base − s B Σ_{k<p} ρ_k D_k          (the leading (p−1)×(p−1) block; ρ = ½ for p = 2)
/// corrector   x_to = base − s B (Σ_{k<p} ρ_k D_k + ρ_p (m_to − m))      (the whole; ρ = ½ for p = 1)
/// base = (σ_to/σ) x − α_to (e^{hh} − 1) m, s = α_to     (x₀; for ε swap α and σ)
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UniPc {
    /// Which belief is integrated.
    pub belief: Belief,
    /// Order of the predictor, from 1.
    pub order: usize,
    /// The scale of the differences.
    pub b: UniPcB,
    /// Lower the order towards the end: the step with `k` steps left has at most order `k`.
    pub lower_order_final: bool,
    /// Correct at all (UniP without).
    pub corrector: bool,
    /// Steps after which not to correct.
    pub skip_corrector: Vec<usize>,
}

impl Default for UniPc {
    fn default() -> Self {
        Self {
            belief: Belief::X0,
            order: 2,
            b: UniPcB::Bh2,
            lower_order_final: true,
            corrector: true,
            skip_corrector: Vec::new(),
        }
    }
}

/// The step that was predicted, for the corrector.
#[derive(Default)]
pub struct Memory {
    history: History,
    last: Option<Last>,
}

struct Last {
    x: Tensor,
    from: Point,
    order: usize,
}

/// The coefficients of one step: what the beliefs at `nodes` (ratios `r`, the present one not among
/// them) weigh, and the base.
struct Update {
    keep: f64,
    present: f64,
    scale: f64,
    rhos: Vec<f64>,
}

impl UniPc {
    /// `ratios` `r_k` of the differences used; the order is `p`.
    fn update(&self, from: &Point, to: &Point, ratios: &[f64]) -> Result<Update> {
        let h = to.lambda() - from.lambda();
        let (hh, keep, scale) = match self.belief {
            Belief::X0 => (-h, to.sigma / from.sigma, to.alpha),
            Belief::Epsilon => (h, to.alpha / from.alpha, to.sigma),
        };
        let big_b = match self.b {
            UniPcB::Bh1 => hh,
            UniPcB::Bh2 => hh.exp_m1(),
        };
        let n = ratios.len();
        let rhos = match n {
            0 => Vec::new(),
            1 => vec![0.5],
            _ => {
                let mut phi = hh.exp_m1() / hh - 1.0;
                let mut factorial = 1.0;
                let mut rows = Vec::with_capacity(n);
                for k in 0..n {
                    let mut row: Vec<f64> = ratios.iter().map(|r| r.powi(k as i32)).collect();
                    row.push(phi * factorial / big_b);
                    rows.push(row);
                    factorial *= (k + 2) as f64;
                    phi = phi / hh - 1.0 / factorial;
                }
                solve(rows)?
            }
        };
        Ok(Update {
            keep,
            present: -scale * hh.exp_m1(),
            scale: -scale * big_b,
            rhos,
        })
    }

    /// `base + scale Σ ρ_k (m_k − m)/r_k`.
    fn apply(
        &self,
        update: &Update,
        x: &Tensor,
        present: &Tensor,
        others: &[(&Tensor, f64)],
    ) -> Result<Tensor> {
        let mut own = update.present;
        let mut terms = vec![(update.keep, x)];
        for (rho, (belief, r)) in update.rhos.iter().zip(others) {
            let c = update.scale * rho / r;
            own -= c;
            terms.push((c, *belief));
        }
        terms.push((own, present));
        Ok(diffusion_ops::combine(&terms)?)
    }

    /// Ratios and beliefs of the differences of order `p` before the belief at `history[first]`.
    fn differences<'a>(
        history: &'a [(Tensor, f64)],
        p: usize,
        from: &Point,
        h: f64,
    ) -> Vec<(&'a Tensor, f64)> {
        history
            .iter()
            .take(p)
            .skip(1)
            .map(|(belief, lambda)| (belief, (lambda - from.lambda()) / h))
            .collect()
    }

    fn predict(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        history: &[(Tensor, f64)],
        p: usize,
    ) -> Result<Tensor> {
        let h = to.lambda() - from.lambda();
        let others = Self::differences(history, p, from, h);
        let ratios: Vec<f64> = others.iter().map(|(_, r)| *r).collect();
        let update = self.update(from, to, &ratios)?;
        self.apply(&update, x, &history[0].0, &others)
    }

    fn correct(
        &self,
        last: &Last,
        to: &Point,
        history: &[(Tensor, f64)],
        there: &Tensor,
    ) -> Result<Tensor> {
        let h = to.lambda() - last.from.lambda();
        let mut others = Self::differences(history, last.order, &last.from, h);
        others.push((there, 1.0));
        let ratios: Vec<f64> = others.iter().map(|(_, r)| *r).collect();
        let update = self.update(&last.from, to, &ratios)?;
        self.apply(&update, &last.x, &history[0].0, &others)
    }
}

impl Step for UniPc {
    type Memory = Memory;

    fn order(&self) -> Order {
        match (self.corrector, self.order) {
            (false, order) => Order::Exactly(order as u32),
            (true, order) => Order::AtLeast(order as u32),
        }
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
        if let (Some(last), true) = (&memory.last, self.corrector)
            && !self.skip_corrector.contains(&(ctx.index.saturating_sub(1)))
        {
            x = self.correct(last, from, &memory.history.items, &belief)?;
        }
        memory.history.push(belief, from.lambda(), self.order);
        let left = if self.lower_order_final {
            ctx.total.saturating_sub(ctx.index)
        } else {
            self.order
        };
        let mut p = self.order.min(left).min(memory.history.len()).max(1);
        if to.sigma == 0.0 {
            // h is infinite: only the first order has a limit.
            p = 1;
        }
        let next = self.predict(&x, from, to, &memory.history.items, p)?;
        memory.last = Some(Last {
            x,
            from: *from,
            order: p,
        });
        Ok(next)
    }
}

/// Gauss with row pivoting, of rows that hold the right-hand side last.
fn solve(mut rows: Vec<Vec<f64>>) -> Result<Vec<f64>> {
    let n = rows.len();
    for k in 0..n {
        let pivot = (k..n)
            .max_by(|a, b| rows[*a][k].abs().total_cmp(&rows[*b][k].abs()))
            .unwrap_or(k);
        rows.swap(k, pivot);
        if rows[k][k] == 0.0 || !rows[k][k].is_finite() {
            return Err(
                Report::new("UniPC", "two points of the grid at one noise level")
                    .expected("falling noise levels")
                    .numeric(),
            );
        }
        for i in k + 1..n {
            let factor = rows[i][k] / rows[k][k];
            for j in k..=n {
                let above = rows[k][j];
                rows[i][j] -= factor * above;
            }
        }
    }
    let mut out = vec![0.0; n];
    for k in (0..n).rev() {
        let known: f64 = (k + 1..n).map(|j| rows[k][j] * out[j]).sum();
        out[k] = (rows[k][n] - known) / rows[k][k];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_and_refuses() {
        let x = solve(vec![vec![0.0, 2.0, 4.0], vec![1.0, 1.0, 5.0]]).unwrap();
        assert_eq!(x, [3.0, 2.0]);
        assert!(solve(vec![vec![1.0, 1.0, 1.0], vec![1.0, 1.0, 2.0]]).is_err());
    }
}
