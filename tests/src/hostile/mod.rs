//! Malformed files of every format that is read from outside, made from valid ones.
//!
//! What is made depends on the seed and nothing else. First come the files that somebody thought of
//! (bombs, absurd claims, names twice, deep nesting), then truncations, header bytes, lengths, flipped
//! bits, pieces left out or repeated, and garbage behind a sound beginning, until there are enough.

pub mod build;
mod pictures;
mod sets;
mod text;
pub mod weights;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use diffusion_ops::rng::{Key, stream};

use crate::targets::{Bench, Format};

/// A file that a reader is given.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The name of the file, as the reader would meet it.
    pub name: String,
    /// What was done to it.
    pub what: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl Sample {
    /// Bytes of memory that reading it may take: 64 MiB and twice its length.
    pub fn allowance(&self) -> u64 {
        (64 << 20) + 2 * self.bytes.len() as u64
    }
}

fn sample(name: &str, what: impl Into<String>, bytes: Vec<u8>) -> Sample {
    Sample {
        name: name.into(),
        what: what.into(),
        bytes,
    }
}

/// The valid files that the others are made from.
///
/// # Errors
/// When the files of the bench cannot be read.
pub fn seeds(format: Format, bench: &Bench) -> std::io::Result<Vec<Sample>> {
    let mut seeds = match format {
        Format::Png => pictures::png_seeds(),
        Format::Jpeg => pictures::jpeg_seeds(),
        Format::Idx => sets::idx_seeds(),
        Format::Cifar => sets::cifar_seeds(),
        Format::Npz => sets::npz_seeds(),
        Format::Safetensors => weights::safetensors_seeds(),
        Format::Pth => weights::pth_seeds(),
        Format::Toml => text::toml_seeds(),
        Format::Json | Format::Manifest => Vec::new(),
    };
    for (name, bytes) in bench.valid(format)? {
        seeds.push(sample(name, "valid", bytes));
    }
    Ok(seeds)
}

/// Malformed files of a format without an end, no two of them the same: what somebody thought of,
/// then valid files that were damaged at random.
#[derive(Debug)]
pub struct Maker {
    textual: bool,
    seeds: Vec<Sample>,
    thought_of: std::vec::IntoIter<Sample>,
    key: Key,
    number: u64,
    made: BTreeSet<u64>,
}

impl Maker {
    /// What it makes depends on the format and the seed.
    ///
    /// # Errors
    /// When the files of the bench cannot be read.
    pub fn new(format: Format, seed: u64, bench: &Bench) -> std::io::Result<Self> {
        let seeds = seeds(format, bench)?;
        let thought_of = match format {
            Format::Png => pictures::png_specials(),
            Format::Jpeg => pictures::jpeg_specials(&seeds),
            Format::Idx => sets::idx_specials(),
            Format::Cifar => sets::cifar_specials(),
            Format::Npz => sets::npz_specials(),
            Format::Safetensors => weights::safetensors_specials(),
            Format::Pth => weights::pth_specials(),
            Format::Json | Format::Toml | Format::Manifest => text::specials(&seeds),
        };
        Ok(Self {
            textual: matches!(format, Format::Json | Format::Toml | Format::Manifest),
            made: seeds.iter().map(digest).collect(),
            seeds,
            thought_of: thought_of.into_iter(),
            key: Key::new(seed, stream::TEST).item(format as u64),
            number: 0,
        })
    }

    /// How many of the files that somebody thought of are still to come.
    pub fn thought_of(&self) -> usize {
        self.thought_of.len()
    }

    fn damaged(&mut self) -> Sample {
        let origin = &self.seeds[self.number as usize % self.seeds.len()];
        let mut dice = Dice(self.key.step(self.number).words(16), 0);
        self.number += 1;
        let (what, bytes) = if self.textual && dice.below(4) > 0 {
            text::mutate(&origin.bytes, &mut dice)
        } else {
            mutate(&origin.bytes, &mut dice)
        };
        sample(&origin.name, format!("{}: {what}", origin.name), bytes)
    }
}

impl Iterator for Maker {
    type Item = Sample;

    fn next(&mut self) -> Option<Sample> {
        loop {
            let sample = self.thought_of.next().unwrap_or_else(|| self.damaged());
            if self.made.insert(digest(&sample)) {
                return Some(sample);
            }
        }
    }
}

fn digest(sample: &Sample) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&sample.name, &sample.bytes).hash(&mut hasher);
    hasher.finish()
}

/// A few random numbers.
pub(crate) struct Dice(Vec<u64>, usize);

impl Dice {
    /// A number below `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let word = self.0[self.1 % self.0.len()];
        self.1 += 1;
        (word % bound.max(1) as u64) as usize
    }
}

/// Lengths and counts that were once trusted.
const CLAIMS: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 40,
    u64::MAX >> 1,
    u64::MAX - 7,
    u64::MAX,
];

/// Changes bytes without knowing what they mean.
fn mutate(origin: &[u8], dice: &mut Dice) -> (String, Vec<u8>) {
    let mut bytes = origin.to_vec();
    let n = bytes.len();
    // Headers are where the claims are.
    let place = |dice: &mut Dice| {
        let end = if dice.below(3) > 0 { n.min(64) } else { n };
        dice.below(end)
    };
    match dice.below(8) {
        0 => {
            let length = dice.below(n);
            bytes.truncate(length);
            (format!("cut after {length} of {n} bytes"), bytes)
        }
        1 => {
            let (at, value) = (place(dice), dice.below(256) as u8);
            bytes[at] = value;
            (format!("byte {at} = {value}"), bytes)
        }
        2 => {
            let (at, bit) = (dice.below(n), dice.below(8));
            bytes[at] ^= 1 << bit;
            (format!("bit {bit} of byte {at}"), bytes)
        }
        3 => {
            let width = [2, 4, 8][dice.below(3)];
            let (at, claim) = (place(dice), CLAIMS[dice.below(CLAIMS.len())]);
            let value = match dice.below(2) {
                0 => claim.to_le_bytes()[..width].to_vec(),
                _ => claim.to_be_bytes()[8 - width..].to_vec(),
            };
            let end = (at + width).min(n);
            bytes.splice(at..end, value);
            (format!("{claim:#x} in {width} bytes at {at}"), bytes)
        }
        4 => {
            let (from, length) = (dice.below(n), 1 + dice.below(32));
            bytes.drain(from..(from + length).min(n));
            (format!("{length} bytes at {from} left out"), bytes)
        }
        5 => {
            let (from, length) = (dice.below(n), 1 + dice.below(n));
            let again = bytes[from..(from + length).min(n)].to_vec();
            let to = dice.below(n);
            bytes.splice(to..to, again);
            (format!("{length} bytes at {from} again at {to}"), bytes)
        }
        6 => {
            let (from, more) = (dice.below(n.min(64)), dice.below(256));
            bytes.truncate(from);
            let mut word = dice.below(usize::MAX) as u64 | 1;
            for _ in 0..more {
                word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                bytes.push((word >> 56) as u8);
            }
            (format!("{more} bytes of garbage after {from}"), bytes)
        }
        _ => {
            for _ in 0..4 {
                let at = dice.below(n);
                bytes[at] = dice.below(256) as u8;
            }
            ("four bytes".into(), bytes)
        }
    }
}
