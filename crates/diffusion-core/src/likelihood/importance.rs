//! The importance-weighted bound over whole trajectories (Burda et al. 2016, on diffusion chains).
//!
//! ```text
//! log p(x₀) ≥ E log 1/M Σ_m w_m,   w = p(x_T) Π p(x_s|x_t) p(x₀|x₁) / [ q(x_T|x₀) Π q(x_s|x_t,x₀) ]
//! ```
//!
//! With one trajectory it is the variational bound; more never loosen it.

use super::gaussian::{log_density, log_prior};
use super::vlb::Vlb;
use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::forward::marginal;
use crate::noise::Noise;
use crate::sample::reverse::posterior_mean;
use crate::tensor::At;
use candle_core::Tensor;
use std::ops::Range;

/// `log 1/M Σ_m e^{l_m}` over the first dimension: `[M, B] → [B]`.
///
/// # Errors
/// Those of the tensor library.
pub fn log_mean_exp(logs: &Tensor) -> Result<Tensor> {
    let count = logs.dim(0)? as f64;
    Ok((logs.log_sum_exp(0)? - count.ln())?)
}

/// `log w` of one trajectory an item, in nats, `[B]`: `x_T ~ q(x_T|x₀)`, then the posteriors down.
///
/// # Shapes
/// `x0` `[B, …]`, `items` the places of the batch in the run.
///
/// # Errors
/// Whatever the network or the noise refuses.
pub fn log_weight(
    vlb: &Vlb,
    network: &dyn Denoiser,
    x0: &Tensor,
    noise: &mut dyn Noise,
    items: Range<u64>,
) -> Result<Tensor> {
    let sum = |x: Tensor| -> Result<Tensor> { Ok(x.flatten_from(1)?.sum(1)?) };
    let batch = x0.dim(0)?;
    let epsilon = noise.normal(x0)?;
    let first = vlb.chain.noisiest();
    let mut x = marginal(x0, &epsilon, At::All(first))?;
    // log q(x_T|x₀) through the noise itself; the deviation's logarithm is the Jacobian.
    let dims = (x0.elem_count() / batch.max(1)) as f64;
    let log_q = (log_prior(&epsilon, 1.0)? - dims * first.sigma.ln())?;
    let mut log_w = (log_prior(&x, vlb.prior_std)? - log_q)?;
    for hop in vlb.chain.hops().iter().rev() {
        let hops = vec![*hop; batch];
        let mut call = Call {
            noise,
            items: items.clone(),
            tracked: false,
        };
        let said = network.predict(&x, At::All(hop.from), &mut call)?;
        let law = vlb.law(said, &x, &hops)?;
        if hop.into_data() {
            let decoded = vlb.decoder.log_prob(x0, &law.mean, &law.log_variance)?;
            log_w = (log_w + sum(decoded)?)?;
            continue;
        }
        let (mean, z) = (posterior_mean(&x, x0, &hops)?, noise.normal(x0)?);
        let std = hop.posterior().variance.sqrt();
        let next = crate::tensor::lincomb(1.0, &mean, std, &z)?;
        let log_q = (log_prior(&z, 1.0)? - dims * std.ln())?;
        let log_p = sum(log_density(&next, &law.mean, &law.log_variance)?)?;
        log_w = (log_w + (log_p - log_q)?)?;
        x = next.detach();
    }
    Ok(log_w.detach())
}

/// The bound of `log p(x₀)` from `trajectories` of them, in nats, `[B]`.
///
/// # Errors
/// As [`log_weight`].
pub fn log_likelihood(
    vlb: &Vlb,
    network: &dyn Denoiser,
    x0: &Tensor,
    trajectories: usize,
    noise: &mut dyn Noise,
    items: Range<u64>,
) -> Result<Tensor> {
    let logs = (0..trajectories.max(1))
        .map(|_| log_weight(vlb, network, x0, noise, items.clone()))
        .collect::<Result<Vec<_>>>()?;
    log_mean_exp(&Tensor::stack(&logs, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Grid;
    use crate::likelihood::Decoder;
    use crate::noise::CounterNoise;
    use crate::oracle::Mixture;
    use crate::sample::{Chain, Variance};
    use crate::schedule::{BetaSchedule, Point};
    use candle_core::Device;
    use diffusion_ops::rng::stream;

    const N: usize = 400;

    fn mean(t: &Tensor) -> (f64, f64) {
        let v = t.to_vec1::<f64>().unwrap();
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / v.len() as f64;
        (mean, 4.0 * (var / v.len() as f64).sqrt())
    }

    #[test]
    fn more_trajectories_come_closer_and_stay_below() {
        let means = vec![vec![-0.6, 0.4], vec![0.5, -0.2]];
        let oracle = Mixture::new(vec![0.3, 0.7], means, vec![0.2, 0.3]).unwrap();
        let x0 = Tensor::new(oracle.samples(3, stream::TEST, N), &Device::Cpu).unwrap();
        let exact = oracle.log_density(&x0, &Point::data(0.0)).unwrap();
        let table = BetaSchedule::ddpm(100).table(100).unwrap();
        let points = Grid::Trailing.points(&table, 10).unwrap();
        let vlb = Vlb::new(
            Chain::new(&points).unwrap(),
            Variance::FixedLarge,
            Decoder::Density,
        );
        let items = 0..N as u64;
        let gap = |m: usize| {
            let mut noise = CounterNoise::new(8, items.clone());
            let ours = log_likelihood(&vlb, &oracle, &x0, m, &mut noise, items.clone()).unwrap();
            mean(&(&exact - ours).unwrap())
        };
        let (one, many) = (gap(1), gap(16));
        assert!(many.0 < one.0 - 0.05, "{one:?} {many:?}");
        assert!(many.0 > -many.1, "{many:?}");
        // A single trajectory is the variational bound, in expectation.
        let mut noise = CounterNoise::new(9, items.clone());
        let bound = vlb
            .evaluate(&oracle, &x0, &mut noise, items.clone())
            .unwrap();
        let nats = bound
            .total
            .affine(2.0 * std::f64::consts::LN_2, 0.0)
            .unwrap();
        let (vlb_gap, error) = mean(&(nats + &exact).unwrap());
        assert!((vlb_gap - one.0).abs() < error + one.1, "{vlb_gap} {one:?}");
    }

    #[test]
    fn the_mean_of_equal_weights_is_the_weight() {
        let logs = Tensor::new(&[[-700.0, 3.0], [-700.0, 3.0f64]], &Device::Cpu).unwrap();
        let ours = log_mean_exp(&logs).unwrap().to_vec1::<f64>().unwrap();
        assert!((ours[0] + 700.0).abs() < 1e-12 && (ours[1] - 3.0).abs() < 1e-12);
    }
}
