//! A saved pipeline of a `UNet2DModel`, loaded.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use diffusion_core::Report;
use diffusion_core::interop::folder::DiffusersFolder;
use diffusion_core::interop::scheduler::Scheduler;
use diffusion_core::limits::Limits;
use diffusion_nn::net::unet2d::{UNet2D, UNet2DConfig, translate_deprecated};
use diffusion_nn::{Mode, Store};
use std::path::Path;

/// The folder, its scheduler and its network.
pub struct SavedUNet {
    /// Where it came from.
    pub folder: DiffusersFolder,
    /// Its scheduler.
    pub scheduler: Scheduler,
    /// Its network.
    pub net: UNet2D,
}

impl SavedUNet {
    /// Loads a folder in f32 on the CPU.
    ///
    /// # Errors
    /// When a file is missing or malformed, the classes are others, or the weights don't fit.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = DiffusersFolder::open(path, &Limits::default())?;
        let class = &folder.component("unet")?.class;
        if class != "UNet2DModel" {
            let report = Report::new("unet", class).expected("a UNet2DModel");
            return Err(report.unsupported().into());
        }
        let scheduler = folder.scheduler()?;
        let config: UNet2DConfig = serde_json::from_str(&folder.config_text("unet")?)
            .with_context(|| folder.config_path("unet").display().to_string())?;
        let weights = translate_deprecated(&folder.weights("unet")?)?;
        let build = |scope: &_| UNet2D::new(&config, scope);
        let net = Store::serve(&weights, DType::F32, &Device::Cpu, build)
            .with_context(|| format!("the weights in {}", path.display()))?;
        Ok(Self {
            folder,
            scheduler,
            net,
        })
    }

    /// The network's output.
    ///
    /// # Errors
    /// Those of the network.
    pub fn predict(&self, x: &Tensor, t: &Tensor) -> diffusion_core::Result<Tensor> {
        self.net
            .forward(x, t, None, Mode::Eval)
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
