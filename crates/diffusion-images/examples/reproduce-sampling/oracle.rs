//! Data whose answers are known: error and order of every deterministic sampler, and the law of the
//! stochastic ones.

use crate::{Options, steps_for};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::grid::Grid;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::oracle::{Mixture, order};
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_core::sample::{Ctx, Named, Order, SAMPLERS, SamplerConfig, Solver};
use diffusion_core::schedule::{Point, Schedule, Vp};
use diffusion_images::figure::{Axes, Series, line_plot};
use std::sync::Arc;
use std::time::Instant;

/// Two modes of unequal weight, the mixture of the card on sampling.
fn two_modes() -> diffusion_core::Result<Mixture> {
    Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4])
}

/// A ring of eight modes in the plane.
fn ring() -> diffusion_core::Result<Mixture> {
    let mean = (0..8)
        .map(|k| {
            let angle = std::f64::consts::TAU * f64::from(k) / 8.0;
            vec![1.5 * angle.cos(), 1.5 * angle.sin()]
        })
        .collect();
    Mixture::new(vec![1.0; 8], mean, vec![0.12; 8])
}

/// The process, down to t = 1e-3.
fn vp() -> Arc<dyn Schedule + Send + Sync> {
    Arc::new(Vp::default())
}

/// Evenly spaced in log SNR, without the jump to the data.
fn open_grid(steps: usize) -> diffusion_core::Result<Vec<Point>> {
    let mut points = Grid::UniformLogSnr.points(&*vp(), steps + 1)?;
    points.pop();
    Ok(points)
}

/// The same with a first step that grows from nothing, so that the low orders at the start of a
/// multistep method are no part of its slope.
fn graded(steps: usize) -> diffusion_core::Result<Vec<Point>> {
    let even = open_grid(steps)?;
    let (first, second) = (even[0].log_snr(), even[1].log_snr());
    let mut points = vec![even[0]];
    for k in (1..=14).rev() {
        points.push(vp().at_log_snr(first + 0.5f64.powi(k) * (second - first)));
    }
    points.extend(&even[1..]);
    Ok(points)
}

fn solve(
    solver: &dyn Solver,
    model: &Mixture,
    x: &Tensor,
    seed: u64,
) -> diffusion_core::Result<(Tensor, usize)> {
    let n = x.dim(0)? as u64;
    let mut noise = CounterNoise::new(seed, 0..n);
    let mut ctx = Ctx::new(model, &mut noise, 0..n);
    let y = solver.solve(x.clone(), &mut ctx, &mut ())?;
    Ok((y, ctx.calls))
}

pub fn run(options: &Options, results: &mut Results) -> Result<()> {
    deterministic(options, results)?;
    laws(options, results)
}

/// What is shown together in one figure.
const FIGURES: [(&str, &str, &[&str]); 2] = [
    (
        "error-low.svg",
        "Orders 1 and 2 with an exact score",
        &[
            "ddim", "heun", "kdpm2", "dpm-2s", "dpmpp-2m", "dpmpp-2s", "unipc", "plms",
        ],
    ),
    (
        "error-high.svg",
        "Orders 3 and 4 with an exact score",
        &[
            "dpm-3s",
            "dpmpp-3m",
            "dpmpp-3m-published",
            "dpmpp-3s",
            "deis",
            "deis-t",
            "unipc-3",
            "lms",
        ],
    ),
];

/// Mean distance to the exact end of the flow against calls, and the slope for many of them.
fn deterministic(options: &Options, results: &mut Results) -> Result<()> {
    let n = 500;
    let like = Tensor::zeros((n, 1), DType::F64, &Device::Cpu)?;
    let x = CounterNoise::new(options.seed, 0..n as u64).normal(&like)?;
    let model = two_modes()?;
    let fine = SamplerConfig::named("unipc-3")?.without_cautious_end();
    let (exact, _) = solve(&*fine.solver(&graded(4000)?, Some(vp())), &model, &x, 0)?;
    let error =
        |y: &Tensor| -> Result<f64> { Ok((y - &exact)?.abs()?.mean_all()?.to_scalar::<f64>()?) };
    let few = x.narrow(0, 0, 3)?;
    let few_exact = exact.narrow(0, 0, 3)?;
    let calls = [5usize, 7, 10, 15, 20, 40, 80, 160];
    let mut curves: Vec<(&str, Series)> = Vec::new();
    let mut ddim = None;
    for Named { name, config, .. } in SAMPLERS {
        let config = config();
        let declared = config.order();
        // Straight paths are another variable than this process has; these two repeat DDIM.
        let other = ["flow-heun", "euler", "dpmpp-1", "tcd"].contains(name);
        let pseudo = ["pndm", "plms", "ipndm"].contains(name);
        if other || (declared == Order::Unstated && !pseudo) {
            continue;
        }
        let start = Instant::now();
        let mut curve = Vec::new();
        let mut at_twenty = None;
        for budget in calls {
            let Some(steps) = steps_for(name, budget) else {
                continue;
            };
            let solver = config.solver(&open_grid(steps)?, Some(vp()));
            let (y, used) = solve(&*solver, &model, &x, 0)?;
            let value = error(&y)?;
            curve.push((used as f64, value));
            if budget == 20 {
                at_twenty = Some(value);
            }
        }
        let plain = config.clone().without_cautious_end();
        let slope = order::measure(&[100, 200, 400], |steps| {
            let solver = plain.solver(&graded(steps)?, Some(vp()));
            let (y, _) = solve(&*solver, &model, &few, 0)?;
            Ok((y - &few_exact)?.abs()?.max_all()?.to_scalar::<f64>()?)
        })?;
        let seconds = start.elapsed().as_secs_f64();
        if *name == "ddim" {
            ddim = at_twenty;
        }
        let row = |metric: &str, value: f64, better, baseline: Option<Baseline>| Row {
            system: format!("{name}, exact score"),
            dataset: "two-mode mixture, VP".into(),
            split: format!("{n} starts"),
            metric: metric.into(),
            value,
            better,
            baseline,
            published: None,
            seconds,
            note: "log-SNR grid to t = 1e-3".into(),
        };
        if let Some(value) = at_twenty {
            let baseline = ddim.filter(|_| *name != "ddim").map(|value| Baseline {
                name: "DDIM".into(),
                value,
            });
            results.rows.push(row(
                "mean error to the exact flow at 20 calls",
                value,
                Better::Lower,
                baseline,
            ));
        }
        let mut measured = row("measured order", slope, Better::Higher, None);
        measured.note = match declared {
            Order::Exactly(n) => format!("declared exactly {n}"),
            Order::AtLeast(n) => format!("declared at least {n}"),
            Order::Unstated => "declared none: its coefficients take steps for equal".into(),
        };
        results.rows.push(measured);
        curves.push((name, Series::new(*name, curve)));
    }
    for (file, title, names) in FIGURES {
        let series: Vec<Series> = curves
            .iter()
            .filter(|(name, _)| names.contains(name))
            .map(|(_, series)| series.clone())
            .collect();
        line_plot(
            &options.out.join(file),
            &Axes::new(title, "network calls", "mean |x - exact flow|")
                .log_x()
                .log_y(),
            &series,
        )?;
        results.figure(
            file,
            "Error against network calls on the two-mode mixture; the slope is the order. Multistep \
             solvers with fewer than 15 steps end with lower orders, as users run them.",
        );
    }
    Ok(())
}

/// Sliced Wasserstein distance to the data against calls, on the ring.
fn laws(options: &Options, results: &mut Results) -> Result<()> {
    let n = 2000;
    let model = ring()?;
    let stream = diffusion_ops::rng::stream::TEST;
    let draw = |seed: u64, n: usize| -> Result<Tensor> {
        Ok(Tensor::new(model.samples(seed, stream, n), &Device::Cpu)?)
    };
    // So many that the reference adds no noise of its own.
    let real = draw(options.seed, 16 * n)?;
    let mut floor = 0.0;
    for k in 0..8 {
        floor += sliced_wasserstein(&draw(options.seed + 1000 + k, n)?, &real)? / 8.0;
    }
    let like = Tensor::zeros((n, 2), DType::F64, &Device::Cpu)?;
    let x = CounterNoise::new(options.seed + 1, 0..n as u64).normal(&like)?;
    let calls = [5usize, 10, 20, 50, 100, 200];
    let shown = [
        "ddim",
        "ddpm",
        "dpmpp-2m-sde",
        "sa-solver",
        "em",
        "reverse-diffusion",
        "pc",
    ];
    let mut curves = Vec::new();
    for Named { name, config, .. } in SAMPLERS {
        let config = config();
        let stochastic = config.order() == Order::Unstated
            && ![
                "pndm",
                "plms",
                "ipndm",
                "rk45",
                "dpm-12",
                "dpm-23",
                "consistency",
                "tcd",
                "ddpm-learned",
            ]
            .contains(name);
        let adaptive = *name == "adaptive-sde";
        if !(stochastic || *name == "ddim") {
            continue;
        }
        let start = Instant::now();
        let mut curve = Vec::new();
        for budget in calls {
            let Some(steps) = steps_for(name, budget) else {
                continue;
            };
            if adaptive && budget != 50 {
                continue;
            }
            let points = Grid::UniformLogSnr.points(&*vp(), steps)?;
            let solver = config.solver(&points, Some(vp()));
            let (y, used) = solve(&*solver, &model, &x, options.seed + 2)?;
            // Every item of an adaptive run has its own number of calls; the batch makes the most.
            let distance = sliced_wasserstein(&y, &real)?;
            curve.push((used as f64, distance));
            if budget == 50 {
                results.rows.push(Row {
                    system: format!("{name}, exact score"),
                    dataset: "ring of 8 modes, VP".into(),
                    split: format!("{n} samples"),
                    metric: format!("sliced Wasserstein-2 at {used} calls"),
                    value: distance,
                    better: Better::Lower,
                    baseline: Some(Baseline {
                        name: "exact draws, mean of 8".into(),
                        value: floor,
                    }),
                    published: None,
                    seconds: start.elapsed().as_secs_f64(),
                    note: "log-SNR grid to t = 1e-3".into(),
                });
            }
        }
        if shown.contains(name) {
            curves.push(Series::new(*name, curve));
        }
    }
    let ends = [(5.0, floor), (200.0, floor)];
    curves.push(Series::new("exact draws", ends.to_vec()));
    line_plot(
        &options.out.join("law.svg"),
        &Axes::new(
            "Distance to the data law with an exact score",
            "network calls",
            "sliced Wasserstein-2",
        )
        .log_x()
        .log_y(),
        &curves,
    )?;
    results.figure(
        "law.svg",
        "Stochastic samplers on the ring of eight modes beside deterministic DDIM; the floor is what \
         as many exact draws are away from the law.",
    );
    Ok(())
}

/// The mean over 64 directions of the squared Wasserstein-2 distance of projections, and its root.
///
/// `b` has a whole multiple of the points of `a`, which then stand for several each.
fn sliced_wasserstein(a: &Tensor, b: &Tensor) -> Result<f64> {
    let mut total = 0.0;
    for k in 0..64 {
        let angle = std::f64::consts::PI * f64::from(k) / 64.0;
        let direction = Tensor::new(&[[angle.cos()], [angle.sin()]], &Device::Cpu)?;
        let project = |t: &Tensor| -> Result<Vec<f64>> {
            let mut v = t.matmul(&direction)?.flatten_all()?.to_vec1::<f64>()?;
            v.sort_by(f64::total_cmp);
            Ok(v)
        };
        let (a, b) = (project(a)?, project(b)?);
        let each = b.len() / a.len();
        let pairs = b.iter().enumerate().map(|(i, y)| (a[i / each], y));
        let squares: f64 = pairs.map(|(x, y)| (x - y).powi(2)).sum();
        total += squares / b.len() as f64;
    }
    Ok((total / 64.0).sqrt())
}
