//! The training task: noise to images, with labels that are sometimes withheld.

use crate::config::ImageConfig;
use crate::data::{Dataset, flips};
use crate::from_nn;
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser, Network, TimeCode};
use diffusion_core::loss::Denoising;
use diffusion_core::noise::CounterNoise;
use diffusion_core::predict::Kind;
use diffusion_core::train::{Loss, Objective, Source, StepCtx};
use diffusion_core::{Report, Result};
use diffusion_nn::net::unet2d::UNet2D;
use diffusion_nn::{Mode, Store};
use diffusion_ops::rng::{Key, stream};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A batch of images with their labels.
pub struct Batch {
    /// `[B, C, H, W]` in `[−1, 1]`.
    pub images: Tensor,
    /// One label an image, `[B]`.
    pub labels: Option<Vec<u32>>,
}

/// A data set on a device, as batches.
pub struct Images<'a> {
    /// The images.
    pub data: &'a Dataset,
    /// Where batches go.
    pub device: Device,
    /// Draws which images are mirrored, by item and epoch; `None` for none.
    pub flip: Option<Key>,
}

impl<'a> Images<'a> {
    /// The images of `data` as a run with `config` sees them.
    pub fn new(data: &'a Dataset, config: &ImageConfig, device: &Device) -> Self {
        Self {
            data,
            device: device.clone(),
            flip: config
                .flip
                .then(|| Key::new(config.train.seed, stream::AUGMENT)),
        }
    }
}

impl Source for Images<'_> {
    type Batch = Batch;

    fn len(&self) -> usize {
        self.data.len()
    }

    fn batch(&self, items: &[usize], epoch: u64) -> Result<Batch> {
        let (images, _) = match self.flip {
            Some(key) => {
                let flips = flips(key.step(epoch), items);
                self.data.batch_flipped(items, &flips, &self.device)?
            }
            None => self.data.batch(items, &self.device)?,
        };
        let labels = self
            .data
            .labels()
            .map(|all| items.iter().map(|i| all[*i]).collect());
        Ok(Batch { images, labels })
    }
}

/// A network with its weights in a store, and what it predicts.
pub(crate) struct Learner {
    network: UNet2D,
    /// The weights.
    pub(crate) store: Store,
    kind: Kind,
}

impl Learner {
    /// A freshly initialised network for a checked configuration.
    pub(crate) fn new(config: &ImageConfig, device: &Device) -> Result<Self> {
        config.check()?;
        let store = Store::new(config.train.seed, DType::F32, device);
        let mut network = UNet2D::new(&config.network, &store.root()).map_err(from_nn)?;
        network.set_gradient_checkpointing(config.gradient_checkpointing);
        Ok(Self {
            network,
            store,
            kind: config.predicts.kind(),
        })
    }

    /// The network as a denoiser that is told these labels, `[B]`, of its own.
    pub(crate) fn denoiser(&self, labels: Option<Tensor>, mode: Mode) -> impl Denoiser + '_ {
        Network::new(self.kind, TimeCode::Index, move |x: &Tensor, t: &Tensor| {
            self.network
                .forward(x, t, labels.as_ref(), mode)
                .map_err(from_nn)
        })
    }
}

/// How a network runs in training: activations are dropped by the place in the run, apart from the
/// labels' own draws.
pub(crate) fn training(ctx: &StepCtx) -> Mode {
    Mode::Train {
        key: Key {
            seed: ctx.seed,
            stream: stream::DROPOUT,
            item: u64::MAX - ctx.micro,
            step: ctx.step,
        },
    }
}

/// A network in training.
pub struct Task {
    learner: Learner,
    objective: Denoising,
    config: ImageConfig,
    device: Device,
}

impl Task {
    /// A freshly initialised network for a checked configuration.
    ///
    /// # Errors
    /// `Config` when the configuration is impossible.
    pub fn new(config: &ImageConfig, device: &Device) -> Result<Self> {
        let learner = Learner::new(config, device)?;
        let objective = Denoising {
            schedule: Arc::new(config.process.table()?),
            weight: config.weight,
            time: config.time,
        };
        Ok(Self {
            learner,
            objective,
            config: config.clone(),
            device: device.clone(),
        })
    }

    /// The trainable parameters by name.
    pub fn parameters(&self) -> BTreeMap<String, candle_core::Var> {
        self.learner.store.named()
    }

    /// Number of trainable values.
    pub fn num_parameters(&self) -> usize {
        self.learner.store.num_parameters()
    }

    /// Labels of a batch, each withheld with the configured probability.
    fn labels(&self, labels: Option<&[u32]>, ctx: &StepCtx) -> Result<Option<Tensor>> {
        let Some(count) = self.config.network.num_class_embeds else {
            return Ok(None);
        };
        let Some(labels) = labels else {
            return Err(Report::new("training data", "images without labels")
                .expected("labels for a class-conditional model")
                .remedy("set conditional = false")
                .config());
        };
        let null = (count - 1) as u32;
        let shown: Vec<u32> = labels
            .iter()
            .enumerate()
            .map(|(i, label)| {
                let withheld = ctx.dropout_key(i).uniform(1)[0] < self.config.label_dropout;
                if withheld { null } else { *label }
            })
            .collect();
        Ok(Some(Tensor::new(shown, &self.device)?))
    }
}

impl Objective for Task {
    type Batch = Batch;

    fn losses(&mut self, _: usize, batch: &Batch, ctx: &StepCtx) -> Result<Vec<Loss>> {
        let n = batch.images.dim(0)? as u64;
        let points = self
            .objective
            .draw((0..n as usize).map(|i| ctx.time_key(i)));
        let epsilon = ctx.noise(&batch.images.dims()[1..], DType::F32, &self.device)?;
        let labels = self.labels(batch.labels.as_deref(), ctx)?;
        let network = self.learner.denoiser(labels, training(ctx));
        let mut noise = CounterNoise::new(ctx.seed, 0..n);
        let mut call = Call {
            noise: &mut noise,
            items: 0..n,
            tracked: true,
        };
        let losses =
            self.objective
                .losses(&network, &batch.images, &epsilon, &points, &mut call)?;
        Ok(vec![Loss::new("denoising", losses.mean_all()?)])
    }

    fn writes_parameters(&self) -> bool {
        false
    }

    fn describe(&self, _: usize, ctx: &StepCtx) -> Option<String> {
        let points = self
            .objective
            .draw((0..ctx.items.len()).map(|i| ctx.time_key(i)));
        let times = points.iter().map(|p| p.t);
        let (low, high) = times.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), t| {
            (a.min(t), b.max(t))
        });
        Some(format!("diffusion times {low} to {high}"))
    }
}

/// The mean denoising loss of a network on held-out images, over `rounds` noise draws an image.
///
/// # Errors
/// Whatever the network refuses.
pub fn held_out_loss(
    model: &crate::model::ImageModel,
    data: &Dataset,
    weight: diffusion_core::loss::Weight,
    seed: u64,
    rounds: u64,
) -> Result<f64> {
    let table = model.table()?;
    let objective = Denoising {
        schedule: Arc::new(table),
        weight,
        time: diffusion_core::loss::TimeLaw::Uniform,
    };
    let (mut total, mut count) = (0.0, 0usize);
    let items: Vec<usize> = (0..data.len()).collect();
    for round in 0..rounds {
        for chunk in items.chunks(64) {
            let (images, labels) = data.batch(chunk, model.device())?;
            let ctx = StepCtx::new(seed, round, chunk.iter().map(|i| *i as u64).collect());
            let points = objective.draw((0..chunk.len()).map(|i| ctx.time_key(i)));
            let epsilon = ctx.noise(&images.dims()[1..], DType::F32, model.device())?;
            // An unconditional model is judged without the labels that the data may have.
            let labels = labels.filter(|_| !model.classes().is_empty());
            let labels = labels.map(|l| l.to_vec1::<u32>()).transpose()?;
            let network = model.denoiser(labels.as_deref())?;
            let mut noise = CounterNoise::new(seed, 0..chunk.len() as u64);
            let mut call = Call {
                noise: &mut noise,
                items: 0..chunk.len() as u64,
                tracked: false,
            };
            let losses = objective.losses(&network, &images, &epsilon, &points, &mut call)?;
            total += losses.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            count += chunk.len();
        }
    }
    Ok(total / count.max(1) as f64)
}
