//! The variational bound of a trained model, part by part.
//!
//! ```text
//! −log₂ p(x₀)/D ≤ L_T + Σ_t L_{t−1} + L_0
//! ```
//!
//! with the prior's term `L_T`, a divergence a step and the decoder's term `L_0` (Ho et al. 2020,
//! eq. 5), over all steps of the table or `K` of them (Nichol and Dhariwal 2021, section 4).

use super::moments::Moments;
use super::watch::{Watch, Watched};
use super::{Spread, denoiser, levels};
use crate::data::Dataset;
use crate::model::ImageModel;
use candle_core::{DType, Tensor};
use diffusion_core::guide::Clip;
use diffusion_core::likelihood::{Bound, Decoder, Vlb};
use diffusion_core::noise::CounterNoise;
use diffusion_core::sample::{Analytic, Bounds, Chain, Variance};
use diffusion_core::schedule::{Respaced, Table};
use diffusion_core::search::StepChoice;
use diffusion_core::{Report, Result};
use serde::Serialize;
use std::cell::RefCell;

/// The variance of a reverse step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReverseVariance {
    /// `β̃_t`, the posterior's.
    Small,
    /// `β_t`.
    #[default]
    Large,
    /// Between the two, as the network says (Nichol and Dhariwal 2021).
    Learned,
    /// The optimal one, from the network's predictions on training images (Bao et al. 2022).
    Analytic,
}

/// What is bounded, and on how much.
#[derive(Clone, Debug)]
pub struct BoundOptions {
    /// Kept steps, evenly; all when `None`.
    pub steps: Option<usize>,
    /// The variance of the reverse steps.
    pub variance: ReverseVariance,
    /// Training images for the statistics of the analytic variance.
    pub moment_images: usize,
    /// Images computed at a time; the result does not depend on it.
    pub batch: usize,
    /// Seed of all noise.
    pub seed: u64,
}

/// A bound in bits per dimension, averaged over images.
#[derive(Clone, Debug, Serialize)]
pub struct BoundReport {
    /// Everything together.
    pub total: Spread,
    /// `L_T`.
    pub prior: f64,
    /// Sums of `L_{t−1}`, the cleanest steps first.
    pub steps: Vec<Part>,
    /// `L_0`.
    pub decoder: f64,
    /// Steps of the chain.
    pub count: usize,
    /// The variance of its steps.
    pub variance: ReverseVariance,
}

/// Terms of some steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// The first index of the chain, from 1.
    pub first: usize,
    /// The last one.
    pub last: usize,
    /// Bits per dimension.
    pub bits: f64,
}

/// The chain of the kept steps of a table (rising indices) and the variance rule that it is read
/// with; `moments` holds `E‖ε̂‖²/D` of every step of the table, for [`ReverseVariance::Analytic`].
///
/// # Errors
/// `Config` when the steps do not fit the table, or there is not one moment a step.
pub fn reverse_chain(
    table: &Table,
    kept: &[usize],
    variance: ReverseVariance,
    moments: &[f64],
) -> Result<(Chain, Variance)> {
    let points = Respaced::keeping(table, kept)?.points();
    let chain = Chain::new(&points)?;
    Ok(match variance {
        ReverseVariance::Small => (chain, Variance::FixedSmall),
        ReverseVariance::Large => (chain, Variance::FixedLarge),
        ReverseVariance::Learned => (chain, Variance::LearnedRange),
        ReverseVariance::Analytic => {
            let own = kept.iter().rev().filter_map(|s| moments.get(*s).copied());
            let own: Vec<f64> = own.collect();
            let analytic = Analytic::new(&points, &own, 1.0, Bounds::default())?;
            let chain = chain.with_variances(&analytic.variances())?;
            (chain, Variance::FixedSmall)
        }
    })
}

/// The indices of `count` steps of a table of `total`, evenly from the first to the last; all when
/// `None`.
///
/// # Errors
/// `Config` for fewer than two or more than all of them.
pub fn even_steps(total: usize, count: Option<usize>) -> Result<Vec<usize>> {
    match count {
        None => Ok((0..total).collect()),
        Some(count) => {
            let steps = StepChoice::Linear.steps(total, count)?;
            Ok(steps.into_iter().map(|s| s - 1).collect())
        }
    }
}

/// A bound over a chain: predictions clipped to `[−1, 1]`, levels decoded by the mass of their bins.
pub fn levels_bound(chain: Chain, variance: Variance, levels: usize) -> Vlb {
    Vlb {
        clip: Clip::Static { range: 1.0 },
        ..Vlb::new(chain, variance, Decoder::Discretised { levels })
    }
}

/// The bound of a model on images that it has not seen; conditional models are told the labels.
///
/// `watch` is told of `test.len()` images.
///
/// # Errors
/// `Config` for impossible options, `Unsupported` for data without levels, `Interrupted`, and whatever
/// the network refuses.
pub fn bound<'w>(
    model: &ImageModel,
    train: &Dataset,
    test: &Dataset,
    options: &BoundOptions,
    watch: &'w mut Watch<'w>,
) -> Result<BoundReport> {
    let table = model.table()?;
    let (_, count) = levels(test)?;
    let learned = options.variance == ReverseVariance::Learned;
    if learned && model.config().out_channels != 2 * model.config().in_channels {
        return Err(
            Report::new("variance", "learned, but the network predicts none")
                .expected("a network with twice the output channels")
                .remedy("use small, large or analytic")
                .config(),
        );
    }
    let kept = even_steps(table.betas().len(), options.steps)?;
    let watch = RefCell::new(watch);
    let moments = match options.variance {
        ReverseVariance::Analytic => moments(model, &table, &kept, train, options, &watch)?,
        _ => Vec::new(),
    };
    let (chain, variance) = reverse_chain(&table, &kept, options.variance, &moments)?;
    let vlb = levels_bound(chain, variance, count);
    let items: Vec<usize> = (0..test.len()).collect();
    let mut bounds = Vec::new();
    for chunk in items.chunks(options.batch.max(1)) {
        let (x, own) = test.batch(chunk, model.device())?;
        let each = chunk.len() as f64 / kept.len() as f64;
        let net = Watched::new(denoiser(model, own.as_ref())?, &watch, chunk[0], each);
        let range = chunk[0] as u64..(chunk[0] + chunk.len()) as u64;
        let mut noise = CounterNoise::new(options.seed, range.clone());
        bounds.push(vlb.evaluate(&net, &x, &mut noise, range)?);
    }
    report(&bounds, options.variance)
}

/// `E‖ε̂‖²/D` by index of the table, 0 for steps that are not kept.
fn moments<'w>(
    model: &ImageModel,
    table: &Table,
    kept: &[usize],
    train: &Dataset,
    options: &BoundOptions,
    watch: &RefCell<&'w mut Watch<'w>>,
) -> Result<Vec<f64>> {
    let points: Vec<_> = kept.iter().map(|s| table.index(*s as i64)).collect();
    let how = Moments {
        images: options.moment_images,
        batch: options.batch,
        seed: options.seed,
    };
    let found = how.measure(train, model.device(), &points, &|own, _| {
        let net = denoiser(model, own)?;
        Ok(Box::new(Watched::new(net, watch, 0, 0.0)))
    })?;
    let mut all = vec![0.0; table.betas().len()];
    for (s, m) in kept.iter().zip(found) {
        all[*s] = m;
    }
    Ok(all)
}

fn report(bounds: &[Bound], variance: ReverseVariance) -> Result<BoundReport> {
    let join = |of: fn(&Bound) -> &Tensor| -> Result<Tensor> {
        let all: Vec<Tensor> = bounds
            .iter()
            .map(|b| of(b).to_dtype(DType::F64))
            .collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&all, 0)?)
    };
    let terms: Vec<f64> = join(|b| &b.terms)?.mean(0)?.to_vec1()?;
    let total: Vec<f64> = join(|b| &b.total)?.to_vec1()?;
    Ok(BoundReport {
        total: Spread::of(&total),
        prior: join(|b| &b.prior)?.mean_all()?.to_scalar()?,
        decoder: terms.first().copied().unwrap_or_default(),
        steps: parts(&terms),
        count: terms.len(),
        variance,
    })
}

/// Sums over decades of the index: 1 to 9, 10 to 99, and so on.
fn parts(terms: &[f64]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut first = 1;
    while first < terms.len() {
        let last = (first * 10 - 1).min(terms.len() - 1);
        let bits = terms[first..=last].iter().sum();
        parts.push(Part { first, last, bits });
        first = last + 1;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_hold_every_term_once() {
        for n in [1, 2, 10, 11, 250] {
            let terms: Vec<f64> = (0..n).map(f64::from).collect();
            let parts = parts(&terms);
            let sum: f64 = parts.iter().map(|p| p.bits).sum();
            assert_eq!(sum, terms[1..].iter().sum::<f64>());
            let steps: usize = parts.iter().map(|p| p.last + 1 - p.first).sum();
            assert_eq!(steps, terms.len() - 1);
        }
    }
}
