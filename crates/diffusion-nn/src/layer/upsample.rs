//! Doubling the resolution of a map.

use crate::error::Result;
use crate::layer::{Conv2d, Conv2dConfig};
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::{fir_resample2d, upsample_nearest2d};

/// Doubles height and width by repetition, then applies a 3×3 convolution. Names: `conv`.
#[derive(Clone, Debug)]
pub struct Upsample2D {
    conv: Conv2d,
}

impl Upsample2D {
    /// A layer with a convolution from `channels` to `out` channels.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, channels: usize, out: usize) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::new(&scope.sub("conv"), Conv2dConfig::same(channels, out, 3))?,
        })
    }

    /// `[B, C, H, W] -> [B, K, 2H, 2W]`.
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(&nearest(x)?)
    }
}

/// Doubles height and width by repetition.
pub(crate) fn nearest(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    Ok(upsample_nearest2d(x, 2 * h, 2 * w)?)
}

/// Doubles height and width by zero insertion and the filter `[1, 3, 3, 1]/4`.
///
/// # Shapes
/// `[B, C, H, W] -> [B, C, 2H, 2W]`.
///
/// # Errors
/// If `x` is not such a map.
pub fn fir_upsample2d(x: &Tensor) -> Result<Tensor> {
    Ok(fir_resample2d(x, &[0.25, 0.75, 0.75, 0.25], 2, 1, (2, 1))?)
}
