//! DPM-Solver-12 and DPM-Solver-23: steps that adapt to the error (Lu et al. 2022, "DPM-Solver",
//! appendix C).

use super::exponential::{Belief, weights};
use super::{Ctx, Observer, Order, Progress, Solver};
use crate::error::{Error, Report, Result};
use crate::schedule::{Point, Schedule};
use crate::tensor::all_finite;
use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// An embedded pair of orders `order − 1` and `order`.
///
/// ```text
/// δ = max(atol, rtol max(|x_low|, |x_prev|)),   E = max over items of √(mean(((x_high − x_low)/δ)²))
/// accepted when E ≤ 1;   h ← min(0.9 h E^{−1/order}, what is left)
/// ```
///
/// The step is common to the batch, as in the paper, unless `per_item` runs every item by itself: then
/// results do not depend on what else is in the batch.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpmAdaptive {
    /// Which belief is integrated.
    pub belief: Belief,
    /// 2 or 3.
    pub order: usize,
    /// Absolute tolerance: half a grey level of 256 on `[−1, 1]` by default.
    pub atol: f64,
    /// Relative tolerance.
    pub rtol: f64,
    /// First step in `λ`.
    pub h: f64,
    /// Each item by itself.
    pub per_item: bool,
    /// Where the solver starts and stops, and the schedule between.
    #[serde(skip)]
    pub span: Option<Span>,
}

/// From where to where, on which schedule.
#[derive(Clone)]
pub struct Span {
    /// The noisiest point.
    pub from: Point,
    /// The cleanest point at which the network is asked.
    pub to: Point,
    /// What lies between.
    pub schedule: Arc<dyn Schedule + Send + Sync>,
    /// Whether the last belief about the data is the result.
    pub denoise: bool,
}

impl Default for DpmAdaptive {
    fn default() -> Self {
        Self {
            belief: Belief::X0,
            order: 3,
            atol: 0.0078,
            rtol: 0.05,
            h: 0.05,
            per_item: true,
            span: None,
        }
    }
}

/// No run takes more steps than this.
const MOST: usize = 100_000;

impl DpmAdaptive {
    /// The order of the better of the two.
    pub fn order(&self) -> Order {
        Order::Unstated
    }

    /// Both solutions of a step from `from` over `h`, sharing their calls.
    fn pair(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        span: &Span,
        ctx: &mut Ctx<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let lambda = from.lambda();
        let h = to.lambda() - lambda;
        let point = |r: f64| span.schedule.at_log_snr(2.0 * (lambda + r * h));
        let ask =
            |x: &Tensor, at: &Point, ctx: &mut Ctx<'_>| self.belief.of(&ctx.denoise(x, at)?, x, at);
        let sum =
            |terms: &[(f64, &Tensor)]| -> Result<Tensor> { Ok(diffusion_ops::combine(terms)?) };
        let d = ask(x, from, ctx)?;
        let w = weights(from, to, self.belief, false);
        if self.order == 2 {
            let middle = point(0.5);
            let v = weights(from, &middle, self.belief, false);
            let d1 = ask(&sum(&[(v.x, x), (v.d0, &d)])?, &middle, ctx)?;
            let low = sum(&[(w.x, x), (w.d0, &d)])?;
            let a = w.midpoint / 0.5;
            return Ok((low, sum(&[(w.x, x), (w.d0 - a, &d), (a, &d1)])?));
        }
        let (p1, p2) = (point(1.0 / 3.0), point(2.0 / 3.0));
        let v = weights(from, &p1, self.belief, false);
        let d1 = ask(&sum(&[(v.x, x), (v.d0, &d)])?, &p1, ctx)?;
        let v = weights(from, &p2, self.belief, false);
        // r₁ = ⅓ of the step is half of the way to r₂.
        let a = v.d1 / 0.5;
        let d2 = ask(&sum(&[(v.x, x), (v.d0 - a, &d), (a, &d1)])?, &p2, ctx)?;
        let a = w.midpoint / (1.0 / 3.0);
        let low = sum(&[(w.x, x), (w.d0 - a, &d), (a, &d1)])?;
        let a = w.d1 / (2.0 / 3.0);
        Ok((low, sum(&[(w.x, x), (w.d0 - a, &d), (a, &d2)])?))
    }

    /// The largest scaled error of the batch.
    fn error(&self, low: &Tensor, high: &Tensor, previous: &Tensor) -> Result<f64> {
        let scale = low
            .abs()?
            .maximum(&previous.abs()?)?
            .affine(self.rtol, 0.0)?
            .maximum(self.atol)?;
        let error = ((high - low)? / scale)?
            .sqr()?
            .flatten_from(1)?
            .mean(D::Minus1)?
            .sqrt()?;
        Ok(error.max_all()?.to_dtype(DType::F64)?.to_scalar()?)
    }

    fn run(
        &self,
        x: Tensor,
        span: &Span,
        ctx: &mut Ctx<'_>,
        watch: &mut dyn Observer,
    ) -> Result<Tensor> {
        let (mut at, end) = (span.from, span.to.lambda());
        let whole = end - at.lambda();
        let (mut x, mut h) = (x, self.h.min(whole));
        let mut previous = x.clone();
        let mut done = 0;
        while at.lambda() < end {
            if done > MOST {
                return Err(Report::new("adaptive sampling", format!("{MOST} steps"))
                    .expected("fewer")
                    .remedy("raise the tolerances")
                    .numeric());
            }
            let target = at.lambda() + h;
            let to = if target >= end - 1e-9 * whole {
                span.to
            } else {
                span.schedule.at_log_snr(2.0 * target)
            };
            let (low, high) = self.pair(&x, &at, &to, span, ctx)?;
            let error = self.error(&low, &high, &previous)?;
            done += 1;
            if !error.is_finite() || !all_finite(&high)? {
                return Err(Report::new(
                    "adaptive sampling",
                    format!("NaN or infinity at lambda = {:.3}", at.lambda()),
                )
                .remedy("check the model's weights, lower the guidance, or clip x0")
                .numeric());
            }
            if error <= 1.0 {
                (x, previous, at) = (high.detach(), low.detach(), to);
                let fraction = (at.lambda() - span.from.lambda()) / whole;
                let progress = Progress {
                    done,
                    total: ((done as f64 / fraction.max(1e-3)).ceil() as usize).max(done),
                    calls: ctx.calls,
                    at,
                    x: &x,
                };
                if watch.step(&progress).is_break() {
                    return Err(Error::Interrupted);
                }
            }
            h = (0.9 * h * error.max(1e-10).powf(-1.0 / self.order as f64)).min(end - at.lambda());
        }
        if span.denoise {
            return ctx.denoise(&x, &at)?.x0(&x, crate::tensor::At::All(at));
        }
        Ok(x)
    }
}

impl Solver for DpmAdaptive {
    fn solve(&self, x: Tensor, ctx: &mut Ctx<'_>, watch: &mut dyn Observer) -> Result<Tensor> {
        if !(2..=3).contains(&self.order) || self.atol <= 0.0 || self.h <= 0.0 {
            return Err(Report::new(
                "adaptive DPM-Solver",
                format!("order {}, atol {}, h {}", self.order, self.atol, self.h),
            )
            .expected("order 2 or 3, positive tolerance and first step")
            .config());
        }
        let Some(span) = &self.span else {
            return Err(Report::new("adaptive DPM-Solver", "no span")
                .expected("where to start and stop")
                .config());
        };
        if !self.per_item {
            return self.run(x, span, ctx, watch);
        }
        let items = ctx.items.clone();
        let mut rows = Vec::new();
        for (i, item) in items.clone().enumerate() {
            ctx.items = item..item + 1;
            rows.push(self.run(x.narrow(0, i, 1)?, span, ctx, watch)?);
        }
        ctx.items = items;
        Ok(Tensor::cat(&rows, 0)?)
    }
}
