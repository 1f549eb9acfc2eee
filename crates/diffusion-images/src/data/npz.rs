//! Images in a `.npz` file of NumPy: a zip archive of arrays.
//!
//! ```text
//! numpy.savez_compressed("pictures.npz", images=images, labels=labels)
//! ```
//!
//! | array | type | shape |
//! |---|---|---|
//! | `images`, or `x`, or `arr_0` | `uint8` | `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, `C` 1 or 3 |
//! | the same | `float32`, `float64`, in `[-1, 1]` with a negative value somewhere | the same |
//! | `labels`, or `y`; may be absent | any integer, 0 to 65535 | `[N]` or `[N, 1]` |
//!
//! Floats without a negative value are refused: they could as well mean 0 to 1. An array that is
//! read by its shape as either order of channels is refused too. Before memory is taken, the
//! length that the archive states for an array is compared with the length of its compressed
//! bytes (at most 200 times as much above 1 MiB), and with the shape in the array's header; what
//! claims much is unpacked once to check it before it is kept.

mod array;

use super::dataset::check_total;
use super::{Dataset, Labels, MAX_IMAGE_BYTES, MAX_SIDE, Pixels, input};
use array::{Header, Scalar};
use diffusion_core::{Error, Report, Result};
use flate2::Crc;
use flate2::read::DeflateDecoder;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use zip::CompressionMethod;

/// How much longer an array may be than its compressed bytes.
const MAX_RATIO: u64 = 200;
/// Arrays up to this length do no harm, however well they were compressed.
const SMALL: u64 = 1 << 20;
const MAX_LABEL: i128 = 65_535;
/// What is read at a time.
const PIECE: u64 = 64 << 10;
/// A compressed array that claims more is unpacked twice, the first time to check it.
const MUCH: u64 = 32 << 20;
const AGAIN: &str = "download or copy the file again";

/// Whether a file is a `.npz` file by its name or its first bytes.
///
/// # Errors
/// It cannot be read.
pub fn is_one(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(4)
        .read_to_end(&mut head)
        .map_err(|e| Error::io(path, e))?;
    Ok(head == b"PK\x03\x04" || path.extension().is_some_and(|end| end == "npz"))
}

/// The images of a file, and their labels.
///
/// # Errors
/// Names the file, the array and what is wrong: a damaged archive, an array that is missing or of
/// another type or shape, values out of range, sizes over the limits.
pub fn read(path: &Path) -> Result<Dataset> {
    input::check_regular(path)?;
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut archive =
        zip::ZipArchive::new(BufReader::new(file)).map_err(|error| broken(path, error))?;
    let names = ["images", "x", "arr_0"];
    let Some(array) = find(path, &mut archive, &names)? else {
        let mut there: Vec<_> = archive.file_names().flatten().take(10).collect();
        there.sort_unstable();
        return Err(
            Report::file(path, format!("the arrays [{}]", there.join(", ")))
                .expected("an array `images`, `x` or `arr_0`")
                .remedy("save it again as numpy.savez_compressed(file, images=…, labels=…)")
                .input(),
        );
    };
    let (layout, pixels) = images(array)?;
    let labels = match find(path, &mut archive, &["labels", "y"])? {
        Some(array) => Some(labels(&array, layout.count)?),
        None => None,
    };
    let shape = (layout.channels, layout.height, layout.width);
    Dataset::new(path.display().to_string(), shape, pixels, labels)
}

/// An array and where it stands.
struct Array {
    at: String,
    header: Header,
    bytes: Vec<u8>,
}

/// The first of the arrays that is there.
fn find(
    path: &Path,
    archive: &mut zip::ZipArchive<BufReader<File>>,
    names: &[&str],
) -> Result<Option<Array>> {
    let mut place = None;
    for name in names {
        let member = format!("{name}.npy");
        if let Some(index) = archive.index_for_name(&member) {
            place = Some((index, format!("{}: {member}", path.display())));
            break;
        }
    }
    let Some((index, at)) = place else {
        return Ok(None);
    };
    let member = archive.by_index_raw(index).map_err(|e| broken(path, e))?;
    let (size, packed, checksum) = (member.size(), member.compressed_size(), member.crc32());
    let stored = member.compression() == CompressionMethod::STORE;
    if member.encrypted() || !stored && member.compression() != CompressionMethod::DEFLATE {
        return Err(
            Report::new(at, "an encrypted member or an unusual compression")
                .expected("stored or deflated")
                .remedy("save it again with numpy.savez_compressed")
                .unsupported(),
        );
    }
    let length = input::check_regular(path)?;
    if packed > length {
        let found = format!("{packed} bytes in a file of {length}");
        return Err(damaged(&at, found).expected_bytes(size));
    }
    check_ratio(&at, size, packed)?;
    if stored && size != packed {
        return Err(damaged(&at, format!("{packed} stored bytes")).expected_bytes(size));
    }
    drop(member);
    if size > MUCH && !stored {
        // Once without keeping it, so that memory is taken only for a sound array.
        let data = open(path, archive, index)?;
        unpack(&at, data, size, checksum, &mut |_| {})?;
    }
    let mut bytes: Vec<u8> = Vec::new();
    bytes
        .try_reserve_exact(size as usize)
        .map_err(|_| input::out_of_memory(Path::new(&at), size))?;
    let mut keep = |piece: &[u8]| bytes.extend_from_slice(piece);
    let data = open(path, archive, index)?;
    let header = unpack(&at, data, size, checksum, &mut keep)?;
    Ok(Some(Array { at, header, bytes }))
}

/// The bytes of a member, unpacked.
fn open<'a>(
    path: &Path,
    archive: &'a mut zip::ZipArchive<BufReader<File>>,
    index: usize,
) -> Result<Box<dyn Read + 'a>> {
    let member = archive.by_index_raw(index).map_err(|e| broken(path, e))?;
    Ok(match member.compression() {
        CompressionMethod::STORE => Box::new(member),
        _ => Box::new(DeflateDecoder::new(member)),
    })
}

fn check_ratio(at: &str, size: u64, packed: u64) -> Result<()> {
    if size > SMALL && size / MAX_RATIO > packed {
        return Err(
            Report::new(at, format!("{size} bytes from {packed} compressed ones"))
                .expected(format!("at most {MAX_RATIO} for each"))
                .remedy("save it with numpy.savez, without compression, if it is genuine")
                .limit(),
        );
    }
    check_total(at, size)
}

/// The header of an array, and its values to `keep`, piece by piece; both fill `size` bytes and no
/// more.
fn unpack(
    at: &str,
    data: impl Read,
    size: u64,
    checksum: u32,
    keep: &mut dyn FnMut(&[u8]),
) -> Result<Header> {
    let mut data = Summed {
        inner: data,
        sum: Crc::new(),
    };
    let header = Header::read(at, &mut data)?;
    let claim = header.length.saturating_add(header.bytes()?);
    if claim != size {
        let found = format!("a header that claims {claim} bytes");
        return Err(damaged(at, found).expected_bytes(size));
    }
    let mut left = claim - header.length;
    let mut buffer = vec![0; left.min(PIECE) as usize];
    while left > 0 {
        let wanted = left.min(PIECE) as usize;
        let read = data.read(&mut buffer[..wanted]);
        let read = read.map_err(|error| array::unreadable(at, &error))?;
        if read == 0 {
            let found = format!("the data ends after {} bytes", claim - left);
            return Err(damaged(at, found).expected_bytes(size));
        }
        keep(&buffer[..read]);
        left -= read as u64;
    }
    let mut beyond = [0; 1];
    let more = data
        .read(&mut beyond)
        .map_err(|error| array::unreadable(at, &error))?;
    if more > 0 {
        return Err(damaged(at, "more data".into()).expected_bytes(size));
    }
    if data.sum.sum() != checksum {
        return Err(damaged(at, "a wrong checksum".into()).expected_bytes(size));
    }
    Ok(header)
}

/// A reader that keeps the checksum of what passed.
struct Summed<R> {
    inner: R,
    sum: Crc,
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.sum.update(&buffer[..read]);
        Ok(read)
    }
}

struct Damaged(Report);

impl Damaged {
    fn expected_bytes(self, size: u64) -> Error {
        let expected = format!("{size} bytes as the archive states, undamaged");
        self.0.expected(expected).remedy(AGAIN).input()
    }
}

fn damaged(at: &str, found: String) -> Damaged {
    Damaged(Report::new(at, found))
}

fn broken(path: &Path, error: zip::result::ZipError) -> Error {
    Report::file(path, format!("a damaged archive ({error})"))
        .expected("a complete .npz file")
        .remedy(AGAIN)
        .input()
}

/// How images lie in an array.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    count: usize,
    channels: usize,
    height: usize,
    width: usize,
    channels_last: bool,
}

impl Layout {
    fn of(at: &str, shape: &[u64]) -> Result<Self> {
        let is_channel = |size: u64| size == 1 || size == 3;
        let refuse = |expected: &str, remedy: &str| {
            Err(Report::new(at, format!("the shape {shape:?}"))
                .expected(expected)
                .remedy(remedy)
                .input())
        };
        let kinds = "[N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels";
        let (count, channels, height, width, channels_last) = match *shape {
            [n, h, w] => (n, 1, h, w, false),
            [_, a, _, b] if is_channel(a) && is_channel(b) => {
                return refuse(
                    "a shape that can be read in one way",
                    "drop the axis of one channel",
                );
            }
            [n, h, w, c] if is_channel(c) => (n, c, h, w, true),
            [n, c, h, w] if is_channel(c) => (n, c, h, w, false),
            _ => return refuse(kinds, "reshape the array; drop the channel of opacity"),
        };
        if [count, height, width].contains(&0) {
            return refuse(kinds, "give at least one image");
        }
        let side = u64::from(MAX_SIDE);
        let fits = height <= side && width <= side && channels * height * width <= MAX_IMAGE_BYTES;
        if !fits {
            return Err(Report::new(at, format!("the shape {shape:?}"))
                .expected(format!(
                    "images of at most {side}x{side} and {MAX_IMAGE_BYTES} bytes"
                ))
                .remedy("use smaller images")
                .limit());
        }
        Ok(Self {
            count: count as usize,
            channels: channels as usize,
            height: height as usize,
            width: width as usize,
            channels_last,
        })
    }

    /// Brings the channels to the front.
    fn planes<T: Copy>(&self, values: Vec<T>) -> Vec<T> {
        if !self.channels_last || self.channels == 1 {
            return values;
        }
        let mut out = Vec::with_capacity(values.len());
        for image in values.chunks_exact(self.channels * self.height * self.width) {
            for channel in 0..self.channels {
                out.extend(image.iter().skip(channel).step_by(self.channels));
            }
        }
        out
    }
}

fn images(array: Array) -> Result<(Layout, Pixels)> {
    let layout = Layout::of(&array.at, &array.header.shape)?;
    let pixels = match array.header.scalar {
        Scalar::Unsigned(1) => Pixels::Levels {
            values: layout.planes(array.bytes),
            max: 255,
        },
        Scalar::Float(_) => {
            let values: Vec<f32> = array.header.floats(&array.bytes).collect();
            check_range(&array.at, &values)?;
            Pixels::Real(layout.planes(values))
        }
        _ => {
            return Err(
                Report::new(&array.at, format!("the type {}", array.header.descr))
                    .expected("uint8, or float32 or float64 in [-1, 1]")
                    .remedy("convert it: images.astype(numpy.uint8)")
                    .input(),
            );
        }
    };
    Ok((layout, pixels))
}

fn check_range(at: &str, values: &[f32]) -> Result<()> {
    let remedy = "store uint8 values 0 to 255, or rescale to -1 to 1";
    if let Some(place) = values.iter().position(|v| !(-1.0..=1.0).contains(v)) {
        return Err(Report::new(format!("{at}: value {place}"), values[place])
            .expected("-1 to 1 in an array of floats")
            .remedy(remedy)
            .input());
    }
    if values.iter().all(|&v| v >= 0.0) {
        return Err(Report::new(at, "floats without a negative value")
            .expected("-1 to 1 in an array of floats; 0 to 1 would be another scale")
            .remedy(remedy)
            .input());
    }
    Ok(())
}

fn labels(array: &Array, count: usize) -> Result<Labels> {
    let shape = &array.header.shape;
    if *shape != [count as u64] && *shape != [count as u64, 1] {
        return Err(Report::new(&array.at, format!("the shape {shape:?}"))
            .expected(format!("[{count}], one for each image"))
            .remedy("give class numbers, not one-hot rows")
            .input());
    }
    if matches!(array.header.scalar, Scalar::Float(_)) {
        return Err(
            Report::new(&array.at, format!("the type {}", array.header.descr))
                .expected("integers")
                .remedy("convert it: labels.astype(numpy.int64)")
                .input(),
        );
    }
    let mut values = Vec::with_capacity(count);
    for (place, value) in array.header.integers(&array.bytes).enumerate() {
        if !(0..=MAX_LABEL).contains(&value) {
            return Err(Report::new(format!("{}: label {place}", array.at), value)
                .expected(format!("0 to {MAX_LABEL}"))
                .remedy("number the classes from 0")
                .input());
        }
        values.push(value as u32);
    }
    let classes = values.iter().max().map_or(0, |&most| most + 1);
    Ok(Labels {
        values,
        classes: (0..classes).map(|class| class.to_string()).collect(),
    })
}

#[cfg(test)]
mod tests;
