//! Reading safetensors files that nobody vouches for.
//!
//! ```text
//! file = u64 n (little endian) ‖ n bytes of JSON ‖ data
//! JSON = { name: { dtype, shape, data_offsets: [begin, end] }, …, "__metadata__": { text: text } }
//! ```
//!
//! The tensors must tile the data exactly: no gap, no overlap, nothing behind the last. Claims are
//! compared with the length of the file before anything is allocated.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Report, Result};
use crate::limits::Limits;

/// All tensors of a safetensors file, on the CPU, sorted by name.
///
/// `BOOL` becomes `U8`; `F64`, `F32`, `F16`, `BF16`, `I64`, `I32`, `U32` and `U8` stay what they are.
///
/// # Errors
///
/// [`Error::Io`] when it cannot be read, [`Error::Limit`] above `limits`, [`Error::Input`] when it
/// is malformed (truncated, a name twice, offsets that overlap, leave gaps or contradict the shape,
/// a Boolean other than 0 and 1) and [`Error::Unsupported`] for another element type.
pub fn read_safetensors(path: &Path, limits: &Limits) -> Result<BTreeMap<String, Tensor>> {
    let io = |e| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    decode_safetensors(&mut BufReader::new(file), len, path, limits)
}

/// [`read_safetensors`] from any source of `len` bytes; `at` names it in messages.
///
/// # Errors
///
/// As [`read_safetensors`].
pub fn decode_safetensors(
    reader: &mut dyn Read,
    len: u64,
    at: &Path,
    limits: &Limits,
) -> Result<BTreeMap<String, Tensor>> {
    let header = read_header(reader, len, at, limits)?;
    let mut out = BTreeMap::new();
    for entry in header {
        let tensor = read_tensor(reader, &entry, at)?;
        out.insert(entry.name, tensor);
    }
    Ok(out)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: String,
    #[serde(deserialize_with = "shape")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    count: usize,
    begin: u64,
    end: u64,
}

#[derive(Clone, Copy)]
enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    U32,
    U8,
    Bool,
}

impl Dtype {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F64" => Self::F64,
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "I64" => Self::I64,
            "I32" => Self::I32,
            "U32" => Self::U32,
            "U8" => Self::U8,
            "BOOL" => Self::Bool,
            _ => return None,
        })
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 | Self::Bool => 1,
        }
    }
}

/// Reads the header in file order, and counts its tensors; those above `most` are not kept. A plain
/// map would let the last of two equal names win in silence.
struct Header {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Header {
    type Value = (Vec<(String, Info)>, usize);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Header {
    type Value = (Vec<(String, Info)>, usize);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = BTreeSet::new();
        let mut count = 0;
        while let Some(name) = map.next_key::<String>()? {
            if count >= self.most && name != METADATA {
                map.next_value::<IgnoredAny>()?;
                count += 1;
                continue;
            }
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format!(
                    "the name `{name}` appears twice"
                )));
            }
            if name == METADATA {
                map.next_value::<Texts>()?;
            } else {
                let info = map
                    .next_value()
                    .map_err(|e| de::Error::custom(format!("tensor `{name}`: {e}")))?;
                entries.push((name, info));
                count += 1;
            }
        }
        Ok((entries, count))
    }
}

const METADATA: &str = "__metadata__";
/// The most dimensions of a tensor.
const DIMENSIONS: usize = 32;

/// The sizes of a tensor, counted while they are read.
fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Sizes;
    impl<'de> Visitor<'de> for Sizes {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {DIMENSIONS} sizes")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
            let mut sizes = Vec::new();
            while let Some(size) = list.next_element()? {
                if sizes.len() == DIMENSIONS {
                    return Err(de::Error::invalid_length(DIMENSIONS + 1, &self));
                }
                sizes.push(size);
            }
            Ok(sizes)
        }
    }
    deserializer.deserialize_seq(Sizes)
}

/// Texts by name, checked and not kept.
struct Texts;

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Check;
        impl<'de> Visitor<'de> for Check {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
                while map.next_entry::<String, String>()?.is_some() {}
                Ok(Texts)
            }
        }
        deserializer.deserialize_map(Check)
    }
}

fn read_header(reader: &mut dyn Read, len: u64, at: &Path, limits: &Limits) -> Result<Vec<Entry>> {
    let io = |e| Error::io(at, e);
    Limits::require(
        format_args!("{}: bytes", at.display()),
        len,
        limits.file_bytes,
        "file_bytes",
    )?;
    let mut word = [0u8; 8];
    if len < 8 {
        return Err(damaged(at, format_args!("{len} bytes long"))
            .expected("at least 8")
            .input());
    }
    reader.read_exact(&mut word).map_err(io)?;
    let header_len = u64::from_le_bytes(word);
    if header_len > len - 8 {
        return Err(damaged(at, format_args!("a header of {header_len} bytes"))
            .expected(format!("at most {}, the rest of the file", len - 8))
            .input());
    }
    Limits::require(
        format_args!("{}: bytes of header", at.display()),
        header_len,
        limits.safetensors_header,
        "safetensors_header",
    )?;
    let mut json = vec![0; header_len as usize];
    reader.read_exact(&mut json).map_err(io)?;
    let mut parser = serde_json::Deserializer::from_slice(&json);
    let most = limits.tensors;
    let parsed = Header { most }.deserialize(&mut parser);
    let (entries, count) = parsed
        .and_then(|found| parser.end().map(|()| found))
        .map_err(|e| {
            damaged(at, format_args!("header: {e}"))
                .expected("a safetensors header")
                .input()
        })?;
    Limits::require(
        format_args!("{}: tensors", at.display()),
        count as u64,
        limits.tensors as u64,
        "tensors",
    )?;
    let data = len - 8 - header_len;
    let mut checked = Vec::with_capacity(entries.len());
    for (name, info) in entries {
        checked.push(check_entry(name, &info, data, at)?);
    }
    checked.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    let mut next = 0;
    for entry in &checked {
        if entry.begin != next {
            let what = if entry.begin < next {
                "overlaps the one before"
            } else {
                "leaves a gap"
            };
            return Err(of(
                at,
                &entry.name,
                format_args!("begins at {} and {what}", entry.begin),
            )
            .expected(format!("to begin at {next}"))
            .input());
        }
        next = entry.end;
    }
    if next != data {
        return Err(damaged(at, format_args!("{data} bytes of data"))
            .expected(format!("{next}, the end of the last tensor"))
            .input());
    }
    Ok(checked)
}

fn check_entry(name: String, info: &Info, data: u64, at: &Path) -> Result<Entry> {
    let Some(dtype) = Dtype::parse(&info.dtype) else {
        return Err(Report::new(
            format_args!("{}: tensor `{name}`", at.display()),
            &info.dtype,
        )
        .expected("F64, F32, F16, BF16, I64, I32, U32, U8 or BOOL")
        .remedy("convert the file to one of these element types")
        .unsupported());
    };
    let (begin, end) = info.data_offsets;
    if begin > end || end > data {
        return Err(of(at, &name, format_args!("offsets {begin}..{end}"))
            .expected(format!("inside the {data} bytes of data"))
            .input());
    }
    // A product that overflows beside a zero is refused too: strides are products of their own.
    let volume = info
        .shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d.max(1)));
    let elements = volume.map(|n| if info.shape.contains(&0) { 0 } else { n });
    let bytes = elements.and_then(|n| n.checked_mul(dtype.bytes()));
    if bytes != Some(end - begin) {
        let claim = bytes.map_or("more than 2⁶⁴".to_string(), |b| b.to_string());
        return Err(of(at, &name, format_args!("{} bytes", end - begin))
            .expected(format!("{claim}, from {} {:?}", info.dtype, info.shape))
            .input());
    }
    let shape = info.shape.iter().map(|&d| d as usize).collect();
    Ok(Entry {
        name,
        dtype,
        shape,
        count: elements.unwrap_or(0) as usize,
        begin,
        end,
    })
}

fn read_tensor(reader: &mut dyn Read, entry: &Entry, at: &Path) -> Result<Tensor> {
    match entry.dtype {
        Dtype::F64 => typed(reader, entry, at, f64::from_le_bytes),
        Dtype::F32 => typed(reader, entry, at, f32::from_le_bytes),
        Dtype::F16 => typed(reader, entry, at, f16::from_le_bytes),
        Dtype::Bf16 => typed(reader, entry, at, bf16::from_le_bytes),
        Dtype::I64 => typed(reader, entry, at, i64::from_le_bytes),
        Dtype::I32 => typed(reader, entry, at, i32::from_le_bytes),
        Dtype::U32 => typed(reader, entry, at, u32::from_le_bytes),
        Dtype::U8 => typed(reader, entry, at, u8::from_le_bytes),
        Dtype::Bool => {
            let mut values = Vec::new();
            fill(reader, entry, at, u8::from_le_bytes, &mut values)?;
            if let Some(i) = values.iter().position(|&v| v > 1) {
                return Err(of(
                    at,
                    &entry.name,
                    format_args!("element {i} is {}", values[i]),
                )
                .expected("0 or 1 in a BOOL tensor")
                .input());
            }
            Ok(Tensor::from_vec(
                values,
                entry.shape.as_slice(),
                &Device::Cpu,
            )?)
        }
    }
}

fn typed<T: WithDType, const N: usize>(
    reader: &mut dyn Read,
    entry: &Entry,
    at: &Path,
    decode: fn([u8; N]) -> T,
) -> Result<Tensor> {
    let mut values = Vec::new();
    fill(reader, entry, at, decode, &mut values)?;
    Ok(Tensor::from_vec(
        values,
        entry.shape.as_slice(),
        &Device::Cpu,
    )?)
}

/// Reads in pieces, so that the raw bytes of a large tensor never stand beside its values.
fn fill<T, const N: usize>(
    reader: &mut dyn Read,
    entry: &Entry,
    at: &Path,
    decode: fn([u8; N]) -> T,
    values: &mut Vec<T>,
) -> Result<()> {
    const PIECE: usize = 8192;
    values.reserve_exact(entry.count);
    let mut buffer = vec![0u8; N * PIECE.min(entry.count)];
    while values.len() < entry.count {
        let n = PIECE.min(entry.count - values.len());
        let piece = &mut buffer[..n * N];
        reader.read_exact(piece).map_err(|e| Error::io(at, e))?;
        values.extend(piece.as_chunks::<N>().0.iter().map(|&bytes| decode(bytes)));
    }
    Ok(())
}

fn of(at: &Path, name: &str, found: impl fmt::Display) -> Report {
    Report::new(format_args!("{}: tensor `{name}`", at.display()), found)
        .remedy("the file is damaged: copy or download it again")
}

fn damaged(at: &Path, found: impl fmt::Display) -> Report {
    Report::file(at, found).remedy("the file is damaged or no safetensors file: get it again")
}
