//! What a reader may at most allocate because of what a file says.
//!
//! A hostile or damaged file can claim any size. Every reader compares the claim with the length of
//! the file and with a [`Limits`] before it allocates; a larger file that is known to be sound is
//! read by raising the limit by name.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Report, Result};

const MIB: u64 = 1 << 20;

/// Upper bounds for everything that is read from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of one weight file; 64 GiB.
    pub file_bytes: u64,
    /// Bytes of the JSON header of a safetensors file; 16 MiB.
    pub safetensors_header: u64,
    /// Tensors in one file; 100 000.
    pub tensors: usize,
    /// Bytes of a JSON file of a known form (indices, manifests) and of a pickle; 16 MiB.
    pub json_bytes: u64,
    /// Bytes of a configuration in JSON or TOML, which takes up to a hundred times as much memory
    /// as text; 512 KiB.
    pub config_bytes: u64,
    /// Instructions of a pickle; 1 000 000.
    pub pickle_ops: u64,
    /// Width and height of an image, in pixels; 16 384.
    pub image_side: u32,
    /// Pixels of an image (width × height); 16 384².
    pub image_pixels: u64,
    /// Bytes of an encoded image file; 64 MiB.
    pub image_bytes: u64,
    /// Unpacked over packed size of a compressed member; 200.
    pub zip_ratio: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: 64 << 30,
            safetensors_header: 16 * MIB,
            tensors: 100_000,
            json_bytes: 16 * MIB,
            config_bytes: MIB / 2,
            pickle_ops: 1_000_000,
            image_side: 16_384,
            image_pixels: 16_384 * 16_384,
            image_bytes: 64 * MIB,
            zip_ratio: 200,
        }
    }
}

impl Limits {
    /// Refuses a `value` above `limit`, naming the `field` of [`Limits`] that would have to be
    /// raised.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`].
    pub fn require(at: impl std::fmt::Display, value: u64, limit: u64, field: &str) -> Result<()> {
        if value <= limit {
            return Ok(());
        }
        Err(Report::new(at, value)
            .expected(format!("at most {limit}"))
            .remedy(format!(
                "raise the limit `{field}` if the file is to be trusted"
            ))
            .limit())
    }

    /// The whole of a text file of a known form, at most [`Limits::json_bytes`].
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it cannot be read, [`Error::Limit`] when it is too long and
    /// [`Error::Input`] when it is not UTF-8.
    pub fn read_text(&self, path: &Path) -> Result<String> {
        utf8(path, read_at_most(path, self.json_bytes, "json_bytes")?)
    }

    /// The whole of a configuration (JSON, TOML), at most [`Limits::config_bytes`].
    ///
    /// # Errors
    ///
    /// As [`Limits::read_text`].
    pub fn read_config(&self, path: &Path) -> Result<String> {
        utf8(path, read_at_most(path, self.config_bytes, "config_bytes")?)
    }
}

fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        Report::file(
            path,
            format!("byte {} is not UTF-8", e.utf8_error().valid_up_to()),
        )
        .expected("UTF-8 text")
        .remedy("save the file as UTF-8")
        .input()
    })
}

/// The whole of a file of at most `limit` bytes; `field` names the limit in the message.
///
/// # Errors
///
/// [`Error::Io`] when it cannot be read, [`Error::Limit`] when it is too long.
pub fn read_at_most(path: &Path, limit: u64, field: &str) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e);
    let len = fs::metadata(path).map_err(io)?.len();
    Limits::require(format_args!("{}: bytes", path.display()), len, limit, field)?;
    let mut bytes = Vec::with_capacity(len as usize);
    // One byte more than allowed, so that a file that grows meanwhile is noticed.
    let mut reader = File::open(path).map_err(io)?.take(limit.saturating_add(1));
    reader.read_to_end(&mut bytes).map_err(io)?;
    Limits::require(
        format_args!("{}: bytes", path.display()),
        bytes.len() as u64,
        limit,
        field,
    )?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_just_below_passes_and_one_just_above_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let limits = Limits {
            json_bytes: 8,
            ..Limits::default()
        };
        fs::write(&path, "12345678").unwrap();
        assert_eq!(limits.read_text(&path).unwrap(), "12345678");
        fs::write(&path, "123456789").unwrap();
        let error = limits.read_text(&path).unwrap_err();
        assert!(matches!(error, Error::Limit(_)));
        assert!(error.to_string().contains("json_bytes"), "{error}");
        let small = Limits {
            config_bytes: 9,
            ..limits.clone()
        };
        assert_eq!(small.read_config(&path).unwrap(), "123456789");
        fs::write(&path, "1234567890").unwrap();
        let error = small.read_config(&path).unwrap_err().to_string();
        assert!(error.contains("config_bytes"), "{error}");
        fs::write(&path, [b'a', 0xff]).unwrap();
        assert!(matches!(
            limits.read_text(&path).unwrap_err(),
            Error::Input(_)
        ));
        assert!(matches!(
            limits.read_text(&dir.path().join("b")).unwrap_err(),
            Error::Io { .. }
        ));
    }
}
