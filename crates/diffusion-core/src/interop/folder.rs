//! Model folders in the layout of diffusers.
//!
//! ```text
//! model_index.json                             the pipeline's class and its components
//! unet/config.json                             the network's configuration
//! unet/diffusion_pytorch_model.safetensors     its weights (see [`super::weights`])
//! scheduler/scheduler_config.json              the scheduler's configuration
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Value, json};

use super::scheduler::Scheduler;
use super::weights::load_weights;
use crate::checkpoint::{write_atomic, write_safetensors_atomic};
use crate::error::{Error, Report, Result};
use crate::limits::Limits;

/// The name of network weights without their endings.
pub const WEIGHTS: &str = "diffusion_pytorch_model";

/// The version of diffusers whose layout is written.
pub const DIFFUSERS_VERSION: &str = "0.42.1";

/// A part of a pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// The library of its class.
    pub library: String,
    /// Its class.
    pub class: String,
}

/// A saved pipeline.
#[derive(Clone, Debug)]
pub struct DiffusersFolder {
    /// Where it is.
    pub path: PathBuf,
    /// The class of the pipeline.
    pub class: String,
    /// Its parts by the name of their folder; parts that are absent (null) are left out.
    pub components: BTreeMap<String, Component>,
    limits: Limits,
}

impl DiffusersFolder {
    /// Reads `model_index.json`.
    ///
    /// # Errors
    /// `Input` when the folder is no saved pipeline, `Io` when it cannot be read.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let file = path.join("model_index.json");
        if !file.exists() {
            return Err(Report::file(path, "no model_index.json")
                .expected("a model folder in the layout of diffusers")
                .remedy("give the folder that holds model_index.json")
                .input());
        }
        let index = read_object(&file, limits)?;
        let class = class_of(&index, &file)?;
        let mut components = BTreeMap::new();
        for (name, value) in &index {
            // Settings of the pipeline stand beside its parts; a part is a pair of texts.
            let Some([library, class]) = value.as_array().map(Vec::as_slice) else {
                continue;
            };
            let (Some(library), Some(class)) = (library.as_str(), class.as_str()) else {
                continue;
            };
            if name.is_empty() || name.contains(['/', '\\']) || name.contains("..") {
                return Err(Report::file(&file, format!("the component name {name:?}"))
                    .expected("the plain name of a folder")
                    .remedy("get the file again from whom you trust")
                    .input());
            }
            let component = Component {
                library: library.into(),
                class: class.into(),
            };
            components.insert(name.clone(), component);
        }
        Ok(Self {
            path: path.to_path_buf(),
            class,
            components,
            limits: limits.clone(),
        })
    }

    /// The class of a part.
    ///
    /// # Errors
    /// `Input` when the pipeline does not have it.
    pub fn component(&self, name: &str) -> Result<&Component> {
        self.components.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.components.keys().map(String::as_str).collect();
            Report::file(
                &self.path.join("model_index.json"),
                format!("no component `{name}`"),
            )
            .expected(format!(
                "a pipeline with it; this one has {}",
                names.join(", ")
            ))
            .remedy("give a folder with this component")
            .input()
        })
    }

    /// The parsed scheduler.
    ///
    /// # Errors
    /// As [`Scheduler::from_json`]; also when the file is missing.
    pub fn scheduler(&self) -> Result<Scheduler> {
        self.component("scheduler")?;
        let file = self.path.join("scheduler").join("scheduler_config.json");
        Scheduler::from_json(
            &self.limits.read_config(&file)?,
            &file.display().to_string(),
        )
    }

    /// The text of a network's `config.json`.
    ///
    /// # Errors
    /// `Input` when the pipeline does not have this part, `Io` when the file cannot be read.
    pub fn config_text(&self, name: &str) -> Result<String> {
        self.component(name)?;
        self.limits.read_config(&self.config_path(name))
    }

    /// Where a network's `config.json` is.
    pub fn config_path(&self, name: &str) -> PathBuf {
        self.path.join(name).join("config.json")
    }

    /// A network's `config.json`.
    ///
    /// # Errors
    /// As [`DiffusersFolder::config_text`]; also when it is not a JSON object.
    pub fn config(&self, name: &str) -> Result<Value> {
        self.component(name)?;
        Ok(Value::Object(read_object(
            &self.config_path(name),
            &self.limits,
        )?))
    }

    /// A network's weights by name, in f32 where they were stored in half precision.
    ///
    /// # Errors
    /// As [`load_weights`].
    pub fn weights(&self, name: &str) -> Result<BTreeMap<String, Tensor>> {
        self.component(name)?;
        load_weights(&self.path.join(name), WEIGHTS, &self.limits)
    }
}

/// Writes a pipeline of a network and a scheduler that diffusers can load, for example class
/// `DDPMPipeline`. Each file appears whole or not at all, `model_index.json` last; configurations
/// must name their classes in `_class_name`.
///
/// # Errors
/// `Config` when a configuration is no object or names no class, `Io` when a file cannot be
/// written.
pub fn write_pipeline(
    path: &Path,
    class: &str,
    unet_config: Value,
    weights: &BTreeMap<String, Tensor>,
    scheduler_config: Value,
) -> Result<()> {
    let unet_class = own_class(&unet_config, "unet_config")?;
    let scheduler_class = own_class(&scheduler_config, "scheduler_config")?;
    let index = json!({
        "_class_name": class,
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers", unet_class],
    });
    let (unet, scheduler) = (path.join("unet"), path.join("scheduler"));
    for folder in [&unet, &scheduler] {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors_atomic(
        &unet.join(format!("{WEIGHTS}.safetensors")),
        weights,
        &metadata,
    )?;
    write_config(&unet.join("config.json"), unet_config)?;
    write_config(&scheduler.join("scheduler_config.json"), scheduler_config)?;
    write_config(&path.join("model_index.json"), index)
}

fn write_config(path: &Path, mut config: Value) -> Result<()> {
    if let Some(object) = config.as_object_mut() {
        object
            .entry("_diffusers_version")
            .or_insert_with(|| DIFFUSERS_VERSION.into());
    }
    // Alternate form is indented; keys come sorted out of a map.
    write_atomic(path, format!("{config:#}\n").as_bytes())
}

fn own_class(config: &Value, at: &str) -> Result<String> {
    match config.get("_class_name").and_then(Value::as_str) {
        Some(class) => Ok(class.to_string()),
        None => Err(Report::new(format!("{at}._class_name"), "missing")
            .expected("the name of a class of diffusers")
            .remedy("add it, or get the file again")
            .config()),
    }
}

fn read_object(path: &Path, limits: &Limits) -> Result<serde_json::Map<String, Value>> {
    let text = limits.read_config(path)?;
    serde_json::from_str(&text).map_err(|error| {
        Report::file(path, error)
            .expected("a JSON object")
            .remedy("the file is damaged: get it again")
            .input()
    })
}

fn class_of(index: &serde_json::Map<String, Value>, file: &Path) -> Result<String> {
    match index.get("_class_name").and_then(Value::as_str) {
        Some(class) => Ok(class.to_string()),
        None => Err(Report::file(file, "no `_class_name`")
            .expected("the class of a pipeline, as in {\"_class_name\": \"DDPMPipeline\"}")
            .remedy("give a folder that diffusers or this program saved")
            .input()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn written(dir: &Path) -> BTreeMap<String, Tensor> {
        let weights = BTreeMap::from([
            (
                "b.weight".to_string(),
                Tensor::new(&[[1.5f32, -2.0]], &Device::Cpu).unwrap(),
            ),
            (
                "a.bias".to_string(),
                Tensor::new(&[0.25f32], &Device::Cpu).unwrap(),
            ),
        ]);
        let unet = json!({"_class_name": "UNet2DModel", "sample_size": 8});
        let scheduler = json!({"_class_name": "DDPMScheduler", "num_train_timesteps": 50});
        write_pipeline(dir, "DDPMPipeline", unet, &weights, scheduler).unwrap();
        weights
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        let weights = written(&path);
        let folder = DiffusersFolder::open(&path, &Limits::default()).unwrap();
        assert_eq!(folder.class, "DDPMPipeline");
        assert_eq!(folder.component("unet").unwrap().class, "UNet2DModel");
        assert_eq!(folder.config("unet").unwrap()["sample_size"], 8);
        assert_eq!(
            folder.scheduler().unwrap().table().unwrap().betas().len(),
            50
        );
        let loaded = folder.weights("unet").unwrap();
        assert_eq!(loaded.len(), 2);
        for (name, tensor) in weights {
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(&loaded[&name]), bits(&tensor), "{name}");
        }
        // The same pipeline gives the same bytes, and no temporary file stays behind.
        let bytes = |file: &str| fs::read(path.join(file)).unwrap();
        let files = [
            "model_index.json",
            "unet/config.json",
            "scheduler/scheduler_config.json",
        ];
        let before = files.map(bytes);
        written(&path);
        assert_eq!(files.map(bytes), before);
        assert_eq!(fs::read_dir(path.join("unet")).unwrap().count(), 2);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = || DiffusersFolder::open(dir.path(), &Limits::default());
        assert!(open().unwrap_err().to_string().contains("model_index.json"));
        let index = dir.path().join("model_index.json");
        for (text, part) in [
            ("[]", "JSON object"),
            ("{}", "_class_name"),
            ("{\"_class_name\": \"P\"", "line 1"),
        ] {
            fs::write(&index, text).unwrap();
            let message = open().unwrap_err().to_string();
            assert!(
                message.contains(part) && message.contains("model_index.json"),
                "{message}"
            );
        }
        fs::write(&index, r#"{"_class_name": "P", "a/b": ["x", "y"]}"#).unwrap();
        assert!(open().unwrap_err().to_string().contains("a/b"));
        let text = r#"{"_class_name": "P", "unet": ["l", "C"], "x": [null, null], "flag": false}"#;
        fs::write(&index, text).unwrap();
        let folder = open().unwrap();
        assert_eq!(folder.components.len(), 1);
        assert!(
            folder
                .component("vae")
                .unwrap_err()
                .to_string()
                .contains("has unet")
        );
        assert!(
            folder
                .weights("unet")
                .unwrap_err()
                .to_string()
                .contains("unet")
        );
        let error = write_pipeline(dir.path(), "P", json!({}), &BTreeMap::new(), json!({}));
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("unet_config._class_name")
        );
    }
}
