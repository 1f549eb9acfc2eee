//! Euler and Maruyama's method on the plug-in family of reverse processes: from the reverse SDE to
//! the probability flow.
//!
//! ```text
//! dx = [f x − (1 − λ/2) g² s] dt + √(1 − λ) g dw̄,   λ ∈ [0, 1]
//! ```
//!
//! `λ = 0` is the reverse SDE (Song et al. 2021, eq. 6), `λ = 1` the probability flow (eq. 13); all of
//! them share their marginals when the score is exact (Huang, Lim and Courville 2021, section 5).

use super::{Ctx, Order, Step};
use crate::error::{Report, Result};
use crate::schedule::{Point, SharedSchedule};
use crate::sde::plug_in_drift;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The sampler.
///
/// ```text
/// x' = x − [f x − (1 − λ/2) g² s] dt + √((1 − λ) g² dt) z
/// ```
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EulerMaruyama {
    /// `λ`, from 0 (all noise) to 1 (none).
    pub lambda: f64,
    /// Every step covers `1/steps` of time, whatever lies between the points: the authors' code,
    /// whose last step goes beyond the last point. Without it a step covers what lies between.
    pub steps: Option<usize>,
    /// Add noise even to the data; by default the last mean is the result.
    pub noise_into_data: bool,
    /// The process whose drift and diffusion are used.
    #[serde(skip)]
    pub schedule: Option<SharedSchedule>,
}

impl EulerMaruyama {
    /// The reverse SDE of a process.
    pub fn new(schedule: SharedSchedule) -> Self {
        Self {
            schedule: Some(schedule),
            ..Self::default()
        }
    }
}

impl Step for EulerMaruyama {
    type Memory = ();

    fn order(&self) -> Order {
        if self.lambda == 1.0 && self.steps.is_none() {
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
        (): &mut (),
    ) -> Result<Tensor> {
        let Some(schedule) = &self.schedule else {
            return Err(Report::new("euler_maruyama", "no schedule")
                .expected("the process that is reversed")
                .config());
        };
        if !(0.0..=1.0).contains(&self.lambda) {
            return Err(Report::new("euler_maruyama: lambda", self.lambda)
                .expected("a number in [0, 1]")
                .config());
        }
        let dt = match self.steps {
            Some(steps) => (steps as f64).recip(),
            None => from.t - to.t,
        };
        let rates = schedule.rates(from.t);
        let score = ctx.denoise(x, from)?.score(x, At::All(*from))?;
        let drift = plug_in_drift(x, &score, &rates, self.lambda)?;
        let mean = lincomb(1.0, x, -dt, &drift)?;
        let std = ((1.0 - self.lambda) * rates.g2 * dt).sqrt();
        let quiet = to.sigma == 0.0 && !self.noise_into_data;
        with_noise(mean, if quiet { 0.0 } else { std }, (from, to), ctx)
    }
}

/// `mean + std z`; without noise nothing is drawn.
pub(super) fn with_noise(
    mean: Tensor,
    std: f64,
    (from, to): (&Point, &Point),
    ctx: &mut Ctx<'_>,
) -> Result<Tensor> {
    if std == 0.0 {
        return Ok(mean);
    }
    let z = ctx.noise_between(&mean, from, to)?;
    lincomb(1.0, &mean, std, &z)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::{Gaussian, order};
    use crate::sample::{Planned, sample};
    use crate::schedule::linear::linspace;
    use crate::schedule::{Schedule, Vp};
    use candle_core::{DType, Device};
    use std::sync::Arc;

    /// The variance that `λ` leaves at the end of `steps` steps on Gaussian data, exactly: the rule
    /// is linear in x.
    fn exact_moments(lambda: f64, steps: usize, mean0: f64, std0: f64) -> (f64, f64) {
        let vp = Vp::default();
        let times = linspace(1.0, 1e-3, steps + 1);
        let p = vp.at(1.0);
        let s = |t: f64| (vp.at(t).alpha * std0).powi(2) + vp.at(t).sigma.powi(2);
        let (mut mean, mut var) = (p.alpha * mean0, s(1.0));
        for w in times.windows(2) {
            let (r, dt) = (vp.rates(w[0]), w[0] - w[1]);
            let pull = (1.0 - 0.5 * lambda) * r.g2 / s(w[0]);
            let gain = 1.0 - dt * (r.d_log_alpha + pull);
            mean = gain * mean + dt * pull * vp.at(w[0]).alpha * mean0;
            var = gain * gain * var + (1.0 - lambda) * r.g2 * dt;
        }
        (mean, var)
    }

    #[test]
    fn all_members_of_the_family_share_their_marginals() {
        // In the limit of small steps …
        for lambda in [0.0, 0.5, 1.0] {
            let (mean, var) = exact_moments(lambda, 20_000, 0.5, 0.7);
            let p = Vp::default().at(1e-3);
            assert!(
                (mean / (p.alpha * 0.5) - 1.0).abs() < 2e-3,
                "{lambda}: {mean}"
            );
            let exact = (p.alpha * 0.7).powi(2) + p.sigma.powi(2);
            assert!((var / exact - 1.0).abs() < 2e-3, "{lambda}: {var}");
        }
        // … and the sampler takes exactly these steps.
        let (n, steps) = (20_000, 60);
        let vp = Vp::default();
        let oracle = Gaussian::new(vec![0.5; n], vec![0.7; n]);
        let points: Vec<Point> = linspace(1.0, 1e-3, steps + 1)
            .into_iter()
            .map(|t| vp.at(t))
            .collect();
        let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
        for lambda in [0.0, 0.5, 1.0] {
            let step = EulerMaruyama {
                lambda,
                ..EulerMaruyama::new(Arc::new(vp))
            };
            let mut noise = CounterNoise::new(4, 0..1);
            let p = points[0];
            let std = (p.alpha * 0.7).hypot(p.sigma);
            let x = noise.normal(&like).unwrap();
            let x = x.affine(std, p.alpha * 0.5).unwrap();
            let x = sample(&Planned::new(step, &points), &oracle, x, &mut noise, 0..1).unwrap();
            let v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let m = v.iter().sum::<f64>() / n as f64;
            let s = v.iter().map(|a| (a - m).powi(2)).sum::<f64>() / n as f64;
            let (mean, var) = exact_moments(lambda, steps, 0.5, 0.7);
            assert!(
                (m - mean).abs() < 4.0 * (var / n as f64).sqrt(),
                "{m} {mean}"
            );
            assert!(
                (s / var - 1.0).abs() < 4.0 * (2.0 / n as f64).sqrt(),
                "{s} {var}"
            );
        }
    }

    /// Weak order: the moments that the rule leaves against those of the process.
    #[test]
    fn its_weak_order_is_one() {
        let p = Vp::default().at(1e-3);
        let exact = (p.alpha * 0.7).powi(2) + p.sigma.powi(2);
        for lambda in [0.0, 0.5] {
            let gap = |n| Ok((exact_moments(lambda, n, 0.5, 0.7).1 - exact).abs());
            let slope = order::measure(&[2000, 4000, 8000], gap).unwrap();
            assert!((slope - 1.0).abs() < 0.2, "{lambda}: {slope:.3}");
        }
    }

    #[test]
    fn without_noise_it_is_eulers_method_in_time() {
        let vp = Vp::default();
        let oracle = Gaussian::new(vec![0.6], vec![0.8]);
        let x = Tensor::new(&[[0.9f64]], &Device::Cpu).unwrap();
        let step = EulerMaruyama {
            lambda: 1.0,
            ..EulerMaruyama::new(Arc::new(vp))
        };
        let slope = order::measure(&[200, 400, 800], |n| {
            let points: Vec<Point> = linspace(1.0, 0.05, n + 1)
                .into_iter()
                .map(|t| vp.at(t))
                .collect();
            let exact = oracle.flow(&x, &points[0], &points[n])?;
            let mut noise = CounterNoise::new(0, 0..1);
            let plan = Planned::new(step.clone(), &points);
            let y = sample(&plan, &oracle, x.clone(), &mut noise, 0..1)?;
            Ok((y - exact)?.abs()?.sum_all()?.to_scalar::<f64>()?)
        })
        .unwrap();
        assert!((slope - 1.0).abs() < 0.1, "{slope}");
        assert_eq!(step.order(), Order::Exactly(1));
    }

    #[test]
    fn a_missing_schedule_or_a_strange_lambda_is_refused() {
        let oracle = Gaussian::new(vec![0.6], vec![0.8]);
        let x = Tensor::new(&[[0.9f64]], &Device::Cpu).unwrap();
        let points = [Vp::default().at(1.0), Vp::default().at(0.5)];
        for step in [
            EulerMaruyama::default(),
            EulerMaruyama {
                lambda: 1.5,
                ..EulerMaruyama::new(Arc::new(Vp::default()))
            },
        ] {
            let mut noise = CounterNoise::new(0, 0..1);
            let plan = Planned::new(step, &points);
            assert!(sample(&plan, &oracle, x.clone(), &mut noise, 0..1).is_err());
        }
    }
}
