//! Normal values against the formula, one value at a time, by `libm`.

use super::*;
use crate::gradcheck::at_every_level;
use crate::rng::{Key, stream};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_PI_2};

/// A generator that repeats the given words.
struct Words<'a>(std::iter::Cycle<std::slice::Iter<'a, u64>>);

impl<'a> Words<'a> {
    fn new(words: &'a [u64]) -> Self {
        Self(words.iter().cycle())
    }
}

impl RngCore for Words<'_> {
    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }

    fn next_u64(&mut self) -> u64 {
        *self.0.next().unwrap()
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        for bytes in bytes.as_chunks_mut::<8>().0 {
            *bytes = self.next_u64().to_le_bytes();
        }
    }
}

/// The definition: one pair after the other, by `libm`.
fn defined(words: &[u64]) -> Vec<u64> {
    let unit = |word: u64| (word >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
    let (pairs, _) = words.as_chunks::<2>();
    let values = pairs.iter().flat_map(|[first, second]| {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - unit(*first)));
        let (sin, cos) = libm::sincos(TAU * unit(*second));
        [(radius * cos).to_bits(), (radius * sin).to_bits()]
    });
    values.collect()
}

fn filled(words: &[u64]) -> Vec<u64> {
    let mut values = vec![f64::NAN; words.len()];
    fill(Words::new(words), &mut values, |z| z);
    values.iter().map(|z| z.to_bits()).collect()
}

/// The word that gives the uniform value nearest to `u`, moved by steps of 2⁻⁵³.
fn word(u: f64, steps: i64) -> u64 {
    let whole = (u * (1u64 << 53) as f64) as i64 + steps;
    (whole.clamp(0, (1 << 53) - 1) as u64) << 11
}

/// Distances of all sizes, to both sides.
fn distances() -> impl Iterator<Item = i64> {
    (0..53).flat_map(|k| [-(1i64 << k) - 1, -(1i64 << k), 0, 1 << k, (1 << k) + 1])
}

#[test]
fn ten_million_values_are_those_of_libm() {
    const KEYS: u64 = 1_000;
    const VALUES: usize = 10_000;
    at_every_level(|level| {
        for i in 0..KEYS {
            let key = Key::new(i, stream::TEST).item(i * i).step(7 * i);
            let bits: Vec<u64> = key.normal(VALUES).iter().map(|z| z.to_bits()).collect();
            assert!(bits == defined(&key.words(VALUES)), "key {i}, {level:?}");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn picked_words_give_the_values_of_libm() {
    let mut firsts = vec![0, 1, u64::MAX, u64::MAX - (1 << 11), 1 << 11, 1 << 63];
    for argument in [1.0, FRAC_1_SQRT_2, 0.5, 0.5 * FRAC_1_SQRT_2, 0.25, 0.0] {
        firsts.extend(distances().map(|d| word(1.0 - argument, d)));
    }
    let mut seconds = vec![0, 1, u64::MAX, u64::MAX - (1 << 11), 1 << 11, 1 << 63];
    for eighth in 0..=8 {
        let u = f64::from(eighth) / 8.0;
        seconds.extend(distances().map(|d| word(u, d)));
        // Where angles begin and cease to be rare.
        for edge in [2f64.powi(-14), 2f64.powi(-16), 2f64.powi(-18)] {
            for side in [-1.0, 1.0] {
                seconds.extend((-300..300).map(|d| word(u + side * edge / TAU, d << 20)));
                seconds.extend((-300..300).map(|d| word(u + side * edge / TAU, d)));
            }
        }
    }
    // Every angle with a few radii, every radius with a few angles.
    let mut words = Vec::new();
    for (i, second) in seconds.iter().enumerate() {
        words.extend([firsts[i % firsts.len()], *second, 1 << 62, *second]);
    }
    for (i, first) in firsts.iter().enumerate() {
        words.extend([*first, seconds[i % seconds.len()], *first, 1 << 60]);
    }
    let expected = defined(&words);
    at_every_level(|level| {
        for (i, (ours, theirs)) in filled(&words).iter().zip(&expected).enumerate() {
            let pair = &words[i / 2 * 2..][..2];
            assert_eq!(ours, theirs, "{pair:x?}, value {}, {level:?}", i % 2);
        }
        Ok(())
    })
    .unwrap();
}

/// The angles for which the branch-free functions vouch must be right; few may be left to `libm`.
#[test]
fn angles_near_the_bounds_are_told_apart() {
    let mut rare = 0;
    let angles = 2_000_000;
    let check = |x: f64| {
        let (sin, cos, left) = sincos(x);
        if !left {
            let (s, c) = libm::sincos(x);
            assert_eq!(
                (sin.to_bits(), cos.to_bits()),
                (s.to_bits(), c.to_bits()),
                "{x:e}"
            );
        }
        left
    };
    for u in Key::new(3, stream::TEST).uniform(angles) {
        rare += usize::from(check(TAU * u));
        // All of them within 2⁻¹³ of a multiple of π/4.
        let multiple = (8.0 * u).round() * 0.5 * FRAC_PI_2;
        check((multiple + (u * 1e4).fract() * 2f64.powi(-12) - 2f64.powi(-13)).clamp(0.0, TAU));
    }
    assert!(rare < angles / 5_000, "{rare}");
}

#[test]
fn every_length_begins_the_same_stream() {
    let key = Key::new(5, stream::TEST);
    let expected = defined(&key.words(302));
    at_every_level(|level| {
        for n in 0..=300 {
            let bits: Vec<u64> = key.normal(n).iter().map(|z| z.to_bits()).collect();
            assert_eq!(bits, expected[..n], "{n}, {level:?}");
            let mut narrow = vec![f32::NAN; n];
            key.fill_normal_f32(&mut narrow);
            for (narrow, bits) in narrow.iter().zip(&expected) {
                let rounded = f64::from_bits(*bits) as f32;
                assert_eq!(narrow.to_bits(), rounded.to_bits(), "{n}, {level:?}");
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn uniform_values_are_the_upper_53_bits() {
    let picked = [0, 1, 1 << 10, 1 << 11, 1 << 31, 1 << 32, 1 << 43, u64::MAX];
    let drawn = Key::new(6, stream::TEST).words(100_000);
    for word in picked.into_iter().chain(drawn) {
        let expected = (word >> 11) as f64 / (1u64 << 53) as f64;
        assert_eq!(unit(word).to_bits(), expected.to_bits(), "{word:x}");
    }
}
