//! A small classifier that the project trains itself: it says of which class a sample is, and its
//! penultimate layer gives features for distances between sets of images.
//!
//! ```text
//! h      = the last rectified layer of the network
//! logits = W h + b
//! L      = −(1/B) Σᵢ log softmax(logitsᵢ)[yᵢ]
//! ```
//!
//! It learns from training images only, each shifted, turned and zoomed a little at random, with
//! the trainer and optimiser of every other model. Images without classes are turned by quarters
//! instead, and the number of quarters is what it learns to tell (Gidaris et al. 2018, "Unsupervised
//! representation learning by predicting image rotations"): features then say what is where, but
//! there is no class to be right about.

mod augment;
mod network;

pub use network::Architecture;

use crate::data::Dataset;
use crate::from_nn;
use augment::Moved;
use candle_core::{D, DType, Device, Tensor};
use diffusion_core::train::{
    AdamWConfig, Cancel, EmaRule, LrSchedule, Quiet, TrainConfig, Trainer,
};
use diffusion_core::{Error, Report, Result};
use diffusion_nn::{Scope, Store};
use network::{Fit, Layers, Sizes};

/// How the classifier is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierConfig {
    /// The network.
    pub architecture: Architecture,
    /// The number of features.
    pub features: usize,
    /// Passes over the training images.
    pub epochs: usize,
    /// Images a step.
    pub batch: usize,
    /// The first learning rate.
    pub learning_rate: f64,
    /// Pull of the weights towards 0.
    pub weight_decay: f64,
    /// Training images are shifted by at most this many pixels along each axis.
    pub shift: f64,
    /// They are turned by at most this many degrees either way.
    pub rotation: f64,
    /// They are magnified or shrunk by at most this share.
    pub zoom: f64,
    /// Of initialisation, order and moves.
    pub seed: u64,
}

/// For the built-in digits; [`ClassifierConfig::fitted`] suits any images.
impl Default for ClassifierConfig {
    fn default() -> Self {
        Self {
            architecture: Architecture::Dense { hidden: 256 },
            features: 64,
            epochs: 100,
            batch: 64,
            learning_rate: 2e-3,
            weight_decay: 0.05,
            shift: 0.6,
            rotation: 12.0,
            zoom: 0.1,
            seed: 0,
        }
    }
}

impl ClassifierConfig {
    /// What suits these images: dense layers up to 16×16 pixels, convolutions above, and tens
    /// of thousands of images seen in training.
    pub fn fitted(data: &Dataset) -> Self {
        let side = data.height().max(data.width());
        let passes = |images: usize| (images / data.len().max(1)).clamp(4, 100);
        if side <= 16 {
            return Self {
                epochs: passes(144_000),
                ..Self::default()
            };
        }
        Self {
            architecture: Architecture::Convolutional { channels: 16 },
            epochs: passes(40_000),
            shift: 0.06 * side as f64,
            ..Self::default()
        }
    }

    fn check(&self) -> Result<()> {
        let bad = |field: &str, value: String, expected: &str| {
            Err(Report::new(format!("classifier: {field}"), value)
                .expected(expected)
                .config())
        };
        let width = match self.architecture {
            Architecture::Dense { hidden } => ("hidden", hidden),
            Architecture::Convolutional { channels } => ("channels", channels),
        };
        for (field, value) in [
            width,
            ("features", self.features),
            ("epochs", self.epochs),
            ("batch", self.batch),
        ] {
            if value == 0 {
                return bad(field, value.to_string(), "at least 1");
            }
        }
        if !(self.learning_rate > 0.0 && self.learning_rate.is_finite()) {
            return bad(
                "learning_rate",
                self.learning_rate.to_string(),
                "a positive number",
            );
        }
        if !(0.0..1.0).contains(&self.weight_decay) {
            return bad(
                "weight_decay",
                self.weight_decay.to_string(),
                "0 to below 1",
            );
        }
        for (field, value, most) in [
            ("shift", self.shift, 1000.0),
            ("rotation", self.rotation, 180.0),
            ("zoom", self.zoom, 0.9),
        ] {
            if !(0.0..=most).contains(&value) {
                return bad(field, value.to_string(), &format!("0 to {most}"));
            }
        }
        Ok(())
    }
}

/// What the classifier learns to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    /// The class of an image.
    Classes,
    /// By how many of so many turns the image was turned: 4 quarters, or 2 halves unless it is square.
    Turns(u32),
}

impl Task {
    fn of(data: &Dataset) -> Self {
        if data.labels().is_some() && data.classes().len() >= 2 {
            Self::Classes
        } else if data.height() == data.width() {
            Self::Turns(4)
        } else {
            Self::Turns(2)
        }
    }
}

fn no_labels(data: &Dataset) -> Error {
    Report::new(data.name(), "no labels")
        .expected("labels of at least two classes")
        .config()
}

/// A trained classifier.
#[derive(Debug)]
pub struct Classifier {
    shape: (usize, usize, usize),
    features: usize,
    /// Empty when it was trained on turns.
    classes: Vec<String>,
    layers: Layers,
}

/// How many images pass through the network at a time.
const CHUNK: usize = 512;

impl Classifier {
    /// Trains on all images of `train`, on the CPU. The result is a function of the images and
    /// the configuration, bit for bit.
    ///
    /// # Errors
    /// A bad configuration; a loss that leaves the finite numbers.
    pub fn train(train: &Dataset, config: &ClassifierConfig) -> Result<Self> {
        config.check()?;
        let task = Task::of(train);
        let classes = match task {
            Task::Classes => train.classes().to_vec(),
            Task::Turns(_) => Vec::new(),
        };
        let sizes = Sizes {
            shape: (train.channels(), train.height(), train.width()),
            features: config.features,
            classes: match task {
                Task::Classes => classes.len(),
                Task::Turns(turns) => turns as usize,
            },
        };
        let store = Store::new(config.seed, DType::F32, &Device::Cpu);
        let build = |scope: &Scope| Layers::new(scope, config.architecture, sizes);
        let mut fit = Fit {
            layers: build(&store.root()).map_err(from_nn)?,
        };
        let steps = (train.len().div_ceil(config.batch) * config.epochs) as u64;
        let schedule = TrainConfig {
            steps,
            batch_size: config.batch,
            lr: config.learning_rate,
            schedule: LrSchedule::CosineToFloor {
                warmup: steps / 50,
                floor: 0.0,
            },
            adamw: AdamWConfig {
                weight_decay: config.weight_decay,
                ..AdamWConfig::default()
            },
            ema: EmaRule::Off {},
            seed: config.seed,
            ..TrainConfig::default()
        };
        let source = Moved {
            data: train,
            task,
            config,
        };
        let mut trainer = Trainer::new(store.named(), schedule.check()?)?;
        trainer.run(&mut fit, &source, &mut Quiet, &Cancel::new())?;
        let frozen = store.frozen().map_err(from_nn)?;
        let layers = Store::serve(&frozen, DType::F32, &Device::Cpu, build).map_err(from_nn)?;
        Ok(Self {
            shape: sizes.shape,
            features: sizes.features,
            classes,
            layers,
        })
    }

    /// The names of the classes, in the order of the logits; none when it was trained on images
    /// without classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The number of features.
    pub fn feature_size(&self) -> usize {
        self.features
    }

    /// The features of images: the last rectified layer.
    ///
    /// # Shapes
    /// `[B, C, H, W]` in `[-1, 1]` to `[B, features]`, on the CPU in f32.
    ///
    /// # Errors
    /// Images of another shape than those trained on.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.in_chunks(images, Layers::features)
    }

    /// The logits of images: of their classes, or of their turns.
    ///
    /// # Shapes
    /// `[B, C, H, W]` in `[-1, 1]` to `[B, classes]`, on the CPU in f32.
    ///
    /// # Errors
    /// Those of [`Classifier::features`].
    pub fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.in_chunks(images, Layers::logits)
    }

    /// The most probable class of each image.
    ///
    /// # Errors
    /// Those of [`Classifier::features`].
    pub fn predict(&self, images: &Tensor) -> Result<Vec<u32>> {
        Ok(self.logits(images)?.argmax(D::Minus1)?.to_vec1()?)
    }

    /// The share of images whose most probable class is their label.
    ///
    /// # Errors
    /// Those of [`Classifier::features`]; labels of another number; a classifier without classes.
    pub fn accuracy(&self, images: &Tensor, labels: &[u32]) -> Result<f64> {
        if self.classes.is_empty() {
            return Err(Report::new("classifier", "trained without classes")
                .expected("images with classes to train on")
                .config());
        }
        let predicted = self.predict(images)?;
        if predicted.len() != labels.len() {
            return Err(
                Report::new("classifier", format!("{} labels", labels.len()))
                    .expected(format!("{}, one an image", predicted.len()))
                    .config(),
            );
        }
        let right = predicted.iter().zip(labels).filter(|(a, b)| a == b).count();
        Ok(right as f64 / labels.len() as f64)
    }

    fn in_chunks(
        &self,
        images: &Tensor,
        pass: impl Fn(&Layers, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (c, h, w) = self.shape;
        let count = match images.dims() {
            [count, rest @ ..] if *count > 0 && *rest == [c, h, w] => *count,
            dims => {
                return Err(Report::new("classifier", format!("images {dims:?}"))
                    .expected(format!("[B, {c}, {h}, {w}] as trained on"))
                    .config());
            }
        };
        let images = images
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F32)?
            .detach();
        let outputs = (0..count).step_by(CHUNK).map(|start| {
            pass(
                &self.layers,
                &images.narrow(0, start, CHUNK.min(count - start))?,
            )
        });
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&outputs, 0)?)
    }
}

#[cfg(test)]
mod tests;
