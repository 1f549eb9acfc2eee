//! A model folder in memory, before a network is made of it: read, changed, and written.
//!
//! ```text
//! MODEL/model_index.json                              the class of the pipeline
//! MODEL/unet/{config.json, diffusion_pytorch_model.safetensors}
//! MODEL/scheduler/scheduler_config.json
//! MODEL/classes.json                                  conditional models (see [`crate::classes`])
//! MODEL/distilled.json                                distilled models (see [`crate::distilled`])
//! ```
//!
//! Folders of an earlier version, which had an unconditional `unet/` with `class_embedding/` beside
//! it, are read into the same form.

use crate::classes::Classes;
use crate::distilled::Distilled;
use candle_core::Tensor;
use diffusion_core::checkpoint::{read_safetensors, write_atomic};
use diffusion_core::interop::folder::{DiffusersFolder, WEIGHTS, write_pipeline};
use diffusion_core::interop::scheduler::Scheduler;
use diffusion_core::limits::Limits;
use diffusion_core::{Report, Result};
use diffusion_nn::net::unet2d::{ClassEmbedType, UNet2DConfig, translate_deprecated};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Where the class vectors lie in a network's weights.
const CLASS_WEIGHT: &str = "class_embedding.weight";
/// The last bias of the time embedding, to which class vectors are added.
const TIME_BIAS: &str = "time_embedding.linear_2.bias";
/// The folder of class vectors in an earlier layout.
const EARLIER: &str = "class_embedding";

/// A model folder in memory.
#[derive(Clone)]
pub struct SavedModel {
    /// The class of the pipeline in diffusers.
    pub pipeline: String,
    /// The configuration of the network.
    pub network: UNet2DConfig,
    /// Its weights by name.
    pub weights: BTreeMap<String, Tensor>,
    /// What its labels mean.
    pub classes: Classes,
    /// The scheduler.
    pub scheduler: Scheduler,
    /// What it was distilled for, if it was.
    pub distilled: Option<Distilled>,
    scheduler_text: String,
}

impl SavedModel {
    /// A model out of its parts, as a `DDPMPipeline`; `scheduler` is a `scheduler_config.json`.
    ///
    /// # Errors
    /// `Config`, `Input` or `Unsupported` when the scheduler's configuration cannot be read.
    pub fn new(
        network: UNet2DConfig,
        weights: BTreeMap<String, Tensor>,
        classes: Classes,
        scheduler: String,
    ) -> Result<Self> {
        Ok(Self {
            pipeline: "DDPMPipeline".into(),
            network,
            weights: translate_deprecated(&weights)?,
            classes,
            scheduler: Scheduler::from_json(&scheduler, "scheduler_config.json")?,
            distilled: None,
            scheduler_text: scheduler,
        })
    }

    /// Replaces what is known about the labels by what a file of the form of `classes.json` says.
    ///
    /// # Errors
    /// As [`Classes::read_file`]; `Config` for a network without labels.
    pub fn declare(&mut self, file: &Path, limits: &Limits) -> Result<()> {
        self.classes = match labels(&self.network, &self.weights, file)? {
            Labels::Some(count) => Classes::read_file(file, count, limits)?,
            Labels::None => {
                return Err(Report::file(file, "classes")
                    .expected("none: this network is unconditional")
                    .config());
            }
        };
        Ok(())
    }

    /// Takes every label for a class, where nothing is known about them.
    ///
    /// # Errors
    /// As [`Classes::undeclared`].
    pub fn undeclared(&mut self, file: &Path) -> Result<()> {
        if let Labels::Some(count) = labels(&self.network, &self.weights, file)? {
            self.classes = Classes::undeclared(file, count)?;
        }
        Ok(())
    }

    /// Reads a model folder: one of ours, or any pipeline of diffusers with a `UNet2DModel`.
    ///
    /// # Errors
    /// `Input` naming what is missing or malformed, `Unsupported` for other networks and
    /// schedulers, `Limit` above `limits`, `Io`.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let folder = DiffusersFolder::open(path, limits)?;
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
        let scheduler = folder.scheduler()?;
        let scheduler_text =
            limits.read_config(&path.join("scheduler").join("scheduler_config.json"))?;
        let mut network = network_config(&folder.config_path("unet"), limits)?;
        let mut weights = translate_deprecated(&folder.weights("unet")?)?;
        let classes = match labels(&network, &weights, &folder.config_path("unet"))? {
            Labels::None if path.join(EARLIER).is_dir() => {
                let (names, table) = earlier(&path.join(EARLIER), limits)?;
                network.num_class_embeds = Some(names.len() + 1);
                weights.insert(CLASS_WEIGHT.into(), table);
                Classes::with_null_last(names)
            }
            Labels::None => Classes::default(),
            Labels::Some(count) => Classes::read(path, count, limits)?,
        };
        Ok(Self {
            pipeline: folder.class,
            network,
            weights,
            classes,
            scheduler,
            distilled: Distilled::read(path, limits)?,
            scheduler_text,
        })
    }

    /// Writes the folder. Each file appears whole or not at all, `model_index.json` last.
    ///
    /// # Errors
    /// `Io`, and `Config` when the configuration cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut unet =
            serde_json::to_value(&self.network).map_err(|e| Report::new("network", e).config())?;
        unet["_class_name"] = "UNet2DModel".into();
        let scheduler = serde_json::json!({ "_class_name": self.scheduler.class() });
        let folder = path.join("scheduler");
        for folder in [path, &folder] {
            std::fs::create_dir_all(folder).map_err(|e| diffusion_core::Error::io(folder, e))?;
        }
        self.classes.write(path)?;
        if let Some(distilled) = &self.distilled {
            distilled.write(path)?;
        }
        write_pipeline(path, &self.pipeline, unet, &self.weights, scheduler)?;
        // As it was read: JSON of Python has words, such as -Infinity, that no value here can hold.
        write_atomic(
            &folder.join("scheduler_config.json"),
            self.scheduler_text.as_bytes(),
        )
    }

    /// The same network for one label, without classes, which every pipeline can run: a label
    /// enters the network as a vector added to its time embedding, so the vector of this one is
    /// added to the last bias of that embedding.
    ///
    /// ```text
    /// e = W₂ a(W₁ embed(t) + β₁) + (β₂ + c[label])
    /// ```
    ///
    /// # Errors
    /// `Config` when the model has no classes or no such label, `Unsupported` when labels are not
    /// embedded by a table.
    pub fn with_label_folded(mut self, label: u32) -> Result<Self> {
        if !self.classes.conditional() {
            return Err(Report::new("class", "given")
                .expected("no class: this model is unconditional")
                .config());
        }
        if let Some(kind) = self.network.class_embed_type {
            return Err(Report::new("class_embed_type", format!("{kind:?}"))
                .expected("a table of classes, which can be folded into a bias")
                .unsupported());
        }
        let missing = |name: &str| {
            Report::new(name, "missing")
                .expected("the weights of a class-conditional UNet")
                .remedy("get the file again")
                .input()
        };
        let table = self.weights.remove(CLASS_WEIGHT);
        let table = table.ok_or_else(|| missing(CLASS_WEIGHT))?;
        let rows = table.dim(0)?;
        if label as usize >= rows {
            return Err(Report::new("label", label)
                .expected(format!("below {rows}"))
                .config());
        }
        let bias = self.weights.get(TIME_BIAS);
        let bias = bias.ok_or_else(|| missing(TIME_BIAS))?;
        let folded = (bias + table.get(label as usize)?)?;
        self.weights.insert(TIME_BIAS.into(), folded);
        self.network.num_class_embeds = None;
        self.classes = Classes::default();
        Ok(self)
    }
}

/// A network's configuration from its `config.json`.
///
/// # Errors
/// `Input` or `Config` naming the file and the field, `Limit` and `Io` of reading.
pub fn network_config(file: &Path, limits: &Limits) -> Result<UNet2DConfig> {
    let text = limits.read_config(file)?;
    let mut reader = serde_json::Deserializer::from_str(&text);
    let config: UNet2DConfig = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        Report::field(file.display(), error.path(), error.inner())
            .expected("the configuration of a UNet2DModel")
            .remedy("correct the file, or get it again")
            .input()
    })?;
    config.check().map_err(|error| {
        Report::file(file, error)
            .expected("the configuration of a UNet2DModel")
            .remedy("correct the file, or get it again")
            .config()
    })?;
    Ok(config)
}

/// How many labels a network has.
enum Labels {
    /// It takes none.
    None,
    /// So many, or whatever number.
    Some(Option<usize>),
}

fn labels(
    network: &UNet2DConfig,
    weights: &BTreeMap<String, Tensor>,
    file: &Path,
) -> Result<Labels> {
    match (network.class_embed_type, network.num_class_embeds) {
        (Some(ClassEmbedType::Identity), _) => {
            Err(Report::file(file, "class_embed_type: identity")
                .expected("labels: a table (num_class_embeds), or timestep")
                .remedy("the vectors of its classes are not in the folder; run the network itself")
                .unsupported())
        }
        (Some(ClassEmbedType::Timestep), count) => Ok(Labels::Some(count)),
        (None, None) => Ok(Labels::None),
        (None, Some(count)) => match weights.get(CLASS_WEIGHT).map(|t| t.dims()) {
            // A claim that the weights do not bear out must not be believed.
            Some([rows, _]) if *rows == count => Ok(Labels::Some(Some(count))),
            found => Err(Report::file(file, format!("num_class_embeds: {count}"))
                .expected(match found {
                    Some(shape) => format!("what {CLASS_WEIGHT} says, which has shape {shape:?}"),
                    None => format!("the weight {CLASS_WEIGHT}, which is missing"),
                })
                .remedy("the configuration and the weights belong to different models")
                .input()),
        },
    }
}

/// The names and the table of an earlier layout, whose withheld label is folded into the network:
/// `config.json` has the names, the weights what each class adds to it.
fn earlier(folder: &Path, limits: &Limits) -> Result<(Vec<String>, Tensor)> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Names {
        names: Vec<String>,
    }
    let file = folder.join("config.json");
    let read: Names = serde_json::from_str(&limits.read_config(&file)?).map_err(|e| {
        Report::file(&file, e)
            .expected("the names of the classes")
            .remedy("correct the file, or get it again")
            .input()
    })?;
    let file = folder.join(format!("{WEIGHTS}.safetensors"));
    let Some(table) = read_safetensors(&file, limits)?.remove("weight") else {
        return Err(Report::file(&file, "no tensor `weight`")
            .expected("one row a class")
            .remedy("get the file again")
            .input());
    };
    if table.rank() != 2 || table.dim(0)? != read.names.len() {
        return Err(Report::file(&file, format!("shape {:?}", table.dims()))
            .expected(format!("one row for each of {} classes", read.names.len()))
            .remedy("get the folder again: its files are not of one model")
            .input());
    }
    let null = Tensor::zeros((1, table.dim(1)?), table.dtype(), table.device())?;
    Ok((read.names, Tensor::cat(&[&table, &null], 0)?))
}
