//! Likelihoods of diffusion models, measured on digits of 8×8 pixels and 16 grey levels.
//!
//! `cargo xtask reproduce likelihood` runs this example and shows the results as a page. Everything is
//! measured on held-out images, beside baselines that a sceptic would ask for; what papers order is
//! measured for three seeds of training and noise.

mod autoregressive;
mod data;
mod figures;
#[path = "../shared/jobs.rs"]
mod jobs;
mod measure;
mod net;
mod rows;
mod study;
mod train;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use data::{Digits, LEVELS};
use diffusion_core::report::Results;
use diffusion_images::likelihood::baselines;
use jobs::Job;
use std::path::PathBuf;
use std::time::Instant;
use study::{Amount, Outcome, SYSTEMS};
use train::Effort;

/// How much work to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Ten minutes on two cores.
    Quick,
    /// Some hours on two cores.
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
    #[arg(long, default_value = "target/reproduce/likelihood")]
    out: PathBuf,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Another data set of grey images of 28×28: whatever `diffusion images train --data` takes.
    #[arg(long, default_value = "mnist")]
    data: String,
    /// Training steps, for trials.
    #[arg(long, hide = true)]
    steps: Option<u64>,
}

fn amount(options: &Options) -> Amount {
    let quick = options.preset == Preset::Quick;
    Amount {
        effort: Effort {
            width: if quick { 192 } else { 256 },
            blocks: if quick { 3 } else { 4 },
            steps: options.steps.unwrap_or(if quick { 2000 } else { 20_000 }),
            batch: 128,
        },
        images: if quick { 200 } else { 1000 },
        rounds: 16,
    }
}

/// A job's answer: the bits of the autoregressive baseline, or a system's numbers.
enum Answer {
    Autoregressive(f64, f64),
    System(Box<Outcome>),
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
    let mut results = Results::new("likelihood", name, options.seed);
    let start = Instant::now();
    let digits = Digits::open(&options.data)?;
    let amount = amount(&options);
    let few = digits.test.narrow(0, 0, amount.images)?;
    let whole = baselines(&digits.train, &digits.test, LEVELS)?;
    let same = baselines(&digits.train, &few, LEVELS)?;
    let digits = &digits;
    let mut work = vec![Job {
        cost: 0.5,
        work: Box::new(|| {
            let steps = amount.effort.steps;
            let tests = [&digits.test, &few];
            let bits = autoregressive::bits(&digits.train, &tests, steps, options.seed)?;
            Ok(Answer::Autoregressive(bits[0], bits[1]))
        }),
    }];
    for (system, seeds) in &SYSTEMS {
        for place in 0..*seeds as u64 {
            let seed = options.seed + place;
            work.push(Job {
                cost: study::cost(system),
                work: Box::new(move || {
                    let outcome = study::run(system, amount, digits, seed)?;
                    study::done(system, seed, start);
                    Ok(Answer::System(Box::new(outcome)))
                }),
            });
        }
    }
    let mut outcomes = Vec::new();
    let mut autoregressive = (f64::NAN, f64::NAN);
    for answer in jobs::run(work)? {
        match answer {
            Answer::Autoregressive(all, few) => autoregressive = (all, few),
            Answer::System(outcome) => outcomes.push(*outcome),
        }
    }
    let table = rows::Table::new(&outcomes, amount, same, autoregressive.1);
    table.baselines(&whole, autoregressive.0, digits.test.dim(0)?, &mut results);
    table.rows(&mut results);
    table.claims(&mut results);
    figures::draw(&table, &outcomes, &options.out, &mut results)?;
    results.write(&options.out)?;
    for row in &results.rows {
        println!(
            "{:50} {:70} {:9.4}  {}",
            row.system, row.metric, row.value, row.note
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
