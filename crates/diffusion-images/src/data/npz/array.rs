//! The header of a `.npy` array (NumPy Enhancement Proposal 1) and the numbers behind it.
//!
//! ```text
//! 93 "NUMPY" | major, minor | length of the text, 2 bytes (major 1) or 4, little-endian
//! {'descr': '|u1', 'fortran_order': False, 'shape': (60000, 28, 28), }
//! ```

use diffusion_core::{Error, Report, Result};
use std::io::Read;

/// The longest text of a header.
const MAX_HEADER: usize = 1 << 16;
/// The most dimensions of an array.
const MAX_DIMS: usize = 8;

/// What the numbers of an array are, with their bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scalar {
    Unsigned(usize),
    Signed(usize),
    Float(usize),
}

/// What a header says.
#[derive(Debug)]
pub(super) struct Header {
    at: String,
    /// The type in NumPy's words.
    pub descr: String,
    pub scalar: Scalar,
    big_endian: bool,
    pub shape: Vec<u64>,
    /// Bytes of the header itself.
    pub length: u64,
}

impl Header {
    /// Reads from the start of an array to the first number.
    pub fn read(at: &str, data: &mut impl Read) -> Result<Self> {
        let mut fill = |buffer: &mut [u8]| data.read_exact(buffer).map_err(|e| unreadable(at, &e));
        let mut start = [0; 8];
        fill(&mut start)?;
        if !start.starts_with(b"\x93NUMPY") || !(1..=3).contains(&start[6]) {
            return Err(wrong(at, format!("an array that begins with {start:02x?}")));
        }
        let mut word = [0; 4];
        let width = if start[6] == 1 { 2 } else { 4 };
        fill(&mut word[..width])?;
        let length = u32::from_le_bytes(word) as usize;
        if length > MAX_HEADER {
            return Err(Report::new(at, format!("a header of {length} bytes"))
                .expected(format!("at most {MAX_HEADER}"))
                .remedy("save the array again with numpy.savez_compressed")
                .limit());
        }
        let mut text = vec![0; length];
        fill(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut header = Self::parse(at, &text)?;
        header.length = (8 + width + length) as u64;
        Ok(header)
    }

    fn parse(at: &str, text: &str) -> Result<Self> {
        let bad = || wrong(at, format!("the header {:?}", short(text)));
        let mut rest = text.trim().strip_prefix('{').ok_or_else(bad)?;
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        loop {
            rest = rest.trim_start();
            if let Some(end) = rest.strip_prefix('}') {
                if end.trim().is_empty() {
                    break;
                }
                return Err(bad());
            }
            let (key, after) = quoted(rest).ok_or_else(bad)?;
            let after = after.trim_start().strip_prefix(':').ok_or_else(bad)?;
            let after = after.trim_start();
            rest = match key {
                "descr" if descr.is_none() => {
                    if after.starts_with('[') {
                        return Err(unusual(at, "an array of records".into()));
                    }
                    let (value, after) = quoted(after).ok_or_else(bad)?;
                    descr = Some(value.to_string());
                    after
                }
                "fortran_order" if fortran.is_none() => {
                    let (value, after) = match after.strip_prefix("False") {
                        Some(after) => (false, after),
                        None => (true, after.strip_prefix("True").ok_or_else(bad)?),
                    };
                    fortran = Some(value);
                    after
                }
                "shape" if shape.is_none() => {
                    let inner = after.strip_prefix('(').ok_or_else(bad)?;
                    let (list, after) = inner.split_once(')').ok_or_else(bad)?;
                    shape = Some(sizes(list).ok_or_else(bad)?);
                    after
                }
                _ => return Err(bad()),
            };
            rest = rest.trim_start();
            rest = match rest.strip_prefix(',') {
                Some(after) => after,
                None if rest.starts_with('}') => rest,
                None => return Err(bad()),
            };
        }
        let (Some(descr), Some(fortran), Some(shape)) = (descr, fortran, shape) else {
            return Err(bad());
        };
        if fortran {
            return Err(unusual(at, "an array in Fortran order".into()));
        }
        let Some((scalar, big_endian)) = scalar(&descr) else {
            return Err(unusual(at, format!("the type {descr}")));
        };
        Ok(Self {
            at: at.to_string(),
            descr,
            scalar,
            big_endian,
            shape,
            length: 0,
        })
    }

    fn width(&self) -> usize {
        match self.scalar {
            Scalar::Unsigned(n) | Scalar::Signed(n) | Scalar::Float(n) => n,
        }
    }

    /// The bytes of all numbers.
    pub fn bytes(&self) -> Result<u64> {
        let start = Some(self.width() as u64);
        let product = self
            .shape
            .iter()
            .fold(start, |n, &size| n?.checked_mul(size));
        product
            .filter(|&n| n < 1 << 62)
            .ok_or_else(|| wrong(&self.at, format!("the shape {:?}", self.shape)))
    }

    /// The numbers of an array of floats.
    pub fn floats<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = f32> + 'a {
        self.words(bytes).map(|word| match self.width() {
            4 => f32::from_bits(word as u32),
            _ => f64::from_bits(word) as f32,
        })
    }

    /// The numbers of an array of integers.
    pub fn integers<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = i128> + 'a {
        let unused = 64 - 8 * self.width() as u32;
        self.words(bytes).map(move |word| match self.scalar {
            // Moved to the top and back, the sign fills the bits that were not there.
            Scalar::Signed(_) => i128::from(((word << unused) as i64) >> unused),
            _ => i128::from(word),
        })
    }

    fn words<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = u64> + 'a {
        bytes.chunks_exact(self.width()).map(|number| {
            let push = |word: u64, &byte: &u8| word << 8 | u64::from(byte);
            if self.big_endian {
                number.iter().fold(0, push)
            } else {
                number.iter().rev().fold(0, push)
            }
        })
    }
}

/// A text in quotes at the start, and what follows.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote)
}

/// `"2, 3, 4"`, with a comma at the end or without.
fn sizes(list: &str) -> Option<Vec<u64>> {
    let list = list.trim();
    if list.is_empty() {
        return Some(Vec::new());
    }
    let list = list.strip_suffix(',').unwrap_or(list);
    let sizes: Option<Vec<u64>> = list.split(',').map(|n| n.trim().parse().ok()).collect();
    sizes.filter(|sizes| sizes.len() <= MAX_DIMS)
}

/// `"<f4"` to what it means; `true` for big-endian.
fn scalar(descr: &str) -> Option<(Scalar, bool)> {
    let big_endian = descr.starts_with('>');
    let scalar = match descr.trim_start_matches(['<', '>', '|', '=']) {
        "u1" => Scalar::Unsigned(1),
        "u2" => Scalar::Unsigned(2),
        "u4" => Scalar::Unsigned(4),
        "u8" => Scalar::Unsigned(8),
        "i1" => Scalar::Signed(1),
        "i2" => Scalar::Signed(2),
        "i4" => Scalar::Signed(4),
        "i8" => Scalar::Signed(8),
        "f4" => Scalar::Float(4),
        "f8" => Scalar::Float(8),
        _ => return None,
    };
    Some((scalar, big_endian))
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

fn wrong(at: &str, found: String) -> Error {
    Report::new(at, found)
        .expected("an array as numpy.save writes it")
        .remedy("save it again with numpy.savez_compressed")
        .input()
}

fn unusual(at: &str, found: String) -> Error {
    Report::new(at, found)
        .expected("whole numbers, float32 or float64 in C order")
        .remedy("convert it: numpy.ascontiguousarray(array).astype(numpy.uint8)")
        .unsupported()
}

/// The compressed bytes are damaged or end early.
pub(super) fn unreadable(at: &str, error: &std::io::Error) -> Error {
    wrong(at, format!("data that cannot be read ({error})"))
}
