//! Analytic-DPM: the optimal reverse variance from one statistic a step (Bao et al. 2022).
//!
//! ```text
//! σ*² = λ² + ( α_s − √(σ_s² − λ²) α_t/σ_t )² · E tr Cov[x₀|x_t]/D
//! E tr Cov[x₀|x_t]/D = (σ_t²/α_t²)(1 − E‖ε̂(x_t)‖²/D)
//! ```
//!
//! where `λ² = η² β̃` chooses the family: η = 1 is DDPM, η = 0 DDIM. `E‖ε̂‖²/D = σ_t² Γ_t` is
//! measured once on the training data ([`noise_moments`]) and serves every sub-grid.

use super::{Ctx, Direction, Order, Step};
use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::{marginal, posterior};
use crate::noise::Noise;
use crate::schedule::Point;
use crate::tensor::{At, lincomb};
use candle_core::{DType, Tensor};
use diffusion_ops::combine;
use std::ops::Range;

/// `E‖ε̂(x_t)‖²/D` over a batch of data, a number a point.
///
/// # Shapes
/// `x0` `[B, …]`, `items` the places of the batch in the run.
///
/// # Errors
/// Whatever the network or the noise refuses.
pub fn noise_moments(
    network: &dyn Denoiser,
    x0: &Tensor,
    points: &[Point],
    noise: &mut dyn Noise,
    items: Range<u64>,
) -> Result<Vec<f64>> {
    points
        .iter()
        .map(|p| {
            let at = At::All(*p);
            let x_t = marginal(x0, &noise.normal(x0)?, at)?;
            let mut call = Call {
                noise,
                items: items.clone(),
                tracked: false,
            };
            let epsilon = network.predict(&x_t, at, &mut call)?.epsilon(&x_t, at)?;
            let mean = epsilon.sqr()?.mean_all()?;
            Ok(mean.to_dtype(DType::F64)?.to_scalar::<f64>()?)
        })
        .collect()
}

/// How the estimated variance is bounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Largest `Cov[x₀|x_t]` a dimension: `((b − a)/2)²` for data in `[a, b]`, 1 for `[−1, 1]`.
    pub covariance: f64,
    /// How many steps before the last one are bounded by `pixel`.
    pub last_steps: usize,
    /// Expected displacement by the noise of these steps, in grey levels of 256: the variance is
    /// at most `(2y/255)² π/2`.
    pub pixel: f64,
}

impl Default for Bounds {
    /// Data in `[−1, 1]`, no bound on the last steps.
    fn default() -> Self {
        Self {
            covariance: 1.0,
            last_steps: 0,
            pixel: 2.0,
        }
    }
}

/// The optimal variance of a step of the family `η`, not bounded by [`Bounds::pixel`].
pub fn optimal_variance(from: &Point, to: &Point, eta: f64, moment: f64, covariance: f64) -> f64 {
    let lambda2 = lambda2(from, to, eta);
    let spread = from.sigma_hat().powi(2) * (1.0 - moment);
    let along = (to.sigma.powi(2) - lambda2).max(0.0).sqrt();
    let gain = to.alpha - along * from.alpha / from.sigma;
    lambda2 + gain.powi(2) * spread.clamp(0.0, covariance)
}

/// `λ² = η² β̃`.
fn lambda2(from: &Point, to: &Point, eta: f64) -> f64 {
    eta.powi(2) * posterior(from, to).variance
}

/// The sampler of the family `η` with the optimal variance.
///
/// ```text
/// x_s = α_s x̂₀ + √(σ_s² − λ²) ε̂ + σ* z
/// ```
///
/// No noise is added when `s` is the data.
#[derive(Clone, Debug, PartialEq)]
pub struct Analytic {
    /// The family: 1 for DDPM, 0 for DDIM.
    pub eta: f64,
    /// Which noise the mean points along: the authors take the network's own for DDIM, and for
    /// DDPM the one that belongs to the clipped `x̂₀`.
    pub direction: Direction,
    steps: Vec<(Point, Point, f64)>,
}

impl Analytic {
    /// The sampler along points, noisiest first, with the moment of the noise at each of them but
    /// the last.
    ///
    /// # Errors
    /// `Config` unless there is one number a step.
    pub fn new(points: &[Point], moments: &[f64], eta: f64, bounds: Bounds) -> Result<Self> {
        if moments.len() + 1 != points.len() || moments.iter().any(|m| !m.is_finite()) {
            return Err(Report::new("noise moments", format!("{moments:?}"))
                .expected(format!("one for each of {} steps", points.len().max(1) - 1))
                .config());
        }
        let cap = (bounds.pixel * 2.0 / 255.0).powi(2) * std::f64::consts::FRAC_PI_2;
        let total = moments.len();
        let steps = points.windows(2).zip(moments).enumerate();
        let steps = steps
            .map(|(i, (w, moment))| {
                let free = optimal_variance(&w[0], &w[1], eta, *moment, bounds.covariance);
                // Counted from the data: the last step is 0.
                let bounded = (1..=bounds.last_steps).contains(&(total - 1 - i));
                (w[0], w[1], if bounded { free.min(cap) } else { free })
            })
            .collect();
        Ok(Self {
            eta,
            direction: if eta == 1.0 {
                Direction::Rederived
            } else {
                Direction::Predicted
            },
            steps,
        })
    }

    /// The variances of the steps, the one into the data first, as
    /// [`super::Chain::with_variances`] takes them for η = 1. There the last step's is the
    /// decoder's, and none is zero.
    pub fn variances(&self) -> Vec<f64> {
        self.steps.iter().rev().map(|s| s.2.max(1e-12)).collect()
    }
}

impl Step for Analytic {
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
        let mut known = self.steps.iter();
        let Some((_, _, variance)) = known.find(|(f, t, _)| f == from && t == to) else {
            return Err(Report::new("analytic step", format!("{from:?} to {to:?}"))
                .expected("a step whose variance was computed")
                .remedy("give Analytic::new the points of the run")
                .config());
        };
        let said = ctx.denoise(x, from)?;
        let at = At::All(*from);
        let x0 = said.x0(x, at)?;
        let epsilon = match self.direction {
            Direction::Predicted => said.epsilon(x, at)?,
            Direction::Rederived => said.epsilon_of_x0(x, at)?,
        };
        let along = (to.sigma.powi(2) - lambda2(from, to, self.eta))
            .max(0.0)
            .sqrt();
        if to.sigma == 0.0 {
            return lincomb(to.alpha, &x0, along, &epsilon);
        }
        let z = ctx.noise.normal(x)?;
        Ok(combine(&[
            (to.alpha, &x0),
            (along, &epsilon),
            (variance.sqrt(), &z),
        ])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Grid;
    use crate::likelihood::{Decoder, Vlb};
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::sample::{Chain, Planned, Variance, prior, sample};
    use crate::schedule::BetaSchedule;
    use candle_core::Device;
    use diffusion_ops::rng::{Key, stream};

    const C: f64 = 0.4;

    fn total(p: &Point) -> f64 {
        (p.alpha * C).powi(2) + p.sigma.powi(2)
    }

    fn points(steps: usize) -> Vec<Point> {
        let table = BetaSchedule::ddpm(100).table(100).unwrap();
        Grid::Trailing.points(&table, steps).unwrap()
    }

    /// `E‖ε̂‖²/D = σ²/S` of Gaussian data.
    fn exact_moments(points: &[Point]) -> Vec<f64> {
        let last = points.len() - 1;
        points[..last]
            .iter()
            .map(|p| p.sigma.powi(2) / total(p))
            .collect()
    }

    fn data(n: usize) -> Tensor {
        let rows: Vec<Vec<f64>> = (0..n as u64)
            .map(|i| {
                let z = Key::new(7, stream::TEST).item(i).normal(2);
                z.iter().map(|z| C * z).collect()
            })
            .collect();
        Tensor::new(rows, &Device::Cpu).unwrap()
    }

    #[test]
    fn gaussian_data_have_the_exact_conditional_variance() {
        let points = points(6);
        let ours = Analytic::new(&points, &exact_moments(&points), 1.0, Bounds::default()).unwrap();
        for (from, to, variance) in &ours.steps {
            let cov = from.alpha / to.alpha * total(to);
            let exact = total(to) - cov.powi(2) / total(from);
            assert!((variance / exact - 1.0).abs() < 1e-9, "{variance} {exact}");
        }
    }

    #[test]
    fn moments_are_those_of_the_data() {
        let oracle = Gaussian::new(vec![0.0; 2], vec![C; 2]);
        let (points, n) = (points(5), 2000);
        let mut noise = CounterNoise::new(2, 0..n as u64);
        let ours = noise_moments(&oracle, &data(n), &points[..5], &mut noise, 0..n as u64).unwrap();
        for (ours, exact) in ours.iter().zip(exact_moments(&points)) {
            // A chi-squared mean over 2n values.
            assert!((ours / exact - 1.0).abs() < 4.0 * (2.0 / (2.0 * n as f64)).sqrt());
        }
    }

    /// Any η, any number of steps: with the optimal variance the samples keep the data's variance.
    #[test]
    fn samples_have_the_variance_of_the_data() {
        let oracle = Gaussian::new(vec![0.0; 2], vec![C; 2]);
        let n = 4000;
        for eta in [0.0, 0.5, 1.0] {
            for steps in [3, 12] {
                let points = points(steps);
                let moments = exact_moments(&points);
                let step = Analytic::new(&points, &moments, eta, Bounds::default()).unwrap();
                let mut noise = CounterNoise::new(5, 0..n as u64);
                let like = data(n);
                let x = prior(&like, &points[0], &mut noise).unwrap();
                // Stops before the data, where noise is still added.
                let solver = Planned::new(step, &points[..steps]);
                let x = sample(&solver, &oracle, x, &mut noise, 0..n as u64).unwrap();
                let ours = x
                    .sqr()
                    .unwrap()
                    .mean_all()
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap();
                let ratio = ours / total(&points[steps - 1]);
                let error = 4.0 * (2.0 / (2.0 * n as f64)).sqrt();
                // The start N(0, σ_T² I) lacks the last of the signal.
                assert!(
                    (ratio - 1.0).abs() < error + 2e-3,
                    "eta {eta}, {steps}: {ratio}"
                );
            }
        }
    }

    #[test]
    fn the_bound_is_tight_for_gaussian_data_at_any_number_of_steps() {
        let oracle = Gaussian::new(vec![0.0; 2], vec![C; 2]);
        let (n, x0) = (1000, data(1000));
        let exact = oracle.log_density(&x0, &Point::data(0.0)).unwrap();
        for steps in [2, 8] {
            let points = points(steps);
            let step =
                Analytic::new(&points, &exact_moments(&points), 1.0, Bounds::default()).unwrap();
            let chain = Chain::new(&points)
                .unwrap()
                .with_variances(&step.variances())
                .unwrap();
            let vlb = Vlb {
                prior_std: total(&points[0]).sqrt(),
                ..Vlb::new(chain, Variance::FixedSmall, Decoder::Density)
            };
            let mut noise = CounterNoise::new(5, 0..n as u64);
            let mut bound = vlb.evaluate(&oracle, &x0, &mut noise, 0..n as u64).unwrap();
            let bits = exact.affine(0.5 / std::f64::consts::LN_2, 0.0).unwrap();
            bound.total = (bound.total + bits).unwrap();
            let (gap, error) = bound.mean().unwrap();
            assert!(gap.abs() < 4.0 * error, "{steps}: {gap} {error}");
        }
    }

    #[test]
    fn bounds_hold() {
        let points = points(4);
        let bounds = Bounds {
            covariance: 0.01,
            last_steps: 1,
            pixel: 1.0,
        };
        let wrong = [-3.0, 1.5, 0.2, 0.0];
        let ours = Analytic::new(&points, &wrong, 1.0, bounds)
            .unwrap()
            .variances();
        let cap = (2.0f64 / 255.0).powi(2) * std::f64::consts::FRAC_PI_2;
        assert!((ours[1] - cap).abs() < 1e-15);
        assert!((ours[0] - 0.01).abs() < 1e-15);
        // Above one the estimate is impossible: the covariance is then zero.
        let small = posterior(&points[1], &points[2]).variance;
        assert!((ours[2] - small).abs() < 1e-15);
        assert!(Analytic::new(&points, &[0.5], 1.0, bounds).is_err());
    }
}
