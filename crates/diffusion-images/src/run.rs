//! A whole training run in a folder: start, stop, resume, and the model at the end.

use crate::card;
use crate::config::ImageConfig;
use crate::data::Dataset;
use crate::model;
use crate::train::{Images, Task};
use candle_core::Device;
use diffusion_core::checkpoint::write_atomic;
use diffusion_core::limits::Limits;
use diffusion_core::train::{Cancel, Observer, Outcome, Trainer};
use diffusion_core::{Error, Report, Result};
use std::path::{Path, PathBuf};

/// Where a run keeps its state inside a model folder.
pub fn run_folder(model: &Path) -> PathBuf {
    model.join("run")
}

/// Where a run keeps its configuration.
pub fn config_file(model: &Path) -> PathBuf {
    run_folder(model).join("config.toml")
}

/// The configuration of a run that was started in this folder.
///
/// # Errors
/// `Input` when there is none, `Config` when it is malformed.
pub fn stored_config(model: &Path) -> Result<ImageConfig> {
    let file = config_file(model);
    match Limits::default().read_config(&file) {
        Ok(text) => {
            ImageConfig::from_toml(&text, &file.display().to_string(), &ImageConfig::default())
        }
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Err(Report::file(&file, "no such file")
                .expected("a run to resume")
                .remedy("start it without --resume")
                .input())
        }
        Err(error) => Err(error),
    }
}

/// What decides a run's numbers beside the training configuration.
fn identity(config: &ImageConfig, data: &Dataset) -> Result<String> {
    let model = ImageConfig {
        train: Default::default(),
        // Memory for time, which a run may change its mind about.
        gradient_checkpointing: false,
        ..config.clone()
    };
    let (name, n) = (data.name(), data.len());
    let shape = [data.channels(), data.height(), data.width()];
    Ok(format!(
        "{}\ndata {name}: {n} images of {shape:?}",
        model.to_toml()?
    ))
}

/// Trains in the folder `out` until the end, or until `cancel` is set, and writes the model.
///
/// A run that is found there is continued from its newest valid checkpoint when `resume` is set
/// and refused otherwise. The model is written from the averaged weights, also after an
/// interruption, so that there is always something to look at.
///
/// # Errors
/// `Checkpoint` when the folder holds another run or is in use; whatever training refuses.
pub fn train(
    config: &ImageConfig,
    data: &Dataset,
    out: &Path,
    resume: bool,
    device: &Device,
    observer: &mut dyn Observer,
    cancel: &Cancel,
) -> Result<Outcome> {
    let run = run_folder(out);
    if !resume && config_file(out).exists() {
        return Err(Report::file(out, "a training run is here already")
            .expected("a new folder")
            .remedy("add --resume to continue it, or choose another --out")
            .checkpoint());
    }
    let mut task = Task::new(config, device)?;
    let checked = config.train.clone().check()?;
    std::fs::create_dir_all(&run).map_err(|e| Error::io(&run, e))?;
    let mut trainer = Trainer::new(task.parameters(), checked)?
        .run_folder(&run)
        .identity(identity(config, data)?);
    if !resume {
        write_atomic(&config_file(out), config.to_toml()?.as_bytes())?;
    }
    let source = Images {
        data,
        device: device.clone(),
    };
    let outcome = trainer.run(&mut task, &source, observer, cancel)?;
    let weights = trainer.ema()?;
    model::save(out, config, data.classes(), &weights)?;
    card::write(out, config, data, trainer.step())?;
    Ok(outcome)
}
