//! Training steps and sampling calls on networks of the image presets.

use candle_core::{Device, Tensor};
use diffusion_core::Result;
use diffusion_core::train::{AdamW, AdamWConfig, Grads, Objective, StepCtx};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::{Dataset, Pixels};
use diffusion_images::model::{self, ImageModel};
use diffusion_images::preset;
use diffusion_images::train::{Batch, Task};

/// A network with a batch to train on.
pub struct Training {
    task: Task,
    optimiser: AdamW,
    batch: Batch,
    config: ImageConfig,
    step: u64,
}

/// A grey data set of this many blank images: timing does not depend on what they show.
///
/// # Errors
/// Those of the data set.
pub fn blank(side: usize, count: usize) -> Result<Dataset> {
    let values = vec![0; side * side * count];
    Dataset::new(
        "blank",
        (1, side, side),
        Pixels::Levels { values, max: 255 },
        None,
    )
}

impl Training {
    /// A preset's network at its first step, with a batch of `batch` images of `side` pixels.
    ///
    /// # Errors
    /// Those of the configuration.
    pub fn new(preset: &str, side: usize, batch: usize) -> Result<Self> {
        let data = blank(side, batch)?;
        let config = preset::preset(preset, &data)?;
        let task = Task::new(&config, &Device::Cpu)?;
        let images = Tensor::zeros(
            (batch, 1, side, side),
            candle_core::DType::F32,
            &Device::Cpu,
        )?;
        let batch = Batch {
            images,
            labels: None,
        };
        Ok(Self {
            task,
            optimiser: AdamW::new(AdamWConfig::default()),
            batch,
            config,
            step: 0,
        })
    }

    /// Number of trained values.
    pub fn num_parameters(&self) -> usize {
        self.task.num_parameters()
    }

    /// The network as a model that samples, by way of a folder.
    ///
    /// # Errors
    /// Those of writing and reading.
    pub fn model(&self, folder: &std::path::Path) -> Result<ImageModel> {
        let weights = self.task.parameters();
        let weights = weights
            .iter()
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        model::save(folder, &self.config, &[], &weights.collect())?;
        ImageModel::open(folder, &Device::Cpu)
    }

    /// Forward, backward, update.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn step(&mut self) -> Result<()> {
        let n = self.batch.images.dim(0)? as u64;
        let ctx = StepCtx::new(self.config.train.seed, self.step, (0..n).collect());
        self.step += 1;
        let params = self.task.parameters();
        let mut grads = Grads::default();
        for loss in self.task.losses(0, &self.batch, &ctx)? {
            grads.add(&mut diffusion_ops::backward(&loss.value)?, params.iter())?;
        }
        self.optimiser.update(&params, &grads, 1e-4, 1.0)
    }
}
