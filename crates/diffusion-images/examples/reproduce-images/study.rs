//! The study of one data set: baselines, models of several seeds, samplers, guidance.

use crate::plan::Plan;
use crate::rows::{ACCURACY, COVERAGE, FRECHET, NEAREST, Run, Table, metric};
use crate::{Options, baselines, pictures, vae};
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use diffusion_core::grid::Grid;
use diffusion_core::guide::Clip;
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::{Cancel, Event};
use diffusion_images::data::{self, Dataset, Splits};
use diffusion_images::metric::{Classifier, ClassifierConfig, Judge};
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::{preset, run as runs};
use std::path::PathBuf;
use std::time::Instant;

pub const REAL: &str = "real images";
pub const PCA: &str = "Gaussian in principal directions";
pub const VAE: &str = "small VAE";

/// What all parts of a study look at.
pub struct Study<'a> {
    pub options: &'a Options,
    pub plan: &'a Plan,
    pub splits: Splits,
    /// Held-out images that samples are compared with.
    reference: Dataset,
    /// Other held-out images, whose labels the samples are asked for, as many as there are samples.
    pub real: Dataset,
    pub labels: Vec<u32>,
    classifier: Classifier,
    start: Instant,
}

/// What one seed of a study gave.
#[derive(Default)]
pub struct Part {
    pub table: Table,
    /// File names and captions.
    pub figures: Vec<(String, String)>,
}

impl Part {
    pub fn figure(&mut self, file: &str, caption: &str) {
        self.figures.push((file.into(), caption.into()));
    }
}

impl<'a> Study<'a> {
    /// Reads the data and trains the classifier that judges.
    pub fn prepare(options: &'a Options, plan: &'a Plan) -> Result<Self> {
        let start = Instant::now();
        let splits = data::splits(&plan.data, &data::Options::default())?;
        // One half of the held-out images is the reference; the other says what real images score.
        let (reference, real) = splits.test.halves()?;
        let first: Vec<usize> = (0..real.len().min(plan.samples)).collect();
        let real = real.select(&first)?;
        let train = &splits.train;
        let study = Self {
            options,
            plan,
            labels: real.labels().map(<[u32]>::to_vec).unwrap_or_default(),
            real,
            reference,
            classifier: Classifier::train(train, &ClassifierConfig::fitted(train))?,
            splits,
            start,
        };
        study.say("classifier");
        Ok(study)
    }

    pub fn classes(&self) -> usize {
        self.splits.train.classes().len()
    }

    /// The judge of all samples.
    pub fn judge(&self) -> Result<Judge<'_>> {
        Ok(Judge::new(
            &self.classifier,
            &self.splits.train,
            &self.reference,
        )?)
    }

    /// Baselines, a model and its samples, for the seed of this place.
    pub fn seed(&self, judge: &Judge<'_>, place: usize) -> Result<Part> {
        let seed = self.plan.seeds[place];
        let mut part = Part::default();
        if place == 0 {
            let start = Instant::now();
            let (images, _) = self.real.all(&Device::Cpu)?;
            let real = Measured::of(REAL, images, start);
            self.measured(judge, &mut part.table, real)?;
        }
        self.baselines(judge, &mut part, place)?;
        self.say(&format!("baselines, seed {seed}"));
        let (model, folder) = self.trained(seed)?;
        self.say(&format!("model, seed {seed}"));
        self.guidance(judge, &mut part.table, &model, seed)?;
        if place < self.plan.curve_seeds {
            self.samplers(judge, &mut part.table, &model, seed)?;
        }
        if place == 0 {
            pictures::of_model(self, &model, &folder, &mut part)?;
        }
        self.say(&format!("samples, seed {seed}"));
        Ok(part)
    }

    /// Puts the seeds together.
    pub fn finish(&self, parts: Vec<Part>, results: &mut Results) -> Result<()> {
        let mut table = Table::default();
        for part in parts {
            table.merge(part.table);
            for (file, caption) in part.figures {
                results.figure(&file, &caption);
            }
        }
        let split = format!(
            "{} samples against {} test images",
            self.real.len(),
            self.reference.len()
        );
        table.rows(self.plan, REAL, &split, results);
        pictures::curves(self, &table, results)?;
        if self.plan.targets {
            targets(self, &table, &split, results)?;
        }
        Ok(())
    }

    fn say(&self, what: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        println!("{}: {what}, {seconds:.0} s", self.plan.name);
    }
}

/// Images with what made them.
struct Measured {
    name: String,
    note: &'static str,
    calls: usize,
    seed: u64,
    images: Tensor,
    seconds: f64,
}

impl Measured {
    fn of(name: &str, images: Tensor, start: Instant) -> Self {
        Self {
            name: name.into(),
            note: "",
            calls: 0,
            seed: 0,
            images,
            seconds: start.elapsed().as_secs_f64(),
        }
    }
}

impl Study<'_> {
    /// The labels of the samples, where there are classes.
    pub fn asked(&self) -> Option<&[u32]> {
        (!self.labels.is_empty()).then_some(self.labels.as_slice())
    }

    fn measured(&self, judge: &Judge<'_>, table: &mut Table, m: Measured) -> Result<()> {
        // A system that was not asked for classes is not right or wrong about them.
        let asks = m.calls > 0 || m.name == REAL || m.name == VAE || m.name.contains("class");
        let labels = self.asked().filter(|_| asks);
        let evaluation = judge.evaluate(&m.images, labels, m.seed)?;
        let run = Run {
            seed: m.seed,
            evaluation,
            seconds: m.seconds,
        };
        table.add(&m.name, m.note, m.calls, run);
        Ok(())
    }

    fn baselines(&self, judge: &Judge<'_>, part: &mut Part, place: usize) -> Result<()> {
        let seed = self.plan.seeds[place];
        let (train, count) = (&self.splits.train, self.real.len());
        let (all, of_class) = self.plan.directions;
        let start = Instant::now();
        let made = [
            (
                "Gaussian on pixels",
                "each pixel by itself",
                baselines::pixels(train, count, seed)?,
            ),
            (
                PCA,
                "one Gaussian for all images",
                baselines::pca(train, all, count, seed)?,
            ),
        ];
        let mut made = made.to_vec();
        if let Some(labels) = self.asked() {
            made.push((
                "the same, one for each class",
                "",
                baselines::pca_of_classes(train, of_class, labels, seed)?,
            ));
        }
        let config = vae::Config {
            hidden: 256,
            latent: 10,
            steps: self.plan.vae_steps,
            seed,
        };
        let drawn = vae::samples(train, &self.labels, count, &config)?;
        made.push((VAE, "the mean of its decoder", drawn));
        for (name, note, images) in made {
            if place == 0 && (name == PCA || name == VAE) {
                pictures::baseline(self, name, &images, part)?;
            }
            let measured = Measured {
                note,
                seed,
                ..Measured::of(name, images, start)
            };
            self.measured(judge, &mut part.table, measured)?;
        }
        Ok(())
    }

    fn trained(&self, seed: u64) -> Result<(ImageModel, PathBuf)> {
        let mut config = preset::preset("quick", &self.splits.train)?;
        config.train.seed = seed;
        preset::set_steps(&mut config, self.plan.steps);
        let (name, start) = (self.plan.name, Instant::now());
        let log = |event: &Event| {
            if let Event::Step { step, loss, .. } = event {
                if step % 100 == 0 {
                    let seconds = start.elapsed().as_secs_f64();
                    println!("{name}: step {step}, loss {loss:.4}, {seconds:.0} s");
                }
            }
        };
        let trained = runs::trained(
            &self.options.cache,
            &config,
            &self.splits.train,
            &Device::Cpu,
            log,
            &Cancel::new(),
        )?;
        let model = ImageModel::open(&trained.folder, &Device::Cpu)?;
        Ok((model, trained.folder))
    }

    /// What to ask a sampler for, with the labels of the real images.
    pub fn request(
        &self,
        model: &ImageModel,
        sampler: &str,
        steps: usize,
        guidance: f64,
        seed: u64,
    ) -> Result<SampleRequest> {
        let labels = self.asked().map(<[u32]>::to_vec);
        Ok(SampleRequest {
            count: self.real.len(),
            sampler: SamplerConfig::named(sampler)?,
            grid: match sampler {
                "heun" | "edm" => Grid::edm(&model.table()?),
                _ => Grid::Trailing,
            },
            steps,
            guidance: if labels.is_some() { guidance } else { 1.0 },
            labels,
            clip: Clip::Static { range: 1.0 },
            batch: 64,
            brownian: false,
            seed,
        })
    }

    /// Samples and measures, unless that was done already.
    fn measure(
        &self,
        judge: &Judge<'_>,
        table: &mut Table,
        model: &ImageModel,
        (sampler, steps, guidance): (&str, usize, f64),
        seed: u64,
    ) -> Result<()> {
        let name = system(sampler, steps, guidance);
        if table.has(&name, seed) {
            return Ok(());
        }
        let start = Instant::now();
        let request = self.request(model, sampler, steps, guidance, seed)?;
        let images = model.sample(&request, &mut ())?;
        let twice = if guidance == 1.0 { 1 } else { 2 };
        // Heun asks twice a step, but for the last one.
        let calls = twice
            * if matches!(sampler, "heun" | "edm") {
                2 * steps - 1
            } else {
                steps
            };
        let measured = Measured {
            calls,
            seed,
            ..Measured::of(&name, images, start)
        };
        self.measured(judge, table, measured)
    }

    /// The guidance sweep with the main sampler.
    fn guidance(
        &self,
        judge: &Judge<'_>,
        table: &mut Table,
        model: &ImageModel,
        seed: u64,
    ) -> Result<()> {
        let Plan {
            sampler,
            sampler_steps,
            ..
        } = *self.plan;
        for &guidance in self.plan.sweep {
            self.measure(
                judge,
                table,
                model,
                (sampler, sampler_steps, guidance),
                seed,
            )?;
        }
        Ok(())
    }

    /// Every sampler at several numbers of steps, conditional without guidance.
    fn samplers(
        &self,
        judge: &Judge<'_>,
        table: &mut Table,
        model: &ImageModel,
        seed: u64,
    ) -> Result<()> {
        for curve in self.plan.curves {
            for &steps in curve.steps {
                self.measure(judge, table, model, (curve.sampler, steps, 1.0), seed)?;
            }
        }
        Ok(())
    }
}

/// The name of a sampler's rows.
pub fn system(sampler: &str, steps: usize, guidance: f64) -> String {
    let sampler = match sampler {
        "heun" => "edm (heun)",
        "edm" => "edm with churn",
        other => other,
    };
    format!("{sampler}, {steps} steps, guidance {guidance}")
}

/// What the section promises of its main rows, each for the worst of the seeds.
fn targets(study: &Study<'_>, table: &Table, split: &str, results: &mut Results) -> Result<()> {
    let plan = study.plan;
    let name = system(plan.sampler, plan.sampler_steps, plan.guidance);
    let find = |name: &str| table.get(name).with_context(|| name.to_string());
    let (main, real, pca, vae) = (find(&name)?, find(REAL)?, find(PCA)?, find(VAE)?);
    let frechet = metric(FRECHET);
    let ratios = |other: &crate::rows::System| -> Vec<f64> {
        let pairs = main.values(frechet).into_iter().zip(other.values(frechet));
        pairs.map(|(a, b)| a / b).collect()
    };
    let floor = real.mean(metric(COVERAGE)).unwrap_or(1.0);
    let coverage = main.values(metric(COVERAGE));
    let share = coverage.iter().map(|c| c / floor).collect();
    let all: [(&str, Vec<f64>, Better, f64); 5] = [
        (
            "labelled as asked",
            main.values(metric(ACCURACY)),
            Better::Higher,
            0.95,
        ),
        (
            "Fréchet distance over that of the principal directions",
            ratios(pca),
            Better::Lower,
            1.0 / 3.0,
        ),
        (
            "Fréchet distance over that of the VAE",
            ratios(vae),
            Better::Lower,
            1.0,
        ),
        (
            "coverage over that of real images",
            share,
            Better::Higher,
            0.5,
        ),
        (
            "nearest training image over that of held-out images",
            main.values(metric(NEAREST)),
            Better::Higher,
            0.9,
        ),
    ];
    for (what, values, better, limit) in all {
        let worst = match better {
            Better::Lower => values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            Better::Higher => values.iter().copied().fold(f64::INFINITY, f64::min),
        };
        let met = match better {
            Better::Lower => worst <= limit,
            Better::Higher => worst >= limit,
        };
        let shown: Vec<String> = values.iter().map(|v| format!("{v:.3}")).collect();
        results.rows.push(Row {
            system: name.clone(),
            dataset: plan.name.into(),
            split: split.into(),
            metric: format!("target: {what}"),
            value: worst,
            better,
            baseline: Some(Baseline {
                name: "limit".into(),
                value: limit,
            }),
            published: None,
            seconds: 0.0,
            note: format!(
                "{}; by seed {}",
                if met { "met" } else { "not met" },
                shown.join(", ")
            ),
        });
    }
    Ok(())
}
