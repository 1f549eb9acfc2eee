//! Project tasks. `cargo xtask TASK --help` explains each one with an example.
//!
//! This package stays light: it knows no diffusion crate and starts cargo for whatever it needs, so
//! that a task that only reads text does not build a tensor library first.

mod bench;
mod ci;
mod consumers;
mod crash;
mod data;
mod fuzz;
mod hostile;
mod parity;
mod report;
mod reproduce;
mod shell;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Project tasks of the diffusion workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Ci(ci::Args),
    Tidy(tidy::Args),
    Data(data::Args),
    Parity(parity::Args),
    Reproduce(reproduce::Args),
    Bench(bench::Args),
    Crash(crash::Args),
    Hostile(hostile::Args),
    Fuzz(fuzz::Args),
    Consumers(consumers::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Ci(args) => ci::run(&args),
        Task::Tidy(args) => tidy::run(&args),
        Task::Data(args) => data::run(&args),
        Task::Parity(args) => parity::run(&args),
        Task::Reproduce(args) => reproduce::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Crash(args) => crash::run(&args),
        Task::Hostile(args) => hostile::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Consumers(args) => consumers::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
