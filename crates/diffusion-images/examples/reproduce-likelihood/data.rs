//! Handwritten digits of 8×8 pixels and 16 grey levels.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::train::Source;
use diffusion_images::data;

/// Rows and columns.
pub const SIDE: usize = 8;
/// Values of an image.
pub const DIMS: usize = SIDE * SIDE;
/// Grey levels.
pub const LEVELS: usize = 16;

/// Levels of the images, `[N, 64]`, whole numbers in f32.
pub struct Digits {
    pub train: Tensor,
    pub test: Tensor,
}

impl Digits {
    /// The built-in MNIST, padded to 32×32, the mean `p` of every 4×4 pixels in [0, 1] taken to the
    /// level `⌊16 p⌋`.
    pub fn open(spec: &str) -> Result<Self> {
        let splits = data::splits(spec, &data::Options::default())?;
        Ok(Self {
            train: coarse(&splits.train)?,
            test: coarse(&splits.test)?,
        })
    }
}

fn coarse(images: &data::Dataset) -> Result<Tensor> {
    let size = (images.channels(), images.height(), images.width());
    anyhow::ensure!(
        size == (1, 28, 28),
        "--data: images of {size:?} (expected grey ones of 28×28, as MNIST's)"
    );
    let (x, _) = images.all(&Device::Cpu)?;
    let p = x.affine(0.5, 0.5)?;
    let p = p.pad_with_zeros(2, 2, 2)?.pad_with_zeros(3, 2, 2)?;
    let mean = p
        .reshape((images.len(), SIDE, 4, SIDE, 4))?
        .to_dtype(DType::F64)?
        .mean(4)?
        .mean(2)?;
    let top = (LEVELS - 1) as f64;
    let k = mean.affine(LEVELS as f64, 0.0)?.floor()?.clamp(0.0, top)?;
    Ok(k.reshape((images.len(), DIMS))?.to_dtype(DType::F32)?)
}

/// Levels as batches `[B, 64]`.
pub struct Levels<'a>(pub &'a Tensor);

impl Source for Levels<'_> {
    type Batch = Tensor;

    fn len(&self) -> usize {
        self.0.dim(0).unwrap_or(0)
    }

    fn batch(&self, items: &[usize], _: u64) -> diffusion_core::Result<Tensor> {
        let items: Vec<u32> = items.iter().map(|i| *i as u32).collect();
        Ok(self.0.index_select(&Tensor::new(items, &Device::Cpu)?, 0)?)
    }
}

/// Levels on the scale of a chain, `2 k/(K − 1) − 1`.
pub fn on_scale(k: &Tensor) -> candle_core::Result<Tensor> {
    k.affine(2.0 / (LEVELS - 1) as f64, -1.0)
}
