//! A whole training run in a folder: start, stop, resume, and the model at the end.

use crate::card;
use crate::config::ImageConfig;
use crate::data::{DataConfig, DataRecord, Dataset};
use crate::model;
use crate::train::{Images, Task};
use candle_core::Device;
use diffusion_core::checkpoint::write_atomic;
use diffusion_core::limits::Limits;
use diffusion_core::train::{Both, Cancel, JsonLines, Observer, Outcome, Trainer};
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
    // By content: data may be moved, but not changed.
    let (n, digest) = (data.len(), data.digest());
    let shape = [data.channels(), data.height(), data.width()];
    Ok(format!(
        "{}\ndata: {n} images of {shape:?}, digest {digest}",
        model.to_toml()?
    ))
}

/// A model that was trained in an earlier run with the same configuration and data, or is now.
#[derive(Debug)]
pub struct Trained {
    /// The model folder.
    pub folder: PathBuf,
    /// Seconds of training, of the run that did it.
    pub seconds: f64,
}

/// The model of this configuration from the folder `cache`, or trained now.
///
/// The model's folder is named after everything that decides its weights, so that sections and runs
/// share it; a training that was interrupted goes on. `metrics.jsonl` lies in its run folder.
///
/// # Errors
/// Those of [`train`].
pub fn trained(
    cache: &Path,
    config: &ImageConfig,
    data: &Dataset,
    device: &Device,
    observer: impl Observer,
    cancel: &Cancel,
) -> Result<Trained> {
    let text = format!("{}\n{}", config.to_toml()?, identity(config, data)?);
    let key = diffusion_ops::init::fnv1a(&text);
    let folder = cache.join(format!("images-{key:016x}"));
    let done = folder.join("seconds");
    if let Some(seconds) = read_seconds(&done) {
        return Ok(Trained { folder, seconds });
    }
    let start = std::time::Instant::now();
    let resume = config_file(&folder).exists();
    let lines = JsonLines::new(run_folder(&folder).join("metrics.jsonl"));
    let mut observer = Both(lines, observer);
    let outcome = train(config, data, &folder, resume, device, &mut observer, cancel)?;
    let seconds = start.elapsed().as_secs_f64();
    if matches!(outcome, Outcome::Finished { .. }) {
        write_atomic(&done, seconds.to_string().as_bytes())?;
    }
    Ok(Trained { folder, seconds })
}

fn read_seconds(file: &Path) -> Option<f64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Refuses a folder in which a run was started already.
///
/// # Errors
/// `Checkpoint` naming the folder.
pub fn refuse_existing(model: &Path) -> Result<()> {
    if !config_file(model).exists() && !crate::distill::config_file(model).exists() {
        return Ok(());
    }
    Err(Report::file(model, "a training run is here already")
        .expected("a new folder")
        .remedy("add --resume to continue it, or choose another --out")
        .checkpoint())
}

/// Refuses a folder that holds other things than a run: its files would lie among them.
///
/// # Errors
/// `Input` naming the folder and what is in it, `Io` when it cannot be read.
pub fn refuse_foreign(out: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(out, error)),
    };
    for entry in entries {
        let name = entry.map_err(|e| Error::io(out, e))?.file_name();
        // A start that failed leaves this.
        if name != "run" {
            return Err(Report::file(out, format!("not empty: {}", name.display()))
                .expected("a new or an empty folder")
                .remedy("choose another --out")
                .input());
        }
    }
    Ok(())
}

/// Where a run keeps which data it learns from.
pub fn data_file(model: &Path) -> PathBuf {
    run_folder(model).join("data.toml")
}

/// Notes in the folder of a model which data it learns from, so that later commands need not be told.
///
/// # Errors
/// `Io` when the note cannot be written.
pub fn remember_data(model: &Path, config: &DataConfig, train: &Dataset) -> Result<()> {
    let run = run_folder(model);
    std::fs::create_dir_all(&run).map_err(|e| Error::io(&run, e))?;
    let record = DataRecord {
        images: train.len(),
        digest: train.digest(),
        data: config.absolute()?,
    };
    record.write(&data_file(model))
}

/// The data that a model learned from, if [`remember_data`] noted it.
///
/// # Errors
/// Those of [`DataRecord::read`].
pub fn remembered_data(model: &Path) -> Result<Option<DataRecord>> {
    DataRecord::read(&data_file(model))
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
    if !resume {
        refuse_existing(out)?;
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
    let source = Images::new(data, config, device);
    let outcome = trainer.run(&mut task, &source, observer, cancel)?;
    let weights = trainer.ema()?;
    model::save(out, config, data.classes(), &weights)?;
    card::write(out, config, data, trainer.step())?;
    Ok(outcome)
}
