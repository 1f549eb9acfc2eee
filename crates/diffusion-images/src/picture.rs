//! Tensors to 8-bit pictures, and PNG files that carry the settings they were made with.
//!
//! ```text
//! k = round(127.5 (clamp(x, −1, 1) + 1)),   x ∈ [−1, 1],   k ∈ 0..=255
//! ```

use crate::data::{MAX_IMAGE_BYTES, MAX_SIDE};
use candle_core::{DType, Device, Tensor};
use diffusion_core::checkpoint::write_atomic;
use diffusion_core::{Error, Report, Result};
use std::io::BufReader;
use std::path::Path;

/// An 8-bit picture, grey or colour, its channels interleaved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    channels: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// A picture of one colour.
    ///
    /// # Errors
    /// Channels other than 1 and 3, a side of 0, sizes over the limits of [`crate::data`].
    pub fn filled(width: usize, height: usize, channels: usize, value: u8) -> Result<Self> {
        let bytes = (width as u64)
            .saturating_mul(height as u64)
            .saturating_mul(channels as u64);
        let report = Report::new("picture", format!("{channels}x{height}x{width}"));
        if !matches!(channels, 1 | 3) || bytes == 0 {
            return Err(report
                .expected("1 or 3 channels and at least one pixel")
                .config());
        }
        if width.max(height) > MAX_SIDE as usize || bytes > MAX_IMAGE_BYTES {
            return Err(report
                .expected(format!(
                    "at most {MAX_SIDE}x{MAX_SIDE} and {MAX_IMAGE_BYTES} bytes"
                ))
                .remedy("show fewer or smaller images")
                .limit());
        }
        Ok(Self {
            width,
            height,
            channels,
            pixels: vec![value; bytes as usize],
        })
    }

    /// The picture of one image.
    ///
    /// # Shapes
    /// `image`: `[C, H, W]` or `[1, C, H, W]` with C = 1 or 3, any float type and device.
    ///
    /// # Errors
    /// Another shape; a value that is not finite; those of tensor conversion.
    pub fn from_tensor(image: &Tensor) -> Result<Self> {
        let image = if image.rank() == 4 {
            image.squeeze(0)?
        } else {
            image.clone()
        };
        let (channels, height, width) = image.dims3()?;
        let mut picture = Self::filled(width, height, channels, 0)?;
        picture.paste(&to_bytes(&image)?, (height, width), (0, 0), 1);
        Ok(picture)
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// 1 for grey, 3 for red, green, blue.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Rows from the top, pixels from the left, channels together.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Puts an image given in planes at (top, left), each pixel as a square of side `scale`.
    pub(crate) fn paste(
        &mut self,
        planes: &[u8],
        (height, width): (usize, usize),
        (top, left): (usize, usize),
        scale: usize,
    ) {
        for (y, row) in planes.chunks_exact(width).enumerate() {
            let (channel, y) = (y / height, y % height);
            for dy in 0..scale {
                let start = (top + y * scale + dy) * self.width + left;
                for (x, &value) in row.iter().enumerate() {
                    for dx in 0..scale {
                        self.pixels[(start + x * scale + dx) * self.channels + channel] = value;
                    }
                }
            }
        }
    }

    /// The picture as the bytes of a PNG file with `texts` as `tEXt` chunks (`iTXt` where a text
    /// leaves Latin-1).
    ///
    /// # Errors
    /// A key that is not 1 to 79 characters of Latin-1, or a zero character in a text.
    pub fn to_png(&self, texts: &[(String, String)]) -> Result<Vec<u8>> {
        let failed = |error: png::EncodingError| Report::new("PNG", error).config();
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(if self.channels == 1 {
            png::ColorType::Grayscale
        } else {
            png::ColorType::Rgb
        });
        encoder.set_depth(png::BitDepth::Eight);
        for (key, text) in texts {
            check_text(key, text)?;
            let (key, text) = (key.clone(), text.clone());
            if text.chars().all(|c| u32::from(c) < 256) {
                encoder.add_text_chunk(key, text).map_err(failed)?;
            } else {
                encoder.add_itxt_chunk(key, text).map_err(failed)?;
            }
        }
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }

    /// Writes [`Picture::to_png`] to a file that is either complete or not there.
    ///
    /// # Errors
    /// Those of [`Picture::to_png`] and of [`write_file`].
    pub fn write_png(&self, path: &Path, texts: &[(String, String)]) -> Result<()> {
        write_file(path, &self.to_png(texts)?)
    }
}

fn check_text(key: &str, text: &str) -> Result<()> {
    let latin = |c: char| matches!(u32::from(c), 32..=126 | 161..=255);
    let length = key.chars().count();
    // The standard forbids spaces at either end and runs of them.
    let spaced = key.trim() != key || key.contains("  ");
    if !(1..=79).contains(&length) || !key.chars().all(latin) || spaced {
        return Err(Report::new(
            format!("PNG text key {key:?}"),
            format!("{length} characters"),
        )
        .expected("1 to 79 characters of Latin-1, single spaces only between words")
        .config());
    }
    if text.contains('\0') {
        return Err(Report::new(format!("PNG text {key:?}"), "a zero character")
            .expected("text without zero characters")
            .config());
    }
    Ok(())
}

/// Values in `[-1, 1]` to bytes, in the tensor's order: `round(127.5 (clamp(x, −1, 1) + 1))`.
///
/// # Errors
/// A value that is not finite; those of tensor conversion.
pub fn to_bytes(images: &Tensor) -> Result<Vec<u8>> {
    let values = images
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let broken = values.iter().filter(|v| !v.is_finite()).count();
    if broken > 0 {
        return Err(Report::new(
            "image",
            format!("{broken} of {} values not finite", values.len()),
        )
        .expected("values around -1 to 1")
        .remedy("the model or its sampler diverged: check the training loss")
        .numeric());
    }
    Ok(values
        .iter()
        .map(|v| (127.5 * (v.clamp(-1.0, 1.0) + 1.0)).round() as u8)
        .collect())
}

/// The texts of a PNG file: key and text of each `tEXt` and `iTXt` chunk before the image data.
///
/// # Errors
/// The file cannot be read or is no PNG; a compressed text of more than 1 MiB.
pub fn read_texts(path: &Path) -> Result<Vec<(String, String)>> {
    let broken = |error: png::DecodingError| {
        Report::file(path, error)
            .expected("a PNG file")
            .remedy("give a picture that this program wrote")
            .input()
    };
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let reader = png::Decoder::new(BufReader::new(file))
        .read_info()
        .map_err(broken)?;
    let info = reader.info();
    let mut texts: Vec<(String, String)> = info
        .uncompressed_latin1_text
        .iter()
        .map(|chunk| (chunk.keyword.clone(), chunk.text.clone()))
        .collect();
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(1 << 20).map_err(broken)?;
        texts.push((chunk.keyword.clone(), chunk.get_text().map_err(broken)?));
    }
    Ok(texts)
}

/// Writes a file in one step, as [`write_atomic`] does, with messages for people.
///
/// # Errors
/// The folder is missing or cannot be written to, or the disk is full; the old file, if any, is
/// then unchanged.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(
            Report::file(path, format!("the folder {} is missing", folder.display()))
                .expected("an existing folder")
                .remedy("create it or write somewhere else")
                .config(),
        );
    }
    match write_atomic(path, bytes) {
        Err(Error::Io { source, .. }) => Err(unwritable(path, &source)),
        other => other,
    }
}

fn unwritable(path: &Path, error: &std::io::Error) -> Error {
    let remedy = match error.kind() {
        std::io::ErrorKind::StorageFull => "free some space on that disk",
        _ => "write to a folder that allows it",
    };
    let text = format!("cannot be written ({error}); {remedy}");
    Error::io(path, std::io::Error::new(error.kind(), text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn bytes_are_rounded_and_clamped() {
        let x = Tensor::new(
            &[-2.0f32, -1.0, -0.9962, -0.5, 0.0, 0.5, 1.0, 7.0],
            &Device::Cpu,
        );
        assert_eq!(
            to_bytes(&x.unwrap()).unwrap(),
            [0, 0, 0, 64, 128, 191, 255, 255]
        );
    }

    #[test]
    fn every_byte_survives_the_round_trip() {
        let x: Vec<f64> = (0..=255).map(|k| f64::from(k) / 127.5 - 1.0).collect();
        for dtype in [DType::F32, DType::F64] {
            let x = Tensor::new(x.as_slice(), &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            assert_eq!(to_bytes(&x).unwrap(), (0..=255).collect::<Vec<u8>>());
        }
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let x = Tensor::new(&[0.0f32, f32::NAN, f32::INFINITY], &Device::Cpu).unwrap();
        let message = to_bytes(&x).unwrap_err().to_string();
        assert!(message.contains("2 of 3 values not finite"), "{message}");
    }

    #[test]
    fn png_keeps_pixels_and_texts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let x: Vec<f32> = (0..18).map(|v| v as f32 / 8.5 - 1.0).collect();
        let x = Tensor::from_vec(x, (3, 2, 3), &Device::Cpu).unwrap();
        let picture = Picture::from_tensor(&x).unwrap();
        let text = |k: &str, v: &str| (k.to_string(), v.to_string());
        let texts = [
            text("seed", "42"),
            text("model", "caf\u{e9}"),
            text("prompt", "σ = 80"),
        ];
        picture.write_png(&path, &texts).unwrap();
        assert_eq!(read_texts(&path).unwrap(), texts);
        let read = image::open(&path).unwrap().into_rgb8();
        assert_eq!((read.width(), read.height()), (3, 2));
        assert_eq!(read.as_raw(), picture.pixels());
        // Planes became interleaved: red, green and blue of the first pixel are 6 apart.
        assert_eq!(picture.pixels()[..3], [0, 90, 180]);
        // Nothing else stays in the folder.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn bad_texts_shapes_and_folders_are_refused() {
        let grey = Picture::filled(2, 2, 1, 0).unwrap();
        for key in ["", " a", "a  b", "σ", "line\nbreak", &"k".repeat(80)] {
            assert!(
                grey.to_png(&[(key.to_string(), String::new())]).is_err(),
                "{key:?}"
            );
        }
        assert!(grey.to_png(&[("k".into(), "a\0b".into())]).is_err());
        assert!(Picture::filled(2, 2, 2, 0).is_err());
        assert!(Picture::filled(0, 2, 1, 0).is_err());
        assert!(Picture::filled(MAX_SIDE as usize + 1, 1, 1, 0).is_err());
        let message = grey
            .write_png(Path::new("no/such/a.png"), &[])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("no/such") && message.contains("create it"),
            "{message}"
        );
        let folder = tempfile::tempdir().unwrap();
        let message = grey.write_png(folder.path(), &[]).unwrap_err().to_string();
        assert!(message.contains("cannot be written"), "{message}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_and_a_forbidden_folder_are_told_apart() {
        // Every write to this device fails with "no space left".
        let mut full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let error = full.write_all(b"x").unwrap_err();
        let message = unwritable(Path::new("out/a.png"), &error).to_string();
        assert!(
            message.contains("out/a.png") && message.contains("free some space"),
            "{message}"
        );
        // This folder exists and nothing can be created in it, not even by the superuser.
        let message = write_file(Path::new("/proc/a.png"), b"x")
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("/proc/a.png: cannot be written"),
            "{message}"
        );
        assert!(message.contains("a folder that allows it"), "{message}");
    }

    #[test]
    fn an_old_file_is_replaced_whole_or_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"new, and longer").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new, and longer");
        let grey = Picture::filled(1, 1, 1, 0).unwrap();
        assert!(
            grey.write_png(&path, &[(String::new(), String::new())])
                .is_err()
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"new, and longer");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let other = folder.path().join("other");
            std::fs::write(&other, b"").unwrap();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode(&path), mode(&other), "as readable as any new file");
        }
    }
}
