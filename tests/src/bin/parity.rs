//! Holds stored numbers of other libraries against ours: `parity DIR... [--json FILE] [--strict]`.

use anyhow::{Context, Result};
use clap::Parser;
use diffusion_core::checkpoint::write_atomic;
use diffusion_tests::parity::{Summary, find, run};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

/// Run parity fixtures.
///
/// Walks the folders for `fixture.json`, runs each fixture, prints a line for each (name, system,
/// worst absolute and relative error, tolerance, verdict) and the counts. Exit code 0 when nothing
/// failed (with --strict: and nothing was unsupported), 1 otherwise, 2 for wrong usage.
#[derive(Parser)]
#[command(name = "parity", verbatim_doc_comment)]
struct Args {
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

fn main() -> ExitCode {
    match all(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("parity: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn all(args: &Args) -> Result<ExitCode> {
    let mut paths = BTreeSet::new();
    for folder in &args.folders {
        paths.extend(find(folder)?);
    }
    let mut summary = Summary::default();
    for path in paths {
        let outcome = run(&path);
        println!("{outcome}");
        summary.add(outcome);
    }
    println!("{summary}");
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&summary)?;
        write_atomic(file, text.as_bytes()).context("the results could not be written")?;
    }
    let good = summary.failed == 0 && !(args.strict && summary.unsupported > 0);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}
