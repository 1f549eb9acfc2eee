//! Whether samples repeat training images.

use super::features::Features;
use diffusion_core::{Report, Result};

/// Distances from samples to their nearest training images, beside those of held-out images.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Memorisation {
    /// The median distance of a sample to the nearest training image.
    pub samples: f64,
    /// The median distance of a held-out image to the nearest training image.
    pub held_out: f64,
    /// The first over the second: about 1 for samples as new as held-out images, near 0 for copies.
    pub ratio: f64,
    /// The share of samples that are nearer to a training image than 99 % of held-out images are.
    pub suspicious: f64,
    /// The nearest training image of each sample.
    #[serde(skip)]
    pub nearest: Vec<usize>,
}

/// Compares Euclidean distances, in pixels or in features.
///
/// ```text
/// d(x) = min over training images t of ‖x − t‖        ratio = median d(sample) / median d(held out)
/// ```
///
/// # Errors
/// `Config` when the vectors differ in length, `Numeric` when half of the held-out images are copies
/// of training images, so that there is nothing to compare with.
pub fn memorisation(
    train: &Features,
    held_out: &Features,
    samples: &Features,
) -> Result<Memorisation> {
    train.must_match(held_out)?;
    train.must_match(samples)?;
    let distances = |set: &Features| -> (Vec<f64>, Vec<usize>) {
        let near = set.nearest(train, 1, false);
        near.iter().map(|n| (n[0].0.sqrt(), n[0].1)).unzip()
    };
    let (own, nearest) = distances(samples);
    let mut usual = distances(held_out).0;
    usual.sort_by(f64::total_cmp);
    let limit = quantile(&usual, 0.01);
    let suspicious = own.iter().filter(|d| **d < limit).count() as f64 / own.len() as f64;
    let mut sorted = own;
    sorted.sort_by(f64::total_cmp);
    let (a, b) = (quantile(&sorted, 0.5), quantile(&usual, 0.5));
    if b == 0.0 {
        return Err(
            Report::new("held-out images", "half of them are training images")
                .expected("images that the model did not see")
                .remedy("split the data so that equal images fall on one side")
                .numeric(),
        );
    }
    Ok(Memorisation {
        samples: a,
        held_out: b,
        ratio: a / b,
        suspicious,
        nearest,
    })
}

/// A quantile of sorted values, linear between them.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - at.floor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(values: &[f64]) -> Features {
        Features::new(values.to_vec(), 1).unwrap()
    }

    #[test]
    fn copies_and_new_images_by_hand() {
        let train = line(&[0.0, 10.0, 20.0]);
        let held_out = line(&[1.0, 12.0, 17.0]);
        let m = memorisation(&train, &held_out, &line(&[2.0, 14.0, 26.0])).unwrap();
        assert_eq!((m.samples, m.held_out, m.ratio), (4.0, 2.0, 2.0));
        assert_eq!((m.suspicious, m.nearest), (0.0, vec![0, 1, 2]));
        let m = memorisation(&train, &held_out, &line(&[0.0, 10.0, 13.0])).unwrap();
        assert_eq!((m.ratio, m.suspicious), (0.0, 2.0 / 3.0));
        let error = memorisation(&train, &train, &held_out).unwrap_err();
        assert!(error.to_string().contains("training images"), "{error}");
    }

    #[test]
    fn quantiles_are_linear_between_values() {
        let values = [1.0, 2.0, 4.0];
        for (q, expected) in [(0.0, 1.0), (0.25, 1.5), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)] {
            assert_eq!(quantile(&values, q), expected);
        }
    }
}
