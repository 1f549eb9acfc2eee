//! `diffusion convert`

use crate::Global;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use diffusion_core::checkpoint::write_safetensors_atomic;
use diffusion_core::interop::folder::{DiffusersFolder, write_pipeline};
use diffusion_core::interop::weights::load_weight_file;
use diffusion_core::limits::Limits;
use diffusion_core::{Error, Report};
use diffusion_images::model::ImageModel;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub const EXAMPLES: &str = "Examples:
  diffusion convert model.pth model.safetensors
  diffusion convert downloaded-folder/ clean-folder/
  diffusion convert epoch=9.ckpt weights.safetensors --strip model. --half
  diffusion convert unet.pth model/ --network config.json --scheduler scheduler_config.json";

/// Options of `diffusion convert`.
#[derive(Args)]
pub struct Convert {
    /// A weight file (.safetensors, an index .json, .pth, .pt, .bin, .ckpt) or a model folder in
    /// diffusers' layout.
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
    /// The scheduler_config.json of that folder; DDPM's linear schedule of 1000 steps when absent.
    #[arg(long, value_name = "FILE", requires = "network")]
    scheduler: Option<PathBuf>,
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
    let folder = args.from.is_dir();
    if folder && args.network.is_some() {
        return Err(Report::new("--network", "with a folder to read")
            .expected("a weight file")
            .remedy("leave --network out: the folder has its own config.json")
            .config()
            .into());
    }
    let weights = match folder {
        true => DiffusersFolder::open(&args.from, &limits)?.weights("unet")?,
        false => load_weight_file(&args.from, &limits)?,
    };
    let weights = strip(weights, args)?;
    let (tensors, values) = (
        weights.len(),
        weights.values().map(Tensor::elem_count).sum::<usize>(),
    );
    if is_file {
        write_file(&args.to, weights, args.half)?;
    } else {
        write_folder(args, &weights, &limits)?;
    }
    if global.json {
        let line = json!({ "out": args.to, "tensors": tensors, "values": values });
        println!("{line}");
    } else {
        println!("{}: {tensors} tensors, {values} values", args.to.display());
    }
    Ok(ExitCode::SUCCESS)
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

fn write_file(path: &Path, weights: Weights, half: bool) -> Result<()> {
    let weights = weights
        .into_iter()
        .map(|(name, tensor)| {
            let narrow = half && matches!(tensor.dtype(), DType::F32 | DType::F64);
            let tensor = match narrow {
                true => tensor.to_dtype(DType::F16)?,
                false => tensor,
            };
            Ok((name, tensor))
        })
        .collect::<candle_core::Result<Weights>>()?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    Ok(write_safetensors_atomic(path, &weights, &metadata)?)
}

/// Writes the folder beside its place, opens it as a model, and moves it there.
fn write_folder(args: &Convert, weights: &Weights, limits: &Limits) -> Result<()> {
    let (network, scheduler) = configurations(args, limits)?;
    let name = args.to.file_name().unwrap_or_default().to_string_lossy();
    let beside = args
        .to
        .with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = write_pipeline(&beside, "DDPMPipeline", network, weights, scheduler)
        .map_err(anyhow::Error::from)
        .and_then(|()| classes(&args.from, &beside))
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

/// The names and vectors of classes lie beside the network in folders of ours.
fn classes(from: &Path, to: &Path) -> Result<()> {
    const NAME: &str = "class_embedding";
    let (from, to) = (from.join(NAME), to.join(NAME));
    if !from.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(&to).map_err(|e| Error::io(&to, e))?;
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(from.join(file), to.join(file)).map_err(|e| Error::io(from.join(file), e))?;
    }
    Ok(())
}

/// The configurations of the network and of the scheduler.
fn configurations(args: &Convert, limits: &Limits) -> Result<(Value, Value)> {
    if args.from.is_dir() {
        let folder = DiffusersFolder::open(&args.from, limits)?;
        folder.scheduler()?;
        let scheduler = args.from.join("scheduler/scheduler_config.json");
        return Ok((folder.config("unet")?, json_file(&scheduler, limits)?));
    }
    let Some(network) = &args.network else {
        return Err(Report::file(&args.to, "a folder, from a weight file alone")
            .expected("the network's configuration")
            .remedy("add --network config.json, or write to a .safetensors file")
            .config()
            .into());
    };
    let scheduler = match &args.scheduler {
        Some(file) => json_file(file, limits)?,
        None => json!({ "_class_name": "DDPMScheduler" }),
    };
    Ok((json_file(network, limits)?, scheduler))
}

fn json_file(path: &Path, limits: &Limits) -> Result<Value> {
    let text = limits.read_text(path)?;
    serde_json::from_str(&text).map_err(|e| {
        Report::file(path, e)
            .expected("a JSON object")
            .input()
            .into()
    })
}
