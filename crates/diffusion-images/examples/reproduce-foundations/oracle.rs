//! Data whose answers are known: the forward process, the way back, and error against calls.
//!
//! Cost: about 2·10⁹ floating-point operations, a few seconds.

use crate::Options;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::forward::marginal;
use diffusion_core::grid::Grid;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::oracle::Mixture;
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_core::sample::{Ctx, Heun, Planned, Progress, SamplerConfig, sample};
use diffusion_core::schedule::{Point, Schedule, Vp};
use diffusion_core::tensor::At;
use diffusion_images::figure::{Axes, Series, line_plot, scatter, trajectories};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Two modes of unequal weight, the mixture of the card on sampling.
fn data() -> diffusion_core::Result<Mixture> {
    Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4])
}

/// A ring of eight modes in the plane, for pictures.
fn ring() -> diffusion_core::Result<Mixture> {
    let mean = (0..8)
        .map(|k| {
            let angle = std::f64::consts::TAU * f64::from(k) / 8.0;
            vec![1.5 * angle.cos(), 1.5 * angle.sin()]
        })
        .collect();
    Mixture::new(vec![1.0; 8], mean, vec![0.12; 8])
}

pub fn run(options: &Options, results: &mut Results) -> Result<()> {
    forward_process(options, results)?;
    reverse_trajectories(options, results)?;
    error_against_calls(options, results)
}

fn forward_process(options: &Options, results: &mut Results) -> Result<()> {
    let n = 600;
    let x0 = Tensor::new(
        ring()?.samples(options.seed, diffusion_ops::rng::stream::TEST, n),
        &Device::Cpu,
    )?;
    let mut noise = CounterNoise::new(options.seed, 0..n as u64);
    let epsilon = noise.normal(&x0)?;
    let vp = Vp::default();
    let series = [0.0, 0.25, 0.5, 1.0]
        .into_iter()
        .map(|t| {
            let x = marginal(&x0, &epsilon, At::All(vp.at(t)))?.to_vec2::<f64>()?;
            Ok(Series::new(
                format!("t = {t}"),
                x.iter().map(|v| (v[0], v[1])).collect(),
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    scatter(
        &options.out.join("forward.svg"),
        &Axes::new(
            "Eight modes become one",
            "first coordinate",
            "second coordinate",
        ),
        &series,
    )?;
    results.figure(
        "forward.svg",
        "The forward process q(x_t | x_0) of the VP SDE on eight Gaussians.",
    );
    Ok(())
}

fn reverse_trajectories(options: &Options, results: &mut Results) -> Result<()> {
    let model = data()?;
    let points = Grid::UniformLogSnr.points(&Vp::default(), 80)?;
    let n = 24u64;
    for (sampler, file, caption) in [
        (
            "heun",
            "flow.svg",
            "The probability flow back from noise (Heun): deterministic, no crossings.",
        ),
        (
            "ddpm",
            "ancestral.svg",
            "Ancestral sampling (DDPM) from the same noise: a random path to the same law.",
        ),
    ] {
        let mut noise = CounterNoise::new(options.seed, 0..n);
        let like = Tensor::zeros((n as usize, 1), DType::F64, &Device::Cpu)?;
        let x = noise.normal(&like)?;
        let mut paths: Vec<Vec<(f64, f64)>> = x
            .flatten_all()?
            .to_vec1::<f64>()?
            .into_iter()
            .map(|v| vec![(points[0].log_snr(), v)])
            .collect();
        let mut watch = |p: &Progress<'_>| {
            if let (true, Ok(values)) = (
                p.at.sigma > 0.0,
                p.x.flatten_all().and_then(|x| x.to_vec1::<f64>()),
            ) {
                for (path, value) in paths.iter_mut().zip(values) {
                    path.push((p.at.log_snr(), value));
                }
            }
            ControlFlow::Continue(())
        };
        let solver = SamplerConfig::named(sampler)?.solver(&points, Some(Arc::new(Vp::default())));
        solver.solve(x, &mut Ctx::new(&model, &mut noise, 0..n), &mut watch)?;
        let series: Vec<Series> = paths.into_iter().map(|p| Series::new("", p)).collect();
        trajectories(
            &options.out.join(file),
            &Axes::new("From noise to two modes", "log SNR", "x"),
            &series,
        )?;
        results.figure(file, caption);
    }
    Ok(())
}

/// Runs a sampler along a log-SNR grid that ends just before the data.
fn run_sampler(name: &str, points: &[Point], x: &Tensor, seed: u64) -> Result<Tensor> {
    let n = x.dim(0)? as u64;
    let solver = SamplerConfig::named(name)?.solver(points, Some(Arc::new(Vp::default())));
    Ok(sample(
        &*solver,
        &data()?,
        x.clone(),
        &mut CounterNoise::new(seed + 1, 0..n),
        0..n,
    )?)
}

/// Largest distance to the exact end of the flow, for the deterministic samplers; Wasserstein
/// distance to the data law, for all.
fn error_against_calls(options: &Options, results: &mut Results) -> Result<()> {
    let n = 4000;
    let like = Tensor::zeros((n, 1), DType::F64, &Device::Cpu)?;
    let x = CounterNoise::new(options.seed, 0..n as u64).normal(&like)?;
    let grid = |steps: usize| -> Result<Vec<Point>> {
        let mut points = Grid::UniformLogSnr.points(&Vp::default(), steps + 1)?;
        points.pop();
        Ok(points)
    };
    let fine = grid(4000)?;
    let exact = sample(
        &Planned::new(Heun::default(), &fine),
        &data()?,
        x.clone(),
        &mut CounterNoise::new(0, 0..n as u64),
        0..n as u64,
    )?;
    let calls = [6usize, 10, 20, 40, 80, 160];
    let mut curves = Vec::new();
    let mut laws = Vec::new();
    let mut reference = None;
    for name in [
        "ddim",
        "euler",
        "dpmpp-1",
        "heun",
        "dpmpp-2m",
        "ddim-eta1",
        "ddpm",
        "ddpm-large",
    ] {
        let per_step = if name == "heun" { 2 } else { 1 };
        let stochastic = matches!(name, "ddim-eta1" | "ddpm" | "ddpm-large");
        let (mut curve, mut law) = (Vec::new(), Vec::new());
        for budget in calls {
            let start = Instant::now();
            let y = run_sampler(name, &grid(budget / per_step)?, &x, options.seed)?;
            let seconds = start.elapsed().as_secs_f64();
            let mean = (&y - &exact)?.abs()?.mean_all()?.to_scalar::<f64>()?;
            let distance = wasserstein(&y, &exact)?;
            if !stochastic {
                curve.push((budget as f64, mean));
            }
            law.push((budget as f64, distance));
            if budget == 20 {
                let (metric, value) = if stochastic {
                    ("W2 to the exact end law at 20 calls", distance)
                } else {
                    ("mean error to the exact flow at 20 calls", mean)
                };
                if name == "ddim" {
                    reference = Some(mean);
                }
                results.rows.push(Row {
                    system: format!("{name}, exact score"),
                    dataset: "two-mode mixture, VP".into(),
                    split: "4000 starts".into(),
                    metric: metric.into(),
                    value,
                    better: Better::Lower,
                    baseline: reference
                        .filter(|_| !stochastic && name != "ddim")
                        .map(|value| Baseline {
                            name: "DDIM".into(),
                            value,
                        }),
                    published: None,
                    seconds,
                    note: "log-SNR grid to t = 1e-3".into(),
                });
            }
        }
        if !stochastic {
            curves.push(Series::new(name, curve));
        }
        laws.push(Series::new(name, law));
    }
    line_plot(
        &options.out.join("error.svg"),
        &Axes::new(
            "Error against calls, exact score",
            "network calls",
            "mean |x - exact flow|",
        )
        .log_x()
        .log_y(),
        &curves,
    )?;
    results.figure("error.svg", "First-order samplers fall with slope 1 (DDIM, Euler and DPM-Solver++ 1 coincide), Heun and 2M with slope 2.");
    line_plot(
        &options.out.join("law.svg"),
        &Axes::new(
            "Distance to the data law, exact score",
            "network calls",
            "Wasserstein-2",
        )
        .log_x()
        .log_y(),
        &laws,
    )?;
    results.figure("law.svg", "Stochastic samplers need more calls for the same law; with 4000 samples each, two exact draws are about 0.02 apart.");
    Ok(())
}

/// The exact one-dimensional Wasserstein-2 distance between two equally large samples.
fn wasserstein(a: &Tensor, b: &Tensor) -> Result<f64> {
    let sorted = |t: &Tensor| -> Result<Vec<f64>> {
        let mut v = t.flatten_all()?.to_vec1::<f64>()?;
        v.sort_by(f64::total_cmp);
        Ok(v)
    };
    let (a, b) = (sorted(a)?, sorted(b)?);
    Ok((a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / a.len() as f64).sqrt())
}
