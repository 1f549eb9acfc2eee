//! One PNG or JPEG file to 8-bit grey or colour.
//!
//! | in the file | becomes |
//! |---|---|
//! | grey of 1, 2, 4 bits | 8 bits: `v · 255 / (2ᵇ − 1)`, exact |
//! | grey of 8 bits, JPEG grey | as it is, 1 channel |
//! | grey of 16 bits | `round(v / 257)`, 1 channel |
//! | grey and α, grey with a transparent value | composed on the background `b`; 1 channel if the background is grey, else 3 |
//! | palette of 1, 2, 4, 8 bits | the colours of its entries, 3 channels |
//! | palette with α, RGB with a transparent colour, RGBA | composed on the background, 3 channels |
//! | RGB of 8 bits, JPEG colour | as it is, 3 channels |
//! | RGB, RGBA of 16 bits | as with 8 bits, rounded once at the end |
//! | an Exif orientation | an upright picture |
//! | colour, where grey is asked for | `Y = 0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601) |
//!
//! ```text
//! composed = round(255 (α c + (m − α) b m / 255) / m²),   m = 255 or 65535,   b = 255 by default
//! ```
//!
//! Colour profiles and gamma chunks are not applied: pixel values are taken as they stand.

use super::container::{self, Flaw, Kind};
use super::{Fit, MAX_IMAGE_BYTES, MAX_SIDE, input};
use diffusion_core::{Error, Report, Result};
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder};
use image::imageops::{self, FilterType};
use image::{
    ColorType, DynamicImage, GrayImage, ImageDecoder, ImageResult, Limits, Luma, Rgb, RgbImage,
};
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

/// What is done to a picture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversion {
    /// The side of the square that it becomes.
    pub side: Option<u32>,
    /// How it becomes a square.
    pub fit: Fit,
    /// What lies behind transparent pixels.
    pub background: [u8; 3],
}

impl Default for Conversion {
    fn default() -> Self {
        Self {
            side: None,
            fit: Fit::Crop,
            background: [255; 3],
        }
    }
}

/// Reads a file.
pub(super) fn read(path: &Path, conversion: &Conversion) -> Result<Pixmap> {
    let bytes = input::read_bounded(path, MAX_FILE_BYTES)?;
    from_bytes(path, &bytes, conversion)
}

/// Reads the bytes of a file, which `path` stands for in errors.
pub(super) fn from_bytes(path: &Path, bytes: &[u8], conversion: &Conversion) -> Result<Pixmap> {
    let kind = container::check(bytes).map_err(|flaw| refuse(path, flaw))?;
    let behind = conversion.background;
    let decoded = match kind {
        Kind::Png => PngDecoder::with_limits(Cursor::new(bytes), limits())
            .and_then(|decoder| to_eight_bits(decoder, behind)),
        Kind::Jpeg => {
            JpegDecoder::new(Cursor::new(bytes)).and_then(|decoder| to_eight_bits(decoder, behind))
        }
    };
    let picture = decoded.map_err(|error| undecodable(path, kind, error))?;
    let picture = match conversion.side {
        Some(side) => resize(picture, side, conversion),
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

fn to_eight_bits(mut decoder: impl ImageDecoder, behind: [u8; 3]) -> ImageResult<DynamicImage> {
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
    let colors = flatten(&mut buffer, channels, wide, behind);
    let picture = if colors == 1 {
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

/// Composes on the background and rounds to 8 bits; the number of channels that are left.
fn flatten(buffer: &mut Vec<u8>, channels: usize, wide: bool, behind: [u8; 3]) -> usize {
    let (colors, alpha) = if channels <= 2 {
        (1, channels == 2)
    } else {
        (3, channels == 4)
    };
    if !wide && !alpha {
        return colors;
    }
    if colors == 1 && alpha && behind != [behind[0]; 3] {
        // Grey on a coloured background is colour: the grey stands for all three.
        let sample = if wide { 2 } else { 1 };
        *buffer = buffer
            .chunks_exact(2 * sample)
            .flat_map(|p| [&p[..sample], &p[..sample], p].concat())
            .collect();
        return flatten(buffer, 4, wide, behind);
    }
    // In place: no pixel grows, so none is overwritten early.
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
            // One rounding for both steps; max / 255 is whole.
            let ground = u64::from(behind[c]) * (max / 255);
            let composed = opacity * sample(buffer, c) + (max - opacity) * ground;
            *value = ((composed * 255 + max * max / 2) / (max * max)) as u8;
        }
        buffer[i * colors..][..colors].copy_from_slice(&pixel[..colors]);
    }
    buffer.truncate(count * colors);
    colors
}

/// The largest centred square or the whole picture, resized by a Lanczos filter that is widened
/// when it shrinks.
fn resize(picture: DynamicImage, side: u32, conversion: &Conversion) -> DynamicImage {
    let (width, height) = (picture.width(), picture.height());
    let square = width.min(height);
    if conversion.fit == Fit::Pad && width != height {
        return pad(picture, side, conversion.background);
    }
    let cropped = match conversion.fit {
        Fit::Crop if width != height => {
            picture.crop_imm((width - square) / 2, (height - square) / 2, square, square)
        }
        _ => picture,
    };
    if (cropped.width(), cropped.height()) == (side, side) {
        cropped
    } else {
        cropped.resize_exact(side, side, FilterType::Lanczos3)
    }
}

/// The whole picture in the middle of a square of the background; grey on a coloured background is
/// colour.
fn pad(picture: DynamicImage, side: u32, behind: [u8; 3]) -> DynamicImage {
    // The longer side becomes `side`, the shorter one at least 1.
    let scaled = |length: u32, longest: u32| {
        let exact = f64::from(length) * f64::from(side) / f64::from(longest);
        (exact.round() as u32).clamp(1, side)
    };
    let longest = picture.width().max(picture.height());
    let (width, height) = (
        scaled(picture.width(), longest),
        scaled(picture.height(), longest),
    );
    let picture = if (width, height) == (picture.width(), picture.height()) {
        picture
    } else {
        picture.resize_exact(width, height, FilterType::Lanczos3)
    };
    let (left, top) = (
        i64::from((side - width) / 2),
        i64::from((side - height) / 2),
    );
    match picture {
        DynamicImage::ImageLuma8(grey) if behind == [behind[0]; 3] => {
            let mut square = GrayImage::from_pixel(side, side, Luma([behind[0]]));
            imageops::replace(&mut square, &grey, left, top);
            DynamicImage::ImageLuma8(square)
        }
        other => {
            let mut square = RgbImage::from_pixel(side, side, Rgb(behind));
            imageops::replace(&mut square, &other.into_rgb8(), left, top);
            DynamicImage::ImageRgb8(square)
        }
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
mod tests;
