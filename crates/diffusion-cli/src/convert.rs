//! `diffusion convert`

use crate::Global;
use crate::out::out;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use diffusion_core::checkpoint::write_safetensors_atomic;
use diffusion_core::interop::folder::WEIGHTS;
use diffusion_core::interop::weights::{load_weight_file, load_weights};
use diffusion_core::limits::Limits;
use diffusion_core::{Error, Report};
use diffusion_images::classes;
use diffusion_images::model::ImageModel;
use diffusion_images::saved::{SavedModel, network_config};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub const EXAMPLES: &str = "Examples:
  diffusion convert model.pth model.safetensors
  diffusion convert downloaded-folder/ clean-folder/
  diffusion convert epoch=9.ckpt weights.safetensors --strip model. --half
  diffusion convert unet.pth model/ --network config.json --scheduler scheduler_config.json
  diffusion convert checkpoint-500/unet_ema/ model/ --scheduler model/scheduler/scheduler_config.json

A model with classes takes a label at every call, which DDPMPipeline of diffusers cannot pass. One
label can be built into the network:
  diffusion convert digits-model sevens-model --class 7
  diffusion convert digits-model any-digit-model --class none

A model of others does not say which label stands for no class, if any. Write what you know to a
file such as {\"names\": [\"cat\", \"dog\"], \"null_class\": 2} (both keys are optional) and
  diffusion convert their-model/ our-model/ --classes classes.json
or put it into their folder as classes.json.";

/// Options of `diffusion convert`.
#[derive(Args)]
pub struct Convert {
    /// A weight file (.safetensors, an index .json, .pth, .pt, .bin, .ckpt), a model folder in
    /// diffusers' layout, or a folder of a network alone (config.json and weights).
    from: PathBuf,
    /// A .safetensors file, or a new folder for a model in diffusers' layout.
    to: PathBuf,
    /// Keep only tensors whose names begin with this, and cut it off.
    #[arg(long, value_name = "PREFIX")]
    strip: Option<String>,
    /// Write 16-bit floating-point numbers; a .safetensors file only.
    #[arg(long)]
    half: bool,
    /// The network's config.json, to make a folder from a weight file.
    #[arg(long, value_name = "FILE")]
    network: Option<PathBuf>,
    /// The scheduler_config.json of a weight file or of a network alone; DDPM's linear schedule of
    /// 1000 steps when absent.
    #[arg(long, value_name = "FILE")]
    scheduler: Option<PathBuf>,
    /// A classes.json that says what the labels mean.
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
    /// Build one label into the network, which is unconditional then: a class by name or number,
    /// or `none` for the withheld label.
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
}

type Weights = BTreeMap<String, Tensor>;

pub fn run(args: &Convert, global: &Global) -> Result<ExitCode> {
    let limits = Limits::default();
    if args.to.exists() {
        return Err(Report::file(&args.to, "exists already")
            .expected("a new file or folder")
            .remedy("choose another name, or remove it")
            .config()
            .into());
    }
    let is_file = args.to.extension().is_some_and(|e| e == "safetensors");
    if !is_file && args.half {
        return Err(Report::new("--half", "with a folder to write")
            .expected("a .safetensors file")
            .remedy("leave --half out")
            .config()
            .into());
    }
    if !args.from.exists() {
        return Err(Report::file(&args.from, "no such file or folder")
            .expected("a weight file or a model folder")
            .remedy("check the path")
            .input()
            .into());
    }
    let source = source(args, &limits)?;
    let weights = source.weights();
    let (tensors, values) = (
        weights.len(),
        weights.values().map(Tensor::elem_count).sum::<usize>(),
    );
    match (is_file, &source) {
        (true, _) => write_file(&args.to, weights, args.half)?,
        (false, Source::Model(model)) => write_folder(args, model)?,
        (false, Source::Weights(_)) => {
            return Err(Report::file(&args.to, "a folder, from a weight file alone")
                .expected("the network's configuration")
                .remedy("add --network config.json, or write to a .safetensors file")
                .config()
                .into());
        }
    }
    if global.json {
        let line = json!({ "out": args.to, "tensors": tensors, "values": values });
        out!("{line}");
    } else {
        out!("{}: {tensors} tensors, {values} values", args.to.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// What is converted.
enum Source {
    /// Tensors of which nothing else is known.
    Weights(Weights),
    Model(Box<SavedModel>),
}

impl Source {
    fn weights(&self) -> &Weights {
        match self {
            Source::Weights(weights) => weights,
            Source::Model(model) => &model.weights,
        }
    }
}

/// Reads what is to be converted, and changes it as asked.
fn source(args: &Convert, limits: &Limits) -> Result<Source> {
    let refuse = |option: &str, expected: &str, remedy: &str| -> Result<Source> {
        Err(Report::new(option, "given")
            .expected(expected)
            .remedy(remedy)
            .config()
            .into())
    };
    let bare = args.from.join("config.json");
    let (network, scheduler) = (args.network.as_deref(), args.scheduler.as_deref());
    let is_folder = args.from.is_dir();
    if is_folder && network.is_some() {
        let remedy = "leave it out: the folder has its own config.json";
        return refuse("--network", "a weight file to read", remedy);
    }
    let alone = is_folder && bare.exists() && !args.from.join("model_index.json").exists();
    let mut model = if is_folder && !alone {
        if scheduler.is_some() {
            let remedy = "leave it out: the folder has its own scheduler_config.json";
            return refuse("--scheduler", "a weight file to read", remedy);
        }
        let mut model = SavedModel::open(&args.from, limits)?;
        model.weights = strip(model.weights, args)?;
        model
    } else {
        let weights = match alone {
            true => load_weights(&args.from, WEIGHTS, limits)?,
            false => load_weight_file(&args.from, limits)?,
        };
        let weights = strip(weights, args)?;
        let Some(network) = network.or(alone.then_some(bare.as_path())) else {
            for (option, there) in [
                ("--scheduler", scheduler.is_some()),
                ("--classes", args.classes.is_some()),
                ("--class", args.class.is_some()),
            ] {
                if there {
                    return refuse(
                        option,
                        "a network's configuration",
                        "add --network config.json",
                    );
                }
            }
            return Ok(Source::Weights(weights));
        };
        let scheduler = match scheduler {
            Some(file) => limits.read_config(file)?,
            None => json!({ "_class_name": "DDPMScheduler" }).to_string(),
        };
        let network = network_config(network, limits)?;
        let mut model = SavedModel::new(network, weights, classes::Classes::default(), scheduler)?;
        if args.classes.is_none() {
            model.undeclared(Path::new(classes::FILE))?;
        }
        model
    };
    if let Some(file) = &args.classes {
        model.declare(file, limits)?;
    }
    if let Some(class) = &args.class {
        let label = match class.as_str() {
            "none" => model.classes.null_label(Some(&args.from))?,
            name => model.classes.label(model.classes.find(name)?)?,
        };
        model = model.with_label_folded(label)?;
    }
    Ok(Source::Model(Box::new(model)))
}

fn strip(weights: Weights, args: &Convert) -> Result<Weights> {
    let Some(prefix) = &args.strip else {
        return Ok(weights);
    };
    let first = weights.keys().next().cloned().unwrap_or_default();
    let kept: Weights = weights
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor)))
        .collect();
    if kept.is_empty() {
        return Err(Report::new("--strip", prefix)
            .expected(format!(
                "the beginning of a tensor's name, which are like `{first}`"
            ))
            .config()
            .into());
    }
    Ok(kept)
}

fn write_file(path: &Path, weights: &Weights, half: bool) -> Result<()> {
    let weights = weights
        .iter()
        .map(|(name, tensor)| {
            let narrow = half && matches!(tensor.dtype(), DType::F32 | DType::F64);
            let tensor = match narrow {
                true => tensor.to_dtype(DType::F16)?,
                false => tensor.clone(),
            };
            Ok((name.clone(), tensor))
        })
        .collect::<candle_core::Result<Weights>>()?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    Ok(write_safetensors_atomic(path, &weights, &metadata)?)
}

/// Writes the folder beside its place, opens it as a model, and moves it there.
fn write_folder(args: &Convert, saved: &SavedModel) -> Result<()> {
    let name = args.to.file_name().unwrap_or_default().to_string_lossy();
    let beside = args
        .to
        .with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = saved
        .write(&beside)
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            let model = ImageModel::open(&beside, &Device::Cpu);
            model.map(drop).with_context(|| {
                format!("{}: not the weights of this network", args.from.display())
            })
        })
        .and_then(|()| {
            std::fs::rename(&beside, &args.to).map_err(|e| Error::io(&args.to, e).into())
        });
    if written.is_err() {
        // What is left of a failed attempt is of no use; the error that counts is the first one.
        let _ = std::fs::remove_dir_all(&beside);
    }
    written
}
