//! Reverse diffusion sampling: the reverse SDE discretised as its forward SDE is (Song et al. 2021,
//! eqs. 46 to 48).

use super::euler_maruyama::with_noise;
use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::schedule::Point;
use crate::sde::{Discretisation, Kernel};
use crate::tensor::At;
use candle_core::Tensor;

/// The sampler.
///
/// ```text
/// forward   x_{i+1} = x_i + F(x_i) + G z
/// reverse   x_i = x_{i+1} − F(x_{i+1}) + G² s + G z
/// flow      x_i = x_{i+1} − F(x_{i+1}) + ½ G² s
/// ```
#[derive(Clone, Default)]
pub struct ReverseDiffusion {
    /// The chain that gives `F` and `G` at the time of a point. Without one the exact step between
    /// the two points is used.
    pub chain: Option<Discretisation>,
    /// The probability flow: half the score and no noise.
    pub flow: bool,
    /// Add noise even to the data; by default the last mean is the result.
    pub noise_into_data: bool,
}

impl ReverseDiffusion {
    /// The reversed steps of a chain.
    pub fn of(chain: Discretisation) -> Self {
        Self {
            chain: Some(chain),
            ..Self::default()
        }
    }
}

impl Step for ReverseDiffusion {
    type Memory = ();

    fn order(&self) -> Order {
        Order::Unstated
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        (): &mut (),
    ) -> Result<Tensor> {
        let kernel = match &self.chain {
            Some(chain) => chain.kernel(from.t),
            None => Kernel::between(to, from),
        };
        let score = ctx.denoise(x, from)?.score(x, At::All(*from))?;
        let mean = kernel.reversed(x, &score, if self.flow { 0.5 } else { 1.0 })?;
        let quiet = self.flow || to.sigma == 0.0 && !self.noise_into_data;
        let std = if quiet { 0.0 } else { kernel.variance.sqrt() };
        with_noise(mean, std, (from, to), ctx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::Gaussian;
    use crate::sample::{Planned, sample};
    use crate::schedule::linear::linspace;
    use crate::schedule::{Schedule, Ve, Vp};
    use candle_core::{DType, Device};

    fn points(schedule: &dyn Schedule, steps: usize) -> Vec<Point> {
        linspace(1.0, 1e-3, steps + 1)
            .into_iter()
            .map(|t| schedule.at(t))
            .collect()
    }

    /// Mean and variance that the rule leaves on data of mean ½ and deviation 0.7, exactly: it is
    /// linear in x.
    fn exact_moments(points: &[Point], flow: bool) -> (f64, f64) {
        let s = |p: &Point| (p.alpha * 0.7).hypot(p.sigma).powi(2);
        let (mut mean, mut var) = (0.5 * points[0].alpha, s(&points[0]));
        for w in points.windows(2) {
            let kernel = Kernel::between(&w[1], &w[0]);
            let pull = if flow { 0.5 } else { 1.0 } * kernel.variance / s(&w[0]);
            let gain = 2.0 - kernel.alpha - pull;
            mean = gain * mean + pull * 0.5 * w[0].alpha;
            var = gain * gain * var + if flow { 0.0 } else { kernel.variance };
        }
        (mean, var)
    }

    #[test]
    fn recovers_gaussian_data() {
        let n = 20_000;
        let ve = Ve {
            sigma_min: 0.01,
            sigma_max: 10.0,
        };
        let schedules: [&dyn Schedule; 2] = [&Vp::default(), &ve];
        let oracle = Gaussian::new(vec![0.5; n], vec![0.7; n]);
        let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
        for schedule in schedules {
            for flow in [false, true] {
                // In the limit of small steps the law is the data's …
                let fine = points(schedule, 40_000);
                let last = fine[40_000];
                let (mean, var) = exact_moments(&fine, flow);
                let exact = (last.alpha * 0.7).hypot(last.sigma).powi(2);
                assert!((mean - 0.5 * last.alpha).abs() < 1e-3, "{mean}");
                assert!((var / exact - 1.0).abs() < 2e-3, "{flow}: {var} {exact}");
                // … and the sampler takes exactly these steps.
                let points = points(schedule, 60);
                let mut noise = CounterNoise::new(4, 0..1);
                let std = (points[0].alpha * 0.7).hypot(points[0].sigma);
                let x = noise.normal(&like).unwrap();
                let x = x.affine(std, points[0].alpha * 0.5).unwrap();
                let step = ReverseDiffusion {
                    flow,
                    ..ReverseDiffusion::default()
                };
                let x = sample(&Planned::new(step, &points), &oracle, x, &mut noise, 0..1).unwrap();
                let v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let m = v.iter().sum::<f64>() / n as f64;
                let s = v.iter().map(|a| (a - m).powi(2)).sum::<f64>() / n as f64;
                let (mean, var) = exact_moments(&points, flow);
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
    }
}
