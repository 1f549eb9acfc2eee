//! Few steps out of many: a trained model teaches a student, which is saved as a model of its own.
//!
//! ```text
//! OUT/                              the student reached last, with distilled.json
//! OUT/run/distill.toml              what the run is
//! OUT/run/steps-0008/               checkpoints of the student of 8 steps, metrics
//! OUT/run/steps-0008/model/         that student, once it is done: the teacher of the next
//! ```
//!
//! Each student is trained by the one trainer of the workspace: it stops and resumes at any step
//! without changing a bit, and students that are done are not trained again.

mod plan;
mod task;

pub use crate::distilled::{Distilled, Method};
pub use plan::{DistillConfig, Stage};

use crate::data::Dataset;
use crate::model::must_make;
use crate::run::{refuse_existing, run_folder};
use crate::saved::SavedModel;
use crate::train::Images;
use candle_core::Device;
use diffusion_core::checkpoint::write_atomic;
use diffusion_core::limits::Limits;
use diffusion_core::train::{Cancel, Observer, Outcome, Trainer};
use diffusion_core::{Error, Report, Result};
use std::path::{Path, PathBuf};
use task::{Lessons, Taught};

/// Where a run keeps its configuration.
pub fn config_file(model: &Path) -> PathBuf {
    run_folder(model).join("distill.toml")
}

/// The configuration of a run that was started in this folder.
///
/// # Errors
/// `Input` when there is none, `Config` when it is malformed.
pub fn stored_config(model: &Path) -> Result<DistillConfig> {
    let file = config_file(model);
    match Limits::default().read_config(&file) {
        Ok(text) => DistillConfig::from_toml(&text, &file),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Err(Report::file(&file, "no such file")
                .expected("a distillation to resume")
                .remedy("start it without --resume")
                .input())
        }
        Err(error) => Err(error),
    }
}

/// Where a distillation stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    /// The student trained last.
    pub stage: Stage,
    /// Its training steps done.
    pub step: u64,
    /// Whether all students are done.
    pub finished: bool,
}

/// Distils in the folder `out` until the end, or until `cancel` is set, and writes the student there.
///
/// `observe` is asked for somebody who watches each student's training. A run that is found is
/// continued when `resume` is set and refused otherwise.
///
/// # Errors
/// `Checkpoint` when the folder holds another run or the teacher has changed; whatever reading the
/// teacher and training refuse.
pub fn distill(
    config: &DistillConfig,
    data: &Dataset,
    out: &Path,
    resume: bool,
    device: &Device,
    observe: &mut dyn FnMut(&Stage) -> Result<Box<dyn Observer>>,
    cancel: &Cancel,
) -> Result<Reached> {
    if !resume {
        refuse_existing(out)?;
    }
    let limits = Limits::default();
    let mut teacher = SavedModel::open(&config.teacher, &limits)?;
    if plan::digest(&teacher)? != config.teacher_digest {
        return Err(
            Report::file(&config.teacher, "its weights have changed since")
                .expected("the teacher that the run began with")
                .remedy("restore the teacher, or start another run in a new folder")
                .checkpoint(),
        );
    }
    let stages = config.stages(&teacher)?;
    must_make(&teacher.network, data)?;
    let run = run_folder(out);
    std::fs::create_dir_all(&run).map_err(|e| Error::io(&run, e))?;
    if !resume {
        write_atomic(&config_file(out), config.to_toml()?.as_bytes())?;
    }
    let mut reached = None;
    for stage in stages {
        let folder = run.join(stage.folder());
        let done = folder.join("model");
        if done.join("model_index.json").exists() {
            teacher = SavedModel::open(&done, &limits)?;
            let step = stage.train_steps;
            reached = Some(Reached {
                stage,
                step,
                finished: true,
            });
            continue;
        }
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
        let mut observer = observe(&stage)?;
        let (student, outcome) = learn(
            config,
            &teacher,
            &stage,
            data,
            &folder,
            device,
            &mut *observer,
            cancel,
        )?;
        let (finished, step) = match outcome {
            Outcome::Finished { step } => (true, step),
            Outcome::Interrupted { step } | Outcome::OutOfTime { step } => (false, step),
        };
        reached = Some(Reached {
            stage,
            step,
            finished,
        });
        if !finished {
            student.write(out)?;
            break;
        }
        student.write(&done)?;
        teacher = student;
    }
    let Some(reached) = reached else {
        return Err(Report::new("distillation", "no student to train")
            .expected("at least one")
            .config());
    };
    if reached.finished {
        teacher.write(out)?;
    }
    Ok(reached)
}

/// Trains one student, from its newest checkpoint if there is one.
#[allow(clippy::too_many_arguments)] // What a run is, where it lies, and who watches it.
fn learn(
    config: &DistillConfig,
    teacher: &SavedModel,
    stage: &Stage,
    data: &Dataset,
    folder: &Path,
    device: &Device,
    observer: &mut dyn Observer,
    cancel: &Cancel,
) -> Result<(SavedModel, Outcome)> {
    let student = config.student(teacher, stage)?;
    let mut task = Lessons::new(config, teacher, &student, stage, data, device)?;
    let mut trainer = Trainer::new(task.parameters(), student.train.clone().check()?)?
        .run_folder(folder)
        .identity(config.identity(stage, data)?);
    let outcome = match config.method {
        Method::Knowledge => {
            let pairs = folder.join("pairs.safetensors");
            match Taught::open(&task, config, &pairs, cancel)? {
                Some(source) => trainer.run(&mut task, &source, observer, cancel)?,
                None => Outcome::Interrupted { step: 0 },
            }
        }
        Method::Progressive | Method::Consistency => {
            let source = Images::new(data, &student, device);
            trainer.run(&mut task, &source, observer, cancel)?
        }
    };
    let weights = trainer.ema()?;
    let saved = config.saved(teacher, stage, &student, weights, task.distilled())?;
    Ok((saved, outcome))
}

#[cfg(test)]
mod tests;
