//! The bound of VDM with a learned schedule (Kingma et al. 2021, eqs. 11 to 17).
//!
//! ```text
//! −log p(x) ≤ −E log p(x|z₀) + KL(q(z₁|x) ‖ N(0, I)) + L_T
//! L_T = T/2 E (e^{γ_t − γ_s} − 1) ‖ε − ε̂(z_t; γ_t)‖²,   s = t − 1/T
//! L_∞ = 1/2 E γ'(t) ‖ε − ε̂(z_t; γ_t)‖²
//! ```

use crate::error::{Report, Result};
use crate::likelihood::decoder::{bin_middle, categorical_log_prob};
use crate::schedule::learned::LearnedSchedule;
use candle_core::{DType, Tensor};
use diffusion_ops::rng::Key;

/// VDM's noise prediction: `z_t` `[B, …]` and `γ_t` `[B]` to `ε̂` `[B, …]`.
pub type NoisePrediction<'a> = dyn Fn(&Tensor, &Tensor) -> Result<Tensor> + 'a;

/// The bound of data with K grey levels.
pub struct Vdm<'a> {
    /// The schedule.
    pub schedule: &'a dyn LearnedSchedule,
    /// The number of levels K.
    pub levels: usize,
    /// The number of steps T, or `None` for continuous time.
    pub steps: Option<usize>,
}

/// The noise of one evaluation.
pub struct VdmDraw {
    /// Noise of the reconstruction, `[B, …]`.
    pub epsilon0: Tensor,
    /// Noise of the diffusion term, `[B, …]`.
    pub epsilon: Tensor,
    /// Times in `[0, 1)`, `[B]`.
    pub times: Vec<f64>,
}

/// The terms of the bound in nats an item, `[B]` each.
#[derive(Clone, Debug)]
pub struct VdmLosses {
    /// `−log p(x|z₀)`.
    pub reconstruction: Tensor,
    /// `KL(q(z₁|x) ‖ N(0, I))`.
    pub prior: Tensor,
    /// The diffusion term.
    pub diffusion: Tensor,
    dims: usize,
}

impl VdmLosses {
    /// The mean bound in bits a dimension, a scalar.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn bits(&self) -> Result<Tensor> {
        let total = ((&self.reconstruction + &self.prior)? + &self.diffusion)?;
        let scale = self.dims as f64 * std::f64::consts::LN_2;
        Ok(total.mean_all()?.affine(1.0 / scale, 0.0)?)
    }

    /// `E[L²]` of the diffusion term in bits a dimension, a scalar: its gradient is that of the
    /// estimator's variance, for parameters that do not move the mean (appendix I).
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn second_moment(&self) -> Result<Tensor> {
        let scale = self.dims as f64 * std::f64::consts::LN_2;
        Ok(self.diffusion.affine(1.0 / scale, 0.0)?.sqr()?.mean_all()?)
    }
}

/// Times that fill `[0, 1)` evenly, from one uniform number: `t_i = (u + i/B) mod 1`.
pub fn even_times(u: f64, batch: usize) -> Vec<f64> {
    (0..batch)
        .map(|i| (u + i as f64 / batch as f64).fract())
        .collect()
}

/// Independent times, each a function of its key alone.
pub fn independent_times(keys: impl IntoIterator<Item = Key>) -> Vec<f64> {
    keys.into_iter().map(|key| key.uniform(1)[0]).collect()
}

/// `1/(1 + e^{−x})`.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

/// `e^x − 1` without cancellation: `tanh(x/2) (e^x + 1)`.
fn expm1(x: &Tensor) -> Result<Tensor> {
    Ok((x.affine(0.5, 0.0)?.tanh()? * (x.exp()? + 1.0)?)?)
}

/// `[B]` as `[B, 1, …]`.
fn broad(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.rank()];
    if let Some(first) = shape.first_mut() {
        *first = x.elem_count();
    }
    Ok(x.reshape(shape)?)
}

impl Vdm<'_> {
    /// Grey levels on the scale of the latents, `(2k + 1)/K − 1`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn encode(&self, k: &Tensor, dtype: DType) -> Result<Tensor> {
        let (low, high) = (bin_middle(0.0, self.levels), bin_middle(1.0, self.levels));
        Ok(k.to_dtype(dtype)?.round()?.affine(high - low, low)?)
    }

    /// `√(1 − σ²) f + σ ε` and `σ²` `[B]` or `[1]`, at `γ`.
    fn latent(&self, f: &Tensor, epsilon: &Tensor, gamma: &Tensor) -> Result<Tensor> {
        let alpha = broad(&sigmoid(&gamma.neg()?)?.sqrt()?, f)?;
        let sigma = broad(&sigmoid(gamma)?.sqrt()?, f)?;
        Ok((f.broadcast_mul(&alpha)? + epsilon.broadcast_mul(&sigma)?)?)
    }

    /// The terms for one draw, differentiable in the network and in the schedule.
    ///
    /// # Shapes
    /// `k` `[B, …]` grey levels; the draw's noise likewise.
    ///
    /// # Errors
    /// `Input` when times don't fit the batch or a level is outside `0..K`; whatever the network
    /// refuses.
    pub fn losses(
        &self,
        network: &NoisePrediction<'_>,
        k: &Tensor,
        draw: &VdmDraw,
    ) -> Result<VdmLosses> {
        let (batch, device) = (k.dim(0)?, draw.epsilon.device());
        let dtype = draw.epsilon.dtype();
        if draw.times.len() != batch {
            return Err(
                Report::new("times", format!("{} of them", draw.times.len()))
                    .expected(format!("one for each of {batch} items"))
                    .input(),
            );
        }
        let f = self.encode(k, dtype)?;
        let sum = |x: Tensor| -> Result<Tensor> { Ok(x.flatten_from(1)?.sum(1)?) };
        let at = |times: Vec<f64>| -> Result<(Tensor, Tensor)> {
            self.schedule
                .gamma(&Tensor::new(times, device)?.to_dtype(dtype)?)
        };

        let (ends, _) = at(vec![0.0, 1.0])?;
        let (gamma0, gamma1) = (ends.narrow(0, 0, 1)?, ends.narrow(0, 1, 1)?);
        // z₀/α₀ = f + e^{γ₀/2} ε.
        let noise0 = draw
            .epsilon0
            .broadcast_mul(&broad(&(&gamma0 * 0.5)?.exp()?, &f)?)?;
        let decoded = categorical_log_prob(k, &(&f + noise0)?, &gamma0, self.levels)?;
        let reconstruction = sum(decoded)?.neg()?;

        let (signal, noise) = (sigmoid(&gamma1.neg()?)?, sigmoid(&gamma1)?);
        let constant = ((&noise - noise.log()?)? - 1.0)?;
        let squares = f.sqr()?.broadcast_mul(&broad(&signal, &f)?)?;
        let prior = sum(squares.broadcast_add(&broad(&constant, &f)?)?)?.affine(0.5, 0.0)?;

        let steps = self.steps.map(|steps| steps as f64);
        let times: Vec<f64> = match steps {
            None => draw.times.clone(),
            Some(n) => draw
                .times
                .iter()
                .map(|t| (t * n).ceil().max(1.0) / n)
                .collect(),
        };
        let (gamma, slope) = at(times.clone())?;
        let said = network(&self.latent(&f, &draw.epsilon, &gamma)?, &gamma)?;
        let error = sum((&draw.epsilon - said)?.sqr()?)?;
        let weight = match steps {
            None => slope,
            Some(n) => {
                let (before, _) = at(times.iter().map(|t| t - 1.0 / n).collect())?;
                (expm1(&(gamma - before)?)? * n)?
            }
        };
        let diffusion = (weight * error)?.affine(0.5, 0.0)?;
        Ok(VdmLosses {
            reconstruction,
            prior,
            diffusion,
            dims: k.elem_count() / batch.max(1),
        })
    }
}

#[cfg(test)]
#[path = "tests/vdm.rs"]
mod tests;
