//! Gives malformed files to the readers and watches what they do.
//!
//! The files are read by a child of this program with 1 GiB of address space. A panic, more than a
//! second, or more memory than 64 MiB and twice the file is a finding; so is a file that is accepted
//! although what was read contradicts itself, and a message without a place, an expectation or a
//! remedy. When a child dies or falls silent, the file that it was at is the finding, and another
//! child goes on behind it.
//!
//! ```text
//! hostile --format pth --files 500 --seed 0
//! ```

mod child;
mod parent;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use diffusion_tests::targets::Format;

/// Gives malformed files to the readers and watches what they do.
#[derive(Debug, Parser)]
struct Args {
    /// Only this format.
    #[arg(long)]
    format: Option<Format>,
    /// At least so many refused files of each format.
    #[arg(long, default_value_t = 500)]
    files: usize,
    /// Chooses what is damaged.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to keep the files that are findings.
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// Be the child: read the files that this file lists.
    #[arg(long, hide = true)]
    child: Option<PathBuf>,
    /// How many of them to leave out.
    #[arg(long, hide = true, default_value_t = 0)]
    skip: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.child {
        Some(list) => child::read_all(list, args.skip).map(|()| ExitCode::SUCCESS),
        None => parent::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("hostile: {error:#}");
        ExitCode::FAILURE
    })
}
