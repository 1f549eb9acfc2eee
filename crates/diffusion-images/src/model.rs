//! A trained model on disk: a folder that diffusers can load, and samples from it.
//!
//! ```text
//! MODEL/model_index.json                              DDPMPipeline
//! MODEL/unet/{config.json, diffusion_pytorch_model.safetensors}
//! MODEL/scheduler/scheduler_config.json
//! MODEL/class_embedding/{config.json, diffusion_pytorch_model.safetensors}   conditional models
//! MODEL/run/                                          configuration, metrics, checkpoints
//! ```
//!
//! `unet/` is always an unconditional network, so that `DDPMPipeline` can run it: a label enters
//! the network as a vector added to the time embedding, so the vector of the withheld label is
//! folded into the last bias of that embedding, and `class_embedding/` holds the others relative
//! to it. A folder whose `unet/` is class-conditional itself (`num_class_embeds`) is read as it is;
//! its last class is taken for the withheld label.

use crate::config::ImageConfig;
use crate::from_nn;
use candle_core::{DType, Device, Tensor};
use diffusion_core::checkpoint::{read_safetensors, write_atomic, write_safetensors_atomic};
use diffusion_core::denoiser::{Denoiser, Network, TimeCode};
use diffusion_core::grid::Grid;
use diffusion_core::guide::{ClassifierFree, Clip, Thresholded};
use diffusion_core::interop::folder::{DiffusersFolder, write_pipeline};
use diffusion_core::interop::scheduler::Scheduler;
use diffusion_core::limits::Limits;
use diffusion_core::noise::CounterNoise;
use diffusion_core::sample::{Ctx, Observer, SamplerConfig, prior};
use diffusion_core::schedule::{Schedule, Table};
use diffusion_core::{Error, Report, Result};
use diffusion_nn::net::unet2d::{SampleSize, UNet2D, UNet2DConfig, translate_deprecated};
use diffusion_nn::{Mode, Store};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Where the class vectors lie in a network's weights.
const CLASS_WEIGHT: &str = "class_embedding.weight";
/// The bias into which the withheld label is folded.
const TIME_BIAS: &str = "time_embedding.linear_2.bias";
/// File stem of weights, as diffusers names it.
const STEM: &str = "diffusion_pytorch_model";

/// The classes of a conditional model.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Classes {
    names: Vec<String>,
}

/// A network ready to sample, with the process it was trained for.
pub struct ImageModel {
    network: UNet2D,
    config: UNet2DConfig,
    scheduler: Scheduler,
    classes: Vec<String>,
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
    /// A class for every image, `None` for the unconditional model.
    pub labels: Option<Vec<u32>>,
    /// Classifier-free guidance weight: 0 unconditional, 1 conditional, more is sharper.
    pub guidance: f64,
    /// Clipping of the predicted image.
    pub clip: Clip,
    /// Images computed at a time; the result does not depend on it.
    pub batch: usize,
    /// Seed of all noise.
    pub seed: u64,
}

/// Writes a trained network as a model folder.
///
/// # Errors
/// `Io`, and `Config` when weights are missing.
pub fn save(
    path: &Path,
    config: &ImageConfig,
    classes: &[String],
    weights: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let mut weights = weights.clone();
    let mut network = config.network.clone();
    if let Some(table) = weights.remove(CLASS_WEIGHT) {
        network.num_class_embeds = None;
        let null = table.get(table.dim(0)? - 1)?;
        let Some(bias) = weights.get(TIME_BIAS) else {
            return Err(Report::new(TIME_BIAS, "missing")
                .expected("the weights of a UNet")
                .input());
        };
        weights.insert(TIME_BIAS.into(), (bias + &null)?);
        let relative = table
            .narrow(0, 0, table.dim(0)? - 1)?
            .broadcast_sub(&null)?;
        let folder = path.join("class_embedding");
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
        let text = to_json(&Classes {
            names: classes.to_vec(),
        })?;
        write_atomic(&folder.join("config.json"), text.as_bytes())?;
        write_safetensors_atomic(
            &folder.join(format!("{STEM}.safetensors")),
            &BTreeMap::from([("weight".to_string(), relative)]),
            &BTreeMap::from([("format".to_string(), "pt".to_string())]),
        )?;
    }
    let mut unet =
        serde_json::to_value(&network).map_err(|e| Report::new("network", e).config())?;
    unet["_class_name"] = "UNet2DModel".into();
    write_pipeline(
        path,
        "DDPMPipeline",
        unet,
        &weights,
        config.scheduler_json()?,
    )
}

/// The configuration of a folder's network.
fn network_config(folder: &DiffusersFolder) -> Result<UNet2DConfig> {
    let file = folder.config_path("unet");
    let text = folder.config_text("unet")?;
    let mut reader = serde_json::Deserializer::from_str(&text);
    let config: UNet2DConfig = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        Report::field(file.display(), error.path(), error.inner())
            .expected("the configuration of a UNet2DModel")
            .remedy("correct the file, or get it again")
            .input()
    })?;
    config.check().map_err(|error| {
        Report::file(&file, error)
            .expected("the configuration of a UNet2DModel")
            .remedy("correct the file, or get it again")
            .config()
    })?;
    Ok(config)
}

fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|e| Report::new("json", e).config())
}

impl ImageModel {
    /// Opens a model folder: one of ours, or any `UNet2DModel` pipeline of diffusers.
    ///
    /// # Errors
    /// `Input` naming what is missing or malformed, `Unsupported` for other networks.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let limits = Limits::default();
        let folder = DiffusersFolder::open(path, &limits)?;
        let component = folder.component("unet")?;
        if component.class != "UNet2DModel" {
            return Err(Report::file(
                &path.join("model_index.json"),
                format!("unet: {}", component.class),
            )
            .expected("UNet2DModel")
            .remedy("give a pipeline of this network")
            .unsupported());
        }
        let mut config = network_config(&folder)?;
        let mut weights = translate_deprecated(&folder.weights("unet")?)?;
        let mut classes = Vec::new();
        let conditions = path.join("class_embedding");
        if conditions.is_dir() {
            let file = conditions.join("config.json");
            let text = limits.read_text(&file)?;
            let read: Classes = serde_json::from_str(&text).map_err(|e| {
                Report::file(&file, e)
                    .expected("the names of the classes")
                    .remedy("correct the file, or get it again")
                    .input()
            })?;
            classes = read.names;
            let file = conditions.join(format!("{STEM}.safetensors"));
            let Some(table) = read_safetensors(&file, &limits)?.remove("weight") else {
                return Err(Report::file(&file, "no tensor `weight`")
                    .expected("one row a class")
                    .remedy("get the file again")
                    .input());
            };
            if table.rank() != 2 || table.dim(0)? != classes.len() {
                return Err(Report::file(&file, format!("shape {:?}", table.dims()))
                    .expected(format!("one row for each of {} classes", classes.len()))
                    .remedy("get the folder again: its files are not of one model")
                    .input());
            }
            let null = Tensor::zeros((1, table.dim(1)?), table.dtype(), table.device())?;
            config.num_class_embeds = Some(classes.len() + 1);
            weights.insert(CLASS_WEIGHT.into(), Tensor::cat(&[&table, &null], 0)?);
        } else if let Some(count) = config.num_class_embeds {
            classes = (0..count.saturating_sub(1))
                .map(|k| k.to_string())
                .collect();
        }
        let scheduler = folder.scheduler()?;
        let parameters = weights.values().map(Tensor::elem_count).sum();
        let network = Store::serve(&weights, DType::F32, device, |scope| {
            UNet2D::new(&config, scope)
        })
        .map_err(|error| match error {
            diffusion_nn::Error::Candle(error) => Error::Tensor(error),
            other => Report::file(&path.join("unet"), other)
                .expected("the weights of the network in unet/config.json")
                .remedy("get the folder again: its files are not of one model")
                .input(),
        })?;
        Ok(Self {
            network,
            config,
            scheduler,
            classes,
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
        let conditional = config.network.num_class_embeds.is_some();
        Ok(Self {
            network,
            config: config.network.clone(),
            scheduler: Scheduler::from_json(&scheduler, "scheduler of the configuration")?,
            classes: if conditional {
                classes.to_vec()
            } else {
                Vec::new()
            },
            device: device.clone(),
            parameters: weights.values().map(Tensor::elem_count).sum(),
        })
    }

    /// Names of the classes, empty for an unconditional model.
    pub fn classes(&self) -> &[String] {
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
        let (height, width) = match self.config.sample_size {
            Some(SampleSize::Side(side)) => (side, side),
            Some(SampleSize::HeightWidth([height, width])) => (height, width),
            None => {
                return Err(Report::new("unet/config.json: sample_size", "null")
                    .expected("the size of an image")
                    .remedy("write it into the file")
                    .config());
            }
        };
        Ok([self.config.in_channels, height, width])
    }

    /// The network as a denoiser; labels for a conditional one, `None` for the withheld label.
    ///
    /// # Errors
    /// `Config` when there are labels for an unconditional model or beyond the last class.
    pub fn denoiser(&self, labels: Option<&[u32]>) -> Result<impl Denoiser + '_> {
        let mut given = labels.unwrap_or_default().iter();
        if let Some(bad) = given.find(|l| **l as usize >= self.classes.len()) {
            let expected = match self.classes.len() {
                0 => "no class: this model is unconditional".to_string(),
                n => format!("0 to {}", n - 1),
            };
            return Err(Report::new("class", bad).expected(expected).config());
        }
        let null = self.classes.len() as u32;
        let labels = labels.map(<[u32]>::to_vec);
        let conditional = self.config.num_class_embeds.is_some();
        Ok(Network::new(
            self.scheduler.kind(),
            TimeCode::Index,
            move |x: &Tensor, t: &Tensor| {
                let labels = match (&labels, conditional) {
                    (_, false) => None,
                    (Some(labels), true) => Some(Tensor::new(labels.as_slice(), &self.device)?),
                    (None, true) => Some(Tensor::full(null, x.dim(0)?, &self.device)?),
                };
                self.network
                    .forward(x, t, labels.as_ref(), Mode::Eval)
                    .map_err(from_nn)
            },
        ))
    }

    /// Samples images, `[count, C, H, W]` in `[−1, 1]`.
    ///
    /// Image `i` depends on the seed, `i`, and the request, not on the batch.
    ///
    /// # Errors
    /// `Config` for impossible requests, `Numeric` when the model says NaN, `Interrupted`.
    pub fn sample(&self, request: &SampleRequest, watch: &mut dyn Observer) -> Result<Tensor> {
        let table = self.table()?;
        self.check(request)?;
        let points = request.grid.points(&table, request.steps)?;
        let shared: Arc<dyn Schedule + Send + Sync> = Arc::new(table);
        let solver = request.sampler.solver(&points, Some(shared));
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
            let x = prior(&like, &points[0], &mut noise)?;
            let denoiser = self.guided(labels, request)?;
            parts.push(solver.solve(x, &mut Ctx::new(&*denoiser, &mut noise, items), watch)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The denoiser of a request: conditional, guided, clipped.
    fn guided<'a>(
        &'a self,
        labels: Option<&[u32]>,
        request: &SampleRequest,
    ) -> Result<Box<dyn Denoiser + 'a>> {
        let clip = request.clip;
        let conditional = self.denoiser(labels)?;
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
            Some(_) if self.classes.is_empty() => Err(Report::new("class", "given")
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
