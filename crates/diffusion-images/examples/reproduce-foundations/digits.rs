//! Real digits: a label-dropout UNet trained on the training split, judged on what it never saw.
//!
//! Cost of the quick preset: 1200 steps of 64 images at about 0.1 GFLOP each, 8 TFLOP, and 50,000
//! network evaluations of one image for the samples, 2 TFLOP.

use crate::{Options, Preset};
use anyhow::{Context, Result};
use candle_core::{D, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::grid::Grid;
use diffusion_core::guide::Clip;
use diffusion_core::loss::{Denoising, TimeLaw, Weight};
use diffusion_core::noise::CounterNoise;
use diffusion_core::oracle::Mixture;
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_core::sample::{Progress, SamplerConfig};
use diffusion_core::train::{Cancel, Event, Observer, StepCtx};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::{self, Dataset};
use diffusion_images::figure::{Axes, Series, line_plot};
use diffusion_images::grid::{GridOptions, sample_grid};
use diffusion_images::metric::{Classifier, ClassifierConfig};
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::{preset, run, train};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Guidance of the conditional samples.
const GUIDANCE: f64 = 2.0;

pub fn run(options: &Options, results: &mut Results) -> Result<()> {
    let splits = data::splits(&options.data, &data::Options::default())?;
    let mut config = preset::preset("auto", &splits.train)?;
    config.train.seed = options.seed;
    config.train.log_every = 10;
    preset::set_steps(
        &mut config,
        if options.preset == Preset::Quick {
            1200
        } else {
            20_000
        },
    );
    let (model, seconds, folder) = trained(options, &config, &splits.train)?;
    println!(
        "{} weights, trained in {seconds:.0} s",
        model.num_parameters()
    );
    loss_curve(options, results, &folder)?;
    held_out(
        options,
        results,
        &model,
        &splits.train,
        &splits.test,
        seconds,
    )?;
    if model.classes().is_empty() {
        return pictures(options, results, &model, &splits.test);
    }
    let classifier = Classifier::train(&splits.train, &ClassifierConfig::fitted(&splits.train))?;
    samplers(
        options,
        results,
        &model,
        &classifier,
        &splits.train,
        &splits.test,
    )?;
    pictures(options, results, &model, &splits.test)
}

/// The model of this configuration from the cache, or trained now.
fn trained(
    options: &Options,
    config: &ImageConfig,
    data: &Dataset,
) -> Result<(ImageModel, f64, PathBuf)> {
    let log = Log {
        start: Instant::now(),
        steps: config.train.steps,
    };
    let run::Trained { folder, seconds } = run::trained(
        &options.cache,
        config,
        data,
        &Device::Cpu,
        log,
        &Cancel::new(),
    )?;
    Ok((ImageModel::open(&folder, &Device::Cpu)?, seconds, folder))
}

struct Log {
    start: Instant,
    steps: u64,
}

impl Observer for Log {
    fn on(&mut self, event: &Event) -> diffusion_core::Result<()> {
        if let Event::Step { step, loss, .. } = event {
            if step % 100 == 0 {
                println!(
                    "step {step} of {}  loss {loss:.4}  {:.0} s",
                    self.steps,
                    self.start.elapsed().as_secs_f64()
                );
            }
        }
        Ok(())
    }
}

/// The training loss, averaged over windows so that one can see it.
fn loss_curve(options: &Options, results: &mut Results, folder: &std::path::Path) -> Result<()> {
    let text = std::fs::read_to_string(run::run_folder(folder).join("metrics.jsonl"))?;
    let points: Vec<(f64, f64)> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|v| Some((v.get("step")?.as_f64()?, v.get("loss")?.as_f64()?)))
        .collect();
    let smooth = points
        .chunks(5)
        .map(|c| {
            let n = c.len() as f64;
            (
                c.iter().map(|p| p.0).sum::<f64>() / n,
                c.iter().map(|p| p.1).sum::<f64>() / n,
            )
        })
        .collect();
    line_plot(
        &options.out.join("loss.svg"),
        &Axes::new(
            "Training loss on the digits",
            "step",
            "mean squared error of the noise",
        )
        .log_y(),
        &[
            Series::new("one batch", points),
            Series::new("mean of 5 batches", smooth),
        ],
    )?;
    results.figure("loss.svg", "The simple loss of the label-dropout UNet.");
    Ok(())
}

/// The loss on held-out digits beside two denoisers that need no network: the exact one of a
/// Gaussian with the training set's mean and deviation, and the one that has memorised the
/// training set.
fn held_out(
    options: &Options,
    results: &mut Results,
    model: &ImageModel,
    train: &Dataset,
    test: &Dataset,
    seconds: f64,
) -> Result<()> {
    let value = train::held_out_loss(model, test, Weight::Simple, options.seed, 4)?;
    let (images, _) = train.all(&Device::Cpu)?;
    let flat = images.flatten_from(1)?;
    let rows: Vec<Vec<f64>> = flat.to_dtype(candle_core::DType::F64)?.to_vec2()?;
    let n = rows.len() as f64;
    let mean: Vec<f64> = (0..rows[0].len())
        .map(|j| rows.iter().map(|r| r[j]).sum::<f64>() / n)
        .collect();
    let std = (0..rows[0].len())
        .map(|j| (rows.iter().map(|r| (r[j] - mean[j]).powi(2)).sum::<f64>() / n).sqrt())
        .collect();
    let gaussian = diffusion_core::oracle::Gaussian::new(mean, std);
    let memory = Mixture::new(vec![1.0; rows.len()], rows.clone(), vec![0.0; rows.len()])?;
    for (name, other) in [
        (
            "exact denoiser of a Gaussian fit",
            oracle_loss(&gaussian, model, test, options.seed)?,
        ),
        (
            "denoiser that memorised the training set",
            oracle_loss(&memory, model, test, options.seed)?,
        ),
    ] {
        results.rows.push(Row {
            system: "DDPM UNet, L_simple".into(),
            dataset: test.name().into(),
            split: "test".into(),
            metric: "noise MSE on held-out images".into(),
            value,
            better: Better::Lower,
            baseline: Some(Baseline {
                name: name.into(),
                value: other,
            }),
            published: None,
            seconds,
            note: format!("{} weights, 4 noise draws an image", model.num_parameters()),
        });
    }
    Ok(())
}

/// The held-out loss of a denoiser over flat vectors, with the same times and noise.
fn oracle_loss(
    oracle: &dyn Denoiser,
    model: &ImageModel,
    test: &Dataset,
    seed: u64,
) -> Result<f64> {
    let objective = Denoising {
        schedule: Arc::new(model.table()?),
        weight: Weight::Simple,
        time: TimeLaw::Uniform,
    };
    let (images, _) = test.all(&Device::Cpu)?;
    let shape = images.dims()[1..].to_vec();
    let x0 = images.flatten_from(1)?.to_dtype(candle_core::DType::F64)?;
    let n = test.len();
    let mut total = 0.0;
    for round in 0..4 {
        let ctx = StepCtx::new(seed, round, (0..n as u64).collect());
        let points = objective.draw((0..n).map(|i| ctx.time_key(i)));
        let epsilon = ctx
            .noise(&shape, candle_core::DType::F64, &Device::Cpu)?
            .flatten_from(1)?;
        let as_noise = diffusion_core::denoiser::from_fn(|x: &Tensor, at, call: &mut Call<'_>| {
            oracle
                .predict(x, at, call)?
                .into_kind(diffusion_core::predict::Kind::Epsilon, x, at)
        });
        let mut noise = CounterNoise::new(seed, 0..n as u64);
        let mut call = Call {
            noise: &mut noise,
            items: 0..n as u64,
            tracked: false,
        };
        total += objective
            .losses(&as_noise, &x0, &epsilon, &points, &mut call)?
            .mean_all()?
            .to_scalar::<f64>()?;
    }
    Ok(total / 4.0)
}

fn request(
    options: &Options,
    sampler: &str,
    steps: usize,
    count: usize,
    classes: usize,
) -> Result<SampleRequest> {
    let grid = if sampler == "heun" {
        Grid::karras()
    } else {
        Grid::Trailing
    };
    let conditional = classes > 0;
    Ok(SampleRequest {
        count,
        sampler: SamplerConfig::named(sampler)?,
        grid,
        steps,
        labels: conditional.then(|| (0..count).map(|i| (i % classes) as u32).collect()),
        guidance: if conditional { GUIDANCE } else { 1.0 },
        clip: Clip::Static { range: 1.0 },
        batch: 100,
        brownian: false,
        seed: options.seed,
    })
}

/// How many class-conditional samples a classifier labels as asked, and how far they are from the
/// training images.
fn samplers(
    options: &Options,
    results: &mut Results,
    model: &ImageModel,
    classifier: &Classifier,
    train: &Dataset,
    test: &Dataset,
) -> Result<()> {
    let (real, _) = test.all(&Device::Cpu)?;
    let real_accuracy = classifier.accuracy(&real, test.labels().context("labels")?)?;
    let (known, _) = train.all(&Device::Cpu)?;
    let real_distance = median_nearest(&real, &known)?;
    let classes = model.classes().len();
    for (sampler, steps, count) in [
        ("dpmpp-2m", 20, 300),
        ("ddim", 20, 100),
        ("ddim", 50, 100),
        ("heun", 10, 100),
        ("ddpm", 250, 40),
    ] {
        let start = Instant::now();
        let request = request(options, sampler, steps, count, classes)?;
        let images = model.sample(&request, &mut ())?;
        let seconds = start.elapsed().as_secs_f64();
        let labels = request.labels.clone().unwrap_or_default();
        let row = |metric: &str, value, better, name: &str, baseline| Row {
            system: format!("{sampler}, {steps} steps, guidance {GUIDANCE}"),
            dataset: test.name().into(),
            split: format!("{count} samples"),
            metric: metric.into(),
            value,
            better,
            baseline: Some(Baseline {
                name: name.into(),
                value: baseline,
            }),
            published: None,
            seconds,
            note: "classifier trained on the training split".into(),
        };
        let accuracy = classifier.accuracy(&images, &labels)?;
        results.rows.push(row(
            "samples labelled as asked",
            accuracy,
            Better::Higher,
            "real test images",
            real_accuracy,
        ));
        if sampler == "dpmpp-2m" {
            let distance = median_nearest(&images, &known)?;
            results.rows.push(row(
                "median distance to the nearest training image",
                distance,
                Better::Lower,
                "real test images",
                real_distance,
            ));
        }
    }
    Ok(())
}

/// The median over images of the Euclidean distance to the nearest other image.
fn median_nearest(images: &Tensor, others: &Tensor) -> Result<f64> {
    let (a, b) = (images.flatten_from(1)?, others.flatten_from(1)?);
    let cross = a.matmul(&b.t()?)?;
    let squares = a
        .sqr()?
        .sum_keepdim(1)?
        .broadcast_add(&b.sqr()?.sum_keepdim(1)?.t()?)?;
    let nearest = (squares - (cross * 2.0)?)?.min(D::Minus1)?;
    let mut d: Vec<f64> = nearest
        .to_vec1::<f32>()?
        .into_iter()
        .map(|v| f64::from(v.max(0.0)).sqrt())
        .collect();
    d.sort_by(f64::total_cmp);
    Ok(d[d.len() / 2])
}

/// Samples beside real images, and one batch on its way from noise to data.
fn pictures(
    options: &Options,
    results: &mut Results,
    model: &ImageModel,
    test: &Dataset,
) -> Result<()> {
    let classes = model.classes().len();
    let texts = |what: &str| {
        vec![
            ("what".to_string(), what.to_string()),
            ("seed".to_string(), options.seed.to_string()),
        ]
    };
    let samples = model.sample(&request(options, "dpmpp-2m", 20, 100, classes)?, &mut ())?;
    let layout = GridOptions {
        columns: Some(10),
        min_tile: 64,
        ..GridOptions::default()
    };
    sample_grid(&samples, &layout)?.write_png(
        &options.out.join("samples.png"),
        &texts("samples, DPM-Solver++ 2M, 20 steps"),
    )?;
    results.figure(
        "samples.png",
        "Samples by class (columns 0 to 9), DPM-Solver++ 2M with 20 steps.",
    );
    // Real images in the same order of classes, where there are any.
    let picked = in_order(test, classes, 100);
    let (real, _) = test.batch(&picked, &Device::Cpu)?;
    sample_grid(&real, &layout)?
        .write_png(&options.out.join("real.png"), &texts("real test images"))?;
    results.figure(
        "real.png",
        "Real test images in the same order, for comparison.",
    );
    let mut strip = Vec::new();
    let steps = 20;
    let mut watch = |p: &Progress<'_>| {
        if p.done % 2 == 0 {
            strip.push(p.x.clamp(-1.0, 1.0));
        }
        ControlFlow::Continue(())
    };
    model.sample(&request(options, "ddim", steps, 10, classes)?, &mut watch)?;
    let rows = strip.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
    // One sample a row, time from left to right.
    let all = Tensor::stack(&rows, 1)?
        .flatten(0, 1)?
        .to_dtype(candle_core::DType::F32)?;
    let layout = GridOptions {
        columns: Some(rows.len()),
        min_tile: 64,
        ..GridOptions::default()
    };
    sample_grid(&all, &layout)?.write_png(
        &options.out.join("denoising.png"),
        &texts("denoising, DDIM"),
    )?;
    results.figure(
        "denoising.png",
        "Ten samples on their way from noise to digits: every second of 20 DDIM steps.",
    );
    Ok(())
}

/// Indices of test images whose labels run through the classes, or simply the first ones.
fn in_order(test: &Dataset, classes: usize, count: usize) -> Vec<usize> {
    let Some(labels) = test.labels().filter(|_| classes > 0) else {
        return (0..count.min(test.len())).collect();
    };
    let mut of: Vec<Vec<usize>> = vec![vec![]; classes];
    for (i, label) in labels.iter().enumerate() {
        of[*label as usize].push(i);
    }
    (0..count)
        .filter_map(|i| of[i % classes].get(i / classes).copied())
        .collect()
}
