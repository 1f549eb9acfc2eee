//! `cargo xtask tidy`: the invariants of ARCHITECTURE.md, checked on the text and on cargo's tree.

mod crates;
mod equations;
mod modules;
mod source;
mod sources;
mod status;
pub mod tree;

use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::shell;

/// Check what the compiler cannot: who may depend on whom, and that the documents are true.
///
/// Dependency directions between crates and between the modules of diffusion-core, a module
/// documentation in every file, file lengths, EQUATIONS.md against code and tests, the status tables
/// of the READMEs, paths of somebody's machine, unused dependencies. Each finding is one line,
/// `file:line: what, remedy`; the exit code is 1 when there is any.
///
/// Example:
///   cargo xtask tidy --fix
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Rewrite the status tables of the READMEs from xtask/status.toml first.
    #[arg(long)]
    fix: bool,
}

/// Something that must be put right.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Finding {
    /// Relative to the repository.
    file: String,
    /// From 1; 0 when the whole file is meant.
    line: usize,
    /// What is wrong and what to do about it.
    what: String,
}

impl Finding {
    fn new(file: impl Into<String>, line: usize, what: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            line,
            what: what.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.what),
            line => write!(f, "{}:{line}: {}", self.file, self.what),
        }
    }
}

/// Runs the checks and prints what they find.
pub fn run(args: &Args) -> Result<ExitCode> {
    let root = shell::root()?;
    if args.fix {
        for file in status::fix(&root)? {
            println!("tidy: rewrote the status table of {file}");
        }
    }
    let findings = check(&root)?;
    findings.iter().for_each(|finding| println!("{finding}"));
    if findings.is_empty() {
        println!("tidy: nothing to put right");
        return Ok(ExitCode::SUCCESS);
    }
    println!("tidy: {} findings", findings.len());
    Ok(ExitCode::FAILURE)
}

/// All findings, sorted by place.
pub fn check(root: &Path) -> Result<Vec<Finding>> {
    let texts = source::texts(root)?;
    let members = crates::members(root)?;
    let mut findings = Vec::new();
    findings.extend(tree::check(root, &members)?);
    findings.extend(crates::check(root, &members, &texts)?);
    findings.extend(modules::check(&texts));
    findings.extend(sources::check(&texts));
    findings.extend(equations::check(root, &texts));
    findings.extend(status::check(root, &texts)?);
    findings.sort();
    Ok(findings)
}
