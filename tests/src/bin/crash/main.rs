//! Kills training runs and compares what comes out with runs that nobody killed.
//!
//! The program starts itself as a child that trains a tiny model with frequent checkpoints, kills it
//! (SIGKILL) at chosen moments, half of them inside a checkpoint write, starts it again until it
//! finishes, and compares every file of the run folder byte by byte. It also sends SIGTERM and
//! SIGINT, and starts a second writer on a folder in use.
//!
//! ```text
//! crash --kills 20 --signals 10 --seed 0
//! ```

mod child;
mod parent;
mod running;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use diffusion_core::train::TrainConfig;

/// Kills training runs and checks that no byte changes.
#[derive(Debug, Parser)]
struct Args {
    /// How many times to kill.
    #[arg(long, default_value_t = 20)]
    kills: u64,
    /// How many times to ask a run to stop, with SIGTERM and SIGINT in turn.
    #[arg(long, default_value_t = 10)]
    signals: u64,
    /// Chooses the moments.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Be the child that trains.
    #[arg(long, hide = true)]
    child: bool,
    /// The child's run folder.
    #[arg(long, hide = true, default_value = "run")]
    out: PathBuf,
    /// What the child trains.
    #[arg(long, hide = true, default_value = "mlp")]
    model: Model,
    /// Microseconds that each step takes longer.
    #[arg(long, hide = true, default_value_t = 0)]
    slow_steps: u64,
    /// Microseconds that each operation on files takes longer.
    #[arg(long, hide = true, default_value_t = 0)]
    slow_files: u64,
}

/// The two models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Model {
    /// A perceptron on a mixture in the plane.
    Mlp,
    /// A U-Net on 8 × 8 images.
    Unet,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Unet => "unet",
        }
    }

    fn config(self) -> TrainConfig {
        let (steps, checkpoint_every) = match self {
            Self::Mlp => (200, 10),
            Self::Unet => (60, 5),
        };
        TrainConfig {
            steps,
            checkpoint_every,
            batch_size: 4,
            lr: 1e-3,
            keep_last: 2,
            log_every: 1,
            seed: 7,
            ..TrainConfig::default()
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = if args.child {
        child::train(&args)
    } else {
        parent::kill_and_compare(&args).map(|()| ExitCode::SUCCESS)
    };
    result.unwrap_or_else(|error| {
        eprintln!("crash: {error:#}");
        ExitCode::FAILURE
    })
}
