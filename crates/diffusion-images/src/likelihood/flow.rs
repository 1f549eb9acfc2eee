//! Bits per dimension by the probability flow, with dequantisation (Song et al. 2021; Theis et al.
//! 2016).
//!
//! ```text
//! bits = E_u[ −log₂ p(x(k + u)) ]/D − log₂ width,   x(k + u) = (2 (k + u) − K)/(K − 1),   u ~ U(0, 1)^D
//! ```
//!
//! The scale is the models', on which the middle of level `k` is `2k/(K − 1) − 1` and a bin is
//! `2/(K − 1)` wide. The continuous process is that of the table, `ln ᾱ` being linear within a step. What
//! is measured is the law at the first step, whose noise is not taken off: a small offset.

use super::watch::{Watch, Watched};
use super::{Spread, denoiser, levels};
use crate::data::Dataset;
use crate::model::ImageModel;
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::likelihood::dequantise::{Uniform, log_prob_of_levels};
use diffusion_core::likelihood::{Divergence, OdeLikelihood, bits_per_dim};
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::ode::DormandPrince;
use diffusion_core::schedule::Schedule;
use diffusion_core::{Report, Result};
use diffusion_ops::rng::stream;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

/// Dimensions up to which the divergence may be computed exactly: a product a dimension.
pub const MOST_EXACT: usize = 100;

/// How the flow is solved, and on how much.
#[derive(Clone, Debug)]
pub struct FlowOptions {
    /// Every derivative instead of one random direction.
    pub exact: bool,
    /// Draws of the noise within a bin; the logarithm of the mean weight of more than one is a tighter
    /// bound.
    pub draws: usize,
    /// Relative and absolute tolerance of the solver.
    pub tolerance: f64,
    /// Images computed at a time; the result does not depend on it.
    pub batch: usize,
    /// Seed of all noise.
    pub seed: u64,
}

/// Bits per dimension, averaged over images.
#[derive(Clone, Debug, Serialize)]
pub struct FlowReport {
    /// The bound of the levels' probability.
    pub total: Spread,
    /// The noise level `σ` at which the process starts.
    pub start_sigma: f64,
    /// Draws of the noise within a bin.
    pub draws: usize,
    /// Whether the divergence is exact.
    pub exact: bool,
    /// Network evaluations an image.
    pub evaluations: f64,
}

/// Bits per dimension of every item, and the evaluations it took (on the whole batch).
///
/// # Shapes
/// `k` `[B, …]`, whole numbers below `levels`.
///
/// # Errors
/// Those of the solver, and whatever the network refuses.
pub fn flow_bits(
    method: &OdeLikelihood,
    net: &dyn Denoiser,
    (k, levels): (&Tensor, usize),
    draws: usize,
    seed: u64,
    items: Range<u64>,
) -> Result<(Vec<f64>, usize)> {
    let dims = k.elem_count() / k.dim(0)?.max(1);
    let stretch = levels as f64 / (levels - 1) as f64;
    let evaluations = Cell::new(0);
    let probes = CounterNoise::on_stream(seed, stream::EVALUATION, items.clone());
    let probes: RefCell<Box<dyn Noise>> = RefCell::new(Box::new(probes));
    let density = |x: &Tensor| -> Result<Tensor> {
        let mut probes = probes.borrow_mut();
        let mut call = Call {
            noise: &mut **probes,
            items: items.clone(),
            tracked: false,
        };
        let solution = method.log_density(net, &x.affine(stretch, 0.0)?, &mut call)?;
        evaluations.set(evaluations.get() + solution.evaluations);
        let jacobian = dims as f64 * stretch.ln();
        let logs: Vec<f64> = solution.log_density.iter().map(|l| l + jacobian).collect();
        Ok(Tensor::new(logs, &Device::Cpu)?.to_device(x.device())?)
    };
    let mut noise = CounterNoise::new(seed, items.clone());
    let k = k.to_dtype(DType::F64)?;
    let how = (draws, draws > 1);
    let logs = log_prob_of_levels(&k, levels, &Uniform, &density, how, &mut noise)?;
    let logs: Vec<f64> = logs.to_vec1()?;
    let bits = logs.into_iter().map(|l| bits_per_dim(-l, dims)).collect();
    Ok((bits, evaluations.get()))
}

/// The bits of a model on images that it has not seen; conditional models are told the labels.
///
/// `watch` is told of `test.len()` images.
///
/// # Errors
/// `Config` for impossible options, `Unsupported` for data without levels and for a process that ends
/// without signal, `Interrupted`, and whatever the solver or the network refuses.
pub fn flow<'w>(
    model: &ImageModel,
    test: &Dataset,
    options: &FlowOptions,
    watch: &'w mut Watch<'w>,
) -> Result<FlowReport> {
    let (k, count) = levels(test)?;
    let dims = test.channels() * test.height() * test.width();
    if options.exact && dims > MOST_EXACT {
        return Err(
            Report::new("exact divergence", format!("{dims} values an image"))
                .expected(format!("at most {MOST_EXACT}"))
                .remedy("leave it to a random direction, which is right on average")
                .config(),
        );
    }
    if !(1e-12..=0.1).contains(&options.tolerance) || options.draws == 0 {
        let found = format!("{}, {} draws", options.tolerance, options.draws);
        return Err(Report::new("tolerance", found)
            .expected("1e-12 to 0.1, and at least one draw")
            .config());
    }
    let table = Arc::new(model.table()?);
    let (low, high) = table.span();
    if table.at(high).alpha == 0.0 {
        return Err(Report::new("scheduler", "no signal at the last step")
            .expected("a process whose log-SNR is finite")
            .remedy("use the variational bound")
            .unsupported());
    }
    let method = OdeLikelihood {
        divergence: match options.exact {
            true => Divergence::Exact,
            false => Divergence::Rademacher,
        },
        solver: DormandPrince {
            rtol: options.tolerance,
            atol: options.tolerance,
            ..DormandPrince::default()
        },
        ..OdeLikelihood::new(table.clone(), low)
    };
    let watch = RefCell::new(watch);
    let items: Vec<usize> = (0..test.len()).collect();
    let (mut all, mut evaluations) = (Vec::new(), 0.0);
    for chunk in items.chunks(options.batch.max(1)) {
        let (first, n) = (chunk[0], chunk.len());
        let (_, own) = test.batch(chunk, model.device())?;
        let net = Watched::new(denoiser(model, own.as_ref())?, &watch, first, 0.0);
        let own = k.narrow(0, first, n)?.to_device(model.device())?;
        let range = first as u64..(first + n) as u64;
        let (bits, calls) = flow_bits(
            &method,
            &net,
            (&own, count),
            options.draws,
            options.seed,
            range,
        )?;
        all.extend(bits);
        evaluations += (calls * n) as f64;
    }
    Ok(FlowReport {
        total: Spread::of(&all),
        start_sigma: table.at(low).sigma,
        draws: options.draws,
        exact: options.exact,
        evaluations: evaluations / all.len().max(1) as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_core::oracle::Gaussian;
    use diffusion_core::schedule::Vp;

    /// On Gaussian data the expectation over the noise in a bin is known, and so is the law at the
    /// start of the process.
    #[test]
    fn bits_of_levels_are_those_of_the_exact_law() {
        const N: usize = 300;
        let (levels, start) = (5, 1e-3);
        let (mean, std) = ([0.1, -0.2], [0.5, 0.4]);
        let oracle = Gaussian::new(mean.to_vec(), std.to_vec());
        let schedule = Arc::new(Vp::default());
        let method = OdeLikelihood {
            divergence: Divergence::Exact,
            ..OdeLikelihood::new(schedule.clone(), start)
        };
        let k = [3.0, 1.0];
        let all = Tensor::new(&[k], &Device::Cpu).unwrap();
        let all = all.broadcast_as((N, 2)).unwrap().contiguous().unwrap();
        let items = 0..N as u64;
        let (bits, calls) = flow_bits(&method, &oracle, (&all, levels), 1, 5, items).unwrap();
        assert!(calls > 0);
        let width = 2.0 / (levels - 1) as f64;
        let p = schedule.at(start);
        let exact: f64 = (0..2)
            .map(|d| {
                let middle = -1.0 + width * k[d];
                let variance = (p.alpha * std[d]).powi(2) + p.sigma.powi(2);
                let square = (middle - p.alpha * mean[d]).powi(2) + width * width / 12.0;
                let nats = 0.5 * (square / variance + (std::f64::consts::TAU * variance).ln());
                bits_per_dim(nats - width.ln(), 2)
            })
            .sum();
        let ours = Spread::of(&bits);
        // The prior stands for the exact law at the end: 1e-4 nats.
        assert!(
            (ours.mean - exact).abs() < 4.0 * ours.error + 1e-3,
            "{ours:?} {exact}"
        );
        assert!(ours.error < 0.02, "{ours:?}");
    }
}
