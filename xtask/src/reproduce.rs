//! `cargo xtask reproduce`: the survey's experiments, each from data to a page with figures.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{report, shell};

/// Train, sample and evaluate the experiments of a section.
///
/// Builds only the crate of that section and runs its example `reproduce-SECTION`, which writes
/// results.json and figures under target/reproduce/SECTION. Then one self-contained page over all
/// sections run so far is written to target/reproduce/index.html. Without a section, all of them run.
///
/// Example:
///   cargo xtask reproduce foundations --preset quick --seed 1
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// What to run; all known sections when none is given.
    #[arg(value_name = "SECTION")]
    sections: Vec<String>,
    /// `quick`: a section in about 10 minutes on two cores, data from data/; `paper`: the published
    /// setting, for a large machine.
    #[arg(long, value_enum, default_value_t = Preset::Quick)]
    preset: Preset,
    /// Decides every random number.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// cpu, cuda:0 or metal:0.
    #[arg(long, value_name = "D")]
    device: Option<String>,
    /// Folder with the data sets that the repository does not carry.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write the page from what was run before, and run nothing.
    #[arg(long)]
    report_only: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Preset {
    Quick,
    Paper,
}

/// A section of the survey and the example that reproduces it.
struct Section {
    name: &'static str,
    package: &'static str,
    example: &'static str,
    features: &'static [&'static str],
}

/// Adding a section is adding a row.
const SECTIONS: &[Section] = &[
    Section {
        name: "foundations",
        package: "diffusion-images",
        example: "reproduce-foundations",
        features: &["figures"],
    },
    Section {
        name: "sampling",
        package: "diffusion-images",
        example: "reproduce-sampling",
        features: &["figures"],
    },
    Section {
        name: "images",
        package: "diffusion-images",
        example: "reproduce-images",
        features: &["figures"],
    },
    Section {
        name: "likelihood",
        package: "diffusion-images",
        example: "reproduce-likelihood",
        features: &["figures"],
    },
];

/// Runs the sections one after another, then writes the page, even when one has failed.
pub fn run(args: &Args) -> Result<ExitCode> {
    let root = shell::root()?;
    let folder = shell::target(&root).join("reproduce");
    let chosen = choose(&args.sections)?;
    let mut failed = Vec::new();
    if !args.report_only {
        for section in chosen {
            let start = Instant::now();
            let outcome = run_section(&root, &folder.join(section.name), section, args);
            match outcome {
                Ok(()) => println!(
                    "reproduce: {} done in {:.0} s",
                    section.name,
                    start.elapsed().as_secs_f64()
                ),
                Err(error) => {
                    eprintln!("error: {}: {error:#}", section.name);
                    failed.push(section.name);
                }
            }
        }
    }
    let known: Vec<&str> = SECTIONS.iter().map(|section| section.name).collect();
    match report::write(&folder, &known)? {
        Some(page) => println!("reproduce: {}", page.display()),
        None => println!("reproduce: no section has results yet, no page written"),
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("failed: {}", failed.join(", "))
}

/// The sections asked for, in the order of the table, each once.
fn choose(names: &[String]) -> Result<Vec<&'static Section>> {
    let known = || {
        SECTIONS
            .iter()
            .map(|section| section.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    for name in names {
        if SECTIONS.iter().all(|section| section.name != name) {
            bail!("unknown section `{name}`; known: {}", known());
        }
    }
    let wanted =
        |section: &&Section| names.is_empty() || names.iter().any(|name| name == section.name);
    Ok(SECTIONS.iter().filter(wanted).collect())
}

fn run_section(root: &Path, out: &Path, section: &Section, args: &Args) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let results = out.join("results.json");
    // A page must never show an earlier run's numbers as those of a run that failed.
    if results.exists() {
        std::fs::remove_file(&results).with_context(|| results.display().to_string())?;
    }
    let mut command = shell::cargo(root, "run");
    command.args([
        "--release",
        "-p",
        section.package,
        "--example",
        section.example,
    ]);
    if !section.features.is_empty() {
        command.arg("--features").arg(section.features.join(","));
    }
    let preset = match args.preset {
        Preset::Quick => "quick",
        Preset::Paper => "paper",
    };
    command
        .args([
            "--",
            "--preset",
            preset,
            "--seed",
            &args.seed.to_string(),
            "--out",
        ])
        .arg(out);
    if let Some(device) = &args.device {
        command.args(["--device", device]);
    }
    if let Some(data) = &args.data {
        command.arg("--data").arg(data);
    }
    let status = shell::status(&mut command)?;
    if !status.success() {
        bail!("`{}` ended with {status}", shell::shown(&command));
    }
    report::read(&results, section.name).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_chosen_once_and_unknown_ones_named() {
        let names = |list: &[&str]| {
            list.iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(choose(&[]).unwrap().len(), SECTIONS.len());
        assert_eq!(
            choose(&names(&["foundations", "foundations"]))
                .unwrap()
                .len(),
            1
        );
        let message = choose(&names(&["foundation"])).err().unwrap().to_string();
        assert!(
            message.contains("`foundation`")
                && message.contains("known: foundations, sampling, images")
        );
    }
}
