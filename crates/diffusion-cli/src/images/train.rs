//! `diffusion images train`

use super::data::{DataArgs, must_be_those};
use crate::out::{note, out};
use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use clap::Args;
use diffusion_core::Report;
use diffusion_core::limits::Limits;
use diffusion_core::train::{Both, Cancel, JsonLines, Outcome};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::{Dataset, Splits};
use diffusion_images::validate::Validation;
use diffusion_images::{preset, run};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub const EXAMPLES: &str = "Examples:
  diffusion images train --data digits --out digits-model
  diffusion images train --data photos/ --size 32 --broken skip --flip --out photo-model --minutes 30
  diffusion images train --out photo-model --resume

Pictures of a folder whose sizes differ need --size, a multiple of 4 for all presets.";

/// Options of `diffusion images train`.
#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    data: DataArgs,
    /// Folder for the model and the state of the run.
    #[arg(long, required_unless_present = "print_config")]
    out: Option<PathBuf>,
    /// Preset: auto, tiny, quick, small or medium.
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
    /// Images in a batch; the preset's when absent. Less needs less memory.
    #[arg(long, conflicts_with = "resume", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: Option<u32>,
    /// Ignore labels: learn one distribution over all images.
    #[arg(long, conflicts_with = "resume")]
    unconditional: bool,
    /// Need less memory and about a third more time: activations inside residual blocks are not
    /// kept for the backward pass but computed again.
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Mirror training images left to right at random. Not for digits, letters and the like.
    #[arg(long, conflicts_with = "resume")]
    flip: bool,
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
    let resumed = args.out.as_ref().filter(|_| args.resume);
    let stored = resumed.map(|out| run::stored_config(out)).transpose()?;
    let out = args.out.as_ref().filter(|_| !args.print_config);
    if let (Some(out), false) = (out, args.resume) {
        run::refuse_existing(out)?;
        run::refuse_foreign(out)?;
    }
    let (source, record) = match resumed {
        Some(out) => args.data.of_model(out)?,
        None => (args.data.new_run(), None),
    };
    let (splits, skipped) = args.data.open(&source)?;
    if let Some(record) = &record {
        must_be_those(record, &source, &splits)?;
    }
    let mut config = match stored {
        Some(stored) => stored,
        None => configuration(args, &splits.train)?,
    };
    match global.seed {
        Some(seed) if args.resume && seed != config.train.seed => {
            return Err(Report::new("--seed", seed)
                .expected(format!("{}, as the run began with", config.train.seed))
                .remedy("leave it out, or start another run in a new folder")
                .config()
                .into());
        }
        Some(seed) => config.train.seed = seed,
        None => {}
    }
    if args.minutes.is_some() {
        config.train.max_minutes = args.minutes;
    }
    config.gradient_checkpointing |= args.gradient_checkpointing;
    config.check()?;
    let Some(out) = out else {
        out!("{}", config.to_toml()?.trim_end());
        return Ok(ExitCode::SUCCESS);
    };
    run::remember_data(out, &source, &splits.train)?;
    if !global.quiet {
        understood(&config, &splits);
    }
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
    let facts = serde_json::json!({ "data": source.source, "skipped": skipped });
    report(global, out, &config, outcome, facts)
}

/// What the run is about, before the first step.
fn understood(config: &ImageConfig, splits: &Splits) {
    let (train, test) = (&splits.train, &splits.test);
    let classes = match train.classes() {
        [] => "no classes".to_string(),
        names if names.len() <= 12 => format!("classes {}", names.join(", ")),
        names => format!("{} classes", names.len()),
    };
    let whole = config.train.batch_size * config.train.accumulate;
    note!(
        "{} images to learn from and {} held out, {} x {} x {}, {classes}; {} steps of {whole}",
        train.len(),
        test.len(),
        train.channels(),
        train.height(),
        train.width(),
        config.train.steps,
    );
}

fn configuration(args: &Train, data: &Dataset) -> Result<ImageConfig> {
    let mut config = preset::preset(args.preset.as_deref().unwrap_or("auto"), data)?;
    if let Some(file) = &args.config {
        let text = Limits::default().read_config(file)?;
        config = ImageConfig::from_toml(&text, &file.display().to_string(), &config)?;
    }
    config.conditional &= !args.unconditional;
    config.flip |= args.flip;
    if let Some(batch) = args.batch {
        config.train.batch_size = batch as usize;
    }
    if let Some(steps) = args.steps {
        preset::set_steps(&mut config, steps);
    }
    preset::fit(&mut config, data)?;
    Ok(config)
}

fn report(
    global: &Global,
    out: &Path,
    config: &ImageConfig,
    outcome: Outcome,
    mut facts: serde_json::Value,
) -> Result<ExitCode> {
    let (finished, step) = match outcome {
        Outcome::Finished { step } => (true, step),
        Outcome::Interrupted { step } | Outcome::OutOfTime { step } => (false, step),
    };
    if global.json {
        facts["model"] = serde_json::json!(out);
        facts["finished"] = finished.into();
        facts["step"] = step.into();
        facts["steps"] = config.train.steps.into();
        facts["seed"] = config.train.seed.into();
        out!("{facts}");
    } else if finished {
        out!("{}: trained for {step} steps", out.display());
        out!(
            "next: diffusion images sample --model {} -n 64 --out grid.png",
            out.display()
        );
    } else {
        out!(
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
