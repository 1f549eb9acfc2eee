//! The variational bound of a chain, term by term (Ho et al. 2020, eq. 5).
//!
//! ```text
//! −log p(x₀) ≤ KL(q(x_T|x₀) ‖ p(x_T)) + Σ_{t>1} E KL(q(x_s|x_t,x₀) ‖ p(x_s|x_t)) − E log p(x₀|x₁)
//! ```

use super::decoder::Decoder;
use super::gaussian::{kl, log_prior};
use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::forward::marginal;
use crate::guide::Clip;
use crate::noise::Noise;
use crate::predict::Prediction;
use crate::sample::reverse::posterior_mean;
use crate::sample::{Chain, Hop, Mean, Reverse, Variance};
use crate::schedule::Point;
use crate::tensor::{At, combine, mean_per_item, per_item};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// What is bounded: a chain of reverse steps, and how each of them reads the network.
#[derive(Clone, Debug)]
pub struct Vlb {
    /// The steps; any sub-grid of a trained table will do.
    pub chain: Chain,
    /// The variance of a step.
    pub variance: Variance,
    /// Where its mean comes from.
    pub mean: Mean,
    /// The clip of the predicted `x₀`.
    pub clip: Clip,
    /// The last term.
    pub decoder: Decoder,
    /// Deviation of the prior `p(x_T) = N(0, s² I)`: 1 for variance-preserving processes.
    pub prior_std: f64,
}

/// The bound of a batch, in bits a dimension.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Everything together, `[B]`.
    pub total: Tensor,
    /// The prior's term, `[B]`.
    pub prior: Tensor,
    /// A term a step, `[B, T]`: column 0 is the decoder, the last the noisiest step.
    pub terms: Tensor,
    /// Mean squared error of the predicted `x₀` at each step, `[B, T]`.
    pub x0_mse: Tensor,
    /// Mean squared error of the noise that belongs to the predicted `x₀`, `[B, T]`.
    pub epsilon_mse: Tensor,
}

/// Nats an entry averaged over the dimensions, as bits.
fn bits(nats: &Tensor) -> Result<Tensor> {
    Ok(mean_per_item(nats)?.affine(std::f64::consts::LOG2_E, 0.0)?)
}

impl Vlb {
    /// A bound for variance-preserving processes: posterior means, nothing clipped.
    pub fn new(chain: Chain, variance: Variance, decoder: Decoder) -> Self {
        Self {
            chain,
            variance,
            mean: Mean::Posterior,
            clip: Clip::None,
            decoder,
            prior_std: 1.0,
        }
    }

    /// The law of the reverse step that a prediction implies, after the clip.
    ///
    /// # Errors
    /// As [`Reverse::of`].
    pub fn law(&self, said: Prediction, x_t: &Tensor, hops: &[Hop]) -> Result<Reverse> {
        let from: Vec<Point> = hops.iter().map(|h| h.from).collect();
        let said = match self.clip {
            Clip::None => said,
            clip => Prediction {
                x0: Some(clip.apply(&said.x0(x_t, At::Each(&from))?)?),
                ..said
            },
        };
        Reverse::of(&said, x_t, hops, self.variance, self.mean)
    }

    /// The terms of a batch in bits a dimension, `[B]`, each item at its own step; differentiable
    /// in the law.
    ///
    /// A step that ends at the data gives the decoder's term, any other the divergence from the
    /// posterior, whose variance of the last step is never needed.
    ///
    /// # Shapes
    /// `x0` and `x_t` `[B, …]`, one step an item.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn terms(&self, law: &Reverse, x0: &Tensor, x_t: &Tensor, hops: &[Hop]) -> Result<Tensor> {
        let decoded = || -> Result<Tensor> {
            bits(&self.decoder.log_prob(x0, &law.mean, &law.log_variance)?)?
                .neg()
                .map_err(Into::into)
        };
        let diverged = || -> Result<Tensor> {
            let small: Vec<f64> = hops.iter().map(|h| h.log_small).collect();
            let small = per_item(&small, x_t)?
                .broadcast_as(x_t.shape())?
                .contiguous()?;
            let exact = posterior_mean(x_t, x0, hops)?;
            bits(&kl(&exact, &small, &law.mean, &law.log_variance)?)
        };
        let last = hops.iter().filter(|h| h.into_data()).count();
        if last == 0 {
            return diverged();
        }
        if last == hops.len() {
            return decoded();
        }
        let is_last: Vec<u8> = hops.iter().map(|h| u8::from(h.into_data())).collect();
        let is_last = Tensor::new(is_last, x_t.device())?;
        Ok(is_last.where_cond(&decoded()?, &diverged()?)?)
    }

    /// `KL(q(x_T | x₀) ‖ N(0, s² I))` in bits a dimension, `[B]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn prior(&self, x0: &Tensor) -> Result<Tensor> {
        let p = self.chain.noisiest();
        let full = |v: f64| x0.zeros_like()?.affine(0.0, v);
        let mean = x0.affine(p.alpha, 0.0)?;
        let log_var = full(2.0 * p.sigma.ln())?;
        bits(&kl(
            &mean,
            &log_var,
            &full(0.0)?,
            &full(2.0 * self.prior_std.ln())?,
        )?)
    }

    /// The whole bound, one network call a step, noise drawn from the noisiest step down.
    ///
    /// # Shapes
    /// `x0` `[B, …]`, `items` the places of the batch in the run.
    ///
    /// # Errors
    /// Whatever the network or the noise refuses.
    pub fn evaluate(
        &self,
        network: &dyn Denoiser,
        x0: &Tensor,
        noise: &mut dyn Noise,
        items: Range<u64>,
    ) -> Result<Bound> {
        let batch = x0.dim(0)?;
        let (mut terms, mut x0_mse, mut epsilon_mse) = (Vec::new(), Vec::new(), Vec::new());
        for hop in self.chain.hops().iter().rev() {
            let (hops, at) = (vec![*hop; batch], At::All(hop.from));
            let epsilon = noise.normal(x0)?;
            let x_t = marginal(x0, &epsilon, at)?;
            let mut call = Call {
                noise,
                items: items.clone(),
                tracked: false,
            };
            let law = self.law(network.predict(&x_t, at, &mut call)?, &x_t, &hops)?;
            terms.push(self.terms(&law, x0, &x_t, &hops)?.detach());
            x0_mse.push(mean_per_item(&(&law.x0 - x0)?.sqr()?)?.detach());
            let sigma = at.coef(|p| 1.0 / p.sigma);
            let implied = combine(&sigma, &x_t, &at.coef(|p| -p.alpha / p.sigma), &law.x0)?;
            epsilon_mse.push(mean_per_item(&(implied - epsilon)?.sqr()?)?.detach());
        }
        let columns = |mut list: Vec<Tensor>| -> Result<Tensor> {
            list.reverse();
            Ok(Tensor::stack(&list, 1)?)
        };
        let terms = columns(terms)?;
        let prior = self.prior(x0)?;
        Ok(Bound {
            total: (terms.sum(1)? + &prior)?,
            prior,
            terms,
            x0_mse: columns(x0_mse)?,
            epsilon_mse: columns(epsilon_mse)?,
        })
    }

    /// `log p(x_T)` in nats, `[B]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn log_prior(&self, x: &Tensor) -> Result<Tensor> {
        log_prior(x, self.prior_std)
    }
}

impl Bound {
    /// The mean over the batch and its standard error, bits a dimension.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn mean(&self) -> Result<(f64, f64)> {
        let all = self.total.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        let variance = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Ok((mean, (variance / n).sqrt()))
    }
}

#[cfg(test)]
#[path = "tests/vlb.rs"]
mod tests;
