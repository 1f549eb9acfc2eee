//! DDPM's ancestral sampling (Ho, Jain and Abbeel 2020, algorithm 2).

use super::reverse::{Hop, Mean, log_variance};
use super::{Ctx, Order, Step};
use crate::error::Result;
use crate::forward::{posterior, transition};
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::Tensor;
use diffusion_ops::combine;
use serde::{Deserialize, Serialize};

/// The variance of the reverse step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// `β̃`, the posterior's: right for data that is one point.
    #[default]
    FixedSmall,
    /// `β̃` through its logarithm, bounded below by 1e-20.
    FixedSmallLog,
    /// `β = σ²_{t|s}`: right for data that is standard normal.
    FixedLarge,
    /// `exp(½(v+1) ln β + ½(1−v) ln β̃)` with `v` from the network (Nichol and Dhariwal 2021,
    /// eq. 15).
    LearnedRange,
    /// The network says the log-variance itself, in the place of its mixing weight.
    Learned,
    /// The network says `E[ε² | x_t]` in the place of its mixing weight; the variance is then
    /// optimal in every dimension (Bao et al. 2022, Extended-Analytic-DPM).
    ///
    /// ```text
    /// Σ = β̃ + c_{x0}² clamp( (σ²/α²)(E[ε²] − ε̂²), 0, 1 )
    /// ```
    NoiseMoment,
}

impl Variance {
    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::FixedSmall => "fixed_small",
            Self::FixedSmallLog => "fixed_small_log",
            Self::FixedLarge => "fixed_large",
            Self::LearnedRange => "learned_range",
            Self::Learned => "learned",
            Self::NoiseMoment => "noise_moment",
        }
    }
}

/// The ancestral sampler.
///
/// ```text
/// x_s = c_x x_t + c_{x0} x̂₀ + std z,   (c_x, c_{x0}) of the posterior q(x_s | x_t, x̂₀)
/// ```
///
/// No noise is added when `s` is the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ancestral {
    /// The variance of a step.
    pub variance: Variance,
    /// Where the mean of a step comes from.
    pub mean: Mean,
    /// Add noise even to the data when the last step does not start from index 0. Diffusers does;
    /// with [`Variance::FixedLarge`] on a coarse grid the result is then visibly noisy.
    pub noise_into_data: bool,
}

impl Step for Ancestral {
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
        let said = ctx.denoise(x, from)?;
        let p = posterior(from, to);
        let x0 = match self.mean {
            Mean::Posterior => said.x0(x, At::All(*from))?,
            Mean::Network => said.raw_x0(x, At::All(*from))?,
        };
        let into_data = to.sigma == 0.0;
        if into_data && !(self.noise_into_data && from.t > 0.0) {
            return lincomb(p.x, x, p.x0, &x0);
        }
        let beta = transition(to, from).variance;
        let small = p.variance.max(1e-20);
        let variance = match self.variance {
            Variance::FixedSmall | Variance::FixedSmallLog => small,
            Variance::FixedLarge => beta,
            Variance::LearnedRange | Variance::Learned | Variance::NoiseMoment => {
                let hops = vec![Hop::between(from, to); x.dim(0)?];
                let std = (log_variance(&said, x, &hops, self.variance)? * 0.5)?.exp()?;
                let mean = lincomb(p.x, x, p.x0, &x0)?;
                return Ok((mean + (std * ctx.noise_between(x, from, to)?)?)?);
            }
        };
        let z = ctx.noise_between(x, from, to)?;
        Ok(combine(&[(p.x, x), (p.x0, &x0), (variance.sqrt(), &z)])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::CounterNoise;
    use crate::predict::{Kind, Prediction};
    use crate::schedule::BetaSchedule;
    use candle_core::Device;

    /// One step from index 400 to 300 with this variance, and this mixing weight from the network.
    fn step(variance: Variance, v: f64) -> Vec<f64> {
        let table = BetaSchedule::ddpm(1000).table(1000).unwrap();
        let model = from_fn(move |x: &Tensor, _, _| {
            let said = Prediction::new(Kind::X0, x.zeros_like()?);
            Ok(Prediction {
                var_mix: Some(x.ones_like()?.affine(v, 0.0)?),
                ..said
            })
        });
        let mut noise = CounterNoise::new(1, 0..1);
        let mut ctx = Ctx::new(&model, &mut noise, 0..1);
        let x = Tensor::new(&[[0.3, -1.0, 2.0f64]], &Device::Cpu).unwrap();
        let sampler = Ancestral {
            variance,
            ..Ancestral::default()
        };
        let y = sampler
            .step(&x, &table.index(400), &table.index(300), &mut ctx, &mut ())
            .unwrap();
        y.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The learned variance runs from β̃ at v = −1 to β at v = 1, geometrically.
    #[test]
    fn learned_range_lies_between_the_fixed_variances() {
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        let (small, large) = (
            step(Variance::FixedSmall, 0.0),
            step(Variance::FixedLarge, 0.0),
        );
        assert!(!close(&small, &large));
        assert!(close(&step(Variance::LearnedRange, -1.0), &small));
        assert!(close(&step(Variance::LearnedRange, 1.0), &large));
        assert!(close(&step(Variance::FixedSmallLog, 0.0), &small));
        let table = BetaSchedule::ddpm(1000).table(1000).unwrap();
        let (from, to) = (table.index(400), table.index(300));
        let (p, beta) = (posterior(&from, &to), transition(&to, &from).variance);
        // With the same draw z the middle is the mean plus the geometric mean of the deviations.
        let middle = step(Variance::LearnedRange, 0.0);
        for ((x, y), s) in [0.3, -1.0, 2.0].iter().zip(&middle).zip(&small) {
            let z = (s - p.x * x) / p.variance.sqrt();
            let exact = p.x * x + (p.variance * beta).powf(0.25) * z;
            assert!((y - exact).abs() < 1e-12, "{y} {exact}");
        }
    }

    /// A clip moves the mean that follows from `x₀`, and not the one that the network predicts.
    #[test]
    fn a_predicted_mean_is_not_clipped() {
        let (from, to) = (Point::from_log_snr(3.0, 1.0), Point::data(-1.0));
        let model = from_fn(|x: &Tensor, _, _| {
            Ok(Prediction {
                x0: Some(x.zeros_like()?),
                ..Prediction::new(Kind::X0, x.affine(2.0, 0.0)?)
            })
        });
        let x = Tensor::new(&[[0.75f64]], &Device::Cpu).unwrap();
        let run = |mean| {
            let mut noise = CounterNoise::new(1, 0..1);
            let mut ctx = Ctx::new(&model, &mut noise, 0..1);
            let sampler = Ancestral {
                mean,
                ..Ancestral::default()
            };
            let y = sampler.step(&x, &from, &to, &mut ctx, &mut ()).unwrap();
            y.to_vec2::<f64>().unwrap()[0][0]
        };
        // The last step goes to the predicted data themselves.
        assert!(run(Mean::Posterior).abs() < 1e-12);
        assert!((run(Mean::Network) - 1.5).abs() < 1e-12);
    }

    #[test]
    fn a_network_without_a_variance_is_refused() {
        let model = from_fn(|x: &Tensor, _, _| Ok(Prediction::new(Kind::X0, x.clone())));
        let mut noise = CounterNoise::new(1, 0..1);
        let mut ctx = Ctx::new(&model, &mut noise, 0..1);
        let x = Tensor::new(&[[0.3f64]], &Device::Cpu).unwrap();
        let sampler = Ancestral {
            variance: Variance::LearnedRange,
            ..Ancestral::default()
        };
        let (from, to) = (Point::new(2.0, 0.6, 0.8), Point::new(1.0, 0.8, 0.6));
        let error = sampler.step(&x, &from, &to, &mut ctx, &mut ()).unwrap_err();
        assert!(error.to_string().contains("learned_range"), "{error}");
    }
}
