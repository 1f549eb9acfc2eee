//! Grids, trajectories, neighbours and curves.

use crate::rows::{ACCURACY, COVERAGE, FRECHET, Table, metric};
use crate::study::{PCA, Part, REAL, Study, VAE, system};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::report::Results;
use diffusion_core::sample::Progress;
use diffusion_images::figure::{Axes, Series, line_plot};
use diffusion_images::grid::{GridOptions, sample_grid};
use diffusion_images::metric::features::Features;
use diffusion_images::metric::memorise::Known;
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::run;
use std::ops::ControlFlow;
use std::path::Path;

/// Rows of a grid by class.
const ROWS: usize = 8;

impl Study<'_> {
    /// Columns of a grid: the classes, or ten.
    fn columns(&self) -> usize {
        match self.classes() {
            n if (5..=12).contains(&n) => n,
            _ => 10,
        }
    }

    /// The indices of images in a grid, column k holding class k where that is possible.
    fn places(&self, labels: &[u32], count: usize) -> Vec<usize> {
        let columns = self.columns();
        if self.classes() != columns {
            // Evenly spread, since a set may be sorted by class.
            let n = (ROWS * columns).min(count);
            return (0..n).map(|i| i * count / n).collect();
        }
        let mut of: Vec<Vec<usize>> = vec![vec![]; columns];
        for (i, label) in labels.iter().enumerate().take(count) {
            of[*label as usize].push(i);
        }
        let cells = (0..ROWS * columns).map(|i| (i % columns, i / columns));
        cells
            .filter_map(|(k, row)| of[k].get(row).copied())
            .collect()
    }

    fn grid(&self, file: &str, images: &Tensor, columns: usize) -> Result<()> {
        let layout = GridOptions {
            columns: Some(columns),
            min_tile: 56,
            ..GridOptions::default()
        };
        let texts = [
            ("data".to_string(), self.plan.data.clone()),
            ("seed".to_string(), self.plan.seeds[0].to_string()),
        ];
        let picture = sample_grid(&images.clamp(-1.0, 1.0)?, &layout)?;
        picture.write_png(&self.options.out.join(file), &texts)?;
        Ok(())
    }

    fn pick(&self, images: &Tensor) -> Result<Tensor> {
        let places = self.places(&self.labels, images.dim(0)?);
        let places: Vec<u32> = places.into_iter().map(|i| i as u32).collect();
        Ok(images.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?)
    }
}

/// Samples of a baseline.
pub fn baseline(study: &Study<'_>, name: &str, images: &Tensor, part: &mut Part) -> Result<()> {
    let short = match name {
        PCA => "pca",
        VAE => "vae",
        _ => "baseline",
    };
    let file = format!("{}-{short}.png", study.plan.name);
    study.grid(&file, &study.pick(images)?, study.columns())?;
    part.figure(
        &file,
        &format!("{}: {name}, for comparison.", study.plan.name),
    );
    Ok(())
}

/// Samples, real images, trajectories, nearest neighbours and the loss of the first seed's model.
pub fn of_model(
    study: &Study<'_>,
    model: &ImageModel,
    folder: &Path,
    part: &mut Part,
) -> Result<()> {
    let plan = study.plan;
    let request = study.request(
        model,
        plan.sampler,
        plan.sampler_steps,
        plan.guidance,
        plan.seeds[0],
    )?;
    // Only the pictures that are shown, each as in the whole set.
    let places = study.places(&study.labels, study.real.len());
    let labels: Option<Vec<u32>> = request
        .labels
        .as_ref()
        .map(|labels| places.iter().map(|i| labels[*i]).collect());
    let request = SampleRequest {
        count: places.len(),
        labels,
        ..request
    };
    let samples = model.sample(&request, &mut ())?;
    let file = format!("{}-samples.png", plan.name);
    study.grid(&file, &samples, study.columns())?;
    let main = system(plan.sampler, plan.sampler_steps, plan.guidance);
    part.figure(&file, &format!("{}: samples, {main}.", plan.name));

    let (real, _) = study.real.batch(&places, &Device::Cpu)?;
    let file = format!("{}-real.png", plan.name);
    study.grid(&file, &real, study.columns())?;
    part.figure(
        &file,
        &format!("{}: real test images in the same order.", plan.name),
    );

    neighbours(study, &samples, part)?;
    trajectories(study, model, &request, part)?;
    loss(study, folder, part)
}

/// Samples above their nearest training images.
fn neighbours(study: &Study<'_>, samples: &Tensor, part: &mut Part) -> Result<()> {
    let train = &study.splits.train;
    let columns = study.columns();
    let count = (2 * columns).min(samples.dim(0)?);
    let samples = samples.narrow(0, 0, count)?;
    let (held_out, _) = study.real.all(&Device::Cpu)?;
    let known = Known::new(train, &Features::from_tensor(&held_out)?)?;
    let found = known.memorisation(&Features::from_tensor(&samples)?)?;
    let (nearest, _) = train.batch(&found.nearest, &Device::Cpu)?;
    let mut parts = Vec::new();
    for start in (0..count).step_by(columns) {
        let n = columns.min(count - start);
        parts.push(samples.narrow(0, start, n)?);
        parts.push(nearest.narrow(0, start, n)?);
    }
    let file = format!("{}-neighbours.png", study.plan.name);
    study.grid(&file, &Tensor::cat(&parts, 0)?, columns)?;
    let caption = format!(
        "{}: samples (first and third row), each above its nearest training image.",
        study.plan.name
    );
    part.figure(&file, &caption);
    Ok(())
}

/// A few samples on their way from noise to data, time from left to right.
fn trajectories(
    study: &Study<'_>,
    model: &ImageModel,
    request: &SampleRequest,
    part: &mut Part,
) -> Result<()> {
    let count = request.count.min(5);
    let request = SampleRequest {
        count,
        steps: 20,
        labels: request.labels.as_ref().map(|l| l[..count].to_vec()),
        ..request.clone()
    };
    let mut seen = Vec::new();
    let mut watch = |p: &Progress<'_>| {
        if p.done % 2 == 1 || p.done == 20 {
            seen.push(p.x.to_dtype(DType::F32));
        }
        ControlFlow::Continue(())
    };
    model.sample(&request, &mut watch)?;
    let seen = seen.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
    let strip = Tensor::stack(&seen, 1)?.flatten(0, 1)?;
    let file = format!("{}-trajectories.png", study.plan.name);
    study.grid(&file, &strip, seen.len())?;
    part.figure(
        &file,
        &format!(
            "{}: from noise to data in 20 steps, every second one.",
            study.plan.name
        ),
    );
    Ok(())
}

/// The training loss, averaged over windows so that one can see it.
fn loss(study: &Study<'_>, folder: &Path, part: &mut Part) -> Result<()> {
    let text = std::fs::read_to_string(run::run_folder(folder).join("metrics.jsonl"))?;
    let points: Vec<(f64, f64)> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|v| Some((v.get("step")?.as_f64()?, v.get("loss")?.as_f64()?)))
        .collect();
    let smooth = points.chunks(5).map(|c| {
        let n = c.len() as f64;
        let sum = c.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
        (sum.0 / n, sum.1 / n)
    });
    let smooth = Series::new("mean of 5 entries", smooth.collect());
    let file = format!("{}-loss.svg", study.plan.name);
    line_plot(
        &study.options.out.join(&file),
        &Axes::new(
            format!("Training loss, {}", study.plan.name),
            "step",
            "weighted squared error",
        )
        .log_y(),
        &[Series::new("one batch", points), smooth],
    )?;
    part.figure(
        &file,
        &format!(
            "{}: the loss of the first seed's training.",
            study.plan.name
        ),
    );
    Ok(())
}

/// Distance against network calls for each sampler, and what guidance changes.
pub fn curves(study: &Study<'_>, table: &Table, results: &mut Results) -> Result<()> {
    let plan = study.plan;
    let frechet = metric(FRECHET);
    let mut lines = Vec::new();
    for curve in plan.curves {
        let points = curve.steps.iter().filter_map(|&steps| {
            let system = table.get(&system(curve.sampler, steps, 1.0))?;
            Some((system.calls as f64, system.mean(frechet)?))
        });
        let name = match curve.sampler {
            "heun" => "edm (heun)",
            "edm" => "edm with churn",
            other => other,
        };
        lines.push(Series::new(name, points.collect()));
    }
    let calls = lines.iter().flat_map(|l| l.points.iter().map(|p| p.0));
    let (low, high) = calls.fold((f64::INFINITY, 0.0f64), |(a, b), c| (a.min(c), b.max(c)));
    for name in [VAE, REAL] {
        if let Some(value) = table.get(name).and_then(|s| s.mean(frechet)) {
            lines.push(Series::new(name, vec![(low, value), (high, value)]));
        }
    }
    let file = format!("{}-calls.svg", plan.name);
    line_plot(
        &study.options.out.join(&file),
        &Axes::new(
            format!("Distance against calls, {}, without guidance", plan.name),
            "network calls an image",
            "Fréchet distance to held-out images",
        )
        .log_x()
        .log_y(),
        &lines,
    )?;
    results.figure(&file, &format!("{}: mean over the seeds.", plan.name));
    if plan.sweep.len() < 3 {
        return Ok(());
    }
    let figures = [FRECHET, ACCURACY, COVERAGE, "recall"];
    let lines: Vec<Series> = figures
        .iter()
        .map(|name| {
            let points = plan.sweep.iter().filter_map(|&weight| {
                let system = table.get(&system(plan.sampler, plan.sampler_steps, weight))?;
                Some((weight, system.mean(metric(name))?))
            });
            Series::new(*name, points.collect())
        })
        .filter(|line| !line.points.is_empty())
        .collect();
    let file = format!("{}-guidance.svg", plan.name);
    line_plot(
        &study.options.out.join(&file),
        &Axes::new(
            format!(
                "Guidance, {}, {} with {} steps",
                plan.name, plan.sampler, plan.sampler_steps
            ),
            "guidance weight",
            "figure",
        ),
        &lines,
    )?;
    results.figure(
        &file,
        &format!("{}: what guidance gains and costs.", plan.name),
    );
    Ok(())
}
