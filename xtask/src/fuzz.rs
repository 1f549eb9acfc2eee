//! `cargo xtask fuzz`: the fuzz targets, compiled, or run for a while.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::shell;

/// Check that the fuzz targets compile, or run them.
///
/// Without --minutes every target is type-checked by the present compiler, in the target folder of
/// this workspace and without libFuzzer itself. With it each target runs for so long on a nightly
/// compiler (`cargo install cargo-fuzz` first); what it finds is in fuzz/artifacts. `cargo test`
/// replays fuzz/corpus.
///
/// Example:
///   cargo xtask fuzz --minutes 30 pth npz
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Only these targets.
    targets: Vec<String>,
    /// Run each target for so many minutes.
    #[arg(long, value_name = "N")]
    minutes: Option<u64>,
}

/// Checks or runs.
pub fn run(args: &Args) -> Result<ExitCode> {
    let root = shell::root()?;
    let all = targets(&root)?;
    if let Some(unknown) = args.targets.iter().find(|name| !all.contains(name)) {
        bail!(
            "no fuzz target `{unknown}`; expected one of {}",
            all.join(", ")
        );
    }
    let Some(minutes) = args.minutes else {
        check(&root)?;
        println!("fuzz: {} targets compile", all.len());
        return Ok(ExitCode::SUCCESS);
    };
    let chosen = if args.targets.is_empty() {
        &all
    } else {
        &args.targets
    };
    for name in chosen {
        let mut command = Command::new("cargo");
        command.args(["+nightly", "fuzz", "run", name, "--"]);
        command.arg(format!("-max_total_time={}", 60 * minutes));
        command.args(["-timeout=5", "-rss_limit_mb=1024"]);
        let status = shell::status(command.current_dir(&root))?;
        ensure!(
            status.success(),
            "`{name}` ended with {status}; what it found is in fuzz/artifacts/{name}"
        );
    }
    println!(
        "fuzz: no finding in {minutes} minutes of each of {} targets",
        chosen.len()
    );
    Ok(ExitCode::SUCCESS)
}

/// Type-checks every target.
pub fn check(root: &Path) -> Result<()> {
    let mut command = shell::cargo(&root.join("fuzz"), "check");
    command.args(["--quiet", "--bins", "--no-default-features", "--target-dir"]);
    let status = shell::status(command.arg(root.join("target")))?;
    ensure!(
        status.success(),
        "the fuzz targets do not compile: {status}"
    );
    Ok(())
}

/// The names of the targets, sorted.
fn targets(root: &Path) -> Result<Vec<String>> {
    let folder = root.join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        names.extend(
            path.file_stem()
                .map(|stem| stem.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}
