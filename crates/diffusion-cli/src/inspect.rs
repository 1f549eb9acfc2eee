//! `diffusion inspect`

use crate::Global;
use crate::out::out;
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
        out!(
            "{}",
            serde_json::json!({
                "parameters": model.num_parameters(),
                "image_shape": shape,
                "classes": model.classes(),
                "null_class": model.labels().null(),
                "unet": config,
                "scheduler": scheduler,
                "training": training,
                "distilled": model.distilled(),
            })
        );
        return Ok(ExitCode::SUCCESS);
    }
    out!("{}", args.model.display());
    out!("  network     UNet2D, {} weights", model.num_parameters());
    out!("  channels    {:?}", config.block_out_channels);
    out!(
        "  blocks      {:?} | {:?}",
        config.down_block_types,
        config.up_block_types
    );
    if let Some([c, h, w]) = shape {
        out!("  images      {c} x {h} x {w}");
    }
    match model.classes() {
        [] => out!("  classes     none (unconditional)"),
        names => out!("  classes     {}", names.join(", ")),
    }
    match model.labels().null() {
        Some(label) => out!("  no class    label {label}"),
        None if model.labels().conditional() => {
            out!("  no class    no label is known for it: no guidance");
        }
        None => {}
    }
    out!(
        "  process     {}, {} steps, {} betas, predicts {}",
        scheduler.class,
        scheduler.num_train_timesteps,
        scheduler.beta_schedule,
        scheduler.prediction_type
    );
    if let Some(learnt) = model.distilled() {
        out!(
            "  distilled   by the {} method for {} steps of {}",
            learnt.method.name(),
            learnt.steps,
            learnt.sampler_name()
        );
    }
    if let Some(training) = training {
        out!(
            "  training    planned for {} steps of {}, learning rate {}, seed {}",
            training.train.steps,
            training.train.batch_size,
            training.train.lr,
            training.train.seed
        );
    }
    Ok(ExitCode::SUCCESS)
}
