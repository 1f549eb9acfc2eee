//! `cargo xtask bench`: time this workspace, alone or against another library, and print one table.

mod against;
mod criterion;
mod pairs;
mod row;
mod side;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use self::against::{Comparison, Found};
use self::pairs::Effort;
use self::row::Row;
use crate::shell;

/// Measure how fast we are.
///
/// Runs the criterion benches of each domain (all of them when none is given) and prints one table:
/// case, median milliseconds, and the median absolute deviation. The number of threads is
/// RAYON_NUM_THREADS, or all cores.
///
/// With --against python the same work is done by PyTorch, too: the results are compared first, then
/// both are timed in turns, and the table shows the median of the ratios of the pairs (below 1 we
/// are faster), by CPU time on one thread and by wall time on more. benches/README.md says more.
///
/// Examples:
///   RAYON_NUM_THREADS=1 cargo xtask bench images --json bench.json
///   cargo xtask bench ops images --against python --python venv/bin/python --quick
///   cargo xtask bench ops --against python --case conv2d --threads 1
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Which benches to run: files of benches/benches, without the ending.
    #[arg(value_name = "DOMAIN")]
    domains: Vec<String>,
    /// Compare with another implementation on the same work.
    #[arg(long, value_enum, value_name = "PEER")]
    against: Option<Peer>,
    /// The Python that has the packages of benches/peers/requirements.txt.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "python3",
        requires = "against"
    )]
    python: PathBuf,
    /// Numbers of threads to compare on.
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_values_t = [1, 2],
        requires = "against",
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    threads: Vec<u16>,
    /// Only the cases whose names contain this; may be given several times.
    #[arg(long = "case", value_name = "SUBSTRING", requires = "against")]
    cases: Vec<String>,
    /// Fewer and shorter pairs.
    #[arg(long, requires = "against")]
    quick: bool,
    /// Time the peer's networks compiled by torch.compile, too.
    #[arg(long, requires = "against")]
    compile: bool,
    /// Time the peer's networks under bf16 autocast, too.
    #[arg(long, requires = "against")]
    bf16: bool,
    /// Write the rows there as JSON; in a comparison after each case.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Peer {
    Python,
}

const QUICK: Effort = Effort {
    pairs: 5,
    turn_seconds: 0.05,
};
const FULL: Effort = Effort {
    pairs: 15,
    turn_seconds: 0.2,
};

/// Runs the benches and prints the table.
pub fn run(args: &Args) -> Result<ExitCode> {
    let root = shell::root()?;
    let domains = choose(&known(&root)?, &args.domains)?;
    let found = match args.against {
        None => {
            let rows = criterion::run(&root, &domains)?;
            println!("{}", row::medians(&rows));
            Found {
                rows,
                ..Found::default()
            }
        }
        Some(Peer::Python) => {
            let mut threads: Vec<usize> = args.threads.iter().map(|&n| n.into()).collect();
            // One thread first: the speed-up of more is measured against it.
            threads.sort_unstable();
            threads.dedup();
            let comparison = Comparison {
                root,
                python: args.python.clone(),
                threads,
                effort: if args.quick { QUICK } else { FULL },
                compile: args.compile,
                bf16: args.bf16,
            };
            let found = comparison.run(&domains, &args.cases, &mut |found| match &args.json {
                Some(path) => write(path, &found.rows, &found.refused),
                None => Ok(()),
            })?;
            println!("{}", row::comparison(&found.rows));
            for note in &found.notes {
                println!("note: {note}");
            }
            found
        }
    };
    if let Some(path) = &args.json {
        write(path, &found.rows, &found.refused)?;
    }
    if found.refused.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{}", found.refused.join("\n"))
}

fn write(path: &Path, rows: &[Row], refused: &[String]) -> Result<()> {
    let value = if refused.is_empty() {
        serde_json::json!({ "rows": rows })
    } else {
        serde_json::json!({ "rows": rows, "refused": refused })
    };
    let text = serde_json::to_string_pretty(&value)?;
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}

/// Domains are the bench files themselves: adding one adds a file.
fn known(root: &Path) -> Result<Vec<String>> {
    let folder = root.join("benches/benches");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(
                path.file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned()),
            );
        }
    }
    names.sort();
    Ok(names)
}

fn choose(known: &[String], names: &[String]) -> Result<Vec<String>> {
    if let Some(name) = names.iter().find(|name| !known.contains(name)) {
        bail!("unknown domain `{name}`; known: {}", known.join(", "));
    }
    Ok(if names.is_empty() {
        known.to_vec()
    } else {
        names.to_vec()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn parsed(words: &[&str]) -> std::result::Result<Args, clap::Error> {
        let words = ["bench"].iter().chain(words);
        Program::try_parse_from(words).map(|program| program.args)
    }

    #[test]
    fn the_comparison_has_its_options() {
        let args = parsed(&[
            "ops",
            "--against",
            "python",
            "--threads",
            "2,4",
            "--case",
            "a",
        ]);
        let args = args.unwrap();
        assert_eq!(
            (args.threads, args.cases),
            (vec![2, 4], vec!["a".to_owned()])
        );
        let plain = parsed(&["images"]).unwrap();
        assert!(plain.against.is_none() && plain.threads == [1, 2]);
        for wrong in [&["--quick"][..], &["--against", "python", "--threads", "0"]] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_was_refused_is_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bench.json");
        write(&path, &[Row::default()], &["ops/x".to_owned()]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["refused"][0], "ops/x");
        for field in [
            "domain",
            "case",
            "threads",
            "ours_ms",
            "peer_ms",
            "ratio",
            "ours_peak_mb",
            "peer_peak_mb",
            "memory_ratio",
            "max_abs_difference",
        ] {
            assert!(value["rows"][0].get(field).is_some(), "{field}");
        }
    }

    #[test]
    fn unknown_domains_are_named() {
        let known = ["images".to_owned()];
        assert_eq!(choose(&known, &[]).unwrap(), known);
        let message = choose(&known, &["video".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(message.contains("`video`") && message.contains("images"));
    }
}
