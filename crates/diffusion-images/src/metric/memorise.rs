//! Whether samples repeat training images.

use super::features::Features;
use crate::data::Dataset;
use candle_core::Device;
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

/// Training images looked at together.
const CHUNK: usize = 4096;

/// Training images, and how far held-out images are from them, in pixels.
#[derive(Clone, Debug)]
pub struct Known<'a> {
    train: &'a Dataset,
    /// Ascending.
    held_out: Vec<f64>,
}

impl<'a> Known<'a> {
    /// Takes the distances of the held-out images, once for all sets of samples.
    ///
    /// # Errors
    /// `Config` when the images differ in size, `Numeric` when half of the held-out images are
    /// copies of training images, so that there is nothing to compare with.
    pub fn new(train: &'a Dataset, held_out: &Features) -> Result<Self> {
        let (mut held_out, _) = nearest_image(train, held_out)?;
        held_out.sort_by(f64::total_cmp);
        if quantile(&held_out, 0.5) == 0.0 {
            return Err(
                Report::new("held-out images", "half of them are training images")
                    .expected("images that the model did not see")
                    .remedy("split the data so that equal images fall on one side")
                    .numeric(),
            );
        }
        Ok(Self { train, held_out })
    }

    /// Compares Euclidean distances between images in `[−1, 1]`.
    ///
    /// ```text
    /// d(x) = min over training images t of ‖x − t‖        ratio = median d(sample) / median d(held out)
    /// ```
    ///
    /// # Errors
    /// `Config` when the images differ in size.
    pub fn memorisation(&self, samples: &Features) -> Result<Memorisation> {
        let (own, nearest) = nearest_image(self.train, samples)?;
        let limit = quantile(&self.held_out, 0.01);
        let suspicious = own.iter().filter(|d| **d < limit).count() as f64 / own.len() as f64;
        let mut sorted = own;
        sorted.sort_by(f64::total_cmp);
        let (a, b) = (quantile(&sorted, 0.5), quantile(&self.held_out, 0.5));
        Ok(Memorisation {
            samples: a,
            held_out: b,
            ratio: a / b,
            suspicious,
            nearest,
        })
    }
}

/// The distance to the nearest image of a data set, and its index; the set passes through memory in
/// parts.
fn nearest_image(train: &Dataset, images: &Features) -> Result<(Vec<f64>, Vec<usize>)> {
    let mut best = vec![(f64::INFINITY, 0); images.len()];
    let all: Vec<usize> = (0..train.len()).collect();
    for items in all.chunks(CHUNK) {
        let part = Features::from_tensor(&train.batch(items, &Device::Cpu)?.0)?;
        for (best, (distance, i)) in best.iter_mut().zip(images.nearest_one(&part)?) {
            if distance < best.0 {
                *best = (distance, items[i]);
            }
        }
    }
    Ok(best.into_iter().unzip())
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
    use crate::data::Pixels;

    /// Images of one pixel, at these places in units of 1/32.
    fn line(places: &[f32]) -> (Dataset, Features) {
        let values: Vec<f32> = places.iter().map(|v| v / 32.0).collect();
        let wide = values.iter().map(|v| f64::from(*v)).collect();
        let data = Dataset::new("line", (1, 1, 1), Pixels::Real(values), None).unwrap();
        (data, Features::new(wide, 1).unwrap())
    }

    #[test]
    fn copies_and_new_images_by_hand() {
        let (train, itself) = line(&[0.0, 10.0, 20.0]);
        let (_, held_out) = line(&[1.0, 12.0, 17.0]);
        let known = Known::new(&train, &held_out).unwrap();
        let m = known.memorisation(&line(&[2.0, 14.0, 26.0]).1).unwrap();
        assert_eq!(
            (32.0 * m.samples, 32.0 * m.held_out, m.ratio),
            (4.0, 2.0, 2.0)
        );
        assert_eq!((m.suspicious, m.nearest), (0.0, vec![0, 1, 2]));
        let m = known.memorisation(&line(&[0.0, 10.0, 13.0]).1).unwrap();
        assert_eq!((m.ratio, m.suspicious), (0.0, 2.0 / 3.0));
        let error = Known::new(&train, &itself).unwrap_err();
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
