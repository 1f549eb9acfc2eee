//! A fixture folder in memory.

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Tensor};
use diffusion_core::checkpoint::read_safetensors;
use diffusion_core::limits::Limits;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Two numbers agree when `|a − b| ≤ abs + rel |b|`, `b` being the stored one.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Tolerance {
    /// The absolute part.
    pub abs: f64,
    /// The part relative to the stored number.
    pub rel: f64,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A fixture: what it is, how it was called, and its tensors. Fields that only people read are not
/// kept.
#[derive(Debug, Deserialize)]
pub struct Fixture {
    /// Its folder.
    #[serde(skip)]
    pub path: PathBuf,
    /// Its name.
    pub name: String,
    /// `scheduler`, `module`, `function` or `pipeline`.
    pub kind: String,
    /// The thing under test.
    pub system: String,
    /// The library's configuration.
    pub config: Map<String, Value>,
    /// What was given at call time.
    pub call: Map<String, Value>,
    /// Within which to agree.
    pub tolerance: Tolerance,
    /// What went in (for pipelines everything).
    #[serde(skip)]
    pub inputs: Tensors,
    /// What came out.
    #[serde(skip)]
    pub outputs: Tensors,
}

impl Fixture {
    /// Reads a folder.
    ///
    /// # Errors
    /// When a file is missing or malformed; the message names it.
    pub fn read(path: &Path) -> Result<Self> {
        let json = path.join("fixture.json");
        let text = Limits::default().read_text(&json)?;
        let mut fixture: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: malformed", json.display()))?;
        fixture.path = path.to_path_buf();
        if fixture.kind == "pipeline" {
            fixture.inputs = fixture.tensors("golden")?;
        } else {
            fixture.inputs = fixture.tensors("inputs")?;
            fixture.outputs = fixture.tensors("outputs")?;
        }
        Ok(fixture)
    }

    /// The tensors of `<stem>.safetensors`; none when there is no such file, which every access
    /// by name then reports.
    ///
    /// # Errors
    /// When the file is malformed.
    pub fn tensors(&self, stem: &str) -> Result<Tensors> {
        let file = self.path.join(format!("{stem}.safetensors"));
        if !file.exists() {
            return Ok(Tensors::new());
        }
        Ok(read_safetensors(&file, &Limits::default())?)
    }

    /// An input tensor.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn input(&self, name: &str) -> Result<&Tensor> {
        self.inputs
            .get(name)
            .ok_or_else(|| self.lacks("input", name))
    }

    /// An input tensor in f64.
    ///
    /// # Errors
    /// As [`Fixture::input`].
    pub fn input_f64(&self, name: &str) -> Result<Tensor> {
        Ok(self.input(name)?.to_dtype(DType::F64)?)
    }

    /// The tensors `name.0`, `name.1`, … among the inputs.
    pub fn numbered(&self, name: &str) -> Vec<Tensor> {
        (0..)
            .map_while(|k| self.inputs.get(&format!("{name}.{k}")).cloned())
            .collect()
    }

    /// A number of `call`, if it is there and not null.
    ///
    /// # Errors
    /// When it is something else than a number.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        number(self.call.get(name), name)
    }

    /// A whole number of `call`, if it is there and not null.
    ///
    /// # Errors
    /// When it is something else.
    pub fn count(&self, name: &str) -> Result<Option<usize>> {
        match self.call.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(count) => Ok(Some(count as usize)),
                None => Err(anyhow!("call.{name}: {value}; expected a whole number")),
            },
        }
    }

    /// A text of `call`, empty if it is not there.
    pub fn text(&self, name: &str) -> &str {
        self.call
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The configuration as a JSON text.
    pub fn config_text(&self) -> String {
        Value::Object(self.config.clone()).to_string()
    }

    /// The keys of `call` that are not in `known`.
    pub fn unknown_in_call(&self, known: &[&str]) -> Vec<&str> {
        self.call
            .keys()
            .map(String::as_str)
            .filter(|key| !known.contains(key))
            .collect()
    }

    fn lacks(&self, what: &str, name: &str) -> anyhow::Error {
        anyhow!(
            "{}: no {what} tensor `{name}`; the fixture is incomplete",
            self.path.display()
        )
    }
}

/// A number that may be written as `"Infinity"`, null or nothing.
///
/// # Errors
/// When it is something else.
pub fn number(value: Option<&Value>, name: &str) -> Result<Option<f64>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(word)) if word == "Infinity" => Ok(Some(f64::INFINITY)),
        Some(Value::String(word)) if word == "-Infinity" => Ok(Some(f64::NEG_INFINITY)),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(anyhow!("{name}: {value}; expected a number")),
        },
    }
}

/// The values of a tensor of any type, flat, as f64.
///
/// # Errors
/// Those of the tensor library.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
