//! The outer structure of PNG and JPEG files, checked before a decoder sees them.
//!
//! Decoders are lenient: some return a half-filled picture for a file that was cut off, and
//! allocate what a header claims. Here the file is walked from the first to the last marker, so
//! that every cut is noticed, and the claimed size is compared with the limits and with the most
//! that the compressed bytes could hold.

use super::{MAX_IMAGE_BYTES, MAX_SIDE};

/// How much more memory than it has bytes a JPEG may take to decode, above [`FREE`].
const MAX_RATIO: u64 = 200;
/// What any file may take, beside twice its length.
const FREE: u64 = 64 << 20;

/// What kind of picture the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Png,
    Jpeg,
}

/// Why a file is refused: what was found and what was expected instead.
#[derive(Debug)]
pub(super) struct Flaw {
    pub found: String,
    pub expected: String,
    /// Too large, rather than malformed.
    pub limit: bool,
}

fn flaw<T>(found: impl Into<String>, expected: impl Into<String>) -> Result<T, Flaw> {
    Err(Flaw {
        found: found.into(),
        expected: expected.into(),
        limit: false,
    })
}

pub(super) const PNG: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Checks the structure of a whole file.
pub(super) fn check(bytes: &[u8]) -> Result<Kind, Flaw> {
    if bytes.starts_with(&PNG) {
        check_png(bytes)?;
        return Ok(Kind::Png);
    }
    if bytes.starts_with(&[0xff, 0xd8]) {
        check_jpeg(bytes)?;
        return Ok(Kind::Jpeg);
    }
    flaw(describe(bytes), "a PNG or JPEG image")
}

/// Names formats that one often meets, so that the message helps.
fn describe(bytes: &[u8]) -> String {
    let known = match bytes {
        [b'G', b'I', b'F', b'8', ..] => "a GIF image",
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => "a WebP image",
        [b'B', b'M', ..] => "a BMP image",
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => "a TIFF image",
        [0x1f, 0x8b, ..] => "a gzip file",
        [b'P', b'K', 3, 4, ..] => "a zip file",
        _ if PNG.starts_with(bytes) || bytes == [0xff] => "the file ends early",
        _ if bytes[..bytes.len().min(64)]
            .iter()
            .all(|b| matches!(b, 9 | 10 | 13 | 32..=126)) =>
        {
            "a text file"
        }
        _ => {
            let head = bytes
                .iter()
                .take(4)
                .map(|b| format!("{b:02x}"))
                .collect::<Vec<_>>();
            return format!("a file that begins with the bytes {}", head.join(" "));
        }
    };
    known.to_string()
}

/// Refuses sides of 0, sides above [`MAX_SIDE`] and more than [`MAX_IMAGE_BYTES`] bytes.
fn check_size(width: u32, height: u32, bytes_per_pixel: u64) -> Result<(), Flaw> {
    let found = format!("a header that claims {width}x{height} pixels");
    if width == 0 || height == 0 {
        return flaw(found, "at least 1x1");
    }
    let bytes = (u64::from(width) * u64::from(height)).saturating_mul(bytes_per_pixel);
    if width > MAX_SIDE || height > MAX_SIDE || bytes > MAX_IMAGE_BYTES {
        let found = format!("{found} ({bytes} bytes)");
        let expected = format!("at most {MAX_SIDE}x{MAX_SIDE} and {MAX_IMAGE_BYTES} bytes");
        return Err(Flaw {
            found,
            expected,
            limit: true,
        });
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_be_bytes)
}

/// PNG (ISO/IEC 15948): signature, IHDR, other chunks, IEND.
fn check_png(bytes: &[u8]) -> Result<(), Flaw> {
    let mut at = PNG.len();
    let mut header = None;
    let mut compressed = 0u64;
    loop {
        let (Some(length), Some(kind)) = (u32_at(bytes, at), bytes.get(at + 4..at + 8)) else {
            return flaw(
                format!("the file ends early, after {} bytes", bytes.len()),
                "IEND",
            );
        };
        let name = kind.escape_ascii().to_string();
        let data = at + 8;
        // Four bytes of checksum follow the data.
        let next = data as u64 + u64::from(length) + 4;
        if next > bytes.len() as u64 {
            return flaw(
                format!("chunk {name} at byte {at} claims {length} bytes, past the end"),
                format!("chunks inside the file's {} bytes", bytes.len()),
            );
        }
        let body = &bytes[data..data + length as usize];
        match (kind, header) {
            (b"IHDR", None) => header = Some(png_header(body)?),
            (b"IHDR", Some(_)) => return flaw("a second IHDR", "one IHDR"),
            (_, None) => return flaw(format!("the first chunk is {name:?}"), "IHDR"),
            (b"IDAT", _) => compressed += u64::from(length),
            (b"IEND", Some(raw)) => return check_deflate(raw, compressed),
            _ => {}
        }
        at = next as usize;
    }
}

/// The bytes of all scan lines.
fn png_header(body: &[u8]) -> Result<u64, Flaw> {
    let (Some(width), Some(height), Some(&[depth, color])) = (
        u32_at(body, 0),
        u32_at(body, 4),
        body.get(8..10).and_then(|b| b.first_chunk::<2>()),
    ) else {
        return flaw(format!("an IHDR of {} bytes", body.len()), "13 bytes");
    };
    // Samples in the file and after a palette is expanded. A tRNS chunk may add one more: the
    // decoder's own limit covers that case.
    let (samples, decoded) = match color {
        0 => (1, 1),
        2 => (3, 3),
        3 => (1, 3),
        4 => (2, 2),
        6 => (4, 4),
        other => return flaw(format!("IHDR: colour type {other}"), "0, 2, 3, 4 or 6"),
    };
    if ![1, 2, 4, 8, 16].contains(&depth) {
        return flaw(format!("IHDR: {depth} bits per sample"), "1, 2, 4, 8 or 16");
    }
    check_size(width, height, decoded * u64::from(depth.div_ceil(8)))?;
    let row = (u64::from(width) * samples * u64::from(depth)).div_ceil(8) + 1;
    Ok(row * u64::from(height))
}

/// Deflate turns one byte into at most 1032 (258 bytes in 2 bits).
fn check_deflate(raw: u64, compressed: u64) -> Result<(), Flaw> {
    if raw / 1032 <= compressed {
        return Ok(());
    }
    flaw(
        format!("{compressed} bytes of compressed data for an image of {raw} bytes"),
        format!("at least {} bytes", raw / 1032),
    )
}

/// JPEG (ITU T.81, annex B): SOI, segments, scans, EOI.
fn check_jpeg(bytes: &[u8]) -> Result<(), Flaw> {
    let mut at = 2;
    let mut size = None;
    let mut scans = 0;
    let cut = |at: usize| {
        flaw(
            format!("the file ends early, at byte {at}"),
            "an EOI marker",
        )
    };
    loop {
        // Any number of fill bytes may stand before a marker.
        if bytes.get(at).is_some_and(|&b| b != 0xff) {
            return flaw(
                format!("byte {at} is {:#04x}", bytes[at]),
                "a marker (0xff)",
            );
        }
        while bytes.get(at) == Some(&0xff) {
            at += 1;
        }
        let Some(&marker) = bytes.get(at) else {
            return cut(at);
        };
        at += 1;
        match marker {
            0xd9 => break,
            // Without a length: TEM and restart markers.
            0x01 | 0xd0..=0xd7 => continue,
            0x00 | 0xd8 => return flaw(format!("marker {marker:#04x} at byte {at}"), "a segment"),
            _ => {}
        }
        let Some(length) = bytes
            .get(at..at + 2)
            .map(|b| usize::from(b[0]) << 8 | usize::from(b[1]))
        else {
            return cut(at);
        };
        if length < 2 || at + length > bytes.len() {
            return flaw(
                format!("segment {marker:#04x} at byte {at} claims {length} bytes"),
                format!("2 to {} bytes", bytes.len() - at),
            );
        }
        let body = &bytes[at + 2..at + length];
        at += length;
        match marker {
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let (Some(&[h1, h0, w1, w0]), Some(&components)) = (
                    body.get(1..).and_then(|b| b.first_chunk::<4>()),
                    body.get(5),
                ) else {
                    return flaw(
                        format!("a frame header of {} bytes", body.len()),
                        "at least 6",
                    );
                };
                let (height, width) = (u16::from_be_bytes([h1, h0]), u16::from_be_bytes([w1, w0]));
                let progressive = matches!(marker, 0xc2 | 0xc6 | 0xca | 0xce);
                let frame = (width, height, components, progressive);
                if size.replace(frame).is_some() {
                    return flaw("a second frame header", "one frame");
                }
                check_size(width.into(), height.into(), components.max(1).into())?;
            }
            0xda => {
                scans += 1;
                at = end_of_scan(bytes, at);
            }
            _ => {}
        }
    }
    let Some((width, height, components, progressive)) = size.filter(|_| scans > 0) else {
        return flaw("an end marker before any image data", "a frame and a scan");
    };
    // Pixels are held twice while they are decoded, and a progressive file's coefficients, two bytes
    // each, until the last scan.
    let values = u64::from(width) * u64::from(height) * u64::from(components);
    let need = values * if progressive { 4 } else { 2 };
    let length = bytes.len() as u64;
    if need > FREE + 2 * length && need > MAX_RATIO * length {
        return Err(Flaw {
            found: format!(
                "{length} bytes for {width}x{height} pixels, which take {need} to decode"
            ),
            expected: format!("at least {} bytes", need / MAX_RATIO),
            limit: true,
        });
    }
    // Each block of 8×8 pixels of the largest component takes at least one bit.
    let blocks = u64::from(width.div_ceil(8)) * u64::from(height.div_ceil(8));
    if blocks / 8 > bytes.len() as u64 {
        return flaw(
            format!("{} bytes for {width}x{height} pixels", bytes.len()),
            format!("at least {} bytes", blocks / 8),
        );
    }
    Ok(())
}

/// The first marker after entropy-coded data, which escapes 0xff by a following 0.
fn end_of_scan(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at..] {
            [0xff, 0x00 | 0xd0..=0xd7, ..] => at += 2,
            [0xff, ..] => return at,
            _ => at += 1,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_it_sees() {
        for (bytes, clue) in [
            (&b"GIF89a"[..], "GIF"),
            (b"RIFF1234WEBPVP8 ", "WebP"),
            (b"BM1234", "BMP"),
            (b"II*\0", "TIFF"),
            (b"hello, world", "text"),
            (b"\x89PNG", "ends early"),
            (b"\xff", "ends early"),
            (b"\x00\x01\x02\x03\x04", "00 01 02 03"),
        ] {
            let flaw = check(bytes).unwrap_err();
            assert!(flaw.found.contains(clue), "{flaw:?}");
        }
    }

    #[test]
    fn sizes_just_below_and_just_above_the_limits() {
        assert!(check_size(MAX_SIDE, 1, 1).is_ok());
        assert!(check_size(MAX_SIDE + 1, 1, 1).unwrap_err().limit);
        assert!(check_size(8192, 8192, 1).is_ok());
        assert!(check_size(8192, 8193, 1).unwrap_err().limit);
        assert!(check_size(u32::MAX, u32::MAX, 8).unwrap_err().limit);
        assert!(!check_size(0, 5, 1).unwrap_err().limit);
    }

    #[test]
    fn a_jpeg_just_long_enough_and_one_just_too_short_for_its_pixels() {
        let file = |marker: u8, length: usize| {
            let mut bytes = vec![0xff, 0xd8, 0xff, marker, 0, 17, 8];
            bytes.extend([2000u16, 8000].map(u16::to_be_bytes).as_flattened());
            bytes.extend([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]);
            bytes.extend([0xff, 0xda, 0, 2]);
            bytes.resize(length - 2, 0);
            bytes.extend([0xff, 0xd9]);
            check(&bytes).map_err(|flaw| (flaw.limit, flaw.expected))
        };
        // 8000 x 2000 x 3 values, two bytes each; four in a progressive file.
        assert_eq!(file(0xc0, 480_000), Ok(Kind::Jpeg));
        let (limit, expected) = file(0xc0, 479_999).unwrap_err();
        assert!(limit && expected == "at least 480000 bytes", "{expected}");
        assert_eq!(file(0xc2, 960_000), Ok(Kind::Jpeg));
        assert_eq!(
            file(0xc2, 959_999),
            Err((true, "at least 960000 bytes".into()))
        );
    }

    #[test]
    fn deflate_cannot_expand_more_than_1032_times() {
        assert!(check_deflate(1032 * 10 + 1031, 10).is_ok());
        assert!(check_deflate(1032 * 11, 10).is_err());
    }
}
