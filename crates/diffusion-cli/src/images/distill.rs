//! `diffusion images distill`

use super::data::{DataArgs, must_be_those};
use crate::out::{note, out};
use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, value_parser};
use diffusion_core::Report;
use diffusion_core::train::{Both, Cancel, JsonLines, Observer};
use diffusion_images::distill::{self, DistillConfig, Method, Reached, Stage};
use diffusion_images::run;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub const EXAMPLES: &str = "Examples:
  diffusion images distill --model digits-model --out digits-4 --to 4
  diffusion images distill --model digits-model --out digits-1 --to 1 --method knowledge --steps 3000
  diffusion images distill --out digits-4 --resume

Methods:
  progressive  a student of half the steps, which then teaches one of half of those, down to --to
  consistency  jumps to the image that agree along the teacher's trajectories, --to of them
  knowledge    one step, from pairs of noise and the image that the teacher makes of it

The result is a model of its own: `diffusion images sample` takes the sampler and the steps that it
was distilled for. Students learn velocities, also from a teacher that says the noise; such a teacher's
first halving takes twice the steps.";

/// Options of `diffusion images distill`.
#[derive(Args)]
pub struct Distill {
    /// The trained model that teaches.
    #[arg(long, required_unless_present = "resume", conflicts_with = "resume")]
    model: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    /// Folder for the student and the state of the run.
    #[arg(long)]
    out: PathBuf,
    /// Steps of the student.
    #[arg(long, default_value_t = 4, conflicts_with = "resume", value_parser = value_parser!(u32).range(1..=65_536))]
    to: u32,
    /// Steps of the teacher: --to doubled as often as you like, or for consistency the number of levels, a
    /// multiple of --to. When absent, up to 64.
    #[arg(long, conflicts_with = "resume", value_parser = value_parser!(u32).range(2..=65_536))]
    from: Option<u32>,
    /// How the student is taught.
    #[arg(long, default_value = "progressive", conflicts_with = "resume", value_parser = methods())]
    method: Method,
    /// Optimiser steps for each halving; for all of the training of the other methods.
    #[arg(long, default_value_t = 1000, conflicts_with = "resume", value_parser = value_parser!(u64).range(1..))]
    steps: u64,
    /// Images in a batch; those of the teacher's training when absent.
    #[arg(long, conflicts_with = "resume", value_parser = value_parser!(u32).range(1..=65_536))]
    batch: Option<u32>,
    /// Pairs that the teacher makes for knowledge distillation.
    #[arg(long, default_value_t = 2048, conflicts_with = "resume", value_parser = value_parser!(u32).range(1..=1_000_000))]
    pairs: u32,
    /// Continue the run in --out from its newest valid checkpoint.
    #[arg(long)]
    resume: bool,
}

fn methods() -> impl TypedValueParser<Value = Method> {
    PossibleValuesParser::new(["progressive", "consistency", "knowledge"]).map(|name| {
        match name.as_str() {
            "consistency" => Method::Consistency,
            "knowledge" => Method::Knowledge,
            _ => Method::Progressive,
        }
    })
}

pub fn run(args: &Distill, global: &Global) -> Result<ExitCode> {
    let device = device::device(&global.device)?;
    let out = &args.out;
    let mut config = match &args.model {
        Some(model) => {
            run::refuse_existing(out)?;
            run::refuse_foreign(out)?;
            configuration(args, model)?
        }
        None => distill::stored_config(out)?,
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
    // The data are those that the teacher learned from, unless others are named.
    let noted = if args.resume { out } else { &config.teacher };
    let (source, record) = args.data.of_model(noted)?;
    let (splits, _) = args.data.open(&source)?;
    if let Some(record) = &record
        && (args.resume || !args.data.names_other(record)?)
    {
        must_be_those(record, &source, &splits)?;
    }
    if !args.resume {
        // Refused before anything is written.
        config.stages(&diffusion_images::saved::SavedModel::open(
            &config.teacher,
            &Default::default(),
        )?)?;
        run::remember_data(out, &source, &splits.train)?;
    }
    let cancel = Cancel::new();
    interrupt::listen(&cancel)?;
    let folder = run::run_folder(out);
    let mut observe = |stage: &Stage| -> diffusion_core::Result<Box<dyn Observer>> {
        if !global.quiet {
            note!("{}", lesson(&config, stage));
        }
        let progress = Progress::new(stage.train_steps, global.quiet, &cancel);
        let metrics = JsonLines::new(folder.join(stage.folder()).join("metrics.jsonl"));
        Ok(Box::new(Both(progress, metrics)))
    };
    let reached = distill::distill(
        &config,
        &splits.train,
        out,
        args.resume,
        &device,
        &mut observe,
        &cancel,
    )?;
    report(global, out, &config, &reached)
}

fn configuration(args: &Distill, model: &Path) -> Result<DistillConfig> {
    let mut config = DistillConfig::new(model, args.method, args.to as usize, args.steps)?;
    if let Some(from) = args.from {
        config.from = from as usize;
    }
    if let Some(batch) = args.batch {
        config.train.batch_size = batch as usize;
    }
    config.pairs = args.pairs as usize;
    Ok(config)
}

/// So many steps, in words.
fn steps(count: usize) -> String {
    match count {
        1 => "1 step".into(),
        n => format!("{n} steps"),
    }
}

/// What a student is about to learn.
fn lesson(config: &DistillConfig, stage: &Stage) -> String {
    let (from, to, train) = (stage.from, steps(stage.to), stage.train_steps);
    let batch = config.train.batch_size * config.train.accumulate;
    match config.method {
        Method::Progressive => {
            format!("a student for {to} from a teacher of {from}: {train} steps of {batch}")
        }
        Method::Consistency => {
            format!("a consistency model on {from} levels: {train} steps of {batch}")
        }
        Method::Knowledge => format!(
            "a student for one step from {} images of {from} steps: {train} steps of {batch}",
            config.pairs
        ),
    }
}

fn report(
    global: &Global,
    out: &Path,
    config: &DistillConfig,
    reached: &Reached,
) -> Result<ExitCode> {
    let (stage, step) = (&reached.stage, reached.step);
    if global.json {
        out!(
            "{}",
            serde_json::json!({
                "model": out, "method": config.method.name(), "finished": reached.finished,
                "sampler_steps": stage.to, "step": step, "steps": stage.train_steps,
                "seed": config.train.seed,
            })
        );
    } else if reached.finished {
        out!("{}: distilled for {}", out.display(), steps(stage.to));
        out!(
            "next: diffusion images sample --model {} -n 64 --out grid.png",
            out.display()
        );
    } else {
        out!(
            "{}: stopped at step {step} of {} of the student for {}; --resume goes on",
            out.display(),
            stage.train_steps,
            steps(stage.to)
        );
    }
    match interrupt::exit_code() {
        Some(code) if !reached.finished => Ok(code),
        _ => Ok(ExitCode::SUCCESS),
    }
}
