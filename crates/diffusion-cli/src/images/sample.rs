//! `diffusion images sample`

use super::data::DataArgs;
use super::evaluate::opened;
use super::way::{self, MEASURED, Measured};
use crate::out::{must_be_writable, out};
use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use clap::Args;
use diffusion_core::Report;
use diffusion_core::grid::{GRIDS, Grid};
use diffusion_core::guide::Clip;
use diffusion_core::sample::SAMPLERS;
use diffusion_core::train::Cancel;
use diffusion_images::grid::{GridOptions, sample_grid};
use diffusion_images::model::{ImageModel, SampleRequest};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

pub const EXAMPLES: &str = "Examples:
  diffusion images sample --model digits-model -n 64 --out grid.png
  diffusion images sample --model digits-model -n 20 --class 7 --guidance 2 --out sevens.png
  diffusion images sample --model digits-model -n 30 --class all --sampler ddim --steps 50 --out all.png
  diffusion images sample --model digits-model --sampler analytic --steps 10 --out analytic.png

Guidance, and samples without a class, need a label that stands for no class. Models that were
trained here have one; for a model of others write {\"null_class\": K} to MODEL/classes.json if
label K was withheld in training.";

/// Options of `diffusion images sample`.
#[derive(Args)]
pub struct Sample {
    /// Model folder, ours or a UNet2DModel pipeline of diffusers.
    #[arg(long)]
    model: PathBuf,
    /// Number of images.
    #[arg(short, long, default_value_t = 64)]
    n: usize,
    /// Sampler: a name, or its parameters as JSON. [default: dpmpp-2m, or what the model was distilled
    /// for]
    #[arg(long)]
    sampler: Option<String>,
    /// Number of steps. [default: 20, or what the model was distilled for]
    #[arg(long)]
    steps: Option<usize>,
    /// Where the steps are: a name, or its parameters as JSON; the sampler's usual grid when absent.
    #[arg(long)]
    grid: Option<String>,
    /// Draw the noise of a sampler's steps from one Brownian path an image, so that more steps refine
    /// the same picture. Slower.
    #[arg(long)]
    brownian: bool,
    /// Training images that the variances of an analytic sampler are measured on. The options of data
    /// below are for these samplers alone. [default: 100]
    #[arg(long, value_parser = positive)]
    moments: Option<usize>,
    #[command(flatten)]
    data: DataArgs,
    /// Class name or index, or `all` for one after the other; the withheld label when absent.
    #[arg(long)]
    class: Option<String>,
    /// Classifier-free guidance: 0 ignores the class, 1 is conditional, more is sharper.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    guidance: f64,
    /// Images computed at a time; does not change the result.
    #[arg(long, default_value_t = 64, value_parser = positive)]
    batch: usize,
    /// Images in a row of the grid.
    #[arg(long)]
    columns: Option<usize>,
    /// The PNG to write.
    #[arg(long)]
    out: PathBuf,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number of at least 1".into()),
        Ok(n) => Ok(n),
    }
}

/// The examples, and every sampler and grid with what it is.
pub fn long_help() -> String {
    let mut text = String::from("Samplers:\n");
    for sampler in SAMPLERS {
        text += &format!("  {:<19} {}\n", sampler.name, sampler.about);
    }
    for Measured { name, about, .. } in MEASURED {
        text += &format!("  {name:<19} {about}\n");
    }
    text += "Grids:\n";
    for (name, about) in GRIDS {
        text += &format!("  {name:<19} {about}\n");
    }
    text += "Both also take what differs from a name as JSON, for example\n  \
             --sampler '{\"name\": \"dpmpp-3m-sde\", \"lower_order_final\": false}'\n  \
             --grid '{\"kind\": \"karras\", \"rho\": 5}'\n";
    text + EXAMPLES
}

fn labels(args: &Sample, model: &ImageModel) -> Result<Option<Vec<u32>>> {
    let Some(class) = &args.class else {
        return Ok(None);
    };
    match model.classes().len() {
        0 => Err(Report::new("--class", class)
            .expected("no class: this model is unconditional")
            .config()
            .into()),
        n if class == "all" => Ok(Some((0..args.n).map(|i| (i % n) as u32).collect())),
        _ => Ok(Some(vec![model.labels().find(class)?; args.n])),
    }
}

pub fn run(args: &Sample, global: &Global) -> Result<ExitCode> {
    if args.n > 100_000 {
        return Err(Report::new("-n", args.n)
            .expected("at most 100000 images")
            .config()
            .into());
    }
    must_be_writable("--out", &args.out, "png")?;
    let device = device::device(&global.device)?;
    // A sampler that does not exist is said before the model is read.
    if let Some(text) = &args.sampler {
        way::sampler(text)?;
    }
    let (model, train) = if way::measured(args.sampler.as_deref()).is_some() {
        let (model, splits) = opened(&args.model, &args.data, &device)?;
        (model, Some(splits.train))
    } else {
        args.data.unused("a sampler that is measured first")?;
        if let Some(moments) = args.moments {
            return Err(Report::new("--moments", moments)
                .expected("--sampler analytic or analytic-ddim")
                .remedy("leave --moments out")
                .config()
                .into());
        }
        (ImageModel::open(&args.model, &device)?, None)
    };
    let way = way::way(&model, args.sampler.as_deref(), args.steps)?;
    let grid = match &args.grid {
        Some(text) => Grid::parse(text, &model.table()?)?,
        None => way.grid.clone(),
    };
    let seed = global.seed.unwrap_or(0);
    let request = SampleRequest {
        count: args.n,
        sampler: way.sampler.clone(),
        grid,
        steps: way.steps,
        labels: labels(args, &model)?,
        guidance: args.guidance,
        clip: Clip::Static { range: 1.0 },
        batch: args.batch,
        brownian: args.brownian,
        seed,
    };
    let cancel = Cancel::new();
    interrupt::listen(&cancel)?;
    let batches = args.n.div_ceil(args.batch.max(1));
    let mut progress = Progress::new((batches * way.steps) as u64, global.quiet, &cancel);
    let start = Instant::now();
    let moments = args.moments.unwrap_or(100);
    let images = way.sample(&model, train.as_ref(), moments, &request, &mut progress)?;
    progress.done();
    let seconds = start.elapsed().as_secs_f64();
    let picture = sample_grid(
        &images,
        &GridOptions {
            columns: args.columns,
            ..GridOptions::default()
        },
    )?;
    let mut settings = vec![
        (
            "Software".to_string(),
            format!("diffusion {}", env!("CARGO_PKG_VERSION")),
        ),
        ("model".to_string(), args.model.display().to_string()),
        ("n".to_string(), args.n.to_string()),
        ("sampler".to_string(), way.name.clone()),
        ("steps".to_string(), way.steps.to_string()),
        ("grid".to_string(), serde_json::to_string(&request.grid)?),
        ("seed".to_string(), seed.to_string()),
    ];
    if let Some(class) = &args.class {
        settings.push(("class".to_string(), class.clone()));
        settings.push(("guidance".to_string(), args.guidance.to_string()));
    }
    picture.write_png(&args.out, &settings)?;
    if global.json {
        out!(
            "{}",
            serde_json::json!({
                "out": args.out, "n": args.n, "sampler": way.name, "steps": way.steps,
                "seed": seed, "seconds": seconds,
            })
        );
    } else {
        out!(
            "{}: {} images in {seconds:.1} s",
            args.out.display(),
            args.n
        );
    }
    Ok(ExitCode::SUCCESS)
}
