//! `diffusion images …`

mod data;
mod evaluate;
mod likelihood;
mod sample;
mod train;

use crate::Global;
use anyhow::Result;
use clap::Subcommand;
use std::process::ExitCode;

/// What can be done with images.
#[derive(Subcommand)]
pub enum Command {
    /// Train a model on built-in data, on MNIST's or CIFAR-10's files, or on a folder of pictures.
    #[command(after_help = train::EXAMPLES)]
    Train(train::Train),
    /// Make new images with a trained model.
    #[command(after_help = sample::EXAMPLES, after_long_help = sample::long_help())]
    Sample(sample::Sample),
    /// Measure a model's samples against images that it has not seen.
    #[command(after_help = evaluate::EXAMPLES)]
    Evaluate(evaluate::Evaluate),
    /// Measure how likely a model holds images that it has not seen, in bits per dimension.
    #[command(after_help = likelihood::EXAMPLES)]
    Likelihood(likelihood::Likelihood),
}

/// Runs a command.
pub fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Train(command) => train::run(&command, global),
        Command::Sample(command) => sample::run(&command, global),
        Command::Evaluate(command) => evaluate::run(&command, global),
        Command::Likelihood(command) => likelihood::run(&command, global),
    }
}
