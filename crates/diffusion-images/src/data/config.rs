//! Which data a run uses, as it is stored beside the model.

use super::{Broken, Color, Fit, Import, Options, Skipped, Source, Splits, splits_import};
use diffusion_core::checkpoint::write_atomic;
use diffusion_core::limits::Limits;
use diffusion_core::{Error, Report, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A source and what is asked of it; all but the source are for folders of images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// What [`super::open`] understands.
    pub source: String,
    /// Width and height of the squares that pictures become.
    #[serde(default)]
    pub size: Option<u32>,
    /// How they become squares.
    #[serde(default)]
    pub fit: Fit,
    /// Grey or colour.
    #[serde(default)]
    pub color: Color,
    /// What happens to broken files.
    #[serde(default)]
    pub broken: Broken,
}

impl DataConfig {
    /// A source without any wishes.
    pub fn new(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            size: None,
            fit: Fit::default(),
            color: Color::default(),
            broken: Broken::default(),
        }
    }

    /// The wishes, with `memory` bytes for decoded pixels.
    pub fn import(&self, memory: u64) -> Import {
        Import {
            fit: self.fit,
            broken: self.broken,
            memory,
            ..Import::from(Options {
                resize: self.size,
                color: self.color,
            })
        }
    }

    /// Training and test images, and the files that were left out; see [`splits_import`].
    ///
    /// # Errors
    /// Those of [`splits_import`].
    pub fn splits(&self, memory: u64) -> Result<(Splits, Vec<Skipped>)> {
        splits_import(&self.source, &self.import(memory))
    }

    /// Whether the source is a folder of images, which alone can be asked for a size, a colour and
    /// the like.
    ///
    /// # Errors
    /// A source that does not exist or is of no known kind.
    pub fn is_folder(&self) -> Result<bool> {
        let source = Source::find(&self.source, &Import::default())?;
        Ok(matches!(source, Source::Folder(_)))
    }

    /// The same with the path of the source made absolute, so that it holds in every folder.
    ///
    /// # Errors
    /// A source that does not exist or is of no known kind.
    pub fn absolute(&self) -> Result<Self> {
        let source = match Source::find(&self.source, &Import::default())? {
            Source::Digits | Source::Mnist | Source::Emoji => self.source.clone(),
            _ => {
                let path = Path::new(&self.source);
                let path = std::fs::canonicalize(path).map_err(|e| Error::io(path, e))?;
                // Made from a string, but links may lead to other names.
                path.to_str().unwrap_or(&self.source).to_string()
            }
        };
        Ok(Self {
            source,
            ..self.clone()
        })
    }
}

/// The data that a run was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecord {
    /// How many training images there were.
    pub images: usize,
    /// Which: [`super::Dataset::digest`].
    pub digest: String,
    /// Where they came from.
    pub data: DataConfig,
}

impl DataRecord {
    /// Writes the record as TOML.
    ///
    /// # Errors
    /// `Io` when the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|e| Report::file(file, e).config())?;
        write_atomic(file, text.as_bytes())
    }

    /// Reads a record; `None` if there is no such file.
    ///
    /// # Errors
    /// `Input` for a malformed file, `Io` for one that cannot be read.
    pub fn read(file: &Path) -> Result<Option<Self>> {
        if !file.exists() {
            return Ok(None);
        }
        let text = Limits::default().read_config(file)?;
        let read = toml::de::Deserializer::parse(&text)
            .map_err(|e| e.to_string())
            .and_then(|toml| serde_path_to_error::deserialize(toml).map_err(|e| e.to_string()));
        let read = read.map_err(|error| {
            // The parser draws the line below its message.
            let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
            Report::file(file, error)
                .expected("the record of a run's data")
                .remedy("remove the file and give the data on the command line")
                .input()
        })?;
        Ok(Some(read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("data.toml");
        assert_eq!(DataRecord::read(&file).unwrap(), None);
        let record = DataRecord {
            images: 7,
            digest: "ab".into(),
            data: DataConfig {
                size: Some(32),
                fit: Fit::Pad,
                color: Color::Grey,
                broken: Broken::Skip,
                ..DataConfig::new("pictures")
            },
        };
        record.write(&file).unwrap();
        assert_eq!(DataRecord::read(&file).unwrap(), Some(record));
        let text = std::fs::read_to_string(&file).unwrap();
        for (from, to) in [
            ("size", "sise"),
            ("\"pad\"", "\"pat\""),
            ("[data]", "[data"),
        ] {
            std::fs::write(&file, text.replace(from, to)).unwrap();
            let message = DataRecord::read(&file).unwrap_err().to_string();
            assert!(
                message.contains("data.toml") && !message.contains('\n'),
                "{message}"
            );
        }
    }

    #[test]
    fn built_in_names_stay_and_paths_become_absolute() {
        let same = DataConfig::new("digits").absolute().unwrap();
        assert_eq!(same.source, "digits");
        assert!(!same.is_folder().unwrap());
        let here = DataConfig::new("./src/../src/").absolute().unwrap();
        assert!(here.is_folder().unwrap());
        let path = Path::new(&here.source);
        assert!(path.is_absolute() && path.ends_with("src"), "{path:?}");
        assert!(DataConfig::new("no/such").absolute().is_err());
    }
}
