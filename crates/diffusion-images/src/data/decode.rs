//! One PNG or JPEG file to 8-bit grey or colour.
//!
//! | in the file | becomes |
//! |---|---|
//! | grey or colour of 1, 2, 4 bits, palette | 8 bits, spread over 0..=255 |
//! | 16 bits | `round(v / 257)` |
//! | transparency α | composed on white: `round((α c + (255 − α) 255) / 255)` |
//! | an Exif orientation | an upright picture |
//! | colour, where grey is asked for | `Y = 0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601) |
//!
//! Colour profiles and gamma chunks are not applied: pixel values are taken as they stand.

use super::container::{self, Flaw, Kind};
use super::{MAX_IMAGE_BYTES, MAX_SIDE, input};
use diffusion_core::{Error, Report, Result};
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder};
use image::imageops::FilterType;
use image::{ColorType, DynamicImage, GrayImage, ImageDecoder, ImageResult, Limits, RgbImage};
use std::io::Cursor;
use std::path::Path;

/// Compressed files longer than this cannot be a picture within the limits.
const MAX_FILE_BYTES: u64 = 2 * MAX_IMAGE_BYTES;

/// A picture with interleaved pixels.
#[derive(Debug, PartialEq)]
pub(super) struct Pixmap {
    pub width: u32,
    pub height: u32,
    /// 1 or 3.
    pub channels: usize,
    pub pixels: Vec<u8>,
}

/// Reads a file; `square` crops the centre and resizes it to that side.
pub(super) fn read(path: &Path, square: Option<u32>) -> Result<Pixmap> {
    let bytes = input::read_bounded(path, MAX_FILE_BYTES)?;
    let kind = container::check(&bytes).map_err(|flaw| refuse(path, flaw))?;
    let decoded = match kind {
        Kind::Png => PngDecoder::with_limits(Cursor::new(&bytes), limits()).and_then(to_eight_bits),
        Kind::Jpeg => JpegDecoder::new(Cursor::new(&bytes)).and_then(to_eight_bits),
    };
    let picture = decoded.map_err(|error| undecodable(path, kind, error))?;
    let picture = match square {
        Some(side) => resize(picture, side),
        None => picture,
    };
    let (width, height) = (picture.width(), picture.height());
    Ok(match picture {
        DynamicImage::ImageLuma8(grey) => Pixmap {
            width,
            height,
            channels: 1,
            pixels: grey.into_raw(),
        },
        other => Pixmap {
            width,
            height,
            channels: 3,
            pixels: other.into_rgb8().into_raw(),
        },
    })
}

impl Pixmap {
    /// Luma of BT.601, rounded.
    pub fn into_grey(mut self) -> Self {
        if self.channels == 3 {
            self.pixels = self
                .pixels
                .chunks_exact(3)
                .map(|p| {
                    let [r, g, b] = [p[0], p[1], p[2]].map(u32::from);
                    ((299 * r + 587 * g + 114 * b + 500) / 1000) as u8
                })
                .collect();
            self.channels = 1;
        }
        self
    }

    /// Appends the planes of the picture, grey repeated if there are more channels than it has.
    pub fn append_planes(&self, channels: usize, out: &mut Vec<u8>) {
        for channel in 0..channels {
            let from = channel.min(self.channels - 1);
            out.extend(self.pixels.iter().skip(from).step_by(self.channels));
        }
    }
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_IMAGE_BYTES);
    limits
}

fn to_eight_bits(mut decoder: impl ImageDecoder) -> ImageResult<DynamicImage> {
    decoder.set_limits(limits())?;
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let bytes = decoder.total_bytes();
    limits().reserve(bytes)?;
    let orientation = decoder.orientation()?;
    let mut buffer = vec![0; bytes as usize];
    decoder.read_image(&mut buffer)?;
    let (channels, wide) = match color {
        ColorType::L8 => (1, false),
        ColorType::La8 => (2, false),
        ColorType::Rgb8 => (3, false),
        ColorType::Rgba8 => (4, false),
        ColorType::L16 => (1, true),
        ColorType::La16 => (2, true),
        ColorType::Rgb16 => (3, true),
        ColorType::Rgba16 => (4, true),
        _ => return Err(wrong_size()),
    };
    flatten(&mut buffer, channels, wide);
    let picture = if channels <= 2 {
        GrayImage::from_raw(width, height, buffer).map(DynamicImage::ImageLuma8)
    } else {
        RgbImage::from_raw(width, height, buffer).map(DynamicImage::ImageRgb8)
    };
    let mut picture = picture.ok_or_else(wrong_size)?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

fn wrong_size() -> image::ImageError {
    let kind = image::error::ParameterErrorKind::DimensionMismatch;
    image::ImageError::Parameter(image::error::ParameterError::from_kind(kind))
}

/// Composes on white and rounds to 8 bits, in place: no pixel grows, so none is overwritten early.
fn flatten(buffer: &mut Vec<u8>, channels: usize, wide: bool) {
    let (colors, alpha) = if channels <= 2 {
        (1, channels == 2)
    } else {
        (3, channels == 4)
    };
    if !wide && !alpha {
        return;
    }
    let max: u64 = if wide { 65_535 } else { 255 };
    let stride = channels * if wide { 2 } else { 1 };
    let count = buffer.len() / stride;
    for i in 0..count {
        let sample = |buffer: &[u8], c: usize| match wide {
            true => {
                let at = i * stride + 2 * c;
                u64::from(u16::from_ne_bytes([buffer[at], buffer[at + 1]]))
            }
            false => u64::from(buffer[i * stride + c]),
        };
        let opacity = if alpha { sample(buffer, colors) } else { max };
        let mut pixel = [0; 3];
        for (c, value) in pixel.iter_mut().enumerate().take(colors) {
            // One rounding for both steps: 255 (α c + (max − α) max) / max².
            let composed = opacity * sample(buffer, c) + (max - opacity) * max;
            *value = ((composed * 255 + max * max / 2) / (max * max)) as u8;
        }
        buffer[i * colors..][..colors].copy_from_slice(&pixel[..colors]);
    }
    buffer.truncate(count * colors);
}

/// The largest centred square, resized by a Lanczos filter that is widened when it shrinks.
fn resize(picture: DynamicImage, side: u32) -> DynamicImage {
    let (width, height) = (picture.width(), picture.height());
    let square = width.min(height);
    let cropped = if width == height {
        picture
    } else {
        picture.crop_imm((width - square) / 2, (height - square) / 2, square, square)
    };
    if square == side {
        cropped
    } else {
        cropped.resize_exact(side, side, FilterType::Lanczos3)
    }
}

fn refuse(path: &Path, flaw: Flaw) -> Error {
    let report = Report::file(path, flaw.found).expected(flaw.expected);
    if flaw.limit {
        report.remedy("make the image smaller").limit()
    } else {
        report.remedy("replace, convert or remove the file").input()
    }
}

fn undecodable(path: &Path, kind: Kind, error: image::ImageError) -> Error {
    let name = match kind {
        Kind::Png => "PNG",
        Kind::Jpeg => "JPEG",
    };
    let report = Report::file(path, format!("a damaged or unusual {name} file ({error})"))
        .expected("a complete image")
        .remedy("replace the file or save it again from an image editor");
    match error {
        image::ImageError::Limits(_) => report.limit(),
        image::ImageError::Unsupported(_) => report.unsupported(),
        _ => report.input(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_is_composed_on_white() {
        let mut rgba = vec![10, 20, 30, 0, 10, 20, 30, 255, 100, 0, 255, 51];
        flatten(&mut rgba, 4, false);
        // The third pixel: 0.2 c + 0.8 · 255.
        assert_eq!(rgba, [255, 255, 255, 10, 20, 30, 224, 204, 255]);
        let mut grey = vec![0, 128, 77, 255];
        flatten(&mut grey, 2, false);
        assert_eq!(grey, [127, 77]);
    }

    #[test]
    fn sixteen_bits_are_rounded_not_cut() {
        let values = [0u16, 128, 129, 257, 65_535, 65_406, 32_767];
        let mut bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        flatten(&mut bytes, 1, true);
        let expected: Vec<u8> = values
            .iter()
            .map(|&v| (f64::from(v) / 257.0).round() as u8)
            .collect();
        assert_eq!(bytes, expected);
        let mut rgba: Vec<u8> = [65_535u16, 0, 1000, 0, 0, 25_700, 65_535, 65_535]
            .map(u16::to_ne_bytes)
            .concat();
        flatten(&mut rgba, 4, true);
        assert_eq!(rgba, [255, 255, 255, 0, 100, 255]);
    }

    #[test]
    fn grey_is_bt601_and_planes_are_separated() {
        let picture = Pixmap {
            width: 2,
            height: 1,
            channels: 3,
            pixels: vec![255, 0, 0, 1, 2, 3],
        };
        let mut planes = Vec::new();
        picture.append_planes(3, &mut planes);
        assert_eq!(planes, [255, 1, 0, 2, 0, 3]);
        let grey = picture.into_grey();
        assert_eq!(grey.pixels, [76, 2]);
        let mut planes = Vec::new();
        grey.append_planes(3, &mut planes);
        assert_eq!(planes, [76, 2, 76, 2, 76, 2]);
    }

    #[test]
    fn resizing_crops_the_centre_and_keeps_a_constant() {
        let mut wide = GrayImage::from_pixel(12, 4, image::Luma([0]));
        for y in 0..4 {
            for x in 4..8 {
                wide.put_pixel(x, y, image::Luma([200]));
            }
        }
        let small = resize(DynamicImage::ImageLuma8(wide), 2).into_luma8();
        assert_eq!(small.into_raw(), [200; 4]);
    }
}
