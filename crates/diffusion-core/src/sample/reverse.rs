//! The reverse step as a law: mean and log-variance of `p(x_s | x_t)`.
//!
//! Samplers draw from it, bounds and hybrid losses measure it. A [`Chain`] holds the steps of a
//! run with the conventions of the last step, whose posterior has no variance (Ho et al. 2020,
//! section 3.2; Nichol and Dhariwal 2021).

use super::Variance;
use crate::error::{Report, Result};
use crate::forward::{Posterior, posterior, transition};
use crate::predict::Prediction;
use crate::schedule::{Point, Table};
use crate::tensor::{At, Coef, combine, per_item};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Below this a posterior variance counts as this: the logarithm of zero is none.
const SMALLEST: f64 = 1e-20;

/// One step of a chain, with what the conventions of the variance need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hop {
    /// The noisier point.
    pub from: Point,
    /// The cleaner point.
    pub to: Point,
    /// `ln β̃`; in a chain, that of the next noisier step where `β̃ = 0`.
    pub log_small: f64,
    /// `ln β = ln σ²_{t|s}`.
    pub log_beta: f64,
    /// `ln` of a variance that replaces whatever the sampler's rule says.
    pub log_given: Option<f64>,
}

impl Hop {
    /// The step between two points, outside any chain.
    pub fn between(from: &Point, to: &Point) -> Self {
        Self {
            from: *from,
            to: *to,
            log_small: posterior(from, to).variance.max(SMALLEST).ln(),
            log_beta: transition(to, from).variance.max(SMALLEST).ln(),
            log_given: None,
        }
    }

    /// The posterior `q(x_s | x_t, x₀)`.
    pub fn posterior(&self) -> Posterior {
        posterior(&self.from, &self.to)
    }

    /// Whether the step ends at the data.
    pub fn into_data(&self) -> bool {
        self.to.sigma == 0.0
    }

    /// `ln` of the large variance: `β`, and for the last step `β̃` of the step before it, which
    /// gives the better decoder.
    pub fn log_large(&self) -> f64 {
        if self.into_data() {
            self.log_small
        } else {
            self.log_beta
        }
    }
}

/// The steps of a run, from the one that ends at the data (index 0) to the noisiest.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    hops: Vec<Hop>,
}

impl Chain {
    /// The chain along points, noisiest first, as [`crate::grid::Grid::points`] gives them.
    ///
    /// # Errors
    /// `Config` when there are fewer than two points, or noise does not fall along them.
    pub fn new(points: &[Point]) -> Result<Self> {
        let mut hops: Vec<Hop> = points
            .windows(2)
            .rev()
            .map(|w| Hop::between(&w[0], &w[1]))
            .collect();
        if hops.is_empty() {
            return Err(Report::new("chain", format!("{} points", points.len()))
                .expected("at least two, noisiest first")
                .config());
        }
        if let Some(bad) = hops
            .iter()
            .find(|h| h.from.sigma_hat().is_nan() || h.from.sigma_hat() <= h.to.sigma_hat())
        {
            return Err(
                Report::new("chain", format!("{:?} before {:?}", bad.from, bad.to))
                    .expected("points whose noise falls")
                    .config(),
            );
        }
        // The posterior of the last step is a point. Its logarithm is taken from the next step;
        // a chain of a single step has only β to fall back on.
        let next = hops.get(1).map(|h| h.log_small);
        if let Some(first) = hops.first_mut().filter(|h| h.into_data()) {
            first.log_small = next.unwrap_or(first.log_beta);
        }
        Ok(Self { hops })
    }

    /// The chain of every step of a table.
    ///
    /// # Errors
    /// As [`Chain::new`].
    pub fn of_table(table: &Table) -> Result<Self> {
        let steps = table.betas().len() as i64;
        let points: Vec<Point> = (-1..steps).rev().map(|i| table.index(i)).collect();
        Self::new(&points)
    }

    /// The same chain with the variances of its steps given, index 0 first.
    ///
    /// # Errors
    /// `Config` unless there is one positive number a step.
    pub fn with_variances(mut self, variances: &[f64]) -> Result<Self> {
        if variances.len() != self.hops.len() || !variances.iter().all(|v| *v > 0.0) {
            return Err(Report::new("variances", format!("{variances:?}"))
                .expected(format!("{} positive numbers", self.hops.len()))
                .config());
        }
        for (hop, variance) in self.hops.iter_mut().zip(variances) {
            hop.log_given = Some(variance.ln());
        }
        Ok(self)
    }

    /// The steps, the one into the data first.
    pub fn hops(&self) -> &[Hop] {
        &self.hops
    }

    /// The number of steps.
    pub fn len(&self) -> usize {
        self.hops.len()
    }

    /// Never: a chain has a step.
    pub fn is_empty(&self) -> bool {
        self.hops.is_empty()
    }

    /// The noisiest point.
    pub fn noisiest(&self) -> Point {
        match self.hops.last() {
            Some(hop) => hop.from,
            None => Point::data(0.0),
        }
    }

    /// The steps with these indices, one an item.
    ///
    /// # Errors
    /// `Input` when an index is not below [`Chain::len`].
    pub fn at(&self, indices: &[usize]) -> Result<Vec<Hop>> {
        indices
            .iter()
            .map(|i| {
                self.hops.get(*i).copied().ok_or_else(|| {
                    Report::new("step", i)
                        .expected(format!("below {}", self.hops.len()))
                        .input()
                })
            })
            .collect()
    }
}

/// Where the mean of the reverse step comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mean {
    /// The posterior's mean with the predicted `x₀`, clipped or not.
    #[default]
    Posterior,
    /// The network itself predicts the mean, see [`crate::denoiser::PreviousX`]: a clip changes
    /// the reported `x₀` only.
    Network,
}

/// The Gaussian `p(x_s | x_t)` of a batch.
#[derive(Clone, Debug)]
pub struct Reverse {
    /// The mean, `[B, …]`.
    pub mean: Tensor,
    /// The logarithm of the variance, `[B, …]`.
    pub log_variance: Tensor,
    /// The predicted data, `[B, …]`.
    pub x0: Tensor,
}

impl Reverse {
    /// The law that a prediction implies, each item at its own step.
    ///
    /// ```text
    /// mean = c_x x_t + c_{x0} x̂₀,   (c_x, c_{x0}) of the posterior q(x_s | x_t, x̂₀)
    /// ```
    ///
    /// # Shapes
    /// `x` `[B, …]`, one step an item.
    ///
    /// # Errors
    /// `Config` when a learned variance is asked for and the network says none.
    pub fn of(
        said: &Prediction,
        x: &Tensor,
        hops: &[Hop],
        variance: Variance,
        mean: Mean,
    ) -> Result<Self> {
        let from: Vec<Point> = hops.iter().map(|h| h.from).collect();
        let x0 = said.x0(x, At::Each(&from))?;
        let within = match mean {
            Mean::Posterior => x0.clone(),
            Mean::Network => said.raw_x0(x, At::Each(&from))?,
        };
        Ok(Self {
            mean: posterior_mean(x, &within, hops)?,
            log_variance: log_variance(said, x, hops, variance)?,
            x0,
        })
    }
}

/// The mean of `q(x_s | x_t, x₀)`, each item at its own step, `[B, …]`.
///
/// # Errors
/// When shapes differ.
pub fn posterior_mean(x: &Tensor, x0: &Tensor, hops: &[Hop]) -> Result<Tensor> {
    let each =
        |f: fn(&Posterior) -> f64| Coef::Each(hops.iter().map(|h| f(&h.posterior())).collect());
    combine(&each(|p| p.x), x, &each(|p| p.x0), x0)
}

/// The logarithm of the variance of the reverse step, each item at its own step, `[B, …]`.
///
/// # Errors
/// `Config` when a learned variance is asked for and the network says none.
pub fn log_variance(
    said: &Prediction,
    x: &Tensor,
    hops: &[Hop],
    variance: Variance,
) -> Result<Tensor> {
    let fixed = |f: &dyn Fn(&Hop) -> f64| -> Result<Tensor> {
        let values: Vec<f64> = hops.iter().map(f).collect();
        Ok(per_item(&values, x)?
            .broadcast_as(x.shape())?
            .contiguous()?)
    };
    if hops.iter().all(|h| h.log_given.is_some()) {
        return fixed(&|h| h.log_given.unwrap_or(h.log_small));
    }
    let learned = || {
        said.var_mix.as_ref().ok_or_else(|| {
            Report::new(
                "variance",
                format!("{}, but the network predicts no variance", variance.name()),
            )
            .expected("a network with twice the output channels")
            .remedy("use fixed_small or fixed_large")
            .config()
        })
    };
    match variance {
        Variance::FixedSmall | Variance::FixedSmallLog => fixed(&|h| h.log_small),
        Variance::FixedLarge => fixed(&Hop::log_large),
        Variance::Learned => Ok(learned()?.clone()),
        Variance::LearnedRange => {
            let v = learned()?;
            let half = |f: fn(&Hop) -> f64| Coef::Each(hops.iter().map(|h| 0.5 * f(h)).collect());
            let middle = fixed(&|h| 0.5 * (h.log_beta + h.log_small))?;
            Ok((half(|h| h.log_beta - h.log_small).times(v)? + middle)?)
        }
        Variance::NoiseMoment => {
            // Cov[x₀ | x_t] a dimension, bounded as data in [−1, 1] bound it.
            let at: Vec<Point> = hops.iter().map(|h| h.from).collect();
            let epsilon = said.epsilon(x, At::Each(&at))?;
            let spread = (learned()? - epsilon.sqr()?)?;
            let covariance = Coef::Each(hops.iter().map(|h| h.from.sigma_hat().powi(2)).collect())
                .times(&spread)?
                .clamp(0.0, 1.0)?;
            let gain = Coef::Each(hops.iter().map(|h| h.posterior().x0.powi(2)).collect());
            let small = fixed(&|h| h.posterior().variance)?;
            Ok((gain.times(&covariance)? + small)?
                .clamp(SMALLEST, f64::MAX.sqrt())?
                .log()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predict::Kind;
    use crate::schedule::BetaSchedule;
    use candle_core::Device;

    fn chain(steps: usize) -> Chain {
        Chain::of_table(&BetaSchedule::ddpm(steps).table(steps).unwrap()).unwrap()
    }

    #[test]
    fn the_last_step_borrows_the_variance_of_the_one_before() {
        let chain = chain(20);
        let hops = chain.hops();
        assert!(hops[0].into_data() && hops[0].posterior().variance == 0.0);
        assert_eq!(hops[0].log_small, hops[1].log_small);
        assert_eq!(hops[0].log_large(), hops[1].log_small);
        assert!((hops[1].log_small.exp() / hops[1].posterior().variance - 1.0).abs() < 1e-12);
        assert!(hops[7].log_large() > hops[7].log_small);
    }

    #[test]
    fn a_learned_variance_is_what_the_network_says() {
        let chain = chain(20);
        let x = Tensor::new(&[[0.1, 0.2], [0.3, -0.4f64]], &Device::Cpu).unwrap();
        let said = Prediction {
            var_mix: Some(x.clone()),
            ..Prediction::new(Kind::X0, x.clone())
        };
        let hops = chain.at(&[0, 9]).unwrap();
        let get = |v| {
            log_variance(&said, &x, &hops, v)
                .unwrap()
                .to_vec2::<f64>()
                .unwrap()
        };
        assert_eq!(get(Variance::Learned), x.to_vec2::<f64>().unwrap());
        let w = 0.5 * (1.0 - 0.4);
        let exact = w * hops[1].log_beta + (1.0 - w) * hops[1].log_small;
        assert!((get(Variance::LearnedRange)[1][1] - exact).abs() < 1e-12);
        assert_eq!(get(Variance::FixedLarge)[0][0], hops[0].log_small);
        let none = Prediction::new(Kind::X0, x.clone());
        let error = log_variance(&none, &x, &hops, Variance::Learned).unwrap_err();
        assert!(error.to_string().contains("twice"), "{error}");
    }

    /// With `E[ε²]` of Gaussian data the step has the exact conditional variance of `x_s`.
    #[test]
    fn the_second_moment_of_the_noise_gives_the_conditional_variance() {
        let chain = chain(20);
        let hop = chain.hops()[9];
        let c2 = 0.3;
        let (t, s) = (hop.from, hop.to);
        let total = t.alpha.powi(2) * c2 + t.sigma.powi(2);
        let x = Tensor::new(&[[0.7f64]], &Device::Cpu).unwrap();
        let mean = t.sigma * 0.7 / total;
        let said = Prediction {
            // Var[ε | x] = 1 − σ²/S.
            var_mix: Some(
                x.affine(0.0, mean.powi(2) + 1.0 - t.sigma.powi(2) / total)
                    .unwrap(),
            ),
            ..Prediction::new(Kind::Epsilon, x.affine(0.0, mean).unwrap())
        };
        let ours = log_variance(&said, &x, &[hop], Variance::NoiseMoment).unwrap();
        let ours = ours.to_vec2::<f64>().unwrap()[0][0].exp();
        // Var[x_s | x_t] = Var x_s − Cov²/Var x_t of the joint normal law.
        let cov = t.alpha / s.alpha * (s.alpha.powi(2) * c2 + s.sigma.powi(2));
        let exact = s.alpha.powi(2) * c2 + s.sigma.powi(2) - cov.powi(2) / total;
        assert!((ours / exact - 1.0).abs() < 1e-10, "{ours} {exact}");
    }

    #[test]
    fn refuses_chains_that_do_not_fall() {
        let p = Point::from_log_snr(0.0, 0.0);
        assert!(Chain::new(&[p]).is_err());
        assert!(Chain::new(&[p, p]).is_err());
        assert!(chain(5).with_variances(&[1.0; 4]).is_err());
        assert!(chain(5).at(&[5]).is_err());
    }
}
