//! Images from noise, measured: digits of 8×8 and 28×28 pixels, and emoji of 32×32 in colour.
//!
//! `cargo xtask reproduce images` runs this example and shows the results as a page. Everything is
//! measured on images that neither the models nor the classifier that judges have seen, for three
//! seeds of training and sampling, beside baselines that a sceptic would ask for.

mod baselines;
#[path = "../shared/jobs.rs"]
mod jobs;
mod pictures;
mod plan;
mod rows;
mod study;
mod vae;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use diffusion_core::report::Results;
use jobs::Job;
use std::path::PathBuf;
use std::time::Instant;
use study::Study;

/// How much work to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Ten minutes on two cores.
    Quick,
    /// A night on two cores.
    Paper,
}

/// Options.
#[derive(Parser)]
pub struct Options {
    #[arg(long, value_enum, default_value = "quick")]
    preset: Preset,
    /// The first of three seeds.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where results and figures go.
    #[arg(long, default_value = "target/reproduce/images")]
    out: PathBuf,
    /// Where trained models are kept between runs.
    #[arg(long, default_value = "target/reproduce/cache")]
    cache: PathBuf,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Another data set than the built-in ones: whatever `diffusion images train --data` takes.
    #[arg(long)]
    data: Option<String>,
    /// Only this study: digits, mnist or emoji.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    anyhow::ensure!(
        options.device == "cpu",
        "--device {}: this example runs on cpu",
        options.device
    );
    std::fs::create_dir_all(&options.out)?;
    let name = match options.preset {
        Preset::Quick => "quick",
        Preset::Paper => "paper",
    };
    let mut results = Results::new("images", name, options.seed);
    let start = Instant::now();
    let plans = plan::plans(&options);
    anyhow::ensure!(
        !plans.is_empty(),
        "--only {}: expected digits, mnist or emoji",
        options.only.as_deref().unwrap_or_default()
    );
    // Classifiers first, then the seeds of all studies; the dearest begins, so that all end together.
    let prepare = plans.iter().map(|plan| Job {
        cost: plan.cost(0),
        work: Box::new(|| Study::prepare(&options, plan)),
    });
    let studies = jobs::run(prepare.collect())?;
    let judges = studies
        .iter()
        .map(Study::judge)
        .collect::<Result<Vec<_>>>()?;
    let mut work = Vec::new();
    for (study, judge) in studies.iter().zip(&judges) {
        for place in 0..study.plan.seeds.len() {
            work.push(Job {
                cost: study.plan.cost(place),
                work: Box::new(move || study.seed(judge, place)),
            });
        }
    }
    let mut parts = jobs::run(work)?.into_iter();
    for study in &studies {
        let own = parts.by_ref().take(study.plan.seeds.len()).collect();
        study.finish(own, &mut results)?;
    }
    results.write(&options.out)?;
    for row in &results.rows {
        let baseline = row
            .baseline
            .as_ref()
            .map_or(String::new(), |b| format!("  ({}: {:.4})", b.name, b.value));
        println!(
            "{:10} {:44} {:28} {:10.4}{baseline}",
            row.dataset, row.system, row.metric, row.value
        );
    }
    println!(
        "{} rows in {:.0} s: {}",
        results.rows.len(),
        start.elapsed().as_secs_f64(),
        options.out.display()
    );
    Ok(())
}
