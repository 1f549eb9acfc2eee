//! A small variational autoencoder (Kingma and Welling 2014), the baseline that has a network too.
//!
//! ```text
//! q(z|x, y) = N(μ(x, y), diag exp s(x, y))        p(z) = N(0, I)
//! p(x|z, y) = N(x̂(z, y), σ² I),   one σ for all, learnt (Rybkin et al. 2021)
//! L = ‖x − x̂‖²/(2σ²) + D ln σ + ½ Σ (μ² + eˢ − 1 − s)
//! ```
//!
//! Encoder and decoder have one hidden layer each; the class enters both. A sample is x̂(z, y) for
//! z ~ N(0, I), without the noise of the last step.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::train::{
    AdamWConfig, Cancel, EmaRule, Loss, LrSchedule, Objective, Quiet, StepCtx, TrainConfig, Trainer,
};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::Dataset;
use diffusion_images::from_nn;
use diffusion_images::train::{Batch, Images};
use diffusion_nn::layer::Linear;
use diffusion_nn::{Scope, Store};
use diffusion_ops::init::Init;
use diffusion_ops::rng::{Key, stream};

/// Sizes of the autoencoder and of its training.
pub struct Config {
    pub hidden: usize,
    pub latent: usize,
    pub steps: u64,
    pub seed: u64,
}

/// Images of the sizes above take this many a step.
const BATCH: usize = 64;

struct Net {
    encode: [Linear; 2],
    decode: [Linear; 2],
    log_sigma: Tensor,
    latent: usize,
    classes: usize,
}

impl Net {
    fn new(
        scope: &Scope,
        pixels: usize,
        classes: usize,
        config: &Config,
    ) -> diffusion_nn::Result<Self> {
        let layer = |name: &str, a, b| Linear::new(&scope.sub(name), a, b, true);
        let (h, l) = (config.hidden, config.latent);
        Ok(Self {
            encode: [
                layer("encode_1", pixels + classes, h)?,
                layer("encode_2", h, 2 * l)?,
            ],
            decode: [
                layer("decode_1", l + classes, h)?,
                layer("decode_2", h, pixels)?,
            ],
            log_sigma: scope.param("log_sigma", 1, Init::Const(-1.0))?,
            latent: l,
            classes,
        })
    }

    fn with_classes(&self, x: &Tensor, labels: &[u32]) -> Result<Tensor, diffusion_core::Error> {
        if self.classes == 0 {
            return Ok(x.clone());
        }
        let hot = labels.iter().flat_map(|label| {
            (0..self.classes).map(move |k| f32::from(u8::from(k == *label as usize)))
        });
        let hot = Tensor::from_vec(hot.collect(), (labels.len(), self.classes), x.device())?;
        Ok(Tensor::cat(&[x, &hot], 1)?)
    }

    fn decode(&self, z: &Tensor, labels: &[u32]) -> Result<Tensor, diffusion_core::Error> {
        let z = self.with_classes(z, labels)?;
        let hidden = self.decode[0].forward(&z).map_err(from_nn)?.relu()?;
        Ok(self.decode[1].forward(&hidden).map_err(from_nn)?.tanh()?)
    }
}

struct Vae {
    net: Net,
}

impl Objective for Vae {
    type Batch = Batch;

    fn losses(
        &mut self,
        _: usize,
        batch: &Batch,
        ctx: &StepCtx,
    ) -> Result<Vec<Loss>, diffusion_core::Error> {
        let x = batch.images.flatten_from(1)?;
        let (_, pixels) = x.dims2()?;
        let labels = batch.labels.clone().unwrap_or_default();
        let input = self.net.with_classes(&x, &labels)?;
        let hidden = self.net.encode[0].forward(&input).map_err(from_nn)?;
        let code = self.net.encode[1]
            .forward(&hidden.relu()?)
            .map_err(from_nn)?;
        let latent = self.net.latent;
        let (mean, log_var) = (code.narrow(1, 0, latent)?, code.narrow(1, latent, latent)?);
        let noise = ctx.noise(&[latent], DType::F32, x.device())?;
        let z = (&mean + ((&log_var * 0.5)?.exp()? * noise)?)?;
        let error = (self.net.decode(&z, &labels)? - &x)?.sqr()?.sum(1)?;
        let precision = (&self.net.log_sigma * -2.0)?.exp()?;
        let likelihood = (error.broadcast_mul(&precision)? * 0.5)?
            .broadcast_add(&(&self.net.log_sigma * pixels as f64)?)?;
        let kl = ((mean.sqr()? + log_var.exp()?)? - (log_var + 1.0)?)?.sum(1)?;
        let loss = (likelihood + (kl * 0.5)?)?.mean_all()?;
        Ok(vec![Loss::new("evidence", (loss / pixels as f64)?)])
    }

    fn writes_parameters(&self) -> bool {
        false
    }
}

/// Trains on `train` and draws an image for each label (`count` images without classes).
pub fn samples(train: &Dataset, labels: &[u32], count: usize, config: &Config) -> Result<Tensor> {
    let pixels = train.channels() * train.height() * train.width();
    let classes = if train.labels().is_some() {
        train.classes().len()
    } else {
        0
    };
    let store = Store::new(config.seed, DType::F32, &Device::Cpu);
    let net = Net::new(&store.root(), pixels, classes, config).map_err(from_nn)?;
    let schedule = TrainConfig {
        steps: config.steps,
        batch_size: BATCH,
        lr: 2e-3,
        schedule: LrSchedule::CosineToFloor {
            warmup: 50,
            floor: 0.02,
        },
        adamw: AdamWConfig {
            weight_decay: 0.0,
            ..AdamWConfig::default()
        },
        ema: EmaRule::Off {},
        seed: config.seed,
        ..TrainConfig::default()
    };
    let mut vae = Vae { net };
    let source = Images::new(train, &ImageConfig::default(), &Device::Cpu);
    let mut trainer = Trainer::new(store.named(), schedule.check()?)?;
    trainer.run(&mut vae, &source, &mut Quiet, &Cancel::new())?;
    let z = Key::new(config.seed, stream::EVALUATION)
        .item(u64::MAX - 1)
        .normal(count * config.latent);
    let z: Vec<f32> = z.into_iter().map(|v| v as f32).collect();
    let z = Tensor::from_vec(z, (count, config.latent), &Device::Cpu)?;
    let frozen = store.frozen().map_err(from_nn)?;
    let net = Store::serve(&frozen, DType::F32, &Device::Cpu, |scope| {
        Net::new(scope, pixels, classes, config)
    })
    .map_err(from_nn)?;
    let images = net.decode(&z, labels)?;
    let shape = (count, train.channels(), train.height(), train.width());
    Ok(images.reshape(shape)?)
}
