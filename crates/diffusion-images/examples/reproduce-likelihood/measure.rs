//! Bits per dimension of a trained system.

use crate::data::{DIMS, LEVELS, on_scale};
use crate::train::{Gamma, START, STEPS, Trained, vp};
use anyhow::Result;
use candle_core::Tensor;
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::forward::marginal;
use diffusion_core::grid::Grid;
use diffusion_core::likelihood::dequantise::{Dequantiser, Uniform, level_bits};
use diffusion_core::likelihood::{Bound, OdeLikelihood, ScoreFlow, bits_per_dim};
use diffusion_core::loss::vdm::{Vdm, VdmDraw, even_times};
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::ode::DormandPrince;
use diffusion_core::sample::{Chain, Variance, noise_moments};
use diffusion_core::schedule::{Point, Table};
use diffusion_core::search::StepChoice;
use diffusion_core::tensor::At;
use diffusion_images::from_nn;
use diffusion_images::likelihood::bound::{even_steps, levels_bound, reverse_chain};
use diffusion_images::likelihood::flow::flow_bits;
use diffusion_images::likelihood::{ReverseVariance, Spread};
use diffusion_ops::rng::{Key, stream};
use std::sync::Arc;

/// `E‖ε̂‖²/D` of every step of a table, index 0 first, over training images.
pub fn moments(net: &dyn Denoiser, table: &Table, k: &Tensor, seed: u64) -> Result<Vec<f64>> {
    let points: Vec<Point> = (0..STEPS as i64).map(|i| table.index(i)).collect();
    let items = 0..k.dim(0)? as u64;
    let mut noise = CounterNoise::on_stream(seed, stream::EVALUATION, items.clone());
    Ok(noise_moments(
        net,
        &on_scale(k)?,
        &points,
        &mut noise,
        items,
    )?)
}

/// `1 − E‖ε − ε̂‖²/D` of every step of a table: for the exact network the same as [`moments`], for any
/// other what makes the variance optimal around its own mean (Bao et al. 2022, "Estimating the optimal
/// covariance with imperfect mean"). It is never above 1, and far less noisy.
pub fn residual_moments(
    net: &dyn Denoiser,
    table: &Table,
    k: &Tensor,
    seed: u64,
) -> Result<Vec<f64>> {
    let items = 0..k.dim(0)? as u64;
    let mut noise = CounterNoise::on_stream(seed, stream::EVALUATION, items.clone());
    let x0 = on_scale(k)?;
    let moment = |i: i64| -> Result<f64> {
        let at = At::All(table.index(i));
        let epsilon = noise.normal(&x0)?;
        let x_t = marginal(&x0, &epsilon, at)?;
        let mut call = Call {
            noise: &mut noise,
            items: items.clone(),
            tracked: false,
        };
        let said = net.predict(&x_t, at, &mut call)?.epsilon(&x_t, at)?;
        let error = (epsilon - said)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        Ok(1.0 - f64::from(error))
    };
    (0..STEPS as i64).map(moment).collect()
}

/// `K` of the steps of a table, evenly or, with moments, along the optimal trajectory.
pub fn steps(table: &Table, count: usize, along: Option<&[f64]>) -> Result<Vec<usize>> {
    let Some(moments) = along else {
        return Ok(even_steps(STEPS, Some(count))?);
    };
    let rule = StepChoice::OptimalTrajectory {
        moments: moments.to_vec(),
        alpha_bar: table.alpha_bar().to_vec(),
    };
    let steps = rule.steps(STEPS, count)?;
    Ok(steps.into_iter().map(|s| s - 1).collect())
}

/// The variational bound over the kept steps, predictions clipped to the range of the data.
pub fn bound(
    net: &dyn Denoiser,
    table: &Table,
    kept: &[usize],
    (variance, moments): (ReverseVariance, &[f64]),
    k: &Tensor,
    seed: u64,
) -> Result<Bound> {
    let (chain, variance) = reverse_chain(table, kept, variance, moments)?;
    along(net, chain, variance, k, seed)
}

/// The bound of the same network over `count` steps of the continuous process.
pub fn bound_of_process(net: &dyn Denoiser, count: usize, k: &Tensor, seed: u64) -> Result<Bound> {
    let points = Grid::UniformLogSnr.points(&vp(), count)?;
    along(net, Chain::new(&points)?, Variance::FixedLarge, k, seed)
}

fn along(
    net: &dyn Denoiser,
    chain: Chain,
    variance: Variance,
    k: &Tensor,
    seed: u64,
) -> Result<Bound> {
    let vlb = levels_bound(chain, variance, LEVELS);
    let items = 0..k.dim(0)? as u64;
    let mut noise = CounterNoise::new(seed, items.clone());
    Ok(vlb.evaluate(net, &on_scale(k)?, &mut noise, items)?)
}

/// The mean of a bound.
pub fn total(bound: &Bound) -> Result<Spread> {
    let (mean, error) = bound.mean()?;
    Ok(Spread { mean, error })
}

/// VDM's bound and its parts, bits per dimension: total, reconstruction, prior, diffusion.
pub fn vdm(
    trained: &Trained,
    gamma: &Gamma,
    steps: Option<usize>,
    rounds: u64,
    k: &Tensor,
    seed: u64,
) -> Result<[f64; 4]> {
    let vdm = Vdm {
        schedule: gamma.schedule(),
        levels: LEVELS,
        steps,
    };
    let network = |z: &Tensor, gamma: &Tensor| trained.net.forward(z, gamma).map_err(from_nn);
    let items = 0..k.dim(0)? as u64;
    let mut noise = CounterNoise::on_stream(seed, stream::EVALUATION, items.clone());
    let mut sum = [0.0; 4];
    for round in 0..rounds {
        let key = Key::new(seed, stream::EVALUATION)
            .item(u64::MAX)
            .step(round);
        let draw = VdmDraw {
            epsilon0: noise.normal(k)?,
            epsilon: noise.normal(k)?,
            times: even_times(key.uniform(1)[0], k.dim(0)?),
        };
        let losses = vdm.losses(&network, k, &draw)?;
        let parts = [&losses.reconstruction, &losses.prior, &losses.diffusion];
        for (i, part) in parts.into_iter().enumerate() {
            let nats = f64::from(part.detach().mean_all()?.to_scalar::<f32>()?);
            let bits = bits_per_dim(nats, DIMS) / rounds as f64;
            sum[i + 1] += bits;
            sum[0] += bits;
        }
    }
    Ok(sum)
}

/// By the probability flow from [`START`], uniform dequantisation, one draw and one probe an image.
pub fn flow(net: &dyn Denoiser, k: &Tensor, seed: u64) -> Result<Spread> {
    let method = OdeLikelihood {
        solver: DormandPrince {
            rtol: 1e-4,
            atol: 1e-4,
            ..DormandPrince::default()
        },
        ..OdeLikelihood::new(Arc::new(vp()), START)
    };
    let items = 0..k.dim(0)? as u64;
    let (bits, _) = flow_bits(&method, net, (k, LEVELS), 1, seed, items)?;
    Ok(Spread::of(&bits))
}

/// The bound of the score-based SDE on dequantised levels, truncation at [`START`] included.
pub fn score_flow(net: &dyn Denoiser, k: &Tensor, rounds: u64, seed: u64) -> Result<Spread> {
    let method = ScoreFlow::new(Arc::new(vp()));
    let n = k.dim(0)?;
    let items = 0..n as u64;
    let mut noise = CounterNoise::new(seed, items.clone());
    let bin = 2.0 / (LEVELS - 1) as f64;
    let mut sum = vec![0.0; n];
    for round in 0..rounds {
        let (u, _) = Uniform.draw(k, &mut noise)?;
        let x = (on_scale(k)? + u.affine(bin, -0.5 * bin)?)?;
        let keys = items
            .clone()
            .map(|i| Key::new(seed, stream::EVALUATION).item(i).step(round));
        let mut call = Call {
            noise: &mut noise,
            items: items.clone(),
            tracked: false,
        };
        let nats: Vec<f64> = method.estimate(net, &x, keys, &mut call)?.to_vec1()?;
        for (s, nats) in sum.iter_mut().zip(nats) {
            *s += level_bits(bits_per_dim(nats, DIMS), bin) / rounds as f64;
        }
    }
    Ok(Spread::of(&sum))
}
