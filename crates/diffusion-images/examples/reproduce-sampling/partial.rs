//! Runs that start on the way: truncated diffusion from a fitted mixture, and super-resolution from a
//! noised guess (come closer, diffuse faster).

use crate::Options;
use crate::digits::{Study, Trained};
use crate::jobs::{self, Job};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::forward::marginal;
use diffusion_core::grid::Grid;
use diffusion_core::guide::{Clip, Thresholded};
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_core::sample::fit::MixtureFit;
use diffusion_core::sample::partial::{DataConsistency, Operator, Start, Truncated, noised_start};
use diffusion_core::sample::{Ddim, Planned, sample};
use diffusion_core::tensor::At;
use diffusion_images::figure::{Axes, Series, line_plot};
use diffusion_images::model::ImageModel;
use diffusion_ops::rng::{Key, stream};
use std::time::Instant;

/// Network calls of the runs below.
const CALLS: usize = 5;
/// Components of the mixture that a truncated chain starts from.
const COMPONENTS: usize = 20;
/// Where chains are cut, as indices of the table of 1000.
const CUTS: [i64; 4] = [200, 300, 500, 700];
/// Where super-resolution starts.
const STARTS: [i64; 7] = [50, 100, 200, 350, 500, 750, 999];

pub fn rows(
    options: &Options,
    results: &mut Results,
    study: &Study,
    model: &Trained,
) -> Result<()> {
    truncated(results, study, model)?;
    come_closer(options, results, study, model)
}

/// The beginning of a batch whose first image has this number, and what constrains it.
struct Ways<'a> {
    start: &'a dyn Fn(&Tensor, &mut CounterNoise, usize) -> Result<Tensor>,
    constraint: &'a dyn Fn(usize, usize) -> Result<Option<DataConsistency>>,
}

/// Samples of the network without a class from index `first` on.
fn from(net: &ImageModel, first: i64, count: usize, seed: u64, ways: &Ways<'_>) -> Result<Tensor> {
    let part = Truncated::new(net.table()?, first as f64)?;
    let points = Grid::Trailing.points(&part, CALLS.min(first as usize + 1))?;
    let [c, h, w] = net.image_shape()?;
    let mut parts = Vec::new();
    for at in (0..count).step_by(100) {
        let n = 100.min(count - at);
        let items = at as u64..(at + n) as u64;
        let mut noise = CounterNoise::new(seed, items.clone());
        let like = Tensor::zeros((n, c, h, w), DType::F32, &Device::Cpu)?;
        let x = (ways.start)(&like, &mut noise, at)?;
        let denoiser = Thresholded {
            inner: net.denoiser(None)?,
            clip: Clip::Static { range: 1.0 },
        };
        let mut planned = Planned::new(Ddim::default(), &points);
        if let Some(constraint) = (ways.constraint)(at, n)? {
            planned.constraint = Some(Box::new(constraint));
        }
        parts.push(sample(&planned, &denoiser, x, &mut noise, items)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// The chain cut at some index, begun with a mixture fitted to noised training images.
fn truncated(results: &mut Results, study: &Study, model: &Trained) -> Result<()> {
    let work = CUTS.iter().map(|cut| Job {
        cost: 1.0,
        work: Box::new(move || -> Result<(f64, f64, f64)> {
            let started = Instant::now();
            let net = model.open()?;
            let point = net.table()?.index(*cut);
            let (x0, _) = study.train.all(&Device::Cpu)?;
            let mut noise = CounterNoise::new(7, 0..x0.dim(0)? as u64);
            let noisy = marginal(&x0, &noise.normal(&x0)?, At::All(point))?;
            let fit = MixtureFit::fit(&noisy, COMPONENTS, 30, Key::new(model.seed, stream::TEST))?;
            let start = |like: &Tensor, noise: &mut CounterNoise, at: usize| {
                let items = at as u64..(at + like.dim(0)?) as u64;
                Ok(fit.draw(like, &point, noise, items)?)
            };
            let ways = Ways {
                start: &start,
                constraint: &|_, _| Ok(None),
            };
            let images = from(&net, *cut, study.count, model.seed, &ways)?;
            let like = images.zeros_like()?;
            let mut noise = CounterNoise::new(8, 0..study.count as u64);
            let alone = fit.draw(&like, &point, &mut noise, 0..study.count as u64)?;
            // What the mixture itself is worth: its samples, scaled to the data.
            let alone = alone.affine(1.0 / point.alpha.max(1e-3), 0.0)?;
            Ok((
                study.distance(&images)?,
                study.distance(&alone)?,
                started.elapsed().as_secs_f64(),
            ))
        }),
    });
    let values = jobs::run(work.collect())?;
    let noise = |like: &Tensor, noise: &mut CounterNoise, _: usize| Ok(noise.normal(like)?);
    let whole = Ways {
        start: &noise,
        constraint: &|_, _| Ok(None),
    };
    let net = model.open()?;
    let last = 999;
    let whole = from(&net, last, study.count, model.seed, &whole)?;
    let full = study.distance(&whole)?;
    for (cut, (value, alone, seconds)) in CUTS.iter().zip(&values) {
        let mut row = study.row(
            format!("truncated at step {cut} of 1000, {COMPONENTS} Gaussians before it"),
            format!("Fréchet distance at {CALLS} calls"),
            *value,
            *seconds,
        );
        row.baseline = Some(Baseline {
            name: "the whole chain".into(),
            value: full,
        });
        row.note = format!("DDIM; the fitted mixture alone, scaled to the data: {alone:.2}");
        results.rows.push(row);
    }
    Ok(())
}

/// Doubling the resolution of test images from pixels of four, from a noised guess.
fn come_closer(
    options: &Options,
    results: &mut Results,
    study: &Study,
    model: &Trained,
) -> Result<()> {
    let n = study.count.min(study.test.len());
    let (real, _) = study
        .test
        .batch(&(0..n).collect::<Vec<_>>(), &Device::Cpu)?;
    let operator = Operator::Pool(2);
    let low = operator.measure(&real)?;
    let guess = operator.lift(&low)?;
    let (real, low, guess) = (&real, &low, &guess);
    let work = STARTS.iter().map(|first| Job {
        cost: 1.0,
        work: Box::new(move || -> Result<(f64, f64)> {
            let started = Instant::now();
            let net = model.open()?;
            let point = net.table()?.index(*first);
            let start = |like: &Tensor, noise: &mut CounterNoise, at: usize| {
                let own = guess.narrow(0, at, like.dim(0)?)?;
                Ok(noised_start(&own, &point, noise)?)
            };
            let keep = |at: usize, size: usize| {
                Ok(Some(DataConsistency {
                    operator: Operator::Pool(2),
                    measurement: low.narrow(0, at, size)?,
                }))
            };
            let ways = Ways {
                start: &start,
                constraint: &keep,
            };
            let images = from(&net, *first, n, model.seed, &ways)?;
            Ok((psnr(&images, real)?, started.elapsed().as_secs_f64()))
        }),
    });
    let values = jobs::run(work.collect())?;
    let nearest = psnr(guess, real)?;
    let whole = values[STARTS.len() - 1].0;
    let curve: Vec<(f64, f64)> = STARTS
        .iter()
        .zip(&values)
        .map(|(first, v)| ((*first + 1) as f64 / 1000.0, v.0))
        .collect();
    for (first, (value, seconds)) in STARTS.iter().zip(&values) {
        results.rows.push(Row {
            system: format!("come closer, diffuse faster, from step {first}"),
            dataset: study.test.name().into(),
            split: format!("{n} test images from pixels of four"),
            metric: format!("PSNR in dB at {CALLS} calls"),
            value: *value,
            better: Better::Higher,
            baseline: Some(Baseline {
                name: "the whole chain".into(),
                value: whole,
            }),
            published: None,
            seconds: *seconds,
            note: format!("DDIM with data consistency; repeated pixels alone: {nearest:.2} dB"),
        });
    }
    let flat = vec![(0.05, nearest), (1.0, nearest)];
    line_plot(
        &options.out.join("closer.svg"),
        &Axes::new(
            "Doubling the resolution from a noised guess",
            "where the run starts, as part of the chain",
            "PSNR in dB",
        ),
        &[
            Series::new(format!("{CALLS} calls of DDIM, consistent"), curve),
            Series::new("repeated pixels", flat),
        ],
    )?;
    results.figure(
        "closer.svg",
        "Super-resolution of test digits at a fixed number of calls: starting from a noised guess \
         against starting from noise (1.0).",
    );
    Ok(())
}

/// Peak signal to noise over all pixels, for values in [−1, 1].
fn psnr(images: &Tensor, real: &Tensor) -> Result<f64> {
    let n = images.dim(0)?.min(real.dim(0)?);
    let (a, b) = (images.narrow(0, 0, n)?, real.narrow(0, 0, n)?);
    let error = (a.clamp(-1.0, 1.0)? - b)?
        .sqr()?
        .mean_all()?
        .to_dtype(DType::F64)?;
    Ok(10.0 * (4.0 / error.to_scalar::<f64>()?).log10())
}
