//! `diffusion inspect`

use crate::Global;
use anyhow::Result;
use candle_core::Device;
use clap::Args;
use diffusion_images::model::ImageModel;
use diffusion_images::run;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `diffusion inspect`.
#[derive(Args)]
pub struct Inspect {
    /// Model folder.
    model: PathBuf,
}

pub fn run(args: &Inspect, global: &Global) -> Result<ExitCode> {
    let model = ImageModel::open(&args.model, &Device::Cpu)?;
    let config = model.config();
    let scheduler = model.scheduler().config();
    let shape = model.image_shape().ok();
    // A model from elsewhere has no run beside it.
    let training = run::config_file(&args.model)
        .exists()
        .then(|| run::stored_config(&args.model))
        .transpose()?;
    if global.json {
        println!(
            "{}",
            serde_json::json!({
                "parameters": model.num_parameters(),
                "image_shape": shape,
                "classes": model.classes(),
                "null_class": model.labels().null(),
                "unet": config,
                "scheduler": scheduler,
                "training": training,
            })
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", args.model.display());
    println!("  network     UNet2D, {} weights", model.num_parameters());
    println!("  channels    {:?}", config.block_out_channels);
    println!(
        "  blocks      {:?} | {:?}",
        config.down_block_types, config.up_block_types
    );
    if let Some([c, h, w]) = shape {
        println!("  images      {c} x {h} x {w}");
    }
    match model.classes() {
        [] => println!("  classes     none (unconditional)"),
        names => println!("  classes     {}", names.join(", ")),
    }
    match model.labels().null() {
        Some(label) => println!("  no class    label {label}"),
        None if model.labels().conditional() => {
            println!("  no class    no label is known for it: no guidance");
        }
        None => {}
    }
    println!(
        "  process     {}, {} steps, {} betas, predicts {}",
        scheduler.class,
        scheduler.num_train_timesteps,
        scheduler.beta_schedule,
        scheduler.prediction_type
    );
    if let Some(training) = training {
        println!(
            "  training    {} steps of {}, learning rate {}, seed {}",
            training.train.steps, training.train.batch_size, training.train.lr, training.train.seed
        );
    }
    Ok(ExitCode::SUCCESS)
}
