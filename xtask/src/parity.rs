//! `cargo xtask parity`: stored numbers of other libraries against ours.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::shell;

/// Compare with stored fixtures of other libraries.
///
/// Walks the folders for `fixture.json` files and saved pipelines, runs each, and prints a line for
/// each (name, system, worst absolute and relative error, tolerance, verdict), then
/// `parity: P passed, F failed, U unsupported`. The exit code is 0 only when nothing failed, with
/// --strict only when nothing was unsupported either. Built in the profile of the tests.
///
/// Example:
///   cargo xtask parity fixtures/scheduler fixtures/module --json parity.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folders to walk.
    #[arg(required = true, value_name = "DIR")]
    folders: Vec<PathBuf>,
    /// Write the results there as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail when a fixture is unsupported.
    #[arg(long)]
    strict: bool,
}

/// Builds the runner and passes everything on to it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut command = shell::cargo(&shell::root()?, "run");
    command
        .args(["--quiet", "-p", "diffusion-tests", "--bin", "parity", "--"])
        .args(&args.folders);
    if let Some(json) = &args.json {
        command.arg("--json").arg(json);
    }
    if args.strict {
        command.arg("--strict");
    }
    Ok(shell::exit_code(shell::status(&mut command)?))
}
