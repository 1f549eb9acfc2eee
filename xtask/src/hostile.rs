//! `cargo xtask hostile`: malformed files of every format against the readers.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::shell;

/// Give malformed files to every reader and watch what it does.
///
/// For each format (png, jpeg, idx, cifar, npz, safetensors, pth, json, toml, manifest) files are made
/// until 500 were refused: cut off, with other header bytes, wrong lengths, absurd claims, names twice,
/// bombs, deep nesting, garbage. A child with 1 GiB of address space reads them. Panics, waits of more
/// than a second, memory above 64 MiB and twice the file, accepted files that contradict themselves and
/// messages without a file, an expectation and a remedy are printed and end the task with an error.
///
/// Example:
///   cargo xtask hostile --format pth --files 2000 --keep findings
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Only this format.
    #[arg(long)]
    format: Option<String>,
    /// At least so many refused files of each format.
    #[arg(long, value_name = "N", default_value_t = 500)]
    files: usize,
    /// Chooses what is damaged.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Where to keep the files that are findings.
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
}

/// Builds the program and passes everything on to it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut command = shell::cargo(&shell::root()?, "run");
    command.args(["--quiet", "-p", "diffusion-tests", "--bin", "hostile", "--"]);
    command.args(["--files", &args.files.to_string()]);
    command.args(["--seed", &args.seed.to_string()]);
    if let Some(format) = &args.format {
        command.args(["--format", format]);
    }
    if let Some(folder) = &args.keep {
        command.arg("--keep").arg(folder);
    }
    Ok(shell::exit_code(shell::status(&mut command)?))
}
