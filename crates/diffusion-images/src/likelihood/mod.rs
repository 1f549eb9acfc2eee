//! How likely a trained model holds images to be: `diffusion images likelihood`.
//!
//! | file | what |
//! |---|---|
//! | [`baseline`] | what a density model has to beat |

pub mod baseline;

pub use baseline::{Baselines, baselines};

use crate::data::Dataset;
use candle_core::{Device, Tensor};
use diffusion_core::{Report, Result};

/// The grey levels of all images, whole numbers in f32, and how many levels there are.
///
/// # Shapes
/// `[N, C, H, W]`.
///
/// # Errors
/// `Unsupported` when the data are real numbers, which have densities but no probabilities.
pub fn levels(data: &Dataset) -> Result<(Tensor, usize)> {
    let Some(levels) = data.levels() else {
        return Err(
            Report::new(format!("data `{}`", data.name()), "real values")
                .expected("grey levels: bits per dimension are the probability of levels")
                .remedy("give images of 8 bits")
                .unsupported(),
        );
    };
    let (x, _) = data.all(&Device::Cpu)?;
    let half = f64::from(levels - 1) / 2.0;
    Ok((x.affine(half, half)?.round()?, levels as usize))
}
