//! Malformed files of every format that is read from outside, made from valid ones.
//!
//! What is made depends on the seed and nothing else. First come the files that somebody thought of
//! (bombs, absurd claims, names twice, deep nesting), then truncations, header bytes, lengths, flipped
//! bits, pieces left out or repeated, and garbage behind a sound beginning, until there are enough.

mod build;
mod images;
mod text;
mod weights;

use diffusion_ops::rng::{Key, stream};

use crate::targets::{Bench, Format};
pub use build::crc32;

/// A file that a reader is given.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The name of the file, as the reader would meet it.
    pub name: String,
    /// What was done to it.
    pub what: String,
    /// Its content.
    pub bytes: Vec<u8>,
    /// How much it genuinely unpacks to, where that is within the limits; else 0.
    pub unpacked: u64,
}

impl Sample {
    /// Bytes of memory that reading it may take: 64 MiB and twice what it holds.
    pub fn allowance(&self) -> u64 {
        (64 << 20) + 2 * self.unpacked.max(self.bytes.len() as u64)
    }
}

fn sample(name: &str, what: impl Into<String>, bytes: Vec<u8>) -> Sample {
    Sample {
        name: name.into(),
        what: what.into(),
        bytes,
        unpacked: 0,
    }
}

/// The valid files that the others are made from.
///
/// # Errors
/// When the files of the bench cannot be read.
pub fn seeds(format: Format, bench: &Bench) -> std::io::Result<Vec<Sample>> {
    let mut seeds = match format {
        Format::Png => images::png_seeds(),
        Format::Jpeg => images::jpeg_seeds(),
        Format::Idx => images::idx_seeds(),
        Format::Cifar => images::cifar_seeds(),
        Format::Npz => images::npz_seeds(),
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

/// At least `count` malformed files.
///
/// # Errors
/// When the files of the bench cannot be read.
pub fn files(
    format: Format,
    count: usize,
    seed: u64,
    bench: &Bench,
) -> std::io::Result<Vec<Sample>> {
    let seeds = seeds(format, bench)?;
    let mut files = match format {
        Format::Png => images::png_specials(),
        Format::Jpeg => images::jpeg_specials(&seeds),
        Format::Idx => images::idx_specials(),
        Format::Cifar => images::cifar_specials(),
        Format::Npz => images::npz_specials(),
        Format::Safetensors => weights::safetensors_specials(),
        Format::Pth => weights::pth_specials(),
        Format::Json | Format::Toml | Format::Manifest => text::specials(&seeds),
    };
    let textual = matches!(format, Format::Json | Format::Toml | Format::Manifest);
    let key = Key::new(seed, stream::TEST).item(format as u64);
    let mut number = 0;
    while files.len() < count {
        let origin = &seeds[number % seeds.len()];
        let mut dice = Dice(key.step(number as u64).words(16), 0);
        let (what, bytes) = if textual && dice.below(4) > 0 {
            text::mutate(&origin.bytes, &mut dice)
        } else {
            mutate(&origin.bytes, &mut dice)
        };
        number += 1;
        if bytes != origin.bytes {
            files.push(sample(
                &origin.name,
                format!("{}: {what}", origin.name),
                bytes,
            ));
        }
    }
    Ok(files)
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
