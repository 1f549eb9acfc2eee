//! A look at a run while it goes on: the loss on held-out images, and a grid of samples.

use crate::config::ImageConfig;
use crate::data::Dataset;
use crate::grid::{GridOptions, sample_grid};
use crate::model::{ImageModel, SampleRequest};
use crate::train::held_out_loss;
use candle_core::{Device, Tensor};
use diffusion_core::grid::Grid;
use diffusion_core::guide::Clip;
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::{Event, Observer};
use diffusion_core::{Error, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Images of a grid and steps of its sampler: enough to judge by eye, little beside the training.
const IMAGES: usize = 32;
const STEPS: usize = 10;
/// Held-out images that the loss is taken over, and noise draws for each.
const HELD_OUT: usize = 512;

/// Measures the averaged weights on held-out images and draws samples from them, now and then.
///
/// The samples are `step-N.png` in the folder given; the same seed draws the same noise each time,
/// so that one can watch a picture come into being.
pub struct Validation {
    /// Steps between two looks; the last step is looked at too.
    pub every: u64,
    /// Images that the network does not learn from.
    pub held_out: Dataset,
    /// Where the grids go; `None` for no grids.
    pub folder: Option<PathBuf>,
    /// What is trained.
    pub config: ImageConfig,
    /// The device to compute on.
    pub device: Device,
}

impl Validation {
    /// A look at `config`'s run every so many steps, on a fixed part of the held-out images.
    ///
    /// # Errors
    /// Those of choosing the images.
    pub fn new(
        every: u64,
        held_out: &Dataset,
        folder: Option<PathBuf>,
        config: &ImageConfig,
        device: &Device,
    ) -> Result<Self> {
        // Evenly spread over the set, which may be sorted by class.
        let n = held_out.len();
        let count = n.min(HELD_OUT);
        let items: Vec<usize> = (0..count).map(|i| i * n / count).collect();
        Ok(Self {
            every: every.max(1),
            held_out: held_out.select(&items)?,
            folder,
            config: config.clone(),
            device: device.clone(),
        })
    }

    fn draw(&self, model: &ImageModel, step: u64) -> Result<()> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let classes = model.classes().len();
        let labels = (classes > 0).then(|| (0..IMAGES).map(|i| (i % classes) as u32).collect());
        let request = SampleRequest {
            count: IMAGES,
            sampler: SamplerConfig::named("dpmpp-2m")?,
            grid: Grid::Trailing,
            steps: STEPS,
            labels,
            guidance: 1.0,
            clip: Clip::Static { range: 1.0 },
            batch: IMAGES,
            brownian: false,
            seed: self.config.train.seed,
        };
        let images = model.sample(&request, &mut ())?;
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let file = folder.join(format!("step-{step:06}.png"));
        let options = GridOptions {
            columns: Some(8),
            ..GridOptions::default()
        };
        sample_grid(&images, &options)?.write_png(&file, &[])
    }
}

impl Observer for Validation {
    fn on(&mut self, _: &Event) -> Result<()> {
        Ok(())
    }

    fn wants(&self, step: u64) -> bool {
        step.is_multiple_of(self.every) || step == self.config.train.steps
    }

    fn evaluate(
        &mut self,
        step: u64,
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        let classes = self.held_out.classes();
        let model = ImageModel::from_weights(&self.config, classes, weights, &self.device)?;
        let weight = self.config.weight;
        let loss = held_out_loss(&model, &self.held_out, weight, self.config.train.seed, 1)?;
        self.draw(&model, step)?;
        Ok(vec![("held_out_loss".into(), loss)])
    }
}
