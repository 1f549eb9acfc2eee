//! Images to latents and back: DDIM's deterministic path in both directions.

use crate::model::ImageModel;
use candle_core::{DType, Tensor};
use diffusion_core::denoiser::Denoiser;
use diffusion_core::grid::Grid;
use diffusion_core::noise::CounterNoise;
use diffusion_core::sample::{Ctx, Ddim, Inversion, Observer, Planned, Solver};
use diffusion_core::tensor::mean_per_item;
use diffusion_core::{Report, Result};

/// How images are inverted.
#[derive(Clone, Debug, PartialEq)]
pub struct Invert {
    /// Where the steps are.
    pub grid: Grid,
    /// Their number.
    pub steps: usize,
    /// Network calls a step on the way up: more come nearer to the image again.
    pub iterations: usize,
    /// Images computed at a time; the result does not depend on it.
    pub batch: usize,
}

/// What became of images, all `[n, C, H, W]`.
pub struct Inverted {
    /// The latents: close to standard normal noise for images like those that were learned.
    pub latents: Tensor,
    /// Images sampled from the latents by DDIM with the same steps.
    pub back: Tensor,
    /// Root mean squared difference of each image and itself afterwards, in units where black is −1
    /// and white is 1.
    pub errors: Vec<f64>,
}

impl ImageModel {
    /// Latents of images, and the images that DDIM makes of them again.
    ///
    /// Without guidance and clipping, under which there is no way back.
    ///
    /// # Shapes
    /// `images`: `[n, C, H, W]` in `[-1, 1]`; `classes`: their labels, or none for the withheld one.
    ///
    /// # Errors
    /// `Config` for no steps, no iterations or another size of images; what the observer says.
    pub fn invert(
        &self,
        images: &Tensor,
        classes: Option<&[u32]>,
        how: &Invert,
        watch: &mut dyn Observer,
    ) -> Result<Inverted> {
        let (n, c, h, w) = images.dims4()?;
        let shape = self.image_shape()?;
        if [c, h, w] != shape || n == 0 {
            return Err(Report::new("images", format!("{:?}", images.dims()))
                .expected(format!("[n, {}, {}, {}]", shape[0], shape[1], shape[2]))
                .remedy("give images of the size that the model makes")
                .config());
        }
        if how.iterations == 0 {
            return Err(Report::new("iterations", 0).expected("at least 1").config());
        }
        let points = how.grid.points(&self.table()?, how.steps)?;
        let up = Inversion::along(how.iterations, &points);
        let down = Planned::new(Ddim::default(), &points);
        let (mut latents, mut back) = (Vec::new(), Vec::new());
        for start in (0..n).step_by(how.batch.max(1)) {
            let end = n.min(start + how.batch.max(1));
            let images = images.narrow(0, start, end - start)?.to_dtype(DType::F32)?;
            let denoiser = self.denoiser(classes.map(|all| &all[start..end]))?;
            let items = start as u64..end as u64;
            let mut walk = |solver: &dyn Solver, x: Tensor, denoiser: &dyn Denoiser| {
                // Neither way draws any noise.
                let mut noise = CounterNoise::new(0, items.clone());
                let mut ctx = Ctx::new(denoiser, &mut noise, items.clone());
                solver.solve(x, &mut ctx, watch)
            };
            let latent = walk(&up, images.to_device(self.device())?, &denoiser)?;
            back.push(walk(&down, latent.clone(), &denoiser)?);
            latents.push(latent);
        }
        let back = Tensor::cat(&back, 0)?;
        let apart = (&back - images.to_dtype(DType::F32)?.to_device(self.device())?)?;
        let squares = mean_per_item(&apart.sqr()?)?.to_dtype(DType::F64)?;
        Ok(Inverted {
            latents: Tensor::cat(&latents, 0)?,
            errors: squares.sqrt()?.to_vec1()?,
            back,
        })
    }
}
