//! `cargo xtask bench`: run the criterion benches and print one table.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::shell;

/// Measure how fast we are.
///
/// Runs the criterion benches of each domain (all of them when none is given) and prints one table:
/// case, median milliseconds, and the median absolute deviation. The number of threads is
/// RAYON_NUM_THREADS, or all cores.
///
/// Example:
///   RAYON_NUM_THREADS=1 cargo xtask bench images --json bench.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Which benches to run: files of benches/benches, without the ending.
    #[arg(value_name = "DOMAIN")]
    domains: Vec<String>,
    /// Compare with another implementation on the same work.
    #[arg(long, value_enum, value_name = "PEER")]
    against: Option<Peer>,
    /// Write the rows there as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Peer {
    Python,
}

/// One line of the table. The peer's columns are there so that the format stays as it is once a peer
/// is measured.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    domain: String,
    case: String,
    threads: usize,
    ours_ms: f64,
    ours_mad_ms: f64,
    peer_ms: Option<f64>,
    ratio: Option<f64>,
    ours_peak_mb: Option<f64>,
    peer_peak_mb: Option<f64>,
    memory_ratio: Option<f64>,
    max_abs_difference: Option<f64>,
}

/// The part of criterion's `benchmark.json` that names a case.
#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
}

/// The part of criterion's `estimates.json` that we print, in nanoseconds.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
    median_abs_dev: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
}

/// Runs the benches and prints the table.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(Peer::Python) = args.against {
        bail!(
            "--against python arrives with the kernels: benches/peers holds no script to compare \
             with yet; run without it to measure this workspace alone"
        );
    }
    let root = shell::root()?;
    let threads = threads(std::env::var("RAYON_NUM_THREADS").ok().as_deref())?;
    let mut rows = Vec::new();
    for domain in choose(&known(&root)?, &args.domains)? {
        let start = SystemTime::now();
        let mut command = shell::cargo(&root, "bench");
        command.args([
            "-p",
            "diffusion-benches",
            "--bench",
            &domain,
            "--",
            "--noplot",
        ]);
        let status = shell::status(&mut command)?;
        ensure!(
            status.success(),
            "`{}` ended with {status}",
            shell::shown(&command)
        );
        let found = collect(
            &shell::target(&root).join("criterion"),
            &domain,
            threads,
            start,
        )?;
        ensure!(
            !found.is_empty(),
            "{domain}: the bench ran but left no estimates"
        );
        rows.extend(found);
    }
    println!("{}", table(&rows));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))?;
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
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

fn threads(variable: Option<&str>) -> Result<usize> {
    match variable {
        None | Some("" | "0") => Ok(std::thread::available_parallelism()
            .context("number of cores")?
            .get()),
        Some(text) => text
            .parse()
            .with_context(|| format!("RAYON_NUM_THREADS: `{text}`; expected a whole number")),
    }
}

/// The estimates under `folder` that were written since `start`, sorted by case.
fn collect(folder: &Path, domain: &str, threads: usize, start: SystemTime) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.ends_with("new/estimates.json") && path.metadata()?.modified()? >= start
            {
                let name = path.with_file_name("benchmark.json");
                let read = |path: &Path| {
                    std::fs::read_to_string(path).with_context(|| path.display().to_string())
                };
                rows.push(
                    row(domain, threads, &read(&name)?, &read(&path)?)
                        .with_context(|| path.display().to_string())?,
                );
            }
        }
    }
    rows.sort_by(|a, b| a.case.cmp(&b.case));
    Ok(rows)
}

fn row(domain: &str, threads: usize, benchmark: &str, estimates: &str) -> Result<Row> {
    let benchmark: Benchmark = serde_json::from_str(benchmark)?;
    let estimates: Estimates = serde_json::from_str(estimates)?;
    Ok(Row {
        domain: domain.to_owned(),
        case: benchmark.full_id,
        threads,
        ours_ms: estimates.median.point_estimate / 1e6,
        ours_mad_ms: estimates.median_abs_dev.point_estimate / 1e6,
        peer_ms: None,
        ratio: None,
        ours_peak_mb: None,
        peer_peak_mb: None,
        memory_ratio: None,
        max_abs_difference: None,
    })
}

fn table(rows: &[Row]) -> String {
    let width = rows
        .iter()
        .map(|row| row.case.chars().count())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut lines = vec![format!(
        "{:<10} {:<width$} {:>7} {:>12} {:>10}",
        "domain", "case", "threads", "median ms", "± MAD"
    )];
    for row in rows {
        lines.push(format!(
            "{:<10} {:<width$} {:>7} {:>12.4} {:>10.4}",
            row.domain, row.case, row.threads, row.ours_ms, row.ours_mad_ms
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BENCHMARK: &str = r#"{"group_id":"unet2d","function_id":"forward","value_str":"8x8",
        "throughput":null,"full_id":"unet2d/forward/8x8","directory_name":"unet2d/forward/8x8",
        "title":"unet2d/forward/8x8"}"#;
    const ESTIMATES: &str = r#"{"mean":{"confidence_interval":{"confidence_level":0.95,
        "lower_bound":1.0,"upper_bound":2.0},"point_estimate":9e6,"standard_error":1.0},
        "median":{"point_estimate":2500000.0},"median_abs_dev":{"point_estimate":5e4},
        "slope":null,"std_dev":{"point_estimate":1.0}}"#;

    #[test]
    fn estimates_become_milliseconds() {
        let row = row("images", 2, BENCHMARK, ESTIMATES).unwrap();
        assert_eq!(
            (row.case.as_str(), row.ours_ms, row.ours_mad_ms),
            ("unet2d/forward/8x8", 2.5, 0.05)
        );
        let json = serde_json::to_value(&row).unwrap();
        assert!(json["peer_ms"].is_null() && json["ratio"].is_null());
        assert!(table(&[row]).contains("unet2d/forward/8x8       2       2.5000     0.0500"));
    }

    #[test]
    fn only_estimates_of_this_run_count() {
        let folder = tempfile::tempdir().unwrap();
        let case = folder.path().join("unet2d/forward");
        for part in ["new", "base"] {
            std::fs::create_dir_all(case.join(part)).unwrap();
            std::fs::write(case.join(part).join("benchmark.json"), BENCHMARK).unwrap();
            std::fs::write(case.join(part).join("estimates.json"), ESTIMATES).unwrap();
        }
        let before = SystemTime::now() - std::time::Duration::from_secs(60);
        let after = SystemTime::now() + std::time::Duration::from_secs(60);
        assert_eq!(
            collect(folder.path(), "images", 1, before).unwrap().len(),
            1
        );
        assert_eq!(collect(folder.path(), "images", 1, after).unwrap().len(), 0);
    }

    #[test]
    fn threads_come_from_the_environment() {
        assert_eq!(threads(Some("3")).unwrap(), 3);
        assert!(threads(None).unwrap() >= 1 && threads(Some("0")).unwrap() >= 1);
        assert!(
            threads(Some("many"))
                .unwrap_err()
                .to_string()
                .contains("`many`")
        );
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
