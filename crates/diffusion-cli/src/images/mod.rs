//! `diffusion images …`

mod data;
mod distill;
mod evaluate;
mod invert;
mod likelihood;
mod sample;
mod train;
mod way;

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
    /// Teach a student to do in few steps what a trained model does in many.
    #[command(after_help = distill::EXAMPLES)]
    Distill(distill::Distill),
    /// Make new images with a trained model.
    #[command(after_help = sample::EXAMPLES, after_long_help = sample::long_help())]
    Sample(sample::Sample),
    /// Measure a model's samples against images that it has not seen.
    #[command(after_help = evaluate::EXAMPLES)]
    Evaluate(evaluate::Evaluate),
    /// Find the noise that a model makes given images from, and make them again.
    #[command(after_help = invert::EXAMPLES)]
    Invert(invert::Invert),
    /// Measure how likely a model holds images that it has not seen, in bits per dimension.
    #[command(after_help = likelihood::EXAMPLES)]
    Likelihood(likelihood::Likelihood),
}

/// Runs a command.
pub fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Train(command) => train::run(&command, global),
        Command::Distill(command) => distill::run(&command, global),
        Command::Sample(command) => sample::run(&command, global),
        Command::Evaluate(command) => evaluate::run(&command, global),
        Command::Invert(command) => invert::run(&command, global),
        Command::Likelihood(command) => likelihood::run(&command, global),
    }
}
