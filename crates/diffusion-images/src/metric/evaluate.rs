//! All figures about a set of samples, in one call.

use super::classifier::Classifier;
use super::features::Features;
use super::frechet::{Moments, frechet};
use super::inception::Inception;
use super::interval::{Figure, bootstrap, share};
use super::kernel::{KernelDistance, kernel_distance};
use super::manifold::{Manifold, manifold};
use super::memorise::{Known, Memorisation};
use crate::data::Dataset;
use candle_core::{DType, Device, Tensor};
use diffusion_core::Result;
use std::fmt;

/// Draws of a bootstrap interval; each takes the eigenvalues of a covariance.
const ROUNDS: usize = 100;
/// Subsets of the kernel distance, and the images of each.
const SUBSETS: (usize, usize) = (50, 200);

/// Features beyond which a Fréchet distance takes seconds, so that it is not resampled.
const MANY: usize = 256;

/// What images are looked at with.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// The features of a classifier of the project, divided by their root mean square over the held-out
    /// images: another classifier's have another scale, and distances would have it too.
    Classifier(&'a Classifier),
    /// The 2048 features of an Inception network as they are, so that the Fréchet distance is FID.
    Inception(&'a Inception),
}

impl View<'_> {
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            View::Classifier(network) => network.features(images),
            View::Inception(network) => network.features(images),
        }
    }
}

/// What is known about a set of samples. Every figure but the memorisation compares with images that
/// neither the model nor the classifier has seen.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Evaluation {
    /// How many samples.
    pub samples: usize,
    /// How many held-out images.
    pub held_out: usize,
    /// Fréchet distance in the features; the interval is not a number (null in JSON) where there are
    /// too many of them to resample.
    pub frechet: Figure,
    /// Kernel distance in the features.
    pub kernel: KernelDistance,
    /// Precision, recall, density, coverage in the features.
    pub manifold: Manifold,
    /// The share of samples that the classifier puts into the class that was asked for.
    pub accuracy: Option<Figure>,
    /// Nearest training images, in pixels.
    pub memorisation: Memorisation,
}

/// What samples are compared with: features of held-out images are computed once.
pub struct Judge<'a> {
    classifier: &'a Classifier,
    view: View<'a>,
    scale: f64,
    held_out: Features,
    moments: Moments,
    known: Known<'a>,
}

impl<'a> Judge<'a> {
    /// A judge with a classifier that was trained on `train`.
    ///
    /// # Errors
    /// Images of another shape than the classifier's; fewer than two held-out images.
    pub fn new(classifier: &'a Classifier, train: &'a Dataset, held_out: &Dataset) -> Result<Self> {
        Self::with_view(View::Classifier(classifier), classifier, train, held_out)
    }

    /// A judge whose distances are those of a view; the classifier says of which class samples are.
    ///
    /// # Errors
    /// Those of [`Judge::new`].
    pub fn with_view(
        view: View<'a>,
        classifier: &'a Classifier,
        train: &'a Dataset,
        held_out: &Dataset,
    ) -> Result<Self> {
        let (images, _) = held_out.all(&Device::Cpu)?;
        let features = view.features(&images)?;
        let scale = match view {
            View::Classifier(_) => {
                let square = features.sqr()?.mean_all()?.to_dtype(DType::F64)?;
                square.to_scalar::<f64>()?.sqrt().max(f64::MIN_POSITIVE)
            }
            View::Inception(_) => 1.0,
        };
        let held_out = Features::from_tensor(&(features / scale)?)?;
        Ok(Self {
            classifier,
            view,
            scale,
            moments: Moments::of(&held_out)?,
            held_out,
            known: Known::new(train, &Features::from_tensor(&images)?)?,
        })
    }

    /// The classifier.
    pub fn classifier(&self) -> &Classifier {
        self.classifier
    }

    /// All figures of samples, with the classes asked for where there are any.
    ///
    /// # Shapes
    /// `samples [n, C, H, W]` in `[−1, 1]`, one label each.
    ///
    /// # Errors
    /// Other shapes; values that are not finite; fewer than six samples.
    pub fn evaluate(
        &self,
        samples: &Tensor,
        labels: Option<&[u32]>,
        seed: u64,
    ) -> Result<Evaluation> {
        let features = (self.view.features(samples)? / self.scale)?;
        let features = Features::from_tensor(&features)?;
        let manifold = manifold(&self.held_out, &features)?;
        let distance =
            |items: &[usize]| frechet(&Moments::of(&features.select(items)?)?, &self.moments);
        let (subsets, most) = SUBSETS;
        // At most half of the images, or all subsets would be the same one.
        let size = most.min(features.len().min(self.held_out.len()) / 2).max(2);
        let accuracy = match labels {
            Some(labels) if !self.classifier.classes().is_empty() => {
                let n = labels.len();
                let right = self.classifier.accuracy(samples, labels)? * n as f64;
                Some(share(right.round() as usize, n)?)
            }
            _ => None,
        };
        let pixels = Features::from_tensor(samples)?;
        Ok(Evaluation {
            samples: features.len(),
            held_out: self.held_out.len(),
            frechet: if features.size() <= MANY {
                let Figure { value, low, high } =
                    bootstrap(features.len(), ROUNDS, seed, distance)?;
                let low = low.max(0.0);
                Figure { value, low, high }
            } else {
                let value = frechet(&Moments::of(&features)?, &self.moments)?;
                Figure {
                    value,
                    low: f64::NAN,
                    high: f64::NAN,
                }
            },
            kernel: kernel_distance(&self.held_out, &features, subsets, size, seed)?,
            manifold,
            accuracy,
            memorisation: self.known.memorisation(&pixels)?,
        })
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figure = |f: &Figure| match f.low.is_nan() {
            true => format!("{:.3}", f.value),
            false => format!("{:.3}  [{:.3}, {:.3}]", f.value, f.low, f.high),
        };
        let Memorisation {
            ratio,
            samples,
            held_out,
            suspicious,
            ..
        } = &self.memorisation;
        let mut rows = vec![
            (
                "samples",
                format!("{}, held-out images {}", self.samples, self.held_out),
            ),
            ("Fréchet distance", figure(&self.frechet)),
            (
                "kernel distance",
                format!("{:.4} ± {:.4}", self.kernel.mean, self.kernel.std),
            ),
            ("precision", format!("{:.3}", self.manifold.precision)),
            ("recall", format!("{:.3}", self.manifold.recall)),
            ("density", format!("{:.3}", self.manifold.density)),
            ("coverage", format!("{:.3}", self.manifold.coverage)),
        ];
        if let Some(accuracy) = &self.accuracy {
            rows.push(("labelled as asked", figure(accuracy)));
        }
        rows.push((
            "nearest training image",
            format!("{samples:.3}, held-out images {held_out:.3}, ratio {ratio:.3}"),
        ));
        rows.push(("suspiciously near", format!("{:.1} %", 100.0 * suspicious)));
        for (name, value) in rows {
            writeln!(f, "  {name:<24}{value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits;
    use crate::metric::ClassifierConfig;

    #[test]
    fn real_images_copies_and_noise_are_told_apart() {
        let (train, test) = digits::load().unwrap().split().unwrap();
        let config = ClassifierConfig {
            epochs: 20,
            ..ClassifierConfig::default()
        };
        let classifier = Classifier::train(&train, &config).unwrap();
        let half = test.len() / 2;
        let items = |of: std::ops::Range<usize>| test.select(&of.collect::<Vec<_>>()).unwrap();
        let (real, other) = (items(0..half), items(half..test.len()));
        let judge = Judge::new(&classifier, &train, &real).unwrap();

        let (images, _) = other.all(&Device::Cpu).unwrap();
        let floor = judge.evaluate(&images, other.labels(), 0).unwrap();
        let accuracy = floor.accuracy.unwrap();
        assert!(
            accuracy.value > 0.9 && accuracy.low < accuracy.value,
            "{floor:?}"
        );
        assert!((floor.memorisation.ratio - 1.0).abs() < 0.15, "{floor:?}");
        assert!(floor.manifold.coverage > 0.7, "{floor:?}");

        let copies: Vec<usize> = (0..half).collect();
        let (copies, _) = train.select(&copies).unwrap().all(&Device::Cpu).unwrap();
        let copied = judge.evaluate(&copies, None, 0).unwrap();
        assert_eq!(copied.memorisation.ratio, 0.0);
        assert_eq!(copied.memorisation.suspicious, 1.0);
        assert_eq!(copied.memorisation.nearest, (0..half).collect::<Vec<_>>());

        let noise = diffusion_ops::rng::Key::new(1, 0).uniform(half * 64);
        let noise: Vec<f32> = noise.into_iter().map(|u| (2.0 * u - 1.0) as f32).collect();
        let noise = Tensor::from_vec(noise, (half, 1, 8, 8), &Device::Cpu).unwrap();
        let bad = judge.evaluate(&noise, None, 0).unwrap();
        assert!(
            bad.frechet.low > 5.0 * floor.frechet.high,
            "{bad:?} {floor:?}"
        );
        assert!(
            bad.kernel.mean > 10.0 * floor.kernel.mean.abs(),
            "{bad:?} {floor:?}"
        );
        assert!(bad.manifold.coverage < 0.3, "{bad:?}");
        let text = bad.to_string();
        assert!(
            text.contains("Fréchet distance") && !text.contains("labelled"),
            "{text}"
        );
        let wrong = Tensor::zeros((9, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(judge.evaluate(&wrong, None, 0).is_err());
    }
}
