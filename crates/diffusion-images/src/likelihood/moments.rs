//! What Analytic-DPM needs to know of a network: `E‖ε̂(x_t)‖²/D` on training images.

use super::watch::{Watch, Watched};
use crate::data::Dataset;
use crate::model::ImageModel;
use candle_core::{Device, Tensor};
use diffusion_core::Result;
use diffusion_core::denoiser::Denoiser;
use diffusion_core::noise::CounterNoise;
use diffusion_core::sample::{Analytic, Bounds, Planned, noise_moments};
use diffusion_core::schedule::Point;
use diffusion_ops::rng::stream;
use std::cell::RefCell;
use std::ops::Range;

/// How the moments are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moments {
    /// Training images, taken evenly over the data.
    pub images: usize,
    /// Images computed at a time.
    pub batch: usize,
    /// Seed of the noise.
    pub seed: u64,
}

/// The denoiser of a batch with these labels, before which so many images are done.
type Told<'a> = dyn Fn(Option<&Tensor>, &Range<u64>) -> Result<Box<dyn Denoiser + 'a>> + 'a;

impl Moments {
    /// The moment at each of the points.
    pub(super) fn measure(
        &self,
        train: &Dataset,
        device: &Device,
        points: &[Point],
        told: &Told<'_>,
    ) -> Result<Vec<f64>> {
        let count = self.images.clamp(1, train.len());
        // Evenly over the data, which may be sorted.
        let items: Vec<usize> = (0..count).map(|i| i * train.len() / count).collect();
        let mut all = vec![0.0; points.len()];
        for (start, chunk) in items.chunks(self.batch.max(1)).enumerate() {
            let (x, own) = train.batch(chunk, device)?;
            let first = (start * self.batch.max(1)) as u64;
            let range = first..first + chunk.len() as u64;
            let net = told(own.as_ref(), &range)?;
            let mut noise = CounterNoise::on_stream(self.seed, stream::EVALUATION, range.clone());
            let found = noise_moments(&net, &x, points, &mut noise, range)?;
            for (all, m) in all.iter_mut().zip(found) {
                *all += m * chunk.len() as f64 / count as f64;
            }
        }
        Ok(all)
    }
}

impl ImageModel {
    /// Analytic-DPM's sampler along the points of a run: DDPM's mean with `eta = 1`, DDIM's with 0,
    /// and the variance that is best for this network (Bao et al. 2022).
    ///
    /// The noise of the last step but one displaces a pixel by at most two grey levels of 256, as in
    /// the paper. `watch` is told of the training images.
    ///
    /// # Errors
    /// `Config` for images of another size, `Interrupted`, and whatever the network refuses.
    pub fn analytic<'w>(
        &self,
        points: &[Point],
        train: &Dataset,
        how: &Moments,
        eta: f64,
        watch: &'w mut Watch<'w>,
    ) -> Result<Planned<Analytic>> {
        self.must_make(train)?;
        let asked = &points[..points.len().saturating_sub(1)];
        let watch = RefCell::new(watch);
        let moments = how.measure(train, self.device(), asked, &|own, range| {
            let each = (range.end - range.start) as f64 / asked.len() as f64;
            let net = super::denoiser(self, own)?;
            Ok(Box::new(Watched::new(
                net,
                &watch,
                range.start as usize,
                each,
            )))
        })?;
        let bounds = Bounds {
            last_steps: 1,
            ..Bounds::default()
        };
        let step = Analytic::new(points, &moments, eta, bounds)?;
        Ok(Planned::new(step, points))
    }
}
