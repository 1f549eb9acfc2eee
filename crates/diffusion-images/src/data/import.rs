//! What can be asked of a folder of images.

use super::MAX_SIDE;
use super::decode::Conversion;
use diffusion_core::{Report, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How many bytes of decoded pixels a folder may keep in memory if nothing else is asked: 1 GiB.
pub const DEFAULT_MEMORY: u64 = 1 << 30;

/// How the images of a folder are made alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Make each image a square of this width and height, by [`Fit`]. Without it all images must
    /// have one size.
    pub resize: Option<u32>,
    /// Grey or colour.
    pub color: Color,
}

/// How many channels the images of a folder get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    /// Grey if every file is stored as grey, else colour.
    #[default]
    Auto,
    /// One channel: colour files are converted by their luma.
    Grey,
    /// Three channels: grey files are repeated.
    Rgb,
}

/// How a picture becomes a square when a size is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// The largest centred square is resized; what lies outside it is lost.
    #[default]
    Crop,
    /// The whole picture is resized to fit inside, centred on the background; nothing is lost.
    Pad,
    /// The whole picture is resized; proportions are lost.
    Stretch,
}

/// What happens to a file that cannot be read as an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Broken {
    /// Reading ends with an error that names all such files.
    #[default]
    Refuse,
    /// The file is left out, with a warning, and listed in [`Skipped`].
    Skip,
}

/// Everything that can be asked of a folder of images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Size and colour.
    pub options: Options,
    /// How a picture becomes a square.
    pub fit: Fit,
    /// The red, green, blue on which transparent and padded pictures lie; white by default.
    pub background: [u8; 3],
    /// What happens to broken files.
    pub broken: Broken,
    /// The most bytes of decoded pixels that are kept in memory. Images beyond it are decoded again
    /// whenever a batch asks for them, which changes no bit of the batch. Other sources than folders
    /// are always held in memory.
    pub memory: u64,
}

impl Default for Import {
    fn default() -> Self {
        Self::from(Options::default())
    }
}

impl From<Options> for Import {
    fn from(options: Options) -> Self {
        Self {
            options,
            fit: Fit::default(),
            background: [255; 3],
            broken: Broken::default(),
            memory: DEFAULT_MEMORY,
        }
    }
}

impl Import {
    pub(super) fn conversion(&self) -> Result<Conversion> {
        if let Some(side) = self.options.resize
            && !(1..=MAX_SIDE / 4).contains(&side)
        {
            return Err(Report::new("size", side)
                .expected(format!("1 to {}", MAX_SIDE / 4))
                .remedy("try 32 or 64")
                .config());
        }
        Ok(Conversion {
            side: self.options.resize,
            fit: self.fit,
            background: self.background,
        })
    }

    /// Whether anything is asked that only a folder of images can honour.
    pub(super) fn asks_of_folder(&self) -> bool {
        let plain = Self {
            memory: self.memory,
            ..Self::default()
        };
        *self != plain
    }
}

/// A file that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The file.
    pub file: PathBuf,
    /// Why: the error that it would have been.
    pub reason: String,
}
