//! A small classifier that the project trains itself: it says of which class a sample is, and its
//! penultimate layer gives features for distances between sets of images.
//!
//! ```text
//! h₁ = relu(W₁ x + b₁),  h₂ = relu(W₂ h₁ + b₂),  logits = W₃ h₂ + b₃
//! L  = −(1/B) Σᵢ log softmax(logitsᵢ)[yᵢ]
//! ```
//!
//! It learns from training images only, each shifted, turned and zoomed a little at random, with
//! the trainer and optimiser of every other model. It is meant for images of digits' kind: small,
//! centred, one object on an even ground.

use crate::data::Dataset;
use crate::from_nn;
use candle_core::{D, DType, Device, Tensor};
use diffusion_core::train::{
    AdamWConfig, Cancel, EmaRule, Loss, LrSchedule, Objective, Quiet, Source, StepCtx, TrainConfig,
    Trainer,
};
use diffusion_core::{Report, Result};
use diffusion_nn::layer::Linear;
use diffusion_nn::{Scope, Store};
use diffusion_ops::rng::{Key, stream};

/// How the classifier is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierConfig {
    /// Width of the first layer.
    pub hidden: usize,
    /// Width of the second layer: the number of features.
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

impl Default for ClassifierConfig {
    fn default() -> Self {
        Self {
            hidden: 256,
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
    fn check(&self) -> Result<()> {
        let bad = |field: &str, value: String, expected: &str| {
            Err(Report::new(format!("classifier: {field}"), value)
                .expected(expected)
                .config())
        };
        for (field, value) in [
            ("hidden", self.hidden),
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

/// A trained classifier.
#[derive(Debug)]
pub struct Classifier {
    shape: (usize, usize, usize),
    classes: Vec<String>,
    layers: Layers,
}

/// How many images pass through the network at a time.
const CHUNK: usize = 4096;

impl Classifier {
    /// Trains on all images of `train`, on the CPU. The result is a function of the images and
    /// the configuration, bit for bit.
    ///
    /// # Errors
    /// Images without labels or of fewer than two classes; a bad configuration; a loss that
    /// leaves the finite numbers.
    pub fn train(train: &Dataset, config: &ClassifierConfig) -> Result<Self> {
        config.check()?;
        let Some(labels) = train.labels().filter(|_| train.classes().len() >= 2) else {
            return Err(
                Report::new(train.name(), format!("{} classes", train.classes().len()))
                    .expected("labels of at least two classes")
                    .remedy("give a data set with labels to train a classifier")
                    .config(),
            );
        };
        let (images, _) = train.all(&Device::Cpu)?;
        let pixels = images.flatten_all()?.to_vec1::<f32>()?;
        let shape = (train.channels(), train.height(), train.width());
        let sizes = [shape.0 * shape.1 * shape.2, config.hidden, config.features];
        let store = Store::new(config.seed, DType::F32, &Device::Cpu);
        let build = |scope: &Scope| Layers::new(scope, sizes, train.classes().len());
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
            pixels: &pixels,
            labels,
            shape,
            config,
        };
        let mut trainer = Trainer::new(store.named(), schedule.check()?)?;
        trainer.run(&mut fit, &source, &mut Quiet, &Cancel::new())?;
        let frozen = store.frozen().map_err(from_nn)?;
        let layers = Store::serve(&frozen, DType::F32, &Device::Cpu, build).map_err(from_nn)?;
        Ok(Self {
            shape,
            classes: train.classes().to_vec(),
            layers,
        })
    }

    /// The names of the classes, in the order of the logits.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The number of features.
    pub fn feature_size(&self) -> usize {
        self.layers.features
    }

    /// The features h₂ of images.
    ///
    /// # Shapes
    /// `[B, C, H, W]` in `[-1, 1]` to `[B, features]`, on the CPU in f32.
    ///
    /// # Errors
    /// Images of another shape than those trained on.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.in_chunks(images, Layers::features)
    }

    /// The logits of images.
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
    /// Those of [`Classifier::features`]; labels of another number.
    pub fn accuracy(&self, images: &Tensor, labels: &[u32]) -> Result<f64> {
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
        let images = images.reshape((count, c * h * w))?;
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

/// Two rectified layers and a linear one.
#[derive(Debug)]
struct Layers {
    layers: [Linear; 3],
    features: usize,
}

impl Layers {
    fn new(scope: &Scope, sizes: [usize; 3], classes: usize) -> diffusion_nn::Result<Self> {
        let layer = |i: usize, out| Linear::new(&scope.sub("layers").sub(i), sizes[i], out, true);
        let layers = [layer(0, sizes[1])?, layer(1, sizes[2])?, layer(2, classes)?];
        Ok(Self {
            layers,
            features: sizes[2],
        })
    }

    fn features(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.layers[0].forward(x).map_err(from_nn)?.relu()?;
        Ok(self.layers[1].forward(&hidden).map_err(from_nn)?.relu()?)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.layers[2].forward(&self.features(x)?).map_err(from_nn)
    }
}

/// The network in training.
struct Fit {
    layers: Layers,
}

impl Objective for Fit {
    /// Images `[B, C·H·W]` and labels `[B, 1]`.
    type Batch = (Tensor, Tensor);

    fn losses(&mut self, _: usize, (x, labels): &Self::Batch, _: &StepCtx) -> Result<Vec<Loss>> {
        let logits = self.layers.logits(x)?;
        // The maximum is a constant: it cancels in the softmax.
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_likelihood = (shifted.gather(labels, 1)? - log_sum)?;
        Ok(vec![Loss::new(
            "cross-entropy",
            log_likelihood.mean_all()?.neg()?,
        )])
    }
}

/// Training images, moved a little differently in every epoch.
struct Moved<'a> {
    pixels: &'a [f32],
    labels: &'a [u32],
    shape: (usize, usize, usize),
    config: &'a ClassifierConfig,
}

impl Source for Moved<'_> {
    type Batch = (Tensor, Tensor);

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn batch(&self, items: &[usize], epoch: u64) -> Result<Self::Batch> {
        let x = moved_batch(self.pixels, self.shape, items, epoch, self.config);
        let x = Tensor::from_vec(
            x,
            (items.len(), self.pixels.len() / self.len()),
            &Device::Cpu,
        )?;
        let labels: Vec<u32> = items.iter().map(|item| self.labels[*item]).collect();
        Ok((x, Tensor::from_vec(labels, (items.len(), 1), &Device::Cpu)?))
    }
}

/// Images of a batch, each shifted, turned and zoomed at random about its centre.
///
/// ```text
/// out(p) = image(c + R_θ (p − c) / z + d),   bilinear between pixels, the edge repeated outside
/// ```
fn moved_batch(
    pixels: &[f32],
    (channels, height, width): (usize, usize, usize),
    items: &[usize],
    epoch: u64,
    config: &ClassifierConfig,
) -> Vec<f32> {
    let size = channels * height * width;
    let (cy, cx) = ((height as f64 - 1.0) / 2.0, (width as f64 - 1.0) / 2.0);
    let mut out = Vec::with_capacity(items.len() * size);
    for &item in items {
        let image = &pixels[item * size..][..size];
        let key = Key::new(config.seed, stream::AUGMENT)
            .item(item as u64)
            .step(epoch);
        let draw: Vec<f64> = key.uniform(4).into_iter().map(|u| 2.0 * u - 1.0).collect();
        let (dy, dx) = (config.shift * draw[0], config.shift * draw[1]);
        let (sin, cos) = libm::sincos((config.rotation * draw[2]).to_radians());
        let zoom = 1.0 + config.zoom * draw[3];
        for plane in image.chunks_exact(height * width) {
            for y in 0..height {
                for x in 0..width {
                    let (v, u) = ((y as f64 - cy) / zoom, (x as f64 - cx) / zoom);
                    let at = (cy + cos * v - sin * u + dy, cx + sin * v + cos * u + dx);
                    out.push(bilinear(plane, (height, width), at));
                }
            }
        }
    }
    out
}

/// The value between the four pixels around a place; places outside are moved to the edge.
fn bilinear(plane: &[f32], (height, width): (usize, usize), (y, x): (f64, f64)) -> f32 {
    let (y, x) = (
        y.clamp(0.0, height as f64 - 1.0),
        x.clamp(0.0, width as f64 - 1.0),
    );
    let (top, left) = (y as usize, x as usize);
    let (bottom, right) = ((top + 1).min(height - 1), (left + 1).min(width - 1));
    let (fy, fx) = ((y - top as f64) as f32, (x - left as f64) as f32);
    let mix = |row: usize| plane[row * width + left] * (1.0 - fx) + plane[row * width + right] * fx;
    mix(top) * (1.0 - fy) + mix(bottom) * fy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Labels, Pixels, digits};

    #[test]
    fn recognises_97_of_100_held_out_digits() {
        let (train, test) = digits::load().unwrap().split().unwrap();
        let start = std::time::Instant::now();
        let classifier = Classifier::train(&train, &ClassifierConfig::default()).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let (images, _) = test.all(&Device::Cpu).unwrap();
        let accuracy = classifier
            .accuracy(&images, test.labels().unwrap())
            .unwrap();
        println!("held-out accuracy {accuracy:.4} after {seconds:.1} s");
        assert!(accuracy >= 0.97, "{accuracy}");
        let features = classifier.features(&images).unwrap();
        assert_eq!(features.dims(), [359, classifier.feature_size()]);
        let spread = features.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(spread.iter().all(|v| *v >= 0.0 && v.is_finite()));
        assert!(spread.iter().any(|v| *v > 0.1));
        // A random guess would be right one time in ten.
        let shuffled: Vec<u32> = test
            .labels()
            .unwrap()
            .iter()
            .map(|l| (l + 1) % 10)
            .collect();
        assert!(classifier.accuracy(&images, &shuffled).unwrap() < 0.1);
        assert!(classifier.accuracy(&images, &shuffled[1..]).is_err());
    }

    /// A hash of the bits of all logits of the test images after one epoch.
    fn fingerprint(seed: u64) -> u64 {
        let (train, test) = digits::load().unwrap().split().unwrap();
        let config = ClassifierConfig {
            epochs: 1,
            seed,
            ..ClassifierConfig::default()
        };
        let classifier = Classifier::train(&train, &config).unwrap();
        let (images, _) = test.all(&Device::Cpu).unwrap();
        let logits = classifier.logits(&images).unwrap().flatten_all().unwrap();
        let bits = logits
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f32::to_bits);
        let text: String = bits.map(|word| format!("{word:08x}")).collect();
        diffusion_ops::init::fnv1a(&text)
    }

    /// Runs in a process of its own, because the number of threads is fixed at the first tensor.
    #[test]
    fn fingerprint_child() {
        println!("bits {:016x}", fingerprint(0));
    }

    #[test]
    fn training_gives_the_same_bits_again_on_any_number_of_threads() {
        let ours = fingerprint(0);
        assert_eq!(ours, fingerprint(0));
        assert_ne!(ours, fingerprint(1));
        for threads in ["1", "2", "4"] {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "metric::classifier::tests::fingerprint_child",
                    "--nocapture",
                ])
                .env("RAYON_NUM_THREADS", threads)
                .env("CANDLE_NUM_THREADS", threads)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                text.contains(&format!("bits {ours:016x}")),
                "{threads} threads: {text}"
            );
        }
    }

    #[test]
    fn moves_follow_the_formula() {
        // A plane a + b y + c x is reproduced exactly by bilinear values inside the image.
        let (height, width) = (9, 7);
        let ramp = |y: f64, x: f64| 0.3 + 0.25 * y - 0.125 * x;
        let image: Vec<f32> = (0..63)
            .map(|i| ramp(f64::from(i / 7), f64::from(i % 7)) as f32)
            .collect();
        let config = ClassifierConfig::default();
        let mut seen = std::collections::BTreeSet::new();
        for epoch in 0..50 {
            let moved = moved_batch(&image, (1, height, width), &[0], epoch, &config);
            let key = Key::new(config.seed, stream::AUGMENT).step(epoch);
            let draw: Vec<f64> = key.uniform(4).into_iter().map(|u| 2.0 * u - 1.0).collect();
            // The centre only shifts; the pixel right of it also turns and grows.
            let (dy, dx) = (0.6 * draw[0], 0.6 * draw[1]);
            let centre = ramp(4.0 + dy, 3.0 + dx);
            assert!((f64::from(moved[4 * 7 + 3]) - centre).abs() < 1e-5);
            let angle = (12.0 * draw[2]).to_radians();
            let radius = 1.0 / (1.0 + 0.1 * draw[3]);
            let (y, x) = (
                -angle.sin() * radius + 4.0 + dy,
                angle.cos() * radius + 3.0 + dx,
            );
            assert!((f64::from(moved[4 * 7 + 4]) - ramp(y, x)).abs() < 1e-5);
            seen.insert(moved[31].to_bits());
        }
        assert_eq!(seen.len(), 50);
        let still = ClassifierConfig {
            shift: 0.0,
            rotation: 0.0,
            zoom: 0.0,
            ..config
        };
        assert_eq!(
            moved_batch(&image, (1, height, width), &[0], 5, &still),
            image
        );
        let corner = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(bilinear(&corner, (2, 2), (-5.0, 9.0)), 2.0);
        assert_eq!(bilinear(&corner, (2, 2), (0.5, 0.5)), 2.5);
    }

    #[test]
    fn bad_data_and_settings_are_refused() {
        let pixels = || Pixels::Levels {
            values: vec![0, 9, 5, 3],
            max: 9,
        };
        let plain = Dataset::new("plain", (1, 1, 2), pixels(), None).unwrap();
        let labels = |names: &[&str]| Labels {
            values: vec![0, 0],
            classes: names.iter().map(ToString::to_string).collect(),
        };
        let one = Dataset::new("one", (1, 1, 2), pixels(), Some(labels(&["a"]))).unwrap();
        let two = Dataset::new("two", (1, 1, 2), pixels(), Some(labels(&["a", "b"]))).unwrap();
        let train = |data, change: fn(&mut ClassifierConfig)| {
            let mut config = ClassifierConfig {
                epochs: 2,
                ..ClassifierConfig::default()
            };
            change(&mut config);
            Classifier::train(data, &config)
        };
        for data in [&plain, &one] {
            assert!(
                train(data, |_| ())
                    .unwrap_err()
                    .to_string()
                    .contains("two classes")
            );
        }
        for (change, field) in [
            ((|c| c.batch = 0) as fn(&mut ClassifierConfig), "batch"),
            (|c| c.learning_rate = f64::NAN, "learning_rate"),
            (|c| c.weight_decay = -1.0, "weight_decay"),
            (|c| c.shift = -1.0, "shift"),
            (|c| c.rotation = f64::NAN, "rotation"),
            (|c| c.zoom = 1.0, "zoom"),
        ] {
            assert!(train(&two, change).unwrap_err().to_string().contains(field));
        }
        let message = train(&two, |c| {
            (c.learning_rate, c.weight_decay, c.epochs) = (1e30, 0.0, 5)
        })
        .unwrap_err()
        .to_string();
        assert!(message.contains("finite"), "{message}");
        let good = train(&two, |_| ()).unwrap();
        let wrong = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
        assert!(
            good.features(&wrong)
                .unwrap_err()
                .to_string()
                .contains("[B, 1, 1, 2]")
        );
    }
}
