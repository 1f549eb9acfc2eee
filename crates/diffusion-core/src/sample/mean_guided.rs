//! Classifier guidance of the mean (Dhariwal and Nichol 2021, algorithm 1; after Sohl-Dickstein
//! et al. 2015).

use super::reverse::{Chain, Hop, Mean, Reverse};
use super::{Ctx, Order, Step, Variance};
use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::{At, gradient};
use candle_core::Tensor;

/// Ancestral sampling whose mean follows a classifier.
///
/// ```text
/// x_s ~ N(μ + s Σ ∇_x log p(y | x_t), Σ)
/// ```
///
/// The score's form of the same idea, for any sampler, is [`crate::guide::ClassifierGuided`].
pub struct MeanGuided<F> {
    /// The steps of the run: the last one takes its variance from the one before.
    pub chain: Chain,
    /// The variance of a step.
    pub variance: Variance,
    /// Where the mean comes from, before it is shifted.
    pub mean: Mean,
    /// `log p(y | x_t)` of every element, `[B]`, differentiable in `x_t`.
    pub log_prob: F,
    /// The scale `s`.
    pub scale: f64,
}

impl<F: Fn(&Tensor, At<'_>) -> Result<Tensor>> MeanGuided<F> {
    /// The step of the chain between two points, or the bare step where the chain has none.
    fn hop(&self, from: &Point, to: &Point) -> Hop {
        let hops = self.chain.hops().iter();
        let known = hops.copied().find(|h| h.from == *from && h.to == *to);
        known.unwrap_or_else(|| Hop::between(from, to))
    }

    /// The law of a step with the shifted mean.
    ///
    /// # Errors
    /// Whatever the model or the classifier refuses.
    pub fn law(&self, x: &Tensor, from: &Point, to: &Point, ctx: &mut Ctx<'_>) -> Result<Reverse> {
        let hop = self.hop(from, to);
        let said = ctx.denoise(x, from)?;
        let law = Reverse::of(&said, x, &vec![hop; x.dim(0)?], self.variance, self.mean)?;
        let slope = gradient(x, |x| Ok((self.log_prob)(x, At::All(*from))?.sum_all()?))?;
        // The borrowed variance of the last step is a logarithm's: the small one itself is zero.
        let still = hop.into_data() && self.variance == Variance::FixedSmall;
        let scale = if still { 0.0 } else { self.scale };
        let shift = (law.log_variance.exp()? * slope)?.affine(scale, 0.0)?;
        Ok(Reverse {
            mean: (law.mean + shift)?,
            ..law
        })
    }
}

impl<F: Fn(&Tensor, At<'_>) -> Result<Tensor>> Step for MeanGuided<F> {
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
        let law = self.law(x, from, to, ctx)?;
        if to.sigma == 0.0 {
            return Ok(law.mean);
        }
        let std = law.log_variance.affine(0.5, 0.0)?.exp()?;
        Ok((law.mean + (std * ctx.noise.normal(x)?)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::sample::{Planned, prior, sample};
    use crate::schedule::BetaSchedule;
    use candle_core::{DType, Device};

    /// Data N(0, 0.5²), classifier log p(y|x_t) = a x_t: the guided law at small steps moves to
    /// the conditional, N(0.25 a, 0.5²) for a classifier of the data, here through its slope on x_t.
    #[test]
    fn a_linear_classifier_moves_the_mean() {
        const N: usize = 2000;
        let (c2, slope) = (0.25, 1.2);
        let oracle = Gaussian::new(vec![0.0], vec![0.5]);
        let table = BetaSchedule::ddpm(200).table(200).unwrap();
        let points: Vec<Point> = (-1..200).rev().map(|i| table.index(i)).collect();
        // p(y|x_t) = ∫ e^{a x₀} p(x₀|x_t): its slope is a ∂E[x₀|x_t]/∂x_t, so that the target is
        // proportional to p(x₀) e^{a x₀} = N(a c², c²).
        let log_prob = move |x: &Tensor, at: At<'_>| {
            let p = at.points(1)[0];
            let gain = p.alpha * c2 / (p.alpha.powi(2) * c2 + p.sigma.powi(2));
            Ok(x.affine(slope * gain, 0.0)?.sum(1)?)
        };
        let guided = MeanGuided {
            chain: Chain::new(&points).unwrap(),
            variance: Variance::FixedLarge,
            mean: Mean::Posterior,
            log_prob,
            scale: 1.0,
        };
        let like = Tensor::zeros((N, 1), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(2, 0..N as u64);
        let x = prior(&like, &points[0], &mut noise).unwrap();
        let solver = Planned::new(guided, &points);
        let x = sample(&solver, &oracle, x, &mut noise, 0..N as u64).unwrap();
        let mean = x.mean_all().unwrap().to_scalar::<f64>().unwrap();
        let error = 4.0 * 0.5 / (N as f64).sqrt();
        assert!((mean - slope * c2).abs() < error + 0.01, "{mean}");
    }
}
