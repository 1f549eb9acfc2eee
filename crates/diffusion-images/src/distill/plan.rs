//! What a distillation is: method, steps, and the students one after the other.

use super::{Distilled, Method};
use crate::config::{ImageConfig, Predicts, ProcessConfig};
use crate::data::Dataset;
use crate::preset;
use crate::run::stored_config;
use crate::saved::SavedModel;
use candle_core::{DType, Tensor};
use diffusion_core::distill::halvings;
use diffusion_core::loss::Weight;
use diffusion_core::predict::Kind;
use diffusion_core::schedule::{BetaSchedule, Table};
use diffusion_core::train::{AdamWConfig, EmaRule, TrainConfig};
use diffusion_core::{Report, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Steps of the first teacher that are taken where nothing is said: DDIM is close to its limit there.
const USUAL_FROM: usize = 64;

/// A whole distillation, as written to `run/distill.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillConfig {
    /// The folder of the teacher.
    pub teacher: PathBuf,
    /// Tells whether its weights are still the same.
    pub teacher_digest: String,
    /// How students are taught.
    pub method: Method,
    /// Steps of the teacher: of its DDIM for progressive and knowledge distillation, the levels between
    /// which a consistency model is trained.
    pub from: usize,
    /// Steps of the last student.
    pub to: usize,
    /// Pairs of noise and image that the teacher makes for knowledge distillation.
    pub pairs: usize,
    /// Decay of the average that a consistency model is compared with; 0 for the student itself.
    pub target_decay: f64,
    /// How often a label is withheld, where a label stands for no class.
    pub label_dropout: f64,
    /// The forward process, as far as the teacher's own run is known.
    pub process: Option<ProcessConfig>,
    /// Mirror images as the teacher's training did.
    pub flip: bool,
    /// The training of each student.
    pub train: TrainConfig,
}

/// One student of a distillation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Steps (or levels) of its teacher.
    pub from: usize,
    /// Steps of its sampler.
    pub to: usize,
    /// Steps of its training.
    pub train_steps: u64,
}

impl Stage {
    /// The folder of its run.
    pub fn folder(&self) -> String {
        format!("steps-{:04}", self.to)
    }
}

/// A hash of the weights of a model.
pub(super) fn digest(model: &SavedModel) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for (name, tensor) in &model.weights {
        hash.update(name.as_bytes());
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?;
        let bytes: Vec<u8> = values
            .to_vec1::<f32>()?
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        hash.update(&bytes);
    }
    Ok(hash.finalize().to_hex().to_string())
}

impl DistillConfig {
    /// The usual distillation of the model in a folder to this many steps, `train_steps` for each
    /// student.
    ///
    /// # Errors
    /// Those of reading the model.
    pub fn new(folder: &Path, method: Method, to: usize, train_steps: u64) -> Result<Self> {
        let teacher = SavedModel::open(folder, &Default::default())?;
        let absolute =
            std::path::absolute(folder).map_err(|e| diffusion_core::Error::io(folder, e))?;
        // A folder of diffusers has no run; its process is then the table in its scheduler.
        let known = stored_config(folder).ok();
        let mut doubled = to.max(1) * 2;
        while doubled * 2 <= USUAL_FROM {
            doubled *= 2;
        }
        let mut base = ImageConfig::default();
        if let Some(known) = &known {
            base.train = known.train.clone();
            base.train.lr *= 0.5;
        } else {
            base.train.batch_size = 32;
            base.train.lr = 5e-4;
            base.train.adamw = AdamWConfig {
                weight_decay: 0.0,
                ..AdamWConfig::default()
            };
        }
        base.train.max_minutes = None;
        preset::set_steps(&mut base, train_steps);
        base.train.ema = EmaRule::Warmup {
            decay: 0.999,
            inv_gamma: 1.0,
            power: 0.75,
            update_after_step: 0,
            min_decay: 0.0,
        };
        Ok(Self {
            teacher: absolute,
            teacher_digest: digest(&teacher)?,
            method,
            from: doubled,
            to,
            pairs: 2048,
            target_decay: 0.0,
            label_dropout: teacher.classes.null().map_or(0.0, |_| 0.1),
            process: known.as_ref().map(|c| c.process.clone()),
            flip: known.as_ref().is_some_and(|c| c.flip),
            train: base.train,
        })
    }

    /// Reads a configuration.
    ///
    /// # Errors
    /// `Config` naming the file and what is wrong.
    pub fn from_toml(text: &str, file: &Path) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            Report::file(file, e.message())
                .expected("the configuration of a distillation")
                .remedy("restore the file, or start another run in a new folder")
                .config()
        })
    }

    /// The configuration as TOML.
    ///
    /// # Errors
    /// `Config` when a value cannot be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Report::new("config", e).config())
    }

    /// The students, one after the other.
    ///
    /// # Errors
    /// `Config` for steps that do not fit the method or the teacher, `Unsupported` for a teacher
    /// without a table of steps.
    pub fn stages(&self, teacher: &SavedModel) -> Result<Vec<Stage>> {
        let total = table(teacher)?.betas().len();
        if self.to == 0 || self.from > total {
            return Err(Report::new(
                "steps of the distillation",
                format!("from {} to {}", self.from, self.to),
            )
            .expected(format!(
                "1 to {total}, as many as the teacher was trained on"
            ))
            .remedy("choose --to and --from in these bounds")
            .config());
        }
        let stages = self.students(teacher)?;
        for stage in &stages {
            // What a student cannot be trained with is said before the first one is.
            self.student(teacher, stage)?.train.check()?;
        }
        Ok(stages)
    }

    fn students(&self, teacher: &SavedModel) -> Result<Vec<Stage>> {
        let steps = self.train.steps;
        let one = |from, to| Stage {
            from,
            to,
            train_steps: steps,
        };
        match self.method {
            Method::Progressive => {
                let mut from = self.from;
                let mut stages = Vec::new();
                for to in halvings(self.from, self.to)? {
                    stages.push(one(from, to));
                    from = to;
                }
                // Its network learns another reading of its output too.
                if let (Some(first), Kind::Epsilon) = (stages.first_mut(), teacher.scheduler.kind())
                {
                    first.train_steps *= 2;
                }
                Ok(stages)
            }
            Method::Knowledge if self.to != 1 => Err(Report::new(
                "--to",
                format!("{} steps by knowledge distillation", self.to),
            )
            .expected("1: its student makes one step")
            .remedy("give --to 1, or choose --method progressive or consistency")
            .config()),
            Method::Knowledge => Ok(vec![one(self.from, 1)]),
            Method::Consistency if !self.from.is_multiple_of(self.to) || self.from <= self.to => {
                Err(Report::new("--from", format!("{} levels", self.from))
                    .expected(format!("a multiple of {}, the steps of --to", self.to))
                    .remedy(format!("give --from {}", self.to * 8))
                    .config())
            }
            Method::Consistency => Ok(vec![one(self.from, self.to)]),
        }
    }

    /// The training of one student.
    pub(super) fn student(&self, teacher: &SavedModel, stage: &Stage) -> Result<ImageConfig> {
        let predicts = match teacher.scheduler.kind() {
            // The noise says too little about the image where few steps begin.
            Kind::Epsilon | Kind::Velocity => Predicts::VPrediction,
            Kind::X0 => Predicts::Sample,
            other => {
                return Err(
                    Report::new("teacher", format!("a network that predicts {other:?}"))
                        .expected("a prediction of the noise, the image, or a velocity")
                        .unsupported(),
                );
            }
        };
        let process = match &self.process {
            Some(process) => process.clone(),
            None => {
                let table = table(teacher)?;
                ProcessConfig {
                    steps: table.betas().len(),
                    betas: BetaSchedule::Custom {
                        betas: table.betas().to_vec(),
                    },
                    zero_terminal_snr: false,
                }
            }
        };
        let mut config = ImageConfig {
            network: teacher.network.clone(),
            process,
            predicts,
            weight: Weight::TruncatedSnr,
            conditional: teacher.classes.conditional(),
            label_dropout: self.label_dropout,
            flip: self.flip,
            train: self.train.clone(),
            ..ImageConfig::default()
        };
        preset::set_steps(&mut config, stage.train_steps);
        Ok(config)
    }

    /// What decides a student's numbers beside its training configuration.
    pub(super) fn identity(&self, stage: &Stage, data: &Dataset) -> Result<String> {
        let plan = Self {
            train: TrainConfig::default(),
            teacher: PathBuf::new(),
            ..self.clone()
        };
        Ok(format!(
            "{}\n{stage:?}\ndata: {} images, digest {}",
            plan.to_toml()?,
            data.len(),
            data.digest()
        ))
    }

    /// The student as a model folder. Its scheduler is diffusers' DDIM on the grid that it learnt.
    pub(super) fn saved(
        &self,
        teacher: &SavedModel,
        stage: &Stage,
        student: &ImageConfig,
        weights: BTreeMap<String, Tensor>,
        distilled: Distilled,
    ) -> Result<SavedModel> {
        let mut scheduler = student.scheduler_json()?;
        if let Some(fields) = scheduler.as_object_mut() {
            fields.remove("variance_type");
            fields.insert("_class_name".into(), "DDIMScheduler".into());
            fields.insert("timestep_spacing".into(), "trailing".into());
            fields.insert("set_alpha_to_one".into(), true.into());
        }
        let mut saved = SavedModel::new(
            teacher.network.clone(),
            weights,
            teacher.classes.clone(),
            format!("{scheduler:#}\n"),
        )?;
        saved.pipeline = "DDIMPipeline".into();
        saved.distilled = Some(Distilled {
            steps: stage.to,
            ..distilled
        });
        Ok(saved)
    }
}

/// The table of training steps of a model.
pub(super) fn table(model: &SavedModel) -> Result<Table> {
    model.scheduler.table().cloned().ok_or_else(|| {
        Report::new("scheduler", model.scheduler.class())
            .expected("a table of training steps")
            .unsupported()
    })
}
