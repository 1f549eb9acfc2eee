//! `diffusion images train`

use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use clap::Args;
use diffusion_core::limits::Limits;
use diffusion_core::train::{Both, Cancel, JsonLines, Outcome};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::{self, Color, Options};
use diffusion_images::validate::Validation;
use diffusion_images::{preset, run};
use std::path::PathBuf;
use std::process::ExitCode;

pub const EXAMPLES: &str = "Examples:
  diffusion images train --data digits --out digits-model
  diffusion images train --data photos/ --size 32 --out photo-model --minutes 30
  diffusion images train --data digits --out digits-model --resume";

/// Options of `diffusion images train`.
#[derive(Args)]
pub struct Train {
    /// `digits`, `mnist` or `emoji` (built in), an IDX or npz file, CIFAR-10's binary files, or a
    /// folder of images (sub-folders are classes).
    #[arg(long, default_value = "digits")]
    data: String,
    /// Folder for the model and the state of the run.
    #[arg(long, required_unless_present = "print_config")]
    out: Option<PathBuf>,
    /// Preset: auto, tiny, small or medium.
    #[arg(long, conflicts_with = "resume")]
    preset: Option<String>,
    /// TOML file whose values replace those of the preset.
    #[arg(long, conflicts_with = "resume")]
    config: Option<PathBuf>,
    /// Continue the run in --out from its newest valid checkpoint.
    #[arg(long)]
    resume: bool,
    /// Optimiser steps.
    #[arg(long, conflicts_with = "resume")]
    steps: Option<u64>,
    /// Stop after so many minutes; --resume goes on.
    #[arg(long, allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// Ignore labels: learn one distribution over all images.
    #[arg(long, conflicts_with = "resume")]
    unconditional: bool,
    /// Need less memory and about a third more time: activations inside residual blocks are not
    /// kept for the backward pass but computed again.
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Resize images of a folder to this many pixels, square.
    #[arg(long)]
    size: Option<u32>,
    /// Turn images of a folder into grey ones.
    #[arg(long)]
    grey: bool,
    /// Steps between two looks at the run: the loss on held-out images goes to metrics.jsonl, a grid
    /// of samples to OUT/run/samples; 0 for none.
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    validate_every: u64,
    /// Print the configuration and stop.
    #[arg(long)]
    print_config: bool,
}

pub fn run(args: &Train, global: &Global) -> Result<ExitCode> {
    let device = device::device(&global.device)?;
    let options = Options {
        resize: args.size,
        color: if args.grey {
            Color::Grey
        } else {
            Options::default().color
        },
    };
    let splits = data::splits(&args.data, &options)?;
    let mut config = match (&args.out, args.resume) {
        (Some(out), true) => run::stored_config(out)?,
        _ => configuration(args, &splits.train)?,
    };
    if let (Some(seed), false) = (global.seed, args.resume) {
        config.train.seed = seed;
    }
    if args.minutes.is_some() {
        config.train.max_minutes = args.minutes;
    }
    config.gradient_checkpointing |= args.gradient_checkpointing;
    config.check()?;
    let Some(out) = args.out.as_ref().filter(|_| !args.print_config) else {
        print!("{}", config.to_toml()?);
        return Ok(ExitCode::SUCCESS);
    };
    let cancel = Cancel::new();
    interrupt::listen(&cancel)?;
    let progress = Progress::new(config.train.steps, global.quiet, &cancel);
    let metrics = JsonLines::new(run::run_folder(out).join("metrics.jsonl"));
    let samples = run::run_folder(out).join("samples");
    let look = match args.validate_every {
        0 => None,
        every => Some(Validation::new(
            every,
            &splits.test,
            Some(samples),
            &config,
            &device,
        )?),
    };
    let mut observer = Both(Both(progress, metrics), look);
    let outcome = run::train(
        &config,
        &splits.train,
        out,
        args.resume,
        &device,
        &mut observer,
        &cancel,
    )?;
    observer.0.0.done();
    report(args, global, out, &config, outcome)
}

fn configuration(args: &Train, data: &data::Dataset) -> Result<ImageConfig> {
    let mut config = preset::preset(args.preset.as_deref().unwrap_or("auto"), data)?;
    if let Some(file) = &args.config {
        let text = Limits::default().read_config(file)?;
        config = ImageConfig::from_toml(&text, &file.display().to_string(), &config)?;
    }
    config.conditional &= !args.unconditional;
    if let Some(steps) = args.steps {
        preset::set_steps(&mut config, steps);
    }
    preset::fit(&mut config, data)?;
    Ok(config)
}

fn report(
    args: &Train,
    global: &Global,
    out: &std::path::Path,
    config: &ImageConfig,
    outcome: Outcome,
) -> Result<ExitCode> {
    let (finished, step) = match outcome {
        Outcome::Finished { step } => (true, step),
        Outcome::Interrupted { step } | Outcome::OutOfTime { step } => (false, step),
    };
    if global.json {
        println!(
            "{}",
            serde_json::json!({
                "model": out, "finished": finished, "step": step, "steps": config.train.steps,
                "seed": config.train.seed, "data": args.data,
            })
        );
    } else if finished {
        println!("{}: trained for {step} steps", out.display());
        println!(
            "next: diffusion images sample --model {} -n 64 --out grid.png",
            out.display()
        );
    } else {
        println!(
            "{}: stopped at step {step} of {}; --resume goes on",
            out.display(),
            config.train.steps
        );
    }
    match interrupt::exit_code() {
        Some(code) if !finished => Ok(code),
        _ => Ok(ExitCode::SUCCESS),
    }
}
