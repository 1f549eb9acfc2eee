//! The lessons of one student: what its teacher says about a batch, and how far the student is off.

use super::plan::{DistillConfig, Stage, table};
use super::{Distilled, Method};
use crate::config::ImageConfig;
use crate::data::Dataset;
use crate::model::ImageModel;
use crate::saved::SavedModel;
use crate::train::{Batch, Learner, training};
use candle_core::{DType, Device, Tensor, Var};
use diffusion_core::checkpoint::{read_safetensors, write_safetensors_atomic};
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::distill::consistency::LevelLaw;
use diffusion_core::distill::{Consistency, Distance, Knowledge, Levels, Ode, Pairs, Progressive};
use diffusion_core::grid::Grid;
use diffusion_core::guide::{Clip, Thresholded};
use diffusion_core::limits::Limits;
use diffusion_core::noise::CounterNoise;
use diffusion_core::sample::{self, Ddim, Direction, Planned, SamplerConfig};
use diffusion_core::schedule::{Point, Schedule};
use diffusion_core::tensor::lincomb;
use diffusion_core::train::{Cancel, Loss, LossValue, Objective, Source, StepCtx};
use diffusion_core::{Report, Result};
use diffusion_nn::{Mode, Strictness};
use std::collections::BTreeMap;
use std::path::Path;

/// Images that the teacher makes at a time.
const CHUNK: usize = 64;
/// Images lie in `[−1, 1]`.
const CLIP: Clip = Clip::Static { range: 1.0 };
/// The steps of DDIM that students are taught.
const DDIM: Ddim = Ddim {
    eta: 0.0,
    direction: Direction::Rederived,
};

/// What is compared.
enum Lesson {
    Progressive(Progressive),
    Consistency(Consistency),
    Knowledge(Knowledge),
}

/// A student in training, and its teacher.
pub(super) struct Lessons {
    student: Learner,
    /// The average that a consistency model is compared with, where it is not the student.
    target: Option<Learner>,
    decay: f64,
    teacher: ImageModel,
    lesson: Lesson,
    /// Where the teacher's DDIM stops.
    points: Vec<Point>,
    label_dropout: f64,
    device: Device,
}

impl Lessons {
    /// A student that begins as its teacher.
    pub(super) fn new(
        config: &DistillConfig,
        teacher: &SavedModel,
        student: &ImageConfig,
        stage: &Stage,
        data: &Dataset,
        device: &Device,
    ) -> Result<Self> {
        let classes = teacher.classes.names().len();
        if teacher.classes.conditional() && data.classes().len() != classes {
            return Err(
                Report::new("training data", format!("{} classes", data.classes().len()))
                    .expected(format!("{classes}, as the teacher has"))
                    .remedy("give the data that the teacher was trained on")
                    .config(),
            );
        }
        let learner = || -> Result<Learner> {
            let learner = Learner::new(student, device)?;
            let loaded = learner.store.load(&teacher.weights, Strictness::Exact);
            loaded.map_err(crate::from_nn)?;
            Ok(learner)
        };
        let table = table(teacher)?;
        let points = Grid::Trailing.points(&table, stage.from)?;
        let lesson = match config.method {
            Method::Progressive => Lesson::Progressive(Progressive::new(&points, student.weight)?),
            Method::Knowledge => Lesson::Knowledge(Knowledge { first: points[0] }),
            Method::Consistency => {
                // Below the cleanest step of the grid, the first of the table is the end.
                let mut levels = points.clone();
                levels.pop();
                levels.push(table.at(0.0));
                levels.dedup();
                let levels = Levels::new(levels, LevelLaw::Uniform)?;
                // With unit data the raw output is the velocity, sign apart.
                Lesson::Consistency(Consistency::new(levels, 1.0, Distance::default()))
            }
        };
        let averaged = config.method == Method::Consistency && config.target_decay > 0.0;
        Ok(Self {
            student: learner()?,
            target: averaged.then(learner).transpose()?,
            decay: config.target_decay,
            teacher: ImageModel::from_saved(teacher.clone(), None, device)?,
            lesson,
            points,
            label_dropout: config.label_dropout,
            device: device.clone(),
        })
    }

    /// The trainable parameters by name.
    pub(super) fn parameters(&self) -> BTreeMap<String, Var> {
        self.student.store.named()
    }

    /// How the student is to be sampled; the steps are those of its stage.
    pub(super) fn distilled(&self) -> Distilled {
        let (method, sampler) = match &self.lesson {
            Lesson::Progressive(_) => (Method::Progressive, SamplerConfig::Ddim(DDIM)),
            Lesson::Knowledge(_) => (Method::Knowledge, SamplerConfig::Ddim(DDIM)),
            Lesson::Consistency(loss) => (
                Method::Consistency,
                SamplerConfig::Consistency(sample::Consistency {
                    boundary: loss.boundary,
                    clip: Some(1.0),
                    ..sample::Consistency::default()
                }),
            ),
        };
        Distilled {
            method,
            steps: 1,
            sampler,
            grid: Grid::Trailing,
        }
    }

    /// Labels for the network out of classes, each withheld where `withheld` says so.
    fn labels(
        &self,
        classes: Option<&[u32]>,
        withheld: impl Fn(usize) -> bool,
    ) -> Result<Option<Tensor>> {
        let known = self.teacher.labels();
        if !known.conditional() {
            return Ok(None);
        }
        let Some(classes) = classes else {
            return Err(Report::new("training data", "images without labels")
                .expected("labels, as the teacher has classes")
                .remedy("give the data that the teacher was trained on")
                .config());
        };
        let labels: Vec<u32> = classes
            .iter()
            .enumerate()
            .map(|(i, class)| match known.null() {
                Some(null) if withheld(i) => Ok(null),
                _ => known.label(*class),
            })
            .collect::<Result<_>>()?;
        Ok(Some(Tensor::new(labels, &self.device)?))
    }

    /// The teacher's images of pairs `items`, with their noise, `[B, 2, C, H, W]`.
    fn pairs(&self, items: std::ops::Range<u64>, seed: u64) -> Result<Tensor> {
        let [c, h, w] = self.teacher.image_shape()?;
        let batch = (items.end - items.start) as usize;
        let like = Tensor::zeros((batch, c, h, w), DType::F32, &self.device)?;
        let classes: Vec<u32> = items.clone().map(|i| self.class(i)).collect();
        let labels = self.labels(Some(&classes), |i| withheld(items.start + i as u64))?;
        let teacher = Thresholded {
            inner: self.teacher.told(labels),
            clip: CLIP,
        };
        let solver = Planned::new(DDIM, &self.points);
        let mut noise = CounterNoise::new(seed, items.clone());
        let pairs = Pairs::generate(&solver, &teacher, &self.points[0], &like, &mut noise, items)?;
        Ok(Tensor::stack(&[&pairs.noise, &pairs.samples], 1)?)
    }

    /// The class of a pair.
    fn class(&self, item: u64) -> u32 {
        (item % self.teacher.classes().len().max(1) as u64) as u32
    }
}

/// Whether a pair has no class: one in ten, so that the student learns to do without.
fn withheld(item: u64) -> bool {
    item % 10 == 9
}

impl Objective for Lessons {
    type Batch = Batch;

    fn losses(&mut self, _: usize, batch: &Batch, ctx: &StepCtx) -> Result<Vec<Loss>> {
        let n = batch.images.dim(0)?;
        let labels = match self.lesson {
            Lesson::Knowledge(_) => self.labels(batch.labels.as_deref(), |i| {
                withheld(ctx.items.get(i).copied().unwrap_or(0))
            })?,
            _ => self.labels(batch.labels.as_deref(), |i| {
                ctx.dropout_key(i).uniform(1)[0] < self.label_dropout
            })?,
        };
        let student = self.student.denoiser(labels.clone(), training(ctx));
        let teacher = Thresholded {
            inner: self.teacher.told(labels.clone()),
            clip: CLIP,
        };
        let mut noise = CounterNoise::new(ctx.seed, 0..n as u64);
        let mut call = Call {
            noise: &mut noise,
            items: 0..n as u64,
            tracked: true,
        };
        let keys = (0..n).map(|i| ctx.time_key(i));
        let epsilon = || ctx.noise(&batch.images.dims()[1..], DType::F32, &self.device);
        let x0 = &batch.images;
        let losses = match &self.lesson {
            Lesson::Progressive(halving) => {
                let steps = halving.draw(keys);
                halving.losses(&teacher, &student, (x0, &epsilon()?), &steps, &mut call)?
            }
            Lesson::Consistency(loss) => {
                let pairs = loss.levels.draw(keys);
                let target = self.target.as_ref().unwrap_or(&self.student);
                let target = target.denoiser(labels, Mode::Eval);
                let both: (&dyn Denoiser, &dyn Denoiser) = (&student, &target);
                let teacher: (&dyn Denoiser, Ode) = (&teacher, Ode::Heun);
                loss.distil(teacher, both, (x0, &epsilon()?), &pairs, &mut call)?
            }
            Lesson::Knowledge(knowledge) => {
                let pairs = Pairs {
                    noise: x0.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?,
                    samples: x0.narrow(1, 1, 1)?.squeeze(1)?.contiguous()?,
                };
                knowledge.losses(&student, &pairs, &mut call)?
            }
        };
        Ok(vec![Loss::new("distillation", losses.mean_all()?)])
    }

    fn after_step(&mut self, _: &[LossValue], _: &StepCtx) -> Result<()> {
        let Some(target) = &self.target else {
            return Ok(());
        };
        let student = self.student.store.named();
        for (name, average) in target.store.named() {
            if let Some(value) = student.get(&name) {
                let (old, new) = (average.as_tensor().detach(), value.as_tensor().detach());
                average.set(&lincomb(self.decay, &old, 1.0 - self.decay, &new)?)?;
            }
        }
        Ok(())
    }

    fn writes_parameters(&self) -> bool {
        false
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        match &self.target {
            Some(target) => Ok(target.store.frozen().map_err(crate::from_nn)?),
            None => Ok(BTreeMap::new()),
        }
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        match &self.target {
            Some(target) => target
                .store
                .load(state, Strictness::Exact)
                .map_err(crate::from_nn),
            None => Ok(()),
        }
    }
}

/// Pairs of noise and the teacher's images, drawn once.
pub(super) struct Taught {
    pairs: Tensor,
    classes: Vec<u32>,
    device: Device,
}

impl Taught {
    /// The pairs in a file, or made now and written there; `None` when `cancel` was set meanwhile.
    pub(super) fn open(
        task: &Lessons,
        config: &DistillConfig,
        file: &Path,
        cancel: &Cancel,
    ) -> Result<Option<Self>> {
        let count = config.pairs as u64;
        let classes = (0..count).map(|i| task.class(i)).collect();
        let read = match file.exists() {
            true => read_safetensors(file, &Limits::default())?.remove("pairs"),
            false => None,
        };
        let pairs = match read {
            Some(pairs) if pairs.dims().first() == Some(&config.pairs) => pairs,
            _ => {
                let mut parts = Vec::new();
                for start in (0..count).step_by(CHUNK) {
                    if cancel.is_set() {
                        return Ok(None);
                    }
                    let end = count.min(start + CHUNK as u64);
                    let pairs = task.pairs(start..end, config.train.seed)?;
                    parts.push(pairs.to_device(&Device::Cpu)?);
                }
                let pairs = Tensor::cat(&parts, 0)?;
                let named = BTreeMap::from([("pairs".to_string(), pairs.clone())]);
                write_safetensors_atomic(file, &named, &BTreeMap::new())?;
                pairs
            }
        };
        Ok(Some(Self {
            pairs,
            classes,
            device: task.device.clone(),
        }))
    }
}

impl Source for Taught {
    type Batch = Batch;

    fn len(&self) -> usize {
        self.classes.len()
    }

    fn batch(&self, items: &[usize], _: u64) -> Result<Batch> {
        let rows: Vec<u32> = items.iter().map(|i| *i as u32).collect();
        let rows = Tensor::new(rows, self.pairs.device())?;
        Ok(Batch {
            images: self.pairs.index_select(&rows, 0)?.to_device(&self.device)?,
            labels: Some(
                items
                    .iter()
                    .filter_map(|i| self.classes.get(*i).copied())
                    .collect(),
            ),
        })
    }
}
