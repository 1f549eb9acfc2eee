//! Division of a data set into training and test images.
//!
//! | rule | which images are for testing | used for |
//! |---|---|---|
//! | [`Dataset::split`] | those whose index is 4 modulo 5 | `digits`, IDX files |
//! | [`Dataset::split_in_classes`] | the same among the images of each class | `mnist`, `emoji` |
//! | [`Dataset::split_by_hash`] | those whose pixels hash to a small number | folders, CIFAR-10, `.npz` |
//!
//! None of them draws random numbers: a source is divided in the same way in every run.

use super::Dataset;
use diffusion_core::{Report, Result};
use std::collections::BTreeSet;

/// The share of the images that [`super::splits`] holds out by hash.
pub const TEST_SHARE: f64 = 0.2;

/// The number of an image of integers: the first 8 bytes of its BLAKE3, little-endian.
pub(super) fn hash_levels(image: &[u8]) -> u64 {
    number(blake3::hash(image))
}

/// The number of an image of real values.
pub(super) fn hash_reals(image: &[f32]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for value in image {
        // Adding 0 makes one number of -0 and 0, which are equal pixels.
        hasher.update(&(value + 0.0).to_le_bytes());
    }
    number(hasher.finalize())
}

fn number(hash: blake3::Hash) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(word)
}

impl Dataset {
    /// The fixed split into training and test images: image `i` is for testing if `i mod 5 = 4`.
    ///
    /// # Errors
    /// Fewer than 5 images.
    pub fn split(&self) -> Result<(Dataset, Dataset)> {
        self.divide((0..self.len()).map(|i| i % 5 == 4))
    }

    /// The fixed split inside each class: of the images of a class, in order, the `k`-th is for
    /// testing if `k mod 5 = 4`, `k` from 0. Without labels this is [`Dataset::split`].
    ///
    /// # Errors
    /// No class of at least 5 images.
    pub fn split_in_classes(&self) -> Result<(Dataset, Dataset)> {
        let Some(labels) = self.labels() else {
            return self.split();
        };
        let mut seen = vec![0usize; self.classes().len()];
        self.divide(labels.iter().map(|&label| {
            let place = &mut seen[label as usize];
            *place += 1;
            place.is_multiple_of(5)
        }))
    }

    /// Two halves with the same share of each class: the images of a class go to one and the other in
    /// turn, the first of an even class to the first half.
    ///
    /// # Errors
    /// Fewer than two images.
    pub fn halves(&self) -> Result<(Dataset, Dataset)> {
        let mut seen = vec![0usize; self.classes().len().max(1)];
        let side = |i: usize| {
            let label = self.labels().map_or(0, |labels| labels[i] as usize);
            let place = &mut seen[label];
            *place += 1;
            (*place + label).is_multiple_of(2)
        };
        self.divide((0..self.len()).map(side))
    }

    /// A split that depends on nothing but the pixels of each image.
    ///
    /// ```text
    /// test ⇔ u < s,   u = h / 2⁶⁴,   h = the first 8 bytes of BLAKE3(pixels), little-endian
    /// ```
    ///
    /// Equal images fall on the same side, so that none is both learnt and tested; neither the
    /// order of the files nor their names matter; an image keeps its side when others are added.
    /// The share `s` is met on average. A side that would be empty gets the image with the
    /// smallest (testing) or the largest (training) number, and its duplicates.
    ///
    /// # Errors
    /// A share outside `(0, 1)`; fewer than two different images.
    pub fn split_by_hash(&self, test_share: f64) -> Result<(Dataset, Dataset)> {
        if !(test_share > 0.0 && test_share < 1.0) {
            return Err(Report::new("test_share", test_share)
                .expected("a number between 0 and 1, both excluded")
                .remedy("try 0.2")
                .config());
        }
        let hashes = self.hashes();
        let different: BTreeSet<u64> = hashes.iter().copied().collect();
        let (Some(&least), Some(&most)) = (different.first(), different.last()) else {
            return Err(self.too_few("no images"));
        };
        if least == most {
            return Err(self.too_few(match self.len() {
                1 => "one image",
                _ => "all images are equal",
            }));
        }
        // 2⁶⁴ s, rounded down; below 2⁶⁴ because s < 1 in double precision.
        let bound = (test_share * 2f64.powi(64)) as u64;
        let bound = bound.clamp(least.saturating_add(1), most);
        self.divide(hashes.iter().map(|&hash| hash < bound))
    }

    fn divide(&self, for_test: impl Iterator<Item = bool>) -> Result<(Dataset, Dataset)> {
        let mut sides = (Vec::new(), Vec::new());
        for (item, test) in for_test.enumerate() {
            if test {
                sides.1.push(item);
            } else {
                sides.0.push(item);
            }
        }
        if sides.0.is_empty() || sides.1.is_empty() {
            return Err(self.too_few(&format!("{} images", self.len())));
        }
        Ok((self.select(&sides.0)?, self.select(&sides.1)?))
    }

    fn too_few(&self, found: &str) -> diffusion_core::Error {
        let enough = match self.len() {
            5.. => "different images",
            _ => "at least 5 different images",
        };
        Report::new(self.name(), found)
            .expected(format!(
                "{enough}, of which about every fifth is held out for testing"
            ))
            .remedy("add images")
            .input()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Labels, Pixels};
    use super::*;

    fn toy(values: Vec<u8>) -> Dataset {
        Dataset::new("toy", (1, 1, 1), Pixels::Levels { values, max: 255 }, None).unwrap()
    }

    fn values(data: &Dataset) -> Vec<u8> {
        match data.pixels() {
            Pixels::Levels { values, .. } => values,
            Pixels::Real(_) => Vec::new(),
        }
    }

    #[test]
    fn halves_have_the_same_classes_even_where_classes_alternate() {
        let labels = Labels {
            values: (0..22).map(|i| i % 2).collect(),
            classes: vec!["a".into(), "b".into()],
        };
        let pixels = Pixels::Levels {
            values: (0..22).collect(),
            max: 255,
        };
        let data = Dataset::new("toy", (1, 1, 1), pixels, Some(labels)).unwrap();
        let (a, b) = data.halves().unwrap();
        let count =
            |d: &Dataset, class| d.labels().unwrap().iter().filter(|l| **l == class).count();
        assert_eq!((count(&a, 0), count(&a, 1)), (6, 5));
        assert_eq!((count(&b, 0), count(&b, 1)), (5, 6));
        let (a, b) = toy(vec![1, 2, 3]).halves().unwrap();
        assert_eq!((a.len(), b.len()), (2, 1));
        assert!(toy(vec![1]).halves().is_err());
    }

    #[test]
    fn equal_images_share_a_side_whatever_the_order() {
        let all: Vec<u8> = (0..=255).chain(0..=255).chain(10..=20).collect();
        let (train, test) = toy(all.clone()).split_by_hash(0.2).unwrap();
        let (a, b) = (values(&train), values(&test));
        assert_eq!(a.len() + b.len(), all.len());
        assert!(a.iter().all(|v| !b.contains(v)));
        // 256 coins of probability 1/5: mean 51.2, deviation 6.4.
        let different: BTreeSet<u8> = b.iter().copied().collect();
        assert!((30..75).contains(&different.len()), "{}", different.len());
        let backwards: Vec<u8> = all.iter().rev().copied().collect();
        let (_, again) = toy(backwards).split_by_hash(0.2).unwrap();
        let mut again = values(&again);
        again.reverse();
        assert_eq!(again, b);
        // Fewer images: those that are left keep their sides.
        let (_, few) = toy((0..100).collect()).split_by_hash(0.2).unwrap();
        let expected: Vec<u8> = (0..100).filter(|v| different.contains(v)).collect();
        assert_eq!(values(&few), expected);
    }

    #[test]
    fn both_sides_have_images_and_a_larger_share_keeps_the_smaller_one() {
        for share in [1e-12, 0.5, 1.0 - 1e-12] {
            for n in 2..6 {
                let (train, test) = toy((0..n).collect()).split_by_hash(share).unwrap();
                assert_eq!(train.len() + test.len(), usize::from(n));
            }
        }
        let test = |share| values(&toy((0..=255).collect()).split_by_hash(share).unwrap().1);
        let (few, many) = (test(0.1), test(0.4));
        assert!(few.len() < many.len() && few.iter().all(|v| many.contains(v)));
        for share in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(toy(vec![1, 2]).split_by_hash(share).is_err(), "{share}");
        }
        let message = toy(vec![7; 9]).split_by_hash(0.2).unwrap_err().to_string();
        assert!(message.contains("all images are equal"), "{message}");
    }

    #[test]
    fn real_pixels_are_hashed_by_value() {
        let real = |values| Dataset::new("real", (1, 1, 1), Pixels::Real(values), None).unwrap();
        let data = real(vec![0.0, -0.0, 0.5, 0.5, -1.0]);
        let hashes = data.hashes();
        assert!(hashes[0] == hashes[1] && hashes[2] == hashes[3]);
        assert!(hashes[0] != hashes[2] && hashes[2] != hashes[4]);
    }

    #[test]
    fn classes_are_divided_one_by_one() {
        let labels = Labels {
            values: (0..12).map(|i| u32::from(i >= 6)).collect(),
            classes: vec!["a".into(), "b".into()],
        };
        let pixels = Pixels::Levels {
            values: (0..12).collect(),
            max: 255,
        };
        let data = Dataset::new("toy", (1, 1, 1), pixels, Some(labels)).unwrap();
        let (train, test) = data.split_in_classes().unwrap();
        assert_eq!(values(&test), [4, 10]);
        assert_eq!(train.len(), 10);
        assert!(
            data.select(&[0, 1, 2, 6, 7])
                .unwrap()
                .split_in_classes()
                .is_err()
        );
        assert_eq!(
            values(&toy((0..9).collect()).split_in_classes().unwrap().1),
            [4]
        );
    }
}
