//! A small classifier that the project trains itself: it says of which class a sample is, and its
//! penultimate layer gives features for distances between sets of images.
//!
//! ```text
//! h₁ = relu(W₁ x + b₁),  h₂ = relu(W₂ h₁ + b₂),  logits = W₃ h₂ + b₃
//! L  = −(1/B) Σᵢ log softmax(logitsᵢ)[yᵢ]
//! ```
//!
//! It learns from training images only, each shifted, turned and zoomed a little at random, by
//! Nesterov's momentum with a learning rate that falls along a half cosine. It is meant for images
//! of digits' kind: small, centred, one object on an even ground.

use crate::data::Dataset;
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use diffusion_core::{Report, Result};
use diffusion_ops::init::Init;
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
    /// Factor on the velocity.
    pub momentum: f64,
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
            learning_rate: 0.05,
            momentum: 0.9,
            weight_decay: 5e-4,
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
        if !(0.0..1.0).contains(&self.momentum) {
            return bad("momentum", self.momentum.to_string(), "0 to below 1");
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
    /// Weights `[in, out]` and biases `[out]` of the three layers.
    layers: [(Tensor, Tensor); 3],
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
        let mut fit = Fit::new(sizes, train.classes().len(), config)?;
        let steps_per_epoch = train.len().div_ceil(config.batch);
        let total = (steps_per_epoch * config.epochs) as f64;
        for epoch in 0..config.epochs {
            let order = Key::new(config.seed, stream::ORDER).step(epoch as u64);
            let order = order.permutation(train.len());
            let mut sum = 0.0;
            for (i, items) in order.chunks(config.batch).enumerate() {
                let progress = (epoch * steps_per_epoch + i) as f64 / total;
                let rate =
                    0.5 * config.learning_rate * (1.0 + (std::f64::consts::PI * progress).cos());
                let x = moved_batch(&pixels, shape, items, epoch as u64, config);
                let x = Tensor::from_vec(x, (items.len(), sizes[0]), &Device::Cpu)?;
                sum += fit.step(&x, items.iter().map(|&item| labels[item]), rate, config)?;
            }
            let loss = sum / steps_per_epoch as f64;
            tracing::debug!(epoch, loss, "classifier");
            if !loss.is_finite() {
                return Err(
                    Report::new("classifier", format!("a loss of {loss}, epoch {epoch}"))
                        .expected("a finite loss")
                        .remedy("use a smaller learning_rate")
                        .numeric(),
                );
            }
        }
        Ok(Self {
            shape,
            classes: train.classes().to_vec(),
            layers: fit.frozen()?,
        })
    }

    /// The names of the classes, in the order of the logits.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The number of features.
    pub fn feature_size(&self) -> usize {
        self.layers[2].0.dims()[0]
    }

    /// The features h₂ of images.
    ///
    /// # Shapes
    /// `[B, C, H, W]` in `[-1, 1]` to `[B, features]`, on the CPU in f32.
    ///
    /// # Errors
    /// Images of another shape than those trained on.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.in_chunks(images, &self.layers[..2])
    }

    /// The logits of images.
    ///
    /// # Shapes
    /// `[B, C, H, W]` in `[-1, 1]` to `[B, classes]`, on the CPU in f32.
    ///
    /// # Errors
    /// Those of [`Classifier::features`].
    pub fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.in_chunks(images, &self.layers)
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

    fn in_chunks(&self, images: &Tensor, layers: &[(Tensor, Tensor)]) -> Result<Tensor> {
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
            let x = images.narrow(0, start, CHUNK.min(count - start))?;
            forward(x, layers, layers.len() == 2)
        });
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&outputs, 0)?)
    }
}

/// Layers with a rectifier after each, the last one excepted unless asked for.
fn forward(x: Tensor, layers: &[(Tensor, Tensor)], rectify_last: bool) -> Result<Tensor> {
    let mut x = x;
    for (i, (weight, bias)) in layers.iter().enumerate() {
        x = x.matmul(weight)?.broadcast_add(bias)?;
        if rectify_last || i + 1 < layers.len() {
            x = x.relu()?;
        }
    }
    Ok(x)
}

/// Network and velocities while training.
struct Fit {
    params: Vec<Var>,
    velocities: Vec<Tensor>,
    classes: usize,
}

impl Fit {
    fn new(sizes: [usize; 3], classes: usize, config: &ClassifierConfig) -> Result<Self> {
        let outs = [sizes[1], sizes[2], classes];
        let (mut params, mut velocities) = (Vec::new(), Vec::new());
        for (i, (fan_in, out)) in sizes.into_iter().zip(outs).enumerate() {
            // He et al. 2015: rectifiers halve the variance.
            let weight = Init::Normal {
                std: (2.0 / fan_in as f64).sqrt(),
            };
            for (init, name, shape) in [
                (weight, "weight", vec![fan_in, out]),
                (Init::Const(0.0), "bias", vec![out]),
            ] {
                let name = format!("classifier.{i}.{name}");
                let value = init.tensor(config.seed, &name, shape, DType::F32, &Device::Cpu)?;
                velocities.push(value.zeros_like()?);
                params.push(Var::from_tensor(&value)?);
            }
        }
        Ok(Self {
            params,
            velocities,
            classes,
        })
    }

    fn layers(&self) -> Vec<(Tensor, Tensor)> {
        let tensor = |var: &Var| var.as_tensor().clone();
        self.params
            .chunks_exact(2)
            .map(|pair| (tensor(&pair[0]), tensor(&pair[1])))
            .collect()
    }

    /// One step of Nesterov's momentum; the loss before it.
    fn step(
        &mut self,
        x: &Tensor,
        labels: impl ExactSizeIterator<Item = u32>,
        rate: f64,
        config: &ClassifierConfig,
    ) -> Result<f64> {
        let count = labels.len();
        let mut target = vec![0f32; count * self.classes];
        for (i, label) in labels.enumerate() {
            target[i * self.classes + label as usize] = 1.0 / count as f32;
        }
        let target = Tensor::from_vec(target, (count, self.classes), &Device::Cpu)?;
        let logits = forward(x.clone(), &self.layers(), false)?;
        // The maximum is a constant: it cancels in the softmax.
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let loss = (shifted.broadcast_sub(&log_sum)? * target)?
            .sum_all()?
            .neg()?;
        let grads = loss.backward()?;
        self.update(&grads, rate, config)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }

    fn update(&mut self, grads: &GradStore, rate: f64, config: &ClassifierConfig) -> Result<()> {
        for (param, velocity) in self.params.iter().zip(&mut self.velocities) {
            let Some(grad) = grads.get(param) else {
                return Err(Report::new("classifier", "a parameter without a gradient").numeric());
            };
            let value = param.as_tensor().detach();
            let grad = (grad + (value.clone() * config.weight_decay)?)?;
            *velocity = ((&*velocity * config.momentum)? + &grad)?.detach();
            let change = ((&*velocity * config.momentum)? + grad)?;
            param.set(&(value - (change * rate)?)?)?;
        }
        Ok(())
    }

    /// Copies that neither keep a graph nor share memory with the variables.
    fn frozen(&self) -> Result<[(Tensor, Tensor); 3]> {
        let copy = |i: usize| self.params[i].as_tensor().detach().copy();
        Ok([
            (copy(0)?, copy(1)?),
            (copy(2)?, copy(3)?),
            (copy(4)?, copy(5)?),
        ])
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
            (|c| c.momentum = 1.0, "momentum"),
            (|c| c.weight_decay = -1.0, "weight_decay"),
            (|c| c.shift = -1.0, "shift"),
            (|c| c.rotation = f64::NAN, "rotation"),
            (|c| c.zoom = 1.0, "zoom"),
        ] {
            assert!(train(&two, change).unwrap_err().to_string().contains(field));
        }
        let message = train(&two, |c| c.learning_rate = 1e30)
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
