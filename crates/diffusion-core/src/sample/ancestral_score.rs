//! Ancestral sampling written with the score (Song et al. 2021, appendix F), on chains whose levels
//! and whose network need not meet: the network is asked at a continuous time, the step is the one
//! that the chain has there.

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
/// x_i = (x_{i+1} + G² s)/a + std z
///
/// DDPM (VP)   (x + β_i s)/√(1 − β_i),           std² = β_i                                  large
/// SMLD (VE)   x + (σ_i² − σ_{i−1}²) s,          std² = σ_{i−1}² (σ_i² − σ_{i−1}²)/σ_i²      posterior
/// ```
///
/// With a score that is exact at the chain's own levels and the posterior variance this is
/// [`Ancestral`](super::Ancestral).
#[derive(Clone, Default)]
pub struct AncestralScore {
    /// The chain that gives the step at the time of a point. Without one the exact step between the
    /// two points is used.
    pub chain: Option<Discretisation>,
    /// Whether the variance is that of the forward step (the authors' choice for VP) instead of
    /// the posterior's (their choice for VE).
    pub large: bool,
    /// Add noise even to the data; by default the last mean is the result.
    pub noise_into_data: bool,
}

impl Step for AncestralScore {
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
        let mean = kernel.denoised(x, &score)?;
        let variance = match (to.sigma == 0.0 && !self.noise_into_data, self.large) {
            (true, _) => 0.0,
            (false, true) => kernel.variance,
            (false, false) => kernel.posterior,
        };
        with_noise(mean, variance.sqrt(), (from, to), ctx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::sample::{Ancestral, Variance};
    use crate::schedule::{Schedule, SubVp, Ve, Vp};
    use candle_core::Device;

    /// The same step as the one written with x₀, for every process and both variances.
    #[test]
    fn is_ancestral_sampling() {
        let oracle = Gaussian::new(vec![0.5, 0.1], vec![0.7, 0.3]);
        let x = Tensor::new(&[[0.9, -0.4f64]], &Device::Cpu).unwrap();
        let schedules: [&dyn Schedule; 3] = [&Vp::default(), &SubVp::default(), &Ve::default()];
        for schedule in schedules {
            for large in [false, true] {
                let (from, to) = (schedule.at(0.6), schedule.at(0.5));
                let variance = if large {
                    Variance::FixedLarge
                } else {
                    Variance::FixedSmall
                };
                let mut noise = CounterNoise::new(4, 0..1);
                let ours = AncestralScore {
                    large,
                    ..AncestralScore::default()
                }
                .step(
                    &x,
                    &from,
                    &to,
                    &mut Ctx::new(&oracle, &mut noise, 0..1),
                    &mut (),
                )
                .unwrap();
                let mut noise = CounterNoise::new(4, 0..1);
                let theirs = Ancestral {
                    variance,
                    ..Ancestral::default()
                }
                .step(
                    &x,
                    &from,
                    &to,
                    &mut Ctx::new(&oracle, &mut noise, 0..1),
                    &mut (),
                )
                .unwrap();
                let gap = (ours - theirs).unwrap().abs().unwrap().sum_all().unwrap();
                assert!(gap.to_scalar::<f64>().unwrap() < 1e-11);
            }
        }
    }
}
