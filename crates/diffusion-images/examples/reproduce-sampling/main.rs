//! Sampling acceleration, measured: every sampler on data whose answer is known, then on digits.
//!
//! `cargo xtask reproduce sampling` runs this example and shows the results as a page: error against
//! network calls with an exact score, Fréchet distance against calls with trained networks of three
//! seeds, distillation into few steps, and runs that start on the way.

mod digits;
mod few;
mod inversion;
#[path = "../shared/jobs.rs"]
mod jobs;
mod oracle;
mod partial;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use diffusion_core::report::Results;
use std::path::PathBuf;
use std::time::Instant;

/// How much work to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Ten minutes on two cores.
    Quick,
    /// About three hours on two cores.
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
    #[arg(long, default_value = "target/reproduce/sampling")]
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

/// How many network calls a sampler's usual step costs: `calls = per_step · steps + more`.
///
/// The steps that a budget of calls pays for, if it pays for any.
pub fn steps_for(sampler: &str, budget: usize) -> Option<usize> {
    match sampler {
        "heun" | "kdpm2" | "kdpm2-a" | "dpmpp-sde" | "flow-heun" => Some(budget.div_ceil(2)),
        "pc" => Some(budget / 2),
        "flow-rk4" => Some((budget + 3) / 4),
        "plms" => budget.checked_sub(1),
        "pndm" => budget.checked_sub(9).filter(|steps| *steps >= 4),
        _ => Some(budget),
    }
    .filter(|steps| *steps > 0)
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
    let mut results = Results::new("sampling", name, options.seed);
    let start = Instant::now();
    let told = |what: &str| println!("{what} at {:.0} s", start.elapsed().as_secs_f64());
    oracle::run(&options, &mut results)?;
    told("exact scores done");
    digits::run(&options, &mut results)?;
    results.write(&options.out)?;
    for row in &results.rows {
        let baseline = row
            .baseline
            .as_ref()
            .map_or(String::new(), |b| format!("  ({}: {:.4})", b.name, b.value));
        println!(
            "{:46} {:44} {:10.4}{baseline}",
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

#[cfg(test)]
mod tests {
    use super::steps_for;

    #[test]
    fn budgets_pay_for_steps() {
        assert_eq!(steps_for("ddim", 10), Some(10));
        assert_eq!(steps_for("heun", 10), Some(5));
        assert_eq!(steps_for("heun", 3), Some(2));
        assert_eq!(steps_for("pndm", 10), None);
        assert_eq!(steps_for("plms", 1), None);
    }
}
