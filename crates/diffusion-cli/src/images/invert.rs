//! `diffusion images invert`

use super::data::DataArgs;
use super::evaluate::opened;
use crate::out::{must_be_writable, out};
use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use candle_core::{DType, Tensor};
use clap::Args;
use diffusion_core::Report;
use diffusion_core::checkpoint::write_safetensors_atomic;
use diffusion_core::grid::Grid;
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::Cancel;
use diffusion_images::grid::{GridOptions, sample_grid};
use diffusion_images::invert::Invert as Request;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

pub const EXAMPLES: &str = "Example:
  diffusion images invert --model digits-model -n 8 --steps 50 --iterations 3 --out there-and-back.png

The picture has the held-out images in its first row, what DDIM makes of their latents in the second,
and the latents, a third of their size, in the third. Said are the root mean squared difference of
images and what came back, in grey levels of 256, and the mean and deviation of the latents, 0 and 1
where the images are like those that the model learned.";

/// Options of `diffusion images invert`.
#[derive(Args)]
pub struct Invert {
    /// Model folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Number of held-out images.
    #[arg(short, long, default_value_t = 8)]
    n: usize,
    /// Number of steps, the same in both directions.
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Network calls a step on the way up: more come nearer to the image again.
    #[arg(long, default_value_t = 3)]
    iterations: usize,
    /// Where the steps are, as for `sample`.
    #[arg(long)]
    grid: Option<String>,
    /// Images computed at a time; does not change the result.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// The PNG to write.
    #[arg(long)]
    out: PathBuf,
    /// Also write the latents, as safetensors: `latents`, `[n, C, H, W]`.
    #[arg(long, value_name = "FILE")]
    latents: Option<PathBuf>,
}

pub fn run(args: &Invert, global: &Global) -> Result<ExitCode> {
    let device = device::device(&global.device)?;
    if let Some(file) = &args.latents {
        must_be_writable("--latents", file, "safetensors")?;
    }
    must_be_writable("--out", &args.out, "png")?;
    let (model, splits) = opened(&args.model, &args.data, &device)?;
    let test = &splits.test;
    if !(1..=test.len()).contains(&args.n) {
        return Err(Report::new("-n", args.n)
            .expected(format!("1 to {}, the held-out images", test.len()))
            .config()
            .into());
    }
    let (images, labels) = test.batch(&(0..args.n).collect::<Vec<_>>(), &device)?;
    let labels = match labels {
        Some(labels) if model.classes() == test.classes() && !model.classes().is_empty() => {
            Some(labels.to_dtype(DType::U32)?.to_vec1()?)
        }
        _ => None,
    };
    let table = model.table()?;
    let grid = match &args.grid {
        Some(text) => Grid::parse(text, &table)?,
        None => SamplerConfig::named("ddim")?.usual_grid(&table),
    };
    let request = Request {
        grid,
        steps: args.steps,
        iterations: args.iterations,
        batch: args.batch,
    };
    let cancel = Cancel::new();
    interrupt::listen(&cancel)?;
    let steps = 2 * args.steps * args.n.div_ceil(args.batch.max(1));
    let mut progress = Progress::new(steps as u64, global.quiet, &cancel);
    let done = model.invert(&images, labels.as_deref(), &request, &mut progress)?;
    progress.done();
    let shown = (&done.latents / 3.0)?.clamp(-1.0, 1.0)?;
    let rows = Tensor::cat(&[&images, &done.back.clamp(-1.0, 1.0)?, &shown], 0)?;
    let options = GridOptions {
        columns: Some(args.n),
        ..GridOptions::default()
    };
    sample_grid(&rows, &options)?.write_png(&args.out, &[])?;
    if let Some(file) = &args.latents {
        let tensors = BTreeMap::from([("latents".to_string(), done.latents.clone())]);
        write_safetensors_atomic(file, &tensors, &BTreeMap::new())?;
    }
    // From −1 to 1 there are 255 steps of grey.
    let grey: Vec<f64> = done.errors.iter().map(|e| e * 127.5).collect();
    let mean = grey.iter().sum::<f64>() / grey.len() as f64;
    let worst = grey.iter().copied().fold(0.0, f64::max);
    let latents = done.latents.to_dtype(DType::F64)?;
    let centre = latents.mean_all()?.to_scalar::<f64>()?;
    let deviation = latents.sqr()?.mean_all()?.to_scalar::<f64>()? - centre * centre;
    let deviation = deviation.max(0.0).sqrt();
    if global.json {
        let all = serde_json::json!({
            "out": args.out, "n": args.n, "steps": args.steps, "iterations": args.iterations,
            "grey_levels": {"mean": mean, "worst": worst},
            "latents": {"mean": centre, "deviation": deviation},
        });
        out!("{all}");
    } else {
        out!(
            "{}: {} images back within {mean:.2} grey levels of 256 (the worst {worst:.2}); latents \
             have mean {centre:.3} and deviation {deviation:.3}",
            args.out.display(),
            args.n
        );
    }
    Ok(ExitCode::SUCCESS)
}
