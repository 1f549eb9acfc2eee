//! The exponential integrator in half log-SNR `λ = ln(α/σ)`: what every DPM-Solver shares.
//!
//! With a belief `D(λ)` about the data, or `ε(λ)` about the noise, the reverse process is linear but
//! for one integral (Lu et al. 2022, DPM-Solver eq. 3.4 and DPM-Solver++ eq. 8). Its Taylor
//! polynomial in `λ` gives, for a step of length `h = λ_to − λ`,
//!
//! ```text
//! x_to = w_x x + w_0 D + w_1 (h D') + w_2 (h² D'') + w_z z
//! ```

use super::Ctx;
use crate::error::Result;
use crate::predict::Prediction;
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Which of the network's beliefs is treated as slowly varying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Belief {
    /// The data `x̂₀` (DPM-Solver++): steady under guidance, and may be thresholded.
    #[default]
    X0,
    /// The noise `ε̂` (DPM-Solver).
    Epsilon,
}

impl Belief {
    /// The belief in a prediction, corrections of `x̂₀` included.
    ///
    /// # Errors
    /// `Numeric` where the prediction cannot give it.
    pub fn of(self, said: &Prediction, x: &Tensor, at: &Point) -> Result<Tensor> {
        match self {
            Belief::X0 => said.x0(x, At::All(*at)),
            Belief::Epsilon => said.epsilon_of_x0(x, At::All(*at)),
        }
    }

    /// The same as what it is made of, where that is enough.
    ///
    /// # Errors
    /// As [`Belief::of`].
    pub fn hold(self, said: &Prediction, x: &Tensor, at: &Point) -> Result<Held> {
        let parts = said.linear(at).map(|[a, b, c, d]| match self {
            Belief::X0 => (a, b),
            Belief::Epsilon => (c, d),
        });
        Ok(match parts {
            Some((a, b)) => Held::Parts([(a, x.clone()), (b, said.value.clone())]),
            None => Held::Whole(self.of(said, x, at)?),
        })
    }
}

/// A belief, perhaps as the sum of sample and prediction that it is: sums of beliefs then are one pass
/// over the data.
pub enum Held {
    /// The belief.
    Whole(Tensor),
    /// Its parts, weighted.
    Parts([(f64, Tensor); 2]),
}

impl Held {
    /// Adds the belief, weighted, to a sum.
    pub fn add<'a>(&'a self, weight: f64, terms: &mut Vec<(f64, &'a Tensor)>) {
        let mut put = |weight: f64, part: &'a Tensor| match terms
            .iter_mut()
            .find(|(_, x)| x.id() == part.id())
        {
            Some(term) => term.0 += weight,
            None if weight == 0.0 => {}
            None => terms.push((weight, part)),
        };
        match self {
            Held::Whole(belief) => put(weight, belief),
            Held::Parts(parts) => parts.iter().for_each(|(w, x)| put(weight * w, x)),
        }
    }
}

/// The weights of one step; see the module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Of the sample.
    pub x: f64,
    /// Of the belief.
    pub d0: f64,
    /// Of `h D'`, exactly.
    pub d1: f64,
    /// Of `h D'` by the midpoint rule, half of `d0`: equal to the same order.
    pub midpoint: f64,
    /// Of `h² D''`.
    pub d2: f64,
    /// Of standard normal noise; 0 for the ODE.
    pub noise: f64,
}

/// The weights of a step of the probability flow, or (`stochastic`) of the reverse SDE.
///
/// ```text
/// D:  w_x = σ_to/σ e^{−(k−1)h},  w_0 = α_to a,  w_1 = α_to (1 − a/kh),  w_2 = α_to (½ − (kh − a)/(kh)²)
/// ε:  w_x = α_to/α,  w_0 = −k σ_to b,  w_1 = −k σ_to (b/h − 1),  w_2 = −k σ_to ((b − h)/h² − ½)
/// a = 1 − e^{−kh},  b = e^h − 1,  k = 1 for the ODE, 2 for the SDE
/// w_z = σ_to √(1 − e^{−2h})  or  σ_to √(e^{2h} − 1)
/// ```
pub fn weights(from: &Point, to: &Point, belief: Belief, stochastic: bool) -> Weights {
    let h = to.lambda() - from.lambda();
    let k = if stochastic { 2.0 } else { 1.0 };
    match belief {
        Belief::X0 => {
            let kh = k * h;
            let a = -(-kh).exp_m1();
            let extra = if stochastic { (-h).exp() } else { 1.0 };
            Weights {
                x: to.sigma / from.sigma * extra,
                d0: to.alpha * a,
                midpoint: 0.5 * to.alpha * a,
                d1: to.alpha * (1.0 - a / kh),
                d2: to.alpha * (0.5 - (kh - a) / (kh * kh)),
                noise: if stochastic {
                    to.sigma * (-(-2.0 * h).exp_m1()).max(0.0).sqrt()
                } else {
                    0.0
                },
            }
        }
        // Into the data h is infinite, σ_to e^h = α_to σ/α stays, and noise would be left in it.
        Belief::Epsilon if to.sigma == 0.0 => {
            let d0 = -to.alpha * from.sigma_hat();
            Weights {
                x: to.alpha / from.alpha,
                d0,
                d1: d0,
                midpoint: 0.5 * d0,
                d2: 0.5 * d0,
                noise: 0.0,
            }
        }
        Belief::Epsilon => {
            let b = h.exp_m1();
            Weights {
                x: to.alpha / from.alpha,
                d0: -k * to.sigma * b,
                midpoint: -0.5 * k * to.sigma * b,
                d1: -k * to.sigma * (b / h - 1.0),
                d2: -k * to.sigma * ((b - h) / (h * h) - 0.5),
                noise: if stochastic {
                    to.sigma * (2.0 * h).exp_m1().max(0.0).sqrt()
                } else {
                    0.0
                },
            }
        }
    }
}

/// How the second-order term is weighted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// By the midpoint rule, the authors' choice.
    #[default]
    Midpoint,
    /// By the exact integral (the authors' `taylor`, diffusers' `heun`).
    Exact,
}

impl Rule {
    /// The weight of `h D'` in a step of order 2.
    pub fn of(self, weights: &Weights) -> f64 {
        match self {
            Rule::Midpoint => weights.midpoint,
            Rule::Exact => weights.d1,
        }
    }
}

/// A weighted sum with noise, drawn only where it counts.
pub(super) fn finish(
    terms: Vec<(f64, &Tensor)>,
    noise: f64,
    x: &Tensor,
    (from, to): (&Point, &Point),
    ctx: &mut Ctx<'_>,
) -> Result<Tensor> {
    if noise == 0.0 {
        return Ok(diffusion_ops::combine(&terms)?);
    }
    let z = ctx.noise_between(x, from, to)?;
    let mut terms: Vec<(f64, &Tensor)> = terms;
    terms.push((noise, &z));
    Ok(diffusion_ops::combine(&terms)?)
}

/// Divided differences of beliefs at earlier points of a run, latest first.
#[derive(Default)]
pub struct History {
    /// Beliefs with the `λ` where they were held.
    pub items: Vec<(Tensor, f64)>,
}

impl History {
    /// Puts the latest belief in front and forgets all but `keep`.
    pub fn push(&mut self, belief: Tensor, lambda: f64, keep: usize) {
        self.items.insert(0, (belief, lambda));
        self.items.truncate(keep.max(1));
    }

    /// How many beliefs there are.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quadrature::gauss_legendre;

    /// The weights are the moments of the integrals they stand for.
    #[test]
    fn weights_are_moments_of_the_exponential() {
        let (from, to) = (
            Point::from_log_snr(0.6, -1.3),
            Point::from_log_snr(0.5, 0.4),
        );
        let h = to.lambda() - from.lambda();
        for (stochastic, k) in [(false, 1.0), (true, 2.0)] {
            let w = weights(&from, &to, Belief::X0, stochastic);
            let moment = |power: i32| {
                gauss_legendre(0.0, h, |u| k * (-k * (h - u)).exp() * (u / h).powi(power))
                    * to.alpha
            };
            assert!((w.d0 - moment(0)).abs() < 1e-13);
            assert!((w.d1 - moment(1)).abs() < 1e-13);
            assert!((w.d2 - 0.5 * moment(2)).abs() < 1e-13);
            let w = weights(&from, &to, Belief::Epsilon, stochastic);
            let moment = |power: i32| {
                gauss_legendre(0.0, h, |u| k * (h - u).exp() * (u / h).powi(power)) * -to.sigma
            };
            assert!((w.d0 - moment(0)).abs() < 1e-13);
            assert!((w.d1 - moment(1)).abs() < 1e-13);
            assert!((w.d2 - 0.5 * moment(2)).abs() < 1e-13);
        }
    }

    /// A step of the SDE keeps the marginal variance of noise: `w_x² σ² + w_z² = σ_to²` when the
    /// data are known.
    #[test]
    fn the_noise_of_a_step_keeps_the_marginal() {
        let (from, to) = (
            Point::from_log_snr(0.6, -1.3),
            Point::from_log_snr(0.5, 0.4),
        );
        let w = weights(&from, &to, Belief::X0, true);
        let variance = (w.x * from.sigma).powi(2) + w.noise.powi(2);
        assert!((variance - to.sigma.powi(2)).abs() < 1e-14);
        assert!((w.x * from.alpha + w.d0 - to.alpha).abs() < 1e-14);
    }
}
