//! `diffusion images evaluate`

use super::data::{DataArgs, must_be_those};
use crate::out::{note, out};
use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use candle_core::Device;
use clap::Args;
use diffusion_core::Report;
use diffusion_core::guide::Clip;
use diffusion_core::limits::Limits;
use diffusion_core::train::Cancel;
use diffusion_images::data::{Dataset, Splits};
use diffusion_images::metric::inception::Inception;
use diffusion_images::metric::{Classifier, ClassifierConfig, Evaluation, Judge, View};
use diffusion_images::model::{ImageModel, SampleRequest};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub const EXAMPLES: &str = "Example:
  diffusion images evaluate --model digits-model --guidance 2

A classifier is trained on the training images; its features carry the distances. Images without
classes are turned by quarters for it, and it learns to tell the turns. Samples are compared with
the held-out images. Below them stands what real images score, one half of the held-out ones against
the other; a Fréchet distance from fewer images is larger by itself.

With --inception FILE the features are those of FID: FILE is pt_inception-2015-12-05-6726825d.pth
(pytorch-fid's), which is not part of this program.";

/// Options of `diffusion images evaluate`.
#[derive(Args)]
pub struct Evaluate {
    /// Model folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Number of samples; as many as there are held-out images when absent.
    #[arg(short, long)]
    n: Option<usize>,
    /// Sampler, as for `sample`.
    #[arg(long)]
    sampler: Option<String>,
    /// Steps of the sampler, as for `sample`.
    #[arg(long)]
    steps: Option<usize>,
    /// Classifier-free guidance, for models with classes.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    guidance: f64,
    /// Images computed at a time.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Weights of the Inception network of FID, whose features then carry the distances.
    #[arg(long, value_name = "FILE")]
    inception: Option<PathBuf>,
}

/// Each half of the held-out images needs more neighbours than coverage asks for.
const FEWEST: usize = 12;

pub fn run(args: &Evaluate, global: &Global) -> Result<ExitCode> {
    let device = device::device(&global.device)?;
    let seed = global.seed.unwrap_or(0);
    let (model, splits) = opened(&args.model, &args.data, &device)?;
    let (train, test) = (&splits.train, &splits.test);
    if test.len() < FEWEST {
        let found = format!(
            "{} held-out images of {}",
            test.len(),
            train.len() + test.len()
        );
        return Err(Report::new(format!("data `{}`", test.name()), found)
            .expected(format!(
                "at least {FEWEST} held-out images, to compare with"
            ))
            .remedy("add images; a fifth of them is held out")
            .input()
            .into());
    }
    let count = args.n.unwrap_or(test.len());
    if !(6..=100_000).contains(&count) {
        return Err(Report::new("-n", count)
            .expected("6 to 100000 samples")
            .config()
            .into());
    }
    let labels = classes(&model, test, count)?;
    let way = super::way::way(&model, args.sampler.as_deref(), args.steps)?;
    let request = SampleRequest {
        count,
        sampler: way.sampler.clone(),
        grid: way.grid.clone(),
        steps: way.steps,
        labels: labels.clone(),
        guidance: args.guidance,
        clip: Clip::Static { range: 1.0 },
        batch: args.batch,
        brownian: false,
        seed,
    };
    let cancel = Cancel::new();
    interrupt::listen(&cancel)?;
    let inception = match &args.inception {
        Some(file) => Some(Inception::open(file, &Limits::default())?),
        None => None,
    };
    let batches = count.div_ceil(args.batch.max(1));
    let mut progress = Progress::new((batches * way.steps) as u64, global.quiet, &cancel);
    let images = way.sample(&model, Some(train), 100, &request, &mut progress)?;
    progress.done();
    let classifier = Classifier::train(train, &ClassifierConfig::fitted(train))?;
    let view = match &inception {
        Some(network) => View::Inception(network),
        None => View::Classifier(&classifier),
    };
    let judge = Judge::with_view(view, &classifier, train, test)?;
    let samples = judge.evaluate(&images, labels.as_deref(), seed)?;
    report(
        &samples,
        &floor(view, &classifier, train, test, seed)?,
        global,
    )?;
    Ok(ExitCode::SUCCESS)
}

/// A model and the data that it learned from, or others of the same shape that are named.
pub fn opened(folder: &Path, data: &DataArgs, device: &Device) -> Result<(ImageModel, Splits)> {
    let model = ImageModel::open(folder, device)?;
    let (source, record) = data.of_model(folder)?;
    let (splits, _) = data.open(&source)?;
    if let Some(record) = &record {
        if data.names_other(record)? {
            note!("the model learned from other data: {}", record.data.source);
        } else {
            must_be_those(record, &source, &splits)?;
        }
    }
    model.must_make(&splits.train)?;
    Ok((model, splits))
}

/// The classes to ask for: as often as they occur among the held-out images.
fn classes(model: &ImageModel, test: &Dataset, count: usize) -> Result<Option<Vec<u32>>> {
    if model.classes().is_empty() {
        return Ok(None);
    }
    if model.classes() != test.classes() {
        let found = format!("classes {}", test.classes().join(", "));
        return Err(Report::new("--data", found)
            .expected(format!("{}, as in the model", model.classes().join(", ")))
            .remedy("give the data that the model was trained on")
            .config()
            .into());
    }
    let labels = test.labels().unwrap_or_default();
    Ok(Some(labels.iter().copied().cycle().take(count).collect()))
}

/// What real images score: one half of the held-out ones judged by the other.
fn floor(
    view: View<'_>,
    classifier: &Classifier,
    train: &Dataset,
    test: &Dataset,
    seed: u64,
) -> Result<Evaluation> {
    let (even, odd) = test.halves()?;
    let (images, _) = odd.all(&Device::Cpu)?;
    Ok(Judge::with_view(view, classifier, train, &even)?.evaluate(&images, odd.labels(), seed)?)
}

fn report(samples: &Evaluation, floor: &Evaluation, global: &Global) -> Result<()> {
    if global.json {
        let both = serde_json::json!({ "samples": samples, "floor": floor });
        out!("{both}");
    } else {
        out!("samples\n{samples}\nfloor: real images against real images\n{floor}");
    }
    Ok(())
}
