//! The readers of everything that comes from outside, each as one function of a file.
//!
//! The hostile files of [`crate::hostile`], the fuzz targets and the replay of their corpus all come
//! through here. What a reader accepts must be consistent in itself, whatever the file says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use diffusion_core::checkpoint::{Checkpoints, DiskStorage, Keep, Snapshot, read_safetensors};
use diffusion_core::interop::scheduler::Request;
use diffusion_core::interop::weights::load_weight_file;
use diffusion_core::limits::Limits;
use diffusion_core::{Report, Result};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::{self, Dataset};
use diffusion_images::model::{self, ImageModel};
use diffusion_images::{preset, train};

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Format {
    /// A PNG image in a folder.
    Png,
    /// A JPEG image in a folder.
    Jpeg,
    /// Images in the format of MNIST, gzipped or not.
    Idx,
    /// Images in the binary format of CIFAR-10.
    Cifar,
    /// Images as arrays of NumPy.
    Npz,
    /// Tensors.
    Safetensors,
    /// Tensors that PyTorch pickled.
    Pth,
    /// The JSON files of a model folder: `model_index`, `config`, `scheduler_config`.
    Json,
    /// The configuration of a training run.
    Toml,
    /// The manifest of a checkpoint.
    Manifest,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Png,
        Self::Jpeg,
        Self::Idx,
        Self::Cifar,
        Self::Npz,
        Self::Safetensors,
        Self::Pth,
        Self::Json,
        Self::Toml,
        Self::Manifest,
    ];

    /// The name in tables and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Idx => "idx",
            Self::Cifar => "cifar",
            Self::Npz => "npz",
            Self::Safetensors => "safetensors",
            Self::Pth => "pth",
            Self::Json => "json",
            Self::Toml => "toml",
            Self::Manifest => "manifest",
        }
    }
}

/// What came of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The reader said no, with this message.
    Refused(String),
    /// The reader accepted it, and what it read is consistent.
    Accepted,
    /// The reader accepted it, and what it read contradicts itself.
    Inconsistent(String),
}

/// Where files are staged: it holds a tiny model and a run of two checkpoints to put them into.
#[derive(Debug)]
pub struct Bench {
    base: tempfile::TempDir,
}

impl Bench {
    /// Makes the model and the run.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn new() -> anyhow::Result<Self> {
        make_base().map(|base| Self { base })
    }

    /// Feeds a file to its reader in this process. `name` is the file's name where the reader looks
    /// for it; of a JSON file the part before the first `-` or `.` says which one it is.
    ///
    /// # Errors
    /// When the scratch files cannot be written.
    pub fn feed(&self, format: Format, name: &str, bytes: &[u8]) -> anyhow::Result<Verdict> {
        let folder = tempfile::tempdir()?;
        let path = self.stage(format, name, bytes, folder.path())?;
        Ok(read(format, &path))
    }

    /// Writes a file where its reader expects it, and gives the path for [`read`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn stage(
        &self,
        format: Format,
        name: &str,
        bytes: &[u8],
        folder: &Path,
    ) -> anyhow::Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        let file = match format {
            Format::Json => {
                copy(&self.base.path().join("model"), folder)?;
                folder.join(match name.split(['-', '.']).next() {
                    Some("scheduler") => "scheduler/scheduler_config.json",
                    Some("unet") => "unet/config.json",
                    _ => "model_index.json",
                })
            }
            Format::Manifest => {
                copy(&self.base.path().join("run"), folder)?;
                std::fs::write(folder.join(SOUND), self.sound(MANIFEST)?)?;
                folder.join(MANIFEST)
            }
            _ => folder.join(name),
        };
        std::fs::write(&file, bytes)?;
        Ok(match format {
            Format::Png | Format::Jpeg | Format::Json | Format::Manifest => folder.to_path_buf(),
            _ => file,
        })
    }

    fn sound(&self, name: &str) -> std::io::Result<Vec<u8>> {
        std::fs::read(self.base.path().join("run").join(name))
    }

    /// The valid files of a format that live in the model and the run.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn valid(&self, format: Format) -> std::io::Result<Vec<(&'static str, Vec<u8>)>> {
        let model = |name: &str| std::fs::read(self.base.path().join("model").join(name));
        Ok(match format {
            Format::Json => vec![
                ("index.json", model("model_index.json")?),
                ("unet.json", model("unet/config.json")?),
                ("scheduler.json", model("scheduler/scheduler_config.json")?),
            ],
            Format::Manifest => vec![("MANIFEST.json", self.sound(MANIFEST)?)],
            _ => Vec::new(),
        })
    }
}

const MANIFEST: &str = "checkpoints/step-000000002/MANIFEST.json";
/// A copy of the manifest that was written, to compare an accepted one with.
const SOUND: &str = "sound";

/// Reads a file that was laid out as its format has it. Panics are for the caller to catch.
pub fn read(format: Format, path: &Path) -> Verdict {
    let result = match format {
        Format::Png | Format::Jpeg | Format::Idx | Format::Cifar | Format::Npz => images(path),
        Format::Safetensors => read_safetensors(path, &Limits::default()).map(|t| tensors(&t)),
        Format::Pth => load_weight_file(path, &Limits::default()).map(|t| tensors(&t)),
        Format::Json => open_model(path),
        Format::Toml => training(path),
        Format::Manifest => manifest(path),
    };
    match result {
        Ok(None) => Verdict::Accepted,
        Ok(Some(what)) => Verdict::Inconsistent(what),
        Err(error) => Verdict::Refused(error.to_string()),
    }
}

/// Whether a refusal tells a user what to do: it names a file or field, what was expected and a
/// remedy.
///
/// ```text
/// FILE…: FOUND; expected EXPECTED (REMEDY)
/// ```
pub fn helps(message: &str) -> bool {
    let place = message.split(": ").next().unwrap_or_default();
    !place.is_empty()
        && message.contains("; expected ")
        && message.contains(" (")
        && message.ends_with(')')
        && message.lines().count() == 1
}

/// What a reader accepted, and what contradicts itself in it.
type Checked = Result<Option<String>>;

fn images(path: &Path) -> Checked {
    let data = data::open(&path.display().to_string())?;
    check_images(&data)
}

fn check_images(data: &Dataset) -> Checked {
    let (n, shape) = (data.len(), [data.channels(), data.height(), data.width()]);
    if n == 0 || shape.contains(&0) || ![1, 3].contains(&shape[0]) {
        return Ok(Some(format!("{n} images of {shape:?}")));
    }
    if let Some(labels) = data.labels() {
        let classes = data.classes().len();
        if labels.len() != n || labels.iter().any(|l| *l as usize >= classes) {
            let found = labels.len();
            return Ok(Some(format!(
                "{found} labels of {classes} classes for {n} images"
            )));
        }
    }
    // One small image: what is measured is the reader, not this check.
    let size: usize = shape.iter().product();
    if size > 1 << 18 {
        return Ok(None);
    }
    let (x, _) = data.batch(&[n - 1], &Device::Cpu)?;
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    if values.len() != size {
        let found = values.len();
        return Ok(Some(format!("{found} values for an image of {shape:?}")));
    }
    let outside = values.iter().find(|v| !(-1.0..=1.0).contains(*v));
    Ok(outside.map(|v| format!("the value {v}")))
}

fn tensors(tensors: &BTreeMap<String, Tensor>) -> Option<String> {
    tensors.iter().find_map(|(name, tensor)| {
        let claimed: usize = tensor.dims().iter().product();
        let held = tensor.flatten_all().map(|t| t.dims().to_vec());
        match held {
            Ok(held) if held == [claimed] => None,
            other => Some(format!("tensor `{name}` of {:?}: {other:?}", tensor.dims())),
        }
    })
}

fn open_model(path: &Path) -> Checked {
    let model = ImageModel::open(path, &Device::Cpu)?;
    if model.num_parameters() == 0 {
        return Ok(Some("a model without parameters".into()));
    }
    model.image_shape()?;
    // A sampler's points must be numbers, however odd the schedule is.
    let plan = model.scheduler().plan(&Request::steps(4))?;
    let numbers = plan.timesteps.iter().chain(plan.sigmas.iter().flatten());
    let broken = numbers
        .chain([&plan.init_noise_sigma])
        .find(|v| !v.is_finite());
    Ok(broken.map(|v| format!("{v} among the points")))
}

fn training(path: &Path) -> Checked {
    let text = Limits::default().read_config(path)?;
    let config = ImageConfig::from_toml(&text, "config.toml", &ImageConfig::default())?;
    config.check()?;
    let again = ImageConfig::from_toml(&config.to_toml()?, "again", &ImageConfig::default())?;
    Ok((again != config).then(|| "a configuration that is another when read again".into()))
}

fn manifest(run: &Path) -> Checked {
    let storage = Box::new(DiskStorage::new());
    let loaded = Checkpoints::open(run, storage, Keep::default())?.load()?;
    let step = loaded.snapshot.map(|s| s.step);
    match (step, loaded.rejected.first()) {
        (Some(1), Some(rejected)) => Err(Report::file(&rejected.path, &rejected.why)
            .expected("the files that were saved")
            .remedy("training goes on from the checkpoint before")
            .checkpoint()),
        (Some(2), None) => {
            let read = |name| std::fs::read(run.join(name)).ok();
            Ok((read(MANIFEST) != read(SOUND))
                .then(|| "another manifest than the one that was written".into()))
        }
        other => Ok(Some(format!("{other:?}"))),
    }
}

fn make_base() -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let digits = data::open("digits")?.select(&[0, 1, 2, 3])?;
    let mut config = preset::preset("tiny", &digits)?;
    config.conditional = false;
    preset::fit(&mut config, &digits)?;
    config.process.steps = 20;
    config.process.betas = diffusion_core::schedule::BetaSchedule::ddpm(20);
    let task = train::Task::new(&config, &Device::Cpu)?;
    let weights: BTreeMap<String, Tensor> = task
        .parameters()
        .into_iter()
        .map(|(name, var)| (name, var.as_tensor().clone()))
        .collect();
    let names: Vec<String> = (0..10).map(|k: u32| k.to_string()).collect();
    model::save(&folder.path().join("model"), &config, &names, &weights)?;
    let run = folder.path().join("run");
    std::fs::create_dir(&run)?;
    let mut checkpoints = Checkpoints::open(&run, Box::new(DiskStorage::new()), Keep::default())?;
    for step in [1, 2] {
        let tensor = Tensor::new(&[step as f32, 0.5], &Device::Cpu)?;
        let group = BTreeMap::from([("w".to_string(), tensor)]);
        checkpoints.save(&Snapshot {
            step,
            groups: BTreeMap::from([("params".to_string(), group)]),
            state: b"{}".to_vec(),
            score: Some(1.5),
        })?;
    }
    Ok(folder)
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else if std::fs::metadata(entry.path())?.len() > 4096 {
            // Large files are never changed: a link is enough.
            std::fs::hard_link(entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// A fuzz target: the reader must come back, and what it accepts must be consistent.
///
/// A file may be named in more than one way; each is tried.
///
/// # Panics
/// When what was accepted contradicts itself, and when the reader panics.
#[allow(clippy::panic, reason = "a panic is how a fuzzer is told of a finding")]
pub fn fuzz(format: Format, bytes: &[u8]) {
    static BENCH: OnceLock<Option<Bench>> = OnceLock::new();
    let names: &[&str] = match format {
        Format::Png => &["a.png"],
        Format::Jpeg => &["a.jpg"],
        Format::Idx => &["a-idx3-ubyte"],
        Format::Cifar => &["data_batch_1.bin"],
        Format::Npz => &["a.npz"],
        Format::Safetensors => &["a.safetensors"],
        Format::Pth => &["a.pth"],
        Format::Json => &["index.json", "unet.json", "scheduler.json"],
        Format::Toml => &["config.toml"],
        Format::Manifest => &["MANIFEST.json"],
    };
    let Some(bench) = BENCH.get_or_init(|| Bench::new().ok()) else {
        panic!("the scratch files cannot be written");
    };
    for name in names {
        match bench.feed(format, name, bytes) {
            Ok(Verdict::Inconsistent(what)) => panic!("{format:?} {name}: {what}"),
            Ok(_) => {}
            Err(error) => panic!("{error:#}"),
        }
    }
}
