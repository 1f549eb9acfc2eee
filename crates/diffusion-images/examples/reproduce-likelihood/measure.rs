//! Bits per dimension of a trained system.

use crate::data::{DIMS, LEVELS, on_scale};
use crate::train::{Gamma, START, STEPS, Trained, vp};
use anyhow::Result;
use candle_core::{Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::guide::Clip;
use diffusion_core::likelihood::dequantise::{Uniform, level_bits, log_prob_of_levels};
use diffusion_core::likelihood::{
    Bound, Decoder, Divergence, OdeLikelihood, ScoreFlow, Vlb, bits_per_dim,
};
use diffusion_core::loss::vdm::{Vdm, VdmDraw, even_times};
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::sample::{Analytic, Bounds, Chain, Variance, noise_moments};
use diffusion_core::schedule::{Point, Respaced, Table};
use diffusion_core::search::StepChoice;
use diffusion_images::from_nn;
use diffusion_ops::rng::{Key, stream};
use std::sync::Arc;

/// The reverse variance of a bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reverse<'a> {
    Small,
    Large,
    Learned,
    /// With `E‖ε̂‖²/D` of all steps of the table.
    Analytic(&'a [f64]),
}

/// A measured number with its standard error over the images.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    pub value: f64,
    pub error: f64,
}

fn of_items(bits: &[f64]) -> Bits {
    let n = bits.len() as f64;
    let value = bits.iter().sum::<f64>() / n;
    let variance = bits.iter().map(|b| (b - value).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Bits {
        value,
        error: (variance / n).sqrt(),
    }
}

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

/// `K` of the steps of a table, evenly or, with moments, along the optimal trajectory.
pub fn steps(table: &Table, count: usize, along: Option<&[f64]>) -> Result<Vec<usize>> {
    let rule = match along {
        None => StepChoice::Linear,
        Some(moments) => StepChoice::OptimalTrajectory {
            moments: moments.to_vec(),
            alpha_bar: table.alpha_bar().to_vec(),
        },
    };
    Ok(rule
        .steps(STEPS, count)?
        .into_iter()
        .map(|s| s - 1)
        .collect())
}

/// The variational bound over the kept steps, predictions clipped to the range of the data.
pub fn bound(
    net: &dyn Denoiser,
    table: &Table,
    kept: &[usize],
    reverse: Reverse<'_>,
    k: &Tensor,
    seed: u64,
) -> Result<Bound> {
    let points = Respaced::keeping(table, kept)?.points();
    let mut chain = Chain::new(&points)?;
    let variance = match reverse {
        Reverse::Small => Variance::FixedSmall,
        Reverse::Large => Variance::FixedLarge,
        Reverse::Learned => Variance::LearnedRange,
        Reverse::Analytic(moments) => {
            let moments: Vec<f64> = kept.iter().rev().map(|s| moments[*s]).collect();
            let analytic = Analytic::new(&points, &moments, 1.0, Bounds::default())?;
            chain = chain.with_variances(&analytic.variances())?;
            Variance::FixedSmall
        }
    };
    along(net, chain, variance, k, seed)
}

/// The bound of the same network over `count` steps of the continuous process.
pub fn bound_of_process(net: &dyn Denoiser, count: usize, k: &Tensor, seed: u64) -> Result<Bound> {
    let points = diffusion_core::grid::Grid::UniformLogSnr.points(&vp(), count)?;
    along(net, Chain::new(&points)?, Variance::FixedLarge, k, seed)
}

fn along(
    net: &dyn Denoiser,
    chain: Chain,
    variance: Variance,
    k: &Tensor,
    seed: u64,
) -> Result<Bound> {
    let vlb = Vlb {
        clip: Clip::Static { range: 1.0 },
        ..Vlb::new(chain, variance, Decoder::Discretised { levels: LEVELS })
    };
    let items = 0..k.dim(0)? as u64;
    let mut noise = CounterNoise::new(seed, items.clone());
    Ok(vlb.evaluate(net, &on_scale(k)?, &mut noise, items)?)
}

/// The mean of a bound.
pub fn total(bound: &Bound) -> Result<Bits> {
    let (value, error) = bound.mean()?;
    Ok(Bits { value, error })
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

/// By the probability flow from [`START`], uniform dequantisation, one draw an image; exact where
/// `exact`, else with a probe. The mean, and the evaluations it took.
pub fn flow(net: &dyn Denoiser, k: &Tensor, exact: bool, seed: u64) -> Result<(Bits, usize)> {
    let method = OdeLikelihood {
        divergence: match exact {
            true => Divergence::Exact,
            false => Divergence::Rademacher,
        },
        solver: diffusion_core::ode::DormandPrince {
            rtol: 1e-4,
            atol: 1e-4,
            ..Default::default()
        },
        ..OdeLikelihood::new(Arc::new(vp()), START)
    };
    let items = 0..k.dim(0)? as u64;
    let evaluations = std::cell::Cell::new(0);
    let mut probes = CounterNoise::on_stream(seed, stream::EVALUATION, items.clone());
    let probes = std::cell::RefCell::new(&mut probes);
    // The chain's levels stand at 2 k/(K − 1) − 1: a bin is wider there by K/(K − 1).
    let stretch = LEVELS as f64 / (LEVELS - 1) as f64;
    let density = |x: &Tensor| -> diffusion_core::Result<Tensor> {
        let mut probes = probes.borrow_mut();
        let mut call = Call {
            noise: &mut **probes,
            items: items.clone(),
            tracked: false,
        };
        let solution = method.log_density(net, &x.affine(stretch, 0.0)?, &mut call)?;
        evaluations.set(evaluations.get() + solution.evaluations);
        let jacobian = DIMS as f64 * stretch.ln();
        let logs: Vec<f64> = solution.log_density.iter().map(|l| l + jacobian).collect();
        Ok(Tensor::new(logs, &Device::Cpu)?.to_dtype(x.dtype())?)
    };
    let mut noise = CounterNoise::new(seed, items.clone());
    let logs = log_prob_of_levels(k, LEVELS, &Uniform, &density, (1, false), &mut noise)?;
    let logs: Vec<f32> = logs.to_vec1()?;
    let bits: Vec<f64> = logs
        .into_iter()
        .map(|l| bits_per_dim(-f64::from(l), DIMS))
        .collect();
    Ok((of_items(&bits), evaluations.get()))
}

/// The bound of the score-based SDE on dequantised levels, truncation at [`START`] included.
pub fn score_flow(net: &dyn Denoiser, k: &Tensor, rounds: u64, seed: u64) -> Result<Bits> {
    let method = ScoreFlow::new(Arc::new(vp()));
    let n = k.dim(0)?;
    let items = 0..n as u64;
    let mut noise = CounterNoise::new(seed, items.clone());
    let bin = 2.0 / (LEVELS - 1) as f64;
    let mut sum = vec![0.0; n];
    for round in 0..rounds {
        let (u, _) =
            diffusion_core::likelihood::dequantise::Dequantiser::draw(&Uniform, k, &mut noise)?;
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
    Ok(of_items(&sum))
}
