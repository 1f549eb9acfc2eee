//! Distillation: students of 8, 4, 2 and 1 steps beside the same calls without it.

use crate::digits::{SEEDS, Study, Trained};
use crate::jobs::{self, Job};
use crate::{Options, Preset};
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use diffusion_core::grid::Grid;
use diffusion_core::report::{Baseline, Published, Results};
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::{Cancel, Quiet};
use diffusion_images::distill::{DistillConfig, Method, distill};
use diffusion_images::figure::{Axes, Series, line_plot};
use diffusion_images::model::ImageModel;
use diffusion_images::run::run_folder;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Steps of the students, and of the first teacher.
pub const STUDENTS: [usize; 4] = [8, 4, 2, 1];
const FROM: usize = 16;

/// A distilled model.
pub struct Student {
    pub steps: usize,
    folder: PathBuf,
}

impl Student {
    /// Its samples, in the way that it was distilled for.
    pub fn sample(&self, study: &Study, seed: u64) -> Result<Tensor> {
        let net = ImageModel::open(&self.folder, &Device::Cpu)?;
        let learnt = net
            .distilled()
            .context("a student says how it is sampled")?;
        let (sampler, grid) = (learnt.sampler.clone(), learnt.grid.clone());
        study.sample(&net, sampler, grid, learnt.steps, seed)
    }
}

/// The students of a trained model, from the cache or distilled now.
pub fn students(
    options: &Options,
    study: &Study,
    folder: &Path,
    seed: u64,
) -> Result<Vec<Student>> {
    let steps = match options.preset {
        Preset::Quick => 600,
        Preset::Paper => 5000,
    };
    let mut config = DistillConfig::new(folder, Method::Progressive, 1, steps)?;
    config.from = FROM;
    config.train.seed = seed;
    let key = diffusion_ops::init::fnv1a(&config.to_toml()?);
    let out = options.cache.join(format!("students-{key:016x}"));
    let resume = diffusion_images::distill::config_file(&out).exists();
    let start = Instant::now();
    distill(
        &config,
        &study.train,
        &out,
        resume,
        &Device::Cpu,
        &mut |_| Ok(Box::new(Quiet)),
        &Cancel::new(),
    )?;
    println!(
        "seed {seed}: distilled in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    Ok(STUDENTS
        .iter()
        .map(|steps| Student {
            steps: *steps,
            folder: run_folder(&out)
                .join(format!("steps-{steps:04}"))
                .join("model"),
        })
        .collect())
}

/// Students against the same calls of their teacher, over all seeds.
pub fn rows(
    options: &Options,
    results: &mut Results,
    study: &Study,
    models: &[Trained],
) -> Result<()> {
    let start = Instant::now();
    let mut work: Vec<Job<'_, f64>> = Vec::new();
    for model in models {
        for student in &model.students {
            work.push(Job {
                cost: student.steps as f64,
                work: Box::new(move || study.distance(&student.sample(study, model.seed)?)),
            });
            work.push(Job {
                cost: student.steps as f64,
                work: Box::new(move || {
                    let ddim = SamplerConfig::named("ddim")?;
                    let net = model.open()?;
                    let images =
                        study.sample(&net, ddim, Grid::Trailing, student.steps, model.seed)?;
                    study.distance(&images)
                }),
            });
        }
    }
    let values = jobs::run(work)?;
    let seconds = start.elapsed().as_secs_f64();
    let at = |seed: usize, k: usize, plain: usize| values[(seed * STUDENTS.len() + k) * 2 + plain];
    let mean = |k: usize, plain: usize| {
        (0..SEEDS).map(|seed| at(seed, k, plain)).sum::<f64>() / SEEDS as f64
    };
    // CIFAR-10, Salimans and Ho 2022, figure 4 and table 2.
    let published = [Some(2.57), Some(3.0), Some(4.51), Some(9.12)];
    for (k, steps) in STUDENTS.iter().enumerate() {
        let holds = (0..SEEDS)
            .filter(|seed| at(*seed, k, 0) < at(*seed, k, 1))
            .count();
        let mut row = study.row(
            format!("progressive distillation, {steps} steps, {SEEDS} seeds"),
            "mean Fréchet distance".into(),
            mean(k, 0),
            seconds,
        );
        row.baseline = Some(Baseline {
            name: format!("DDIM at {steps} calls, not distilled"),
            value: mean(k, 1),
        });
        row.published = published[k].map(|value| Published {
            value,
            dataset: "CIFAR-10, FID".into(),
            source: "Salimans and Ho 2022".into(),
        });
        row.note =
            format!("ahead of the same calls without distillation in {holds} of {SEEDS} seeds");
        results.rows.push(row);
    }
    let curve = |plain: usize| -> Vec<(f64, f64)> {
        STUDENTS
            .iter()
            .enumerate()
            .map(|(k, steps)| (*steps as f64, mean(k, plain)))
            .collect()
    };
    let floor = vec![(1.0, study.floor), (8.0, study.floor)];
    line_plot(
        &options.out.join("distilled.svg"),
        &Axes::new(
            "Distilled into few steps",
            "network calls",
            "Fréchet distance",
        )
        .log_x()
        .log_y(),
        &[
            Series::new("progressive distillation", curve(0)),
            Series::new("DDIM, not distilled", curve(1)),
            Series::new("halves of the test images", floor),
        ],
    )?;
    results.figure(
        "distilled.svg",
        "Progressive distillation from 16 steps of DDIM, the mean of three seeds, beside DDIM with as \
         many calls.",
    );
    Ok(())
}
