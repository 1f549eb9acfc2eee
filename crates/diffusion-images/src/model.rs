//! A trained model on disk, a folder that diffusers can load, and samples from it.
//!
//! ```text
//! MODEL/model_index.json                              DDPMPipeline
//! MODEL/unet/{config.json, diffusion_pytorch_model.safetensors}
//! MODEL/scheduler/scheduler_config.json
//! MODEL/classes.json                                  conditional models: names, withheld label
//! MODEL/distilled.json                                distilled models: sampler, grid and steps
//! MODEL/run/                                          configuration, metrics, checkpoints
//! ```
//!
//! `unet/` is the network as diffusers' users expect it: a class-conditional one has
//! `num_class_embeds`, and its last label, one more than there are classes, stands for no class.
//! See [`crate::saved`] for reading and writing, [`crate::classes`] for what labels mean.

use crate::classes::Classes;
use crate::config::ImageConfig;
use crate::data::Dataset;
use crate::distilled::Distilled;
use crate::from_nn;
use crate::saved::SavedModel;
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Denoiser, Network, TimeCode, from_fn};
use diffusion_core::grid::Grid;
use diffusion_core::guide::{ClassifierFree, Clip, Thresholded};
use diffusion_core::interop::scheduler::Scheduler;
use diffusion_core::limits::Limits;
use diffusion_core::noise::CounterNoise;
use diffusion_core::sample::{Ctx, Observer, SamplerConfig, Solver, prior};
use diffusion_core::schedule::{Point, Schedule, Table};
use diffusion_core::{Error, Report, Result};
use diffusion_nn::net::unet2d::{SampleSize, UNet2D, UNet2DConfig};
use diffusion_nn::{Mode, Store};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A network ready to sample, with the process it was trained for.
pub struct ImageModel {
    network: UNet2D,
    config: UNet2DConfig,
    scheduler: Scheduler,
    classes: Classes,
    distilled: Option<Distilled>,
    /// Where it was read from.
    folder: Option<PathBuf>,
    device: Device,
    parameters: usize,
}

/// What to sample.
#[derive(Clone)]
pub struct SampleRequest {
    /// How many images.
    pub count: usize,
    /// The sampler.
    pub sampler: SamplerConfig,
    /// Where it stops.
    pub grid: Grid,
    /// Number of steps.
    pub steps: usize,
    /// A class for every image; `None` for an unconditional model, or for the withheld label.
    pub labels: Option<Vec<u32>>,
    /// Classifier-free guidance weight: 0 unconditional, 1 conditional, more is sharper.
    pub guidance: f64,
    /// Clipping of the predicted image.
    pub clip: Clip,
    /// Images computed at a time; the result does not depend on it.
    pub batch: usize,
    /// Take the noise of steps from one Brownian path an image: a finer grid refines it.
    pub brownian: bool,
    /// Seed of all noise.
    pub seed: u64,
}

/// Writes a trained network as a model folder. `classes` are the names of a conditional network's
/// classes; its last label is the withheld one.
///
/// # Errors
/// `Io`, and `Config` when the names are not one fewer than the labels, or when the process has no
/// counterpart in diffusers.
pub fn save(
    path: &Path,
    config: &ImageConfig,
    classes: &[String],
    weights: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let scheduler = format!("{:#}\n", config.scheduler_json()?);
    let network = config.network.clone();
    SavedModel::new(
        network,
        weights.clone(),
        trained(config, classes)?,
        scheduler,
    )?
    .write(path)
}

/// The classes of a network in training.
fn trained(config: &ImageConfig, names: &[String]) -> Result<Classes> {
    match config.network.num_class_embeds {
        Some(labels) if labels != names.len() + 1 => {
            Err(Report::new("network.num_class_embeds", labels)
                .expected(format!("{}: one a class, and one more", names.len() + 1))
                .config())
        }
        Some(_) => Ok(Classes::with_null_last(names.to_vec())),
        None => Ok(Classes::default()),
    }
}

impl ImageModel {
    /// Opens a model folder: one of ours, or any `UNet2DModel` pipeline of diffusers.
    ///
    /// # Errors
    /// `Input` naming what is missing or malformed, `Unsupported` for other networks.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let saved = SavedModel::open(path, &Limits::default())?;
        Self::from_saved(saved, Some(path), device)
    }

    /// The model of a folder in memory, which lies at `path` where it has a place.
    ///
    /// # Errors
    /// `Input` when the weights are not those of the network.
    pub fn from_saved(saved: SavedModel, path: Option<&Path>, device: &Device) -> Result<Self> {
        let parameters = saved.weights.values().map(Tensor::elem_count).sum();
        let network = Store::serve(&saved.weights, DType::F32, device, |scope| {
            UNet2D::new(&saved.network, scope)
        })
        .map_err(|error| match error {
            diffusion_nn::Error::Candle(error) => Error::Tensor(error),
            other => Report::file(&path.unwrap_or(Path::new("")).join("unet"), other)
                .expected("the weights of the network in unet/config.json")
                .remedy("get both files again, from one model")
                .input(),
        })?;
        Ok(Self {
            network,
            config: saved.network,
            scheduler: saved.scheduler,
            classes: saved.classes,
            distilled: saved.distilled,
            folder: path.map(Path::to_path_buf),
            device: device.clone(),
            parameters,
        })
    }

    /// A model of weights that are at hand, as training has them (`class_embedding.weight` included
    /// for a conditional one).
    ///
    /// # Errors
    /// `Config` when the configuration is impossible, `Input` when weights are missing.
    pub fn from_weights(
        config: &ImageConfig,
        classes: &[String],
        weights: &BTreeMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let network = Store::serve(weights, DType::F32, device, |scope| {
            UNet2D::new(&config.network, scope)
        })
        .map_err(from_nn)?;
        let scheduler = config.scheduler_json()?.to_string();
        Ok(Self {
            network,
            config: config.network.clone(),
            scheduler: Scheduler::from_json(&scheduler, "scheduler of the configuration")?,
            classes: trained(config, classes)?,
            distilled: None,
            folder: None,
            device: device.clone(),
            parameters: weights.values().map(Tensor::elem_count).sum(),
        })
    }

    /// Names of the classes, empty for an unconditional model.
    pub fn classes(&self) -> &[String] {
        self.classes.names()
    }

    /// What the labels of the network mean.
    pub fn labels(&self) -> &Classes {
        &self.classes
    }

    /// The network's configuration.
    pub fn config(&self) -> &UNet2DConfig {
        &self.config
    }

    /// The scheduler it was saved with.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// What the model was distilled for, if it was.
    pub fn distilled(&self) -> Option<&Distilled> {
        self.distilled.as_ref()
    }

    /// Number of weights.
    pub fn num_parameters(&self) -> usize {
        self.parameters
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The table of training steps.
    ///
    /// # Errors
    /// `Unsupported` for schedulers without one.
    pub fn table(&self) -> Result<Table> {
        self.scheduler.table().cloned().ok_or_else(|| {
            Report::new("scheduler", self.scheduler.class())
                .expected("a table of training steps")
                .unsupported()
        })
    }

    /// Shape of one image, `[C, H, W]`.
    ///
    /// # Errors
    /// `Config` when the configuration names no size.
    pub fn image_shape(&self) -> Result<[usize; 3]> {
        shape_of(&self.config)
    }

    /// Refuses data whose images are not of the model's shape.
    ///
    /// # Errors
    /// `Config` naming both shapes.
    pub fn must_make(&self, data: &Dataset) -> Result<()> {
        must_make(&self.config, data)
    }

    /// The network as a denoiser; classes for a conditional one, `None` for the withheld label.
    ///
    /// # Errors
    /// `Config` when there are classes for an unconditional model or beyond the last one, and when
    /// there are none for a conditional model whose withheld label is not known.
    pub fn denoiser(&self, classes: Option<&[u32]>) -> Result<impl Denoiser + '_> {
        self.denoiser_from(classes, 0)
    }

    /// The same for a batch whose first item of the run is `first`: samplers that run items by
    /// themselves ask for one label of many.
    fn denoiser_from(&self, classes: Option<&[u32]>, first: u64) -> Result<impl Denoiser + '_> {
        let labels = match classes {
            Some(classes) => {
                let labels = classes.iter().map(|class| self.classes.label(*class));
                Some(labels.collect::<Result<Vec<u32>>>()?)
            }
            None => None,
        };
        let null = match (&labels, self.classes.conditional()) {
            (None, true) => Some(self.classes.null_label(self.folder.as_deref())?),
            _ => None,
        };
        Ok(from_fn(move |x, at, call| {
            let batch = x.dim(0)?;
            let labels = match (&labels, null) {
                (Some(labels), _) if labels.len() == batch => Some(labels.clone()),
                (Some(labels), _) => {
                    let start = call.items.start.saturating_sub(first) as usize;
                    let own = labels.get(start..start + batch).ok_or_else(|| {
                        Report::new("items of a call", format!("{:?}", call.items))
                            .expected(format!("some of the {} that have labels", labels.len()))
                            .config()
                    })?;
                    Some(own.to_vec())
                }
                (None, Some(null)) => Some(vec![null; batch]),
                (None, None) => None,
            };
            let labels = labels.map(|l| Tensor::new(l, &self.device)).transpose()?;
            self.told(labels).predict(x, at, call)
        }))
    }

    /// The network as a denoiser that is told these labels, `[B]`, of its own.
    pub(crate) fn told(&self, labels: Option<Tensor>) -> impl Denoiser + '_ {
        Network::new(
            self.scheduler.kind(),
            TimeCode::Index,
            move |x: &Tensor, t: &Tensor| {
                self.network
                    .forward(x, t, labels.as_ref(), Mode::Eval)
                    .map_err(from_nn)
            },
        )
    }

    /// Samples images, `[count, C, H, W]` in `[−1, 1]`.
    ///
    /// Image `i` depends on the seed, `i`, and the request, not on the batch.
    ///
    /// # Errors
    /// `Config` for impossible requests, `Numeric` when the model says NaN, `Interrupted`.
    pub fn sample(&self, request: &SampleRequest, watch: &mut dyn Observer) -> Result<Tensor> {
        let table = self.table()?;
        let points = request.grid.points(&table, request.steps)?;
        let shared: Arc<dyn Schedule + Send + Sync> = Arc::new(table);
        let solver = request.sampler.solver(&points, Some(shared));
        self.sample_by(&*solver, &points, request, watch)
    }

    /// The same by a solver that begins at the first of these points, whatever the request's sampler,
    /// grid and steps.
    ///
    /// # Errors
    /// As [`ImageModel::sample`].
    pub fn sample_by(
        &self,
        solver: &dyn Solver,
        points: &[Point],
        request: &SampleRequest,
        watch: &mut dyn Observer,
    ) -> Result<Tensor> {
        self.check(request)?;
        let Some(noisiest) = points.first() else {
            return Err(Report::new("points of the run", "none")
                .expected("at least one")
                .config());
        };
        let shape = self.image_shape()?;
        let mut parts = Vec::new();
        for start in (0..request.count).step_by(request.batch.max(1)) {
            let end = request.count.min(start + request.batch.max(1));
            let labels = request.labels.as_ref().map(|l| &l[start..end]);
            let items = start as u64..end as u64;
            let mut noise = CounterNoise::new(request.seed, items.clone());
            let like = Tensor::zeros(
                (end - start, shape[0], shape[1], shape[2]),
                DType::F32,
                &self.device,
            )?;
            let x = prior(&like, noisiest, &mut noise)?;
            let denoiser = self.guided(labels, start as u64, request)?;
            let mut ctx = Ctx::new(&*denoiser, &mut noise, items);
            ctx.brownian = request.brownian;
            parts.push(solver.solve(x, &mut ctx, watch)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The denoiser of a request from item `first`: conditional, guided, clipped.
    fn guided<'a>(
        &'a self,
        labels: Option<&[u32]>,
        first: u64,
        request: &SampleRequest,
    ) -> Result<Box<dyn Denoiser + 'a>> {
        let clip = request.clip;
        let conditional = self.denoiser_from(labels, first)?;
        if labels.is_none() || request.guidance == 1.0 {
            return Ok(Box::new(Thresholded {
                inner: conditional,
                clip,
            }));
        }
        let guided = ClassifierFree {
            conditional,
            unconditional: self.denoiser(None)?,
            weight: request.guidance,
            rescale: 0.0,
        };
        Ok(Box::new(Thresholded {
            inner: guided,
            clip,
        }))
    }

    fn check(&self, request: &SampleRequest) -> Result<()> {
        request.clip.check()?;
        request.sampler.check()?;
        if request.count == 0 {
            return Err(Report::new("number of images", 0)
                .expected("at least 1")
                .config());
        }
        if !request.guidance.is_finite() || request.guidance < 0.0 {
            return Err(Report::new("guidance", request.guidance)
                .expected("a number of at least 0")
                .config());
        }
        match &request.labels {
            Some(labels) if labels.len() != request.count => {
                Err(Report::new("classes", format!("{} labels", labels.len()))
                    .expected(format!("one for each of {} images", request.count))
                    .config())
            }
            Some(_) if self.classes().is_empty() => Err(Report::new("class", "given")
                .expected("no class: this model is unconditional")
                .remedy("leave the class out, or train on labelled images")
                .config()),
            None if request.guidance != 1.0 => Err(Report::new("guidance", request.guidance)
                .expected("a class to guide towards")
                .remedy("add a class, or leave the guidance out")
                .config()),
            _ => Ok(()),
        }
    }
}

/// Shape of the images of a network, `[C, H, W]`.
fn shape_of(config: &UNet2DConfig) -> Result<[usize; 3]> {
    let (height, width) = match config.sample_size {
        Some(SampleSize::Side(side)) => (side, side),
        Some(SampleSize::HeightWidth([height, width])) => (height, width),
        None => {
            return Err(Report::new("unet/config.json: sample_size", "null")
                .expected("the size of an image")
                .remedy("write the side of its images there")
                .config());
        }
    };
    Ok([config.in_channels, height, width])
}

/// Refuses data whose images a network does not make.
pub(crate) fn must_make(config: &UNet2DConfig, data: &Dataset) -> Result<()> {
    let (made, found) = (
        shape_of(config)?,
        [data.channels(), data.height(), data.width()],
    );
    if made == found {
        return Ok(());
    }
    let name = data.name();
    Err(
        Report::new(format!("data `{name}`"), format!("images of {found:?}"))
            .expected(format!("{made:?}, as the model makes"))
            .remedy("give the data that the model was trained on")
            .config(),
    )
}
