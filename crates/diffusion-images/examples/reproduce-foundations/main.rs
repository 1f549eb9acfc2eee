//! The foundations of the survey, measured: exact oracles, then real digits.
//!
//! `cargo xtask reproduce foundations` runs this example and shows the results as a page.

mod digits;
mod oracle;

use clap::{Parser, ValueEnum};
use diffusion_core::report::Results;
use std::path::PathBuf;
use std::time::Instant;

/// How much work to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Ten minutes on two cores.
    Quick,
    /// About two hours on two cores.
    Paper,
}

/// Options.
#[derive(Parser)]
pub struct Options {
    #[arg(long, value_enum, default_value = "quick")]
    preset: Preset,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where results and figures go.
    #[arg(long, default_value = "target/reproduce/foundations")]
    out: PathBuf,
    /// Where trained models are kept between runs.
    #[arg(long, default_value = "target/reproduce/cache")]
    cache: PathBuf,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Another data set than the built-in digits: an IDX file or a folder.
    #[arg(long, default_value = "digits")]
    data: String,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    anyhow::ensure!(
        options.device == "cpu",
        "--device {}: this example runs on cpu",
        options.device
    );
    std::fs::create_dir_all(&options.out)?;
    let name = if options.preset == Preset::Quick {
        "quick"
    } else {
        "paper"
    };
    let mut results = Results::new("foundations", name, options.seed);
    let start = Instant::now();
    oracle::run(&options, &mut results)?;
    // On a thread of the pool, or every parallel loop would begin by waking one.
    rayon::scope(|_| digits::run(&options, &mut results))?;
    results.write(&options.out)?;
    for row in &results.rows {
        let baseline = row
            .baseline
            .as_ref()
            .map_or(String::new(), |b| format!("  ({}: {:.4})", b.name, b.value));
        println!(
            "{:44} {:38} {:10.4}{baseline}",
            row.system, row.metric, row.value
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
