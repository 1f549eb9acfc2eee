//! The criterion benches, and the estimates that they leave.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::row::Row;
use crate::shell;

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

/// Runs the benches of these domains and collects their rows.
pub fn run(root: &Path, domains: &[String]) -> Result<Vec<Row>> {
    let threads = threads(std::env::var("RAYON_NUM_THREADS").ok().as_deref())?;
    let mut rows = Vec::new();
    for domain in domains {
        let start = SystemTime::now();
        let mut command = shell::cargo(root, "bench");
        command.args([
            "-p",
            "diffusion-benches",
            "--bench",
            domain,
            "--",
            "--noplot",
        ]);
        let status = shell::status(&mut command)?;
        ensure!(
            status.success(),
            "`{}` ended with {status}",
            shell::shown(&command)
        );
        let folder = shell::target(root).join("criterion");
        let found = collect(&folder, domain, threads, start)?;
        ensure!(
            !found.is_empty(),
            "{domain}: the bench ran but left no estimates"
        );
        rows.extend(found);
    }
    Ok(rows)
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
        ..Row::default()
    })
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
        assert!(
            super::super::row::medians(&[row])
                .contains("unet2d/forward/8x8       2       2.5000     0.0500")
        );
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
}
