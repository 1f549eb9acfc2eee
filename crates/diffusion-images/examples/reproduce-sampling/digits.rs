//! Trained networks of three seeds on 8x8 digits: Fréchet distance against network calls.
//!
//! Cost of the quick preset: three trainings of 1500 steps of 32 images, three distillations of five
//! halvings, and about 350,000 network evaluations of one image for the samples.

use crate::few::{self, Student};
use crate::jobs::{self, Job};
use crate::{Options, Preset, inversion, partial, steps_for};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use diffusion_core::grid::Grid;
use diffusion_core::guide::Clip;
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::{Cancel, Quiet};
use diffusion_images::data::{self, Dataset};
use diffusion_images::figure::{Axes, Series, line_plot};
use diffusion_images::grid::{GridOptions, sample_grid};
use diffusion_images::likelihood::Moments as Statistics;
use diffusion_images::metric::features::Features;
use diffusion_images::metric::frechet::{Moments, frechet};
use diffusion_images::metric::{Classifier, ClassifierConfig};
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::{preset, run};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

/// Seeds of training and sampling.
pub const SEEDS: usize = 3;

/// The samplers whose curves are drawn, and their figure.
const CURVES: [(&str, usize); 16] = [
    ("ddpm", 0),
    ("analytic", 0),
    ("analytic-ddim", 0),
    ("dpmpp-2m-sde", 0),
    ("sa-solver", 0),
    ("ddim", 0),
    ("plms", 0),
    ("ipndm", 0),
    ("heun", 0),
    ("kdpm2", 1),
    ("dpm-3s", 1),
    ("deis", 1),
    ("dpmpp-2s", 1),
    ("dpmpp-2m", 1),
    ("dpmpp-3m", 1),
    ("unipc-3", 1),
];
/// Network calls at which they are measured; the first two also at 200.
const CALLS: [usize; 5] = [3, 5, 10, 20, 50];
const LONG: (usize, [&str; 2]) = (200, ["ddim", "ddpm"]);

/// What judges samples: the features of a classifier that was trained on the training images.
pub struct Study {
    pub train: Dataset,
    pub test: Dataset,
    classifier: Classifier,
    /// Features are divided by the root mean square of the test images'.
    scale: f64,
    real: Moments,
    /// Samples a measurement.
    pub count: usize,
    /// The Fréchet distance of one half of the test images to the other.
    pub floor: f64,
}

impl Study {
    fn new(options: &Options) -> Result<Self> {
        let splits = data::splits(&options.data, &data::Options::default())?;
        let (train, test) = (splits.train, splits.test);
        let classifier = Classifier::train(&train, &ClassifierConfig::fitted(&train))?;
        let (images, _) = test.all(&Device::Cpu)?;
        let features = classifier.features(&images)?;
        let square = features.sqr()?.mean_all()?.to_dtype(DType::F64)?;
        let mut study = Self {
            scale: square.to_scalar::<f64>()?.sqrt().max(f64::MIN_POSITIVE),
            real: Moments::of(&Features::from_tensor(&features)?)?,
            floor: 0.0,
            train,
            test,
            classifier,
            count: match options.preset {
                Preset::Quick => 200,
                Preset::Paper => 2000,
            },
        };
        study.real = study.moments(&images)?;
        let (one, other) = study.test.halves()?;
        let halves = [one, other].map(|half| study.moments(&half.all(&Device::Cpu)?.0));
        let [one, other] = halves;
        study.floor = frechet(&one?, &other?)?;
        Ok(study)
    }

    fn moments(&self, images: &Tensor) -> Result<Moments> {
        let features = self
            .classifier
            .features(images)?
            .affine(1.0 / self.scale, 0.0)?;
        Ok(Moments::of(&Features::from_tensor(&features)?)?)
    }

    /// The Fréchet distance of images to the test images.
    pub fn distance(&self, images: &Tensor) -> Result<f64> {
        Ok(frechet(
            &self.moments(&images.clamp(-1.0, 1.0)?)?,
            &self.real,
        )?)
    }

    /// Labels that run through the classes, where there are any.
    pub fn labels(&self, model: &ImageModel) -> Option<Vec<u32>> {
        let classes = model.classes().len();
        (classes > 0).then(|| (0..self.count).map(|i| (i % classes) as u32).collect())
    }

    /// Samples of a model.
    pub fn sample(
        &self,
        model: &ImageModel,
        sampler: SamplerConfig,
        grid: Grid,
        steps: usize,
        seed: u64,
    ) -> Result<Tensor> {
        Ok(model.sample(&self.request(model, sampler, grid, steps, seed), &mut ())?)
    }

    fn request(
        &self,
        model: &ImageModel,
        sampler: SamplerConfig,
        grid: Grid,
        steps: usize,
        seed: u64,
    ) -> SampleRequest {
        SampleRequest {
            count: self.count,
            sampler,
            grid,
            steps,
            labels: self.labels(model),
            guidance: 1.0,
            clip: Clip::Static { range: 1.0 },
            batch: 100,
            brownian: false,
            seed,
        }
    }

    /// Samples by a sampler of [`CURVES`] on its usual grid.
    fn sample_named(
        &self,
        model: &ImageModel,
        name: &str,
        steps: usize,
        seed: u64,
    ) -> Result<Tensor> {
        // Analytic-DPM's variances are measured on training images, which costs no call of a sample.
        let (mean, eta) = match name {
            "analytic" => ("ddpm", Some(1.0)),
            "analytic-ddim" => ("ddim", Some(0.0)),
            other => (other, None),
        };
        let sampler = SamplerConfig::named(mean)?;
        let table = model.table()?;
        let grid = sampler.usual_grid(&table);
        let points = grid.points(&table, steps)?;
        let request = self.request(model, sampler, grid, steps, seed);
        let Some(eta) = eta else {
            return Ok(model.sample(&request, &mut ())?);
        };
        let how = Statistics {
            images: 100,
            batch: 100,
            seed,
        };
        let mut watch = |_| ControlFlow::Continue(());
        let solver = model.analytic(&points, &self.train, &how, eta, &mut watch)?;
        Ok(model.sample_by(&solver, &points, &request, &mut ())?)
    }

    /// A row of this study.
    pub fn row(&self, system: String, metric: String, value: f64, seconds: f64) -> Row {
        Row {
            system,
            dataset: self.test.name().into(),
            split: format!("{} samples, {} test images", self.count, self.test.len()),
            metric,
            value,
            better: Better::Lower,
            baseline: Some(Baseline {
                name: "halves of the test images".into(),
                value: self.floor,
            }),
            published: None,
            seconds,
            note: "features of a classifier trained on the training split".into(),
        }
    }
}

/// A trained model with its students.
pub struct Trained {
    pub folder: PathBuf,
    pub seed: u64,
    pub students: Vec<Student>,
}

impl Trained {
    pub fn open(&self) -> Result<ImageModel> {
        Ok(ImageModel::open(&self.folder, &Device::Cpu)?)
    }
}

fn train(options: &Options, study: &Study, seed: u64) -> Result<Trained> {
    let mut config = preset::preset("quick", &study.train)?;
    config.train.seed = seed;
    config.train.log_every = 50;
    preset::set_steps(
        &mut config,
        match options.preset {
            Preset::Quick => 1500,
            Preset::Paper => 20_000,
        },
    );
    let cancel = Cancel::new();
    let run::Trained { folder, seconds } = run::trained(
        &options.cache,
        &config,
        &study.train,
        &Device::Cpu,
        Quiet,
        &cancel,
    )?;
    println!("seed {seed}: trained in {seconds:.0} s");
    let students = few::students(options, study, &folder, seed)?;
    Ok(Trained {
        folder,
        seed,
        students,
    })
}

pub fn run(options: &Options, results: &mut Results) -> Result<()> {
    let study = Study::new(options)?;
    let seeds = (0..SEEDS as u64).map(|k| options.seed + k);
    let study_ref = &study;
    let work = seeds.map(|seed| Job {
        cost: 1.0,
        work: Box::new(move || train(options, study_ref, seed)),
    });
    let start = Instant::now();
    let models = jobs::run(work.collect())?;
    println!(
        "{SEEDS} seeds ready in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    curves(options, results, &study, &models[0])?;
    orderings(results, &study, &models)?;
    few::rows(options, results, &study, &models)?;
    partial::rows(options, results, &study, &models[0])?;
    inversion::rows(options, results, &study, &models[0])?;
    pictures(options, results, &study, &models[0])
}

/// Fréchet distance against calls, for every sampler of [`CURVES`].
fn curves(options: &Options, results: &mut Results, study: &Study, model: &Trained) -> Result<()> {
    let mut work: Vec<Job<'_, (usize, usize, f64, f64)>> = Vec::new();
    for (place, (name, _)) in CURVES.iter().enumerate() {
        let mut budgets: Vec<usize> = CALLS.to_vec();
        if LONG.1.contains(name) {
            budgets.push(LONG.0);
        }
        for budget in budgets {
            let Some(steps) = steps_for(name, budget) else {
                continue;
            };
            work.push(Job {
                cost: budget as f64,
                work: Box::new(move || {
                    let start = Instant::now();
                    let net = model.open()?;
                    let images = study.sample_named(&net, name, steps, model.seed)?;
                    let seconds = start.elapsed().as_secs_f64();
                    Ok((place, budget, study.distance(&images)?, seconds))
                }),
            });
        }
    }
    let measured = jobs::run(work)?;
    let series = |figure: usize| -> Vec<Series> {
        let mut series: Vec<Series> = CURVES
            .iter()
            .enumerate()
            .filter(|(_, (_, place))| *place == figure)
            .map(|(place, (name, _))| {
                let points = measured.iter().filter(|m| m.0 == place);
                Series::new(*name, points.map(|m| (m.1 as f64, m.2)).collect())
            })
            .collect();
        let floor = vec![(3.0, study.floor), (50.0, study.floor)];
        series.push(Series::new("halves of the test images", floor));
        series
    };
    for (figure, file, title) in [
        (
            0,
            "frechet-a.svg",
            "Digits: ancestral, first-order and two-call samplers",
        ),
        (1, "frechet-b.svg", "Digits: samplers of order 2 and 3"),
    ] {
        line_plot(
            &options.out.join(file),
            &Axes::new(title, "network calls", "Fréchet distance")
                .log_x()
                .log_y(),
            &series(figure),
        )?;
        results.figure(
            file,
            "Fréchet distance to the test images in a classifier's features against network calls, one \
             trained network. The line is what one half of the test images has to the other.",
        );
    }
    for (place, (name, _)) in CURVES.iter().enumerate() {
        for m in measured.iter().filter(|m| m.0 == place) {
            if [5, 10, 50, 200].contains(&m.1) {
                let metric = format!("Fréchet distance at {} calls", m.1);
                results
                    .rows
                    .push(study.row((*name).into(), metric, m.2, m.3));
            }
        }
    }
    Ok(())
}

/// Deterministic samplers of few steps against ancestral sampling, over all seeds.
fn orderings(results: &mut Results, study: &Study, models: &[Trained]) -> Result<()> {
    let mut work: Vec<Job<'_, f64>> = Vec::new();
    let names = ["dpmpp-2m", "ddim", "ddpm"];
    let budgets = [5usize, 10];
    for model in models {
        for name in names {
            for steps in budgets {
                work.push(Job {
                    cost: steps as f64,
                    work: Box::new(move || {
                        let net = model.open()?;
                        study.distance(&study.sample_named(&net, name, steps, model.seed)?)
                    }),
                });
            }
        }
    }
    let start = Instant::now();
    let mut values = jobs::run(work)?.into_iter();
    let mut table = Vec::new();
    for _ in models {
        let own: Vec<f64> = values.by_ref().take(names.len() * budgets.len()).collect();
        table.push(own);
    }
    let seconds = start.elapsed().as_secs_f64();
    for (k, name) in names.iter().enumerate().take(2) {
        for (b, steps) in budgets.iter().enumerate() {
            let at = |own: &Vec<f64>, k: usize| own[k * budgets.len() + b];
            let holds = table.iter().filter(|own| at(own, k) < at(own, 2)).count();
            let worst = table
                .iter()
                .map(|own| at(own, k) / at(own, 2))
                .fold(f64::MIN, f64::max);
            let mut row = study.row(
                format!("{name} against ddpm, {SEEDS} seeds"),
                format!("worst ratio of Fréchet distances at {steps} calls"),
                worst,
                seconds,
            );
            row.baseline = Some(Baseline {
                name: "equal".into(),
                value: 1.0,
            });
            row.note = format!(
                "ahead of ancestral sampling in {holds} of {SEEDS} seeds; the papers report it ahead"
            );
            results.rows.push(row);
        }
    }
    Ok(())
}

/// The same noise through several samplers at ten calls, one a row.
fn pictures(
    options: &Options,
    results: &mut Results,
    study: &Study,
    model: &Trained,
) -> Result<()> {
    let net = model.open()?;
    let names = ["ddpm", "ddim", "heun", "dpmpp-2m", "unipc-3"];
    let mut rows = Vec::new();
    for name in names {
        let steps = steps_for(name, 10).context("ten calls pay for steps")?;
        let images = study.sample_named(&net, name, steps, model.seed)?;
        rows.push(images.narrow(0, 0, 20)?);
    }
    for student in &model.students {
        let images = student.sample(study, model.seed)?;
        rows.push(images.narrow(0, 0, 20)?);
    }
    let all = Tensor::cat(&rows, 0)?;
    let layout = GridOptions {
        columns: Some(20),
        min_tile: 40,
        ..GridOptions::default()
    };
    let what = "the same noise, ten calls by five samplers, then students of 8, 4, 2 and 1";
    let texts = [("what".to_string(), what.to_string())];
    sample_grid(&all, &layout)?.write_png(&options.out.join("samples.png"), &texts)?;
    results.figure(
        "samples.png",
        "The same noise at ten calls: DDPM, DDIM, Heun, DPM-Solver++ 2M, UniPC-3 (rows 1 to 5), and \
         the students of 8, 4, 2 and 1 steps (rows 6 to 9).",
    );
    Ok(())
}
