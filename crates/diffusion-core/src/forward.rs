//! The forward process: marginals, transitions, and the posterior that reverses them.

use crate::error::Result;
use crate::schedule::Point;
use crate::tensor::{At, combine};
use candle_core::Tensor;

/// A sample of `q(x_t | x₀)` (Ho et al. 2020, eq. 4).
///
/// ```text
/// x_t = α_t x₀ + σ_t ε        (DDPM: √ᾱ_t x₀ + √(1 − ᾱ_t) ε)
/// ```
///
/// # Shapes
/// `x0` and `epsilon` `[B, …]`, the result likewise.
///
/// # Errors
/// When shapes differ.
pub fn marginal(x0: &Tensor, epsilon: &Tensor, at: At<'_>) -> Result<Tensor> {
    combine(&at.coef(|p| p.alpha), x0, &at.coef(|p| p.sigma), epsilon)
}

/// The Gaussian `q(x_t | x_s)` between two times `s < t`.
///
/// ```text
/// q(x_t | x_s) = N(α_{t|s} x_s, σ²_{t|s} I),   α_{t|s} = α_t/α_s,   σ²_{t|s} = σ_t² − α²_{t|s} σ_s²
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transition {
    /// `α_{t|s}`.
    pub alpha: f64,
    /// `σ²_{t|s}`.
    pub variance: f64,
}

/// The transition from the cleaner point `s` to the noisier point `t`.
///
/// For one step of DDPM this is `N(√(1 − β_t) x_{t−1}, β_t I)` (eq. 2).
pub fn transition(s: &Point, t: &Point) -> Transition {
    let alpha = t.alpha / s.alpha;
    Transition {
        alpha,
        variance: t.sigma * t.sigma - (alpha * s.sigma).powi(2),
    }
}

/// The Gaussian `q(x_s | x_t, x₀)` with mean `c_x x_t + c_{x0} x₀`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    /// Weight of `x_t` in the mean.
    pub x: f64,
    /// Weight of `x₀` in the mean.
    pub x0: f64,
    /// Variance; for one step of DDPM `β̃_t`.
    pub variance: f64,
}

/// The posterior of the cleaner point `s` given the noisier point `t` (Ho et al. 2020, eq. 7, for
/// any two points).
///
/// ```text
/// v = σ²_{t|s} σ_s²/σ_t²
/// μ = (α_{t|s} σ_s²/σ_t²) x_t + (α_s σ²_{t|s}/σ_t²) x₀
/// ```
pub fn posterior(t: &Point, s: &Point) -> Posterior {
    let Transition { alpha, variance } = transition(s, t);
    let (vs, vt) = (s.sigma * s.sigma, t.sigma * t.sigma);
    Posterior {
        x: alpha * vs / vt,
        x0: s.alpha * variance / vt,
        variance: variance * vs / vt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{BetaSchedule, Schedule, SubVp, Ve};
    use candle_core::Device;
    use diffusion_ops::rng::{Key, stream};

    #[test]
    fn ddpm_symbols_are_the_special_case() {
        let table = BetaSchedule::ddpm(1000).table(1000).unwrap();
        for i in [1usize, 2, 10, 500, 999] {
            let (beta, bar, prev) = (
                table.betas()[i],
                table.alpha_bar()[i],
                table.alpha_bar()[i - 1],
            );
            let (s, t) = (table.index(i as i64 - 1), table.index(i as i64));
            let q = transition(&s, &t);
            assert!((q.alpha - (1.0 - beta).sqrt()).abs() < 1e-14);
            assert!((q.variance - beta).abs() < 1e-14);
            let p = posterior(&t, &s);
            assert!((p.variance - (1.0 - prev) / (1.0 - bar) * beta).abs() < 1e-13);
            assert!((p.x - (1.0 - beta).sqrt() * (1.0 - prev) / (1.0 - bar)).abs() < 1e-11);
            assert!((p.x0 - prev.sqrt() * beta / (1.0 - bar)).abs() < 1e-11);
        }
        // The first step goes to the data: no variance, and the mean is x₀ itself.
        let p = posterior(&table.index(0), &table.index(-1));
        assert_eq!((p.x, p.variance), (0.0, 0.0));
        assert!((p.x0 - 1.0).abs() < 1e-12);
    }

    /// Transition after marginal is the marginal; posterior after marginal is the joint.
    #[test]
    fn consistent_for_every_process() {
        let schedules: [&dyn Schedule; 3] = [
            &crate::schedule::Vp::default(),
            &SubVp::default(),
            &Ve::default(),
        ];
        for schedule in schedules {
            let (s, t) = (schedule.at(0.3), schedule.at(0.8));
            let q = transition(&s, &t);
            assert!((q.alpha * s.alpha - t.alpha).abs() < 1e-14);
            assert!((q.variance + (q.alpha * s.sigma).powi(2) - t.sigma.powi(2)).abs() < 1e-10);
            // Mean and variance of x_s recovered through x_t: E over x_t of the posterior.
            let p = posterior(&t, &s);
            assert!((p.x * t.alpha + p.x0 - s.alpha).abs() < 1e-12);
            let total = p.variance + (p.x * t.sigma).powi(2);
            assert!((total / s.sigma.powi(2) - 1.0).abs() < 1e-12);
            // Bayes: log q(x_t|x_s) + log q(x_s|x₀) − log q(x_t|x₀) = log posterior, at some values.
            let normal = |x: f64, m: f64, v: f64| -0.5 * ((x - m).powi(2) / v + v.ln());
            for (x0, xs, xt) in [(0.3, -0.2, 0.9), (-1.0, 0.1, -0.4)] {
                let bayes = normal(xt, q.alpha * xs, q.variance)
                    + normal(xs, s.alpha * x0, s.sigma.powi(2))
                    - normal(xt, t.alpha * x0, t.sigma.powi(2));
                let ours = normal(xs, p.x * xt + p.x0 * x0, p.variance);
                assert!(
                    (bayes - ours).abs() < 1e-9 * bayes.abs().max(1.0),
                    "{bayes} {ours}"
                );
            }
        }
    }

    #[test]
    fn moments_of_the_marginal() {
        let n = 40_000;
        let z = Key::new(5, stream::TEST).normal(n);
        let epsilon = Tensor::from_vec(z, (n,), &Device::Cpu).unwrap();
        let x0 = Tensor::full(0.7, (n,), &Device::Cpu).unwrap();
        let p = BetaSchedule::ddpm(1000).table(1000).unwrap().index(250);
        let x = marginal(&x0, &epsilon, At::All(p))
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let mean = x.iter().sum::<f64>() / n as f64;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.7 * p.alpha).abs() < 4.0 * p.sigma / (n as f64).sqrt());
        assert!((var / p.sigma.powi(2) - 1.0).abs() < 4.0 * (2.0 / n as f64).sqrt());
    }
}
