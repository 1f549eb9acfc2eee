//! A saved pipeline of a `UNet2DModel`, loaded.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use diffusion_core::Report;
use diffusion_core::interop::scheduler::Scheduler;
use diffusion_core::limits::Limits;
use diffusion_images::classes::Classes;
use diffusion_images::saved::SavedModel;
use diffusion_nn::net::unet2d::UNet2D;
use diffusion_nn::{Mode, Store};
use std::path::Path;

/// The class of the pipeline, its scheduler and its network.
pub struct SavedUNet {
    /// The class of the pipeline.
    pub pipeline: String,
    /// Its scheduler.
    pub scheduler: Scheduler,
    /// What the network's labels mean.
    pub classes: Classes,
    /// Its network.
    pub net: UNet2D,
}

impl SavedUNet {
    /// Loads a folder in f32 on the CPU.
    ///
    /// # Errors
    /// When a file is missing or malformed, the classes are others, or the weights don't fit.
    pub fn open(path: &Path) -> Result<Self> {
        let saved = SavedModel::open(path, &Limits::default())?;
        let build = |scope: &_| UNet2D::new(&saved.network, scope);
        let net = Store::serve(&saved.weights, DType::F32, &Device::Cpu, build)
            .with_context(|| format!("the weights in {}", path.display()))?;
        Ok(Self {
            pipeline: saved.pipeline,
            scheduler: saved.scheduler,
            classes: saved.classes,
            net,
        })
    }

    /// The network's output, for labels where it has them.
    ///
    /// # Errors
    /// Those of the network.
    pub fn predict(
        &self,
        x: &Tensor,
        t: &Tensor,
        labels: Option<&Tensor>,
    ) -> diffusion_core::Result<Tensor> {
        self.net
            .forward(x, t, labels, Mode::Eval)
            .map_err(|error| match error {
                diffusion_nn::Error::Candle(error) => error.into(),
                other => Report::new("unet", other).input(),
            })
    }
}

/// Samples in `[−1, 1]`, `[B, C, H, W]`, as images in `[0, 1]`, `[B, H, W, C]`.
///
/// # Errors
/// Those of the tensor library.
pub fn as_images(x: &Tensor) -> Result<Tensor> {
    Ok(x.affine(0.5, 0.5)?
        .clamp(0.0, 1.0)?
        .permute((0, 2, 3, 1))?
        .contiguous()?)
}
