//! `cargo xtask crash`: training that is killed again and again must end with the same bits.

use std::process::ExitCode;

use anyhow::Result;

use crate::shell;

/// Kill a training run at random times, resume it, and compare the end.
///
/// Each round starts a small training run, ends it with SIGKILL at a random moment (a third of them
/// inside the writing of a checkpoint), resumes to the end, and compares weights, averaged weights,
/// optimiser state and metrics with those of a run that was never disturbed: every byte must agree.
/// Then runs are asked to stop by SIGTERM and SIGINT, which must save within a step and end with 143
/// and 130, and a second writer is refused.
///
/// Example:
///   cargo xtask crash --kills 200 --signals 50 --seed 7
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// How many times to kill.
    #[arg(long, value_name = "N", default_value_t = 20)]
    kills: u32,
    /// How many times to ask a run to stop.
    #[arg(long, value_name = "N", default_value_t = 10)]
    signals: u32,
    /// Decides the moments.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

/// Builds the harness and passes everything on to it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut command = shell::cargo(&shell::root()?, "run");
    command.args(["--quiet", "-p", "diffusion-tests", "--bin", "crash", "--"]);
    command.args([
        "--kills",
        &args.kills.to_string(),
        "--signals",
        &args.signals.to_string(),
        "--seed",
        &args.seed.to_string(),
    ]);
    Ok(shell::exit_code(shell::status(&mut command)?))
}
