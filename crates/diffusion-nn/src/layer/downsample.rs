//! Halving the resolution of a map.

use crate::error::Result;
use crate::layer::{Conv2d, Conv2dConfig};
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::{Padding, fir_resample2d};

/// Halves height and width by a 3×3 convolution of stride 2. Names: `conv`.
#[derive(Clone, Debug)]
pub struct Downsample2D {
    conv: Conv2d,
}

impl Downsample2D {
    /// A layer that pads each side by `padding`, or, where that is 0, the right and the bottom
    /// by one.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, channels: usize, out: usize, padding: usize) -> Result<Self> {
        let padding = match padding {
            0 => Padding {
                top: 0,
                bottom: 1,
                left: 0,
                right: 1,
            },
            p => p.into(),
        };
        let config = Conv2dConfig {
            stride: 2,
            padding,
            ..Conv2dConfig::same(channels, out, 3)
        };
        Ok(Self {
            conv: Conv2d::new(&scope.sub("conv"), config)?,
        })
    }

    /// `[B, C, H, W] -> [B, K, H', W']`.
    ///
    /// # Errors
    /// If the channels don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(x)
    }
}

/// Halves height and width by the filter `[1, 3, 3, 1]/8` and decimation.
///
/// # Shapes
/// `[B, C, H, W] -> [B, C, ⌊H/2⌋, ⌊W/2⌋]`.
///
/// # Errors
/// If `x` is not such a map.
pub fn fir_downsample2d(x: &Tensor) -> Result<Tensor> {
    Ok(fir_resample2d(
        x,
        &[0.125, 0.375, 0.375, 0.125],
        1,
        2,
        (1, 1),
    )?)
}
