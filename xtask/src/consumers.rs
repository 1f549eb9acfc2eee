//! `cargo xtask consumers`: programs outside this workspace that depend on one domain crate.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::{shell, tidy::tree};

/// Check a program for each domain crate, as somebody else would write it.
///
/// `tests/consumers/NAME` is a workspace of its own that depends on `diffusion-NAME` alone. No package
/// that another domain pays for may stand in its tree. It is type-checked in the target folder and with
/// the locked versions of this workspace, where most of what clippy has checked serves again; with
/// --run it is built, which compiles the tensor library anew, and run.
///
/// Example:
///   cargo xtask consumers --run
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Build the programs and run them.
    #[arg(long)]
    run: bool,
}

/// Checks all programs.
pub fn run(args: &Args) -> Result<ExitCode> {
    check(&shell::root()?, args.run)?;
    Ok(ExitCode::SUCCESS)
}

/// Checks all programs; the first failure ends it.
pub fn check(root: &Path, run: bool) -> Result<()> {
    let folder = root.join("tests/consumers");
    let mut programs = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.join("Cargo.toml").is_file() {
            programs.push(path);
        }
    }
    programs.sort();
    programs
        .iter()
        .try_for_each(|path| program(root, path, run))
}

fn program(root: &Path, path: &Path, run: bool) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let domain = format!("diffusion-{name}");
    let lock = path.join("Cargo.lock");
    std::fs::copy(root.join("Cargo.lock"), &lock).with_context(|| lock.display().to_string())?;
    let mut command = shell::cargo(path, "tree");
    command.args(["-e", "normal", "--prefix", "none", "--format", "{p}"]);
    let text = shell::output(&mut command)?;
    let packages = tree::packages(&text);
    ensure!(
        packages.contains(&domain.as_str()),
        "{}: does not depend on `{domain}`; expected a program that uses it",
        path.display()
    );
    let strangers = tree::strangers(&domain, &packages);
    ensure!(
        strangers.is_empty(),
        "{}: `{domain}` alone brings {}; expected nothing that another domain pays for",
        path.display(),
        strangers.join(", ")
    );
    let out = Scratch(root.join("target/consumers").join(&*name));
    out.clear()?;
    let mut command = shell::cargo(path, if run { "run" } else { "check" });
    command.arg("--quiet").arg("--target-dir");
    command.arg(root.join("target"));
    if run {
        command.arg("--").arg(&out.0);
    }
    let status = shell::status(&mut command)?;
    ensure!(
        status.success(),
        "the program in {} ended with {status}",
        path.display()
    );
    println!(
        "consumers: {name}: {} packages, none of another domain; it {}",
        packages.len(),
        if run { "runs" } else { "compiles" }
    );
    out.clear()
}

/// Where a program writes to.
struct Scratch(PathBuf);

impl Scratch {
    fn clear(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| self.0.display().to_string())
            }
            _ => Ok(()),
        }
    }
}
