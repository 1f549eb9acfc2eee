//! The `diffusion` command.

mod convert;
mod device;
mod images;
mod inspect;
mod interrupt;
mod out;
mod progress;

use crate::out::note;
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::process::ExitCode;

/// Train, sample and inspect diffusion models.
#[derive(Parser)]
#[command(
    name = "diffusion",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Args, Clone)]
pub struct Global {
    /// Seed of everything random: the same seed gives the same bytes.
    #[arg(long, global = true, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Where to compute: cpu, cuda, cuda:1, metal.
    #[arg(long, global = true, default_value = "cpu")]
    pub device: String,
    /// Number of threads; all cores when absent. Does not change results.
    #[arg(long, global = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Print the result as JSON on standard output.
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress on standard error.
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Images: train on your own, and make new ones.
    #[command(subcommand)]
    Images(images::Command),
    /// Say what a model folder holds.
    #[command(after_help = "Example:\n  diffusion inspect digits-model")]
    Inspect(inspect::Inspect),
    /// Turn weight files and model folders of other programs into safetensors and folders of ours.
    #[command(after_help = convert::EXAMPLES)]
    Convert(convert::Convert),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(code) = device::with_threads(cli.global.threads) {
        return code;
    }
    logging(&cli.global);
    // Inside the thread pool: from outside, each of a step's many parallel regions would begin with
    // waking a thread and end with waking this one.
    match rayon::scope(|_| run(cli)) {
        Ok(code) => code,
        Err(error) => {
            // A reader that went away (`| head`) is not an error of ours.
            if is_broken_pipe(&error) {
                return ExitCode::SUCCESS;
            }
            note!("error: {}", sentence(&error));
            interrupt::exit_code().unwrap_or(ExitCode::from(failure_code(&error)))
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Images(command) => images::run(command, &cli.global),
        Command::Inspect(command) => inspect::run(&command, &cli.global),
        Command::Convert(command) => convert::run(&command, &cli.global),
    }
}

/// The error and its causes, each said once: some causes are part of the error's own text.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
        text
    })
}

/// 2 for what the user asked for, 1 for everything else.
fn failure_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<diffusion_core::Error>() {
        Some(diffusion_core::Error::Config(_)) => 2,
        _ => 1,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

fn logging(global: &Global) {
    let default = if global.quiet { "error" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("DIFFUSION_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .without_time()
        .init();
}
