//! The bound's cost of every step between any two points (Watson et al. 2021, section 3).
//!
//! ```text
//! L(t, s) = ½ (β̃/v − 1 − ln β̃/v) + c_{x0}² E‖x₀ − x̂₀(x_t)‖²/(2 D v)
//! L(t, 0) = −E log p(x₀ | x_t)/D
//! ```
//!
//! in nats a dimension. The error of the network at `t` is all that a row needs: one pass a point
//! fills the whole table.

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::forward::marginal;
use crate::likelihood::Decoder;
use crate::noise::Noise;
use crate::sample::{Hop, Variance};
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// The table for [`super::Paths`]: node 0 is the data, node `i` the point `i − 1`.
///
/// With [`Variance::FixedLarge`] a step has `v = β`, otherwise `v = β̃`. The decoder's variance is
/// the mean squared error of the network at its point, the best that a constant can be.
///
/// # Shapes
/// `x0` `[B, …]`, `points` from the cleanest to the noisiest, `items` the places in the run.
///
/// # Errors
/// Whatever the network or the noise refuses.
pub fn bound_costs(
    network: &dyn Denoiser,
    x0: &Tensor,
    points: &[Point],
    variance: Variance,
    decoder: Decoder,
    noise: &mut dyn Noise,
    items: Range<u64>,
) -> Result<Vec<Vec<f64>>> {
    let scalar = |t: Tensor| -> Result<f64> { Ok(t.to_dtype(DType::F64)?.to_scalar::<f64>()?) };
    let n = points.len() + 1;
    let mut costs = vec![vec![f64::INFINITY; n]; n];
    for (i, from) in points.iter().enumerate() {
        let at = At::All(*from);
        let x_t = marginal(x0, &noise.normal(x0)?, at)?;
        let mut call = Call {
            noise,
            items: items.clone(),
            tracked: false,
        };
        let guess = network.predict(&x_t, at, &mut call)?.x0(&x_t, at)?;
        let mse = scalar((&guess - x0)?.sqr()?.mean_all()?)?;
        let log_var = x0.zeros_like()?.affine(0.0, decoder_variance(mse).ln())?;
        let decoded = decoder.log_prob(x0, &guess, &log_var)?.mean_all()?;
        costs[0][i + 1] = -scalar(decoded)?;
        for (j, to) in points.iter().enumerate().take(i) {
            costs[j + 1][i + 1] = divergence(&Hop::between(from, to), variance, mse);
        }
    }
    Ok(costs)
}

/// The variance of the decoder of a point where the network errs by `mse`.
pub fn decoder_variance(mse: f64) -> f64 {
    mse.max(1e-12)
}

/// `L(t, s)` in nats a dimension, for the mean squared error of `x̂₀` at `t`.
pub fn divergence(hop: &Hop, variance: Variance, mse: f64) -> f64 {
    let log_v = match variance {
        Variance::FixedLarge => hop.log_beta,
        _ => hop.log_small,
    };
    let ratio = hop.log_small - log_v;
    let mean = hop.posterior().x0.powi(2) * mse * (-log_v).exp();
    0.5 * (ratio.exp_m1() - ratio + mean)
}

#[cfg(test)]
mod tests {
    use super::super::Paths;
    use super::*;
    use crate::likelihood::Vlb;
    use crate::noise::CounterNoise;
    use crate::oracle::Mixture;
    use crate::sample::Chain;
    use crate::schedule::BetaSchedule;
    use candle_core::Device;
    use diffusion_ops::rng::stream;

    /// The cheapest path's cost is the bound of its chain measured anew, falls with the number of
    /// steps, and an even path of as many steps costs more.
    #[test]
    fn the_path_costs_what_its_bound_measures() {
        const N: usize = 1000;
        let oracle = Mixture::new(vec![0.4, 0.6], vec![vec![-0.6], vec![0.5]], vec![0.1, 0.2]);
        let oracle = oracle.unwrap();
        let x0 = Tensor::new(oracle.samples(3, stream::TEST, N), &Device::Cpu).unwrap();
        let table = BetaSchedule::ddpm(40).table(40).unwrap();
        let points: Vec<Point> = (0..40).map(|i| table.index(i)).collect();
        let items = 0..N as u64;
        let mut noise = CounterNoise::new(2, items.clone());
        let variance = Variance::FixedLarge;
        let costs = bound_costs(
            &oracle,
            &x0,
            &points,
            variance,
            Decoder::Density,
            &mut noise,
            items.clone(),
        )
        .unwrap();
        let paths = Paths::new(&costs, 40).unwrap();
        let (path, cost) = (paths.path(6).unwrap(), paths.cost(6));
        let node = |i: usize| {
            if i == 0 {
                Point::data(-1.0)
            } else {
                points[i - 1]
            }
        };
        let chain = Chain::new(&path.iter().rev().map(|i| node(*i)).collect::<Vec<_>>()).unwrap();
        let mut variances: Vec<f64> = chain.hops().iter().map(|h| h.log_beta.exp()).collect();
        // The decoder's variance again, from an independent pass.
        let at = At::All(chain.hops()[0].from);
        let x_t = marginal(&x0, &noise.normal(&x0).unwrap(), at).unwrap();
        let guess = oracle.x0(&x_t, &chain.hops()[0].from).unwrap();
        let mse = (guess - &x0).unwrap().sqr().unwrap().mean_all().unwrap();
        variances[0] = mse.to_scalar::<f64>().unwrap();
        let chain = chain.with_variances(&variances).unwrap();
        let vlb = Vlb::new(chain, variance, Decoder::Density);
        let mut bound = vlb.evaluate(&oracle, &x0, &mut noise, items).unwrap();
        bound.total = (bound.total - &bound.prior).unwrap();
        let (mean, error) = bound.mean().unwrap();
        let nats = |b: f64| b * std::f64::consts::LN_2;
        // Both are means over N draws.
        assert!(
            (nats(mean) - cost).abs() < 4.0 * 2f64.sqrt() * nats(error),
            "{mean} {cost}"
        );
        assert!((2..=6).all(|k| paths.cost(k) <= paths.cost(k - 1)));
        let even: f64 = [0usize, 6, 13, 20, 26, 33, 40]
            .windows(2)
            .map(|w| costs[w[0]][w[1]])
            .sum();
        assert!(cost < even, "{cost} {even}");
    }

    #[test]
    fn with_the_small_variance_the_cost_is_the_fall_of_the_snr() {
        let (t, s) = (
            Point::from_log_snr(0.0, -1.0),
            Point::from_log_snr(0.0, 0.5),
        );
        let ours = divergence(&Hop::between(&t, &s), Variance::FixedSmall, 0.3);
        assert!((ours - 0.5 * (s.snr() - t.snr()) * 0.3).abs() < 1e-12);
    }
}
