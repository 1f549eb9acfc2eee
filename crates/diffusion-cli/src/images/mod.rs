//! `diffusion images …`

mod data;
mod distill;
mod evaluate;
mod invert;
mod likelihood;
mod sample;
mod train;

use crate::Global;
use anyhow::Result;
use clap::Subcommand;
use diffusion_core::grid::Grid;
use diffusion_core::sample::SamplerConfig;
use diffusion_images::model::ImageModel;
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

/// How a model is sampled.
pub struct Way {
    /// The sampler's name, or its parameters as JSON.
    pub name: String,
    /// The sampler.
    pub sampler: SamplerConfig,
    /// Where it stops.
    pub grid: Grid,
    /// Its steps.
    pub steps: usize,
}

/// The way that was asked for; where nothing was, the one that the model was distilled for, or else the
/// usual one.
pub fn way(model: &ImageModel, sampler: Option<&str>, steps: Option<usize>) -> Result<Way> {
    if let (Some(learnt), None) = (model.distilled(), sampler) {
        return Ok(Way {
            name: learnt.sampler_name().into(),
            sampler: learnt.sampler.clone(),
            grid: learnt.grid.clone(),
            steps: steps.unwrap_or(learnt.steps),
        });
    }
    let name = sampler.unwrap_or("dpmpp-2m");
    let sampler = SamplerConfig::parse(name)?;
    Ok(Way {
        name: name.into(),
        grid: sampler.usual_grid(&model.table()?),
        sampler,
        steps: steps.unwrap_or(20),
    })
}
