//! How likely a trained model holds images to be: `diffusion images likelihood`.
//!
//! | file | what |
//! |---|---|
//! | [`baseline`] | what a density model has to beat |
//! | [`bound`](mod@bound) | the variational bound, part by part |
//! | [`flow`](mod@flow) | the density of the probability flow, dequantised |
//! | [`moments`] | what the best variance needs to know of a network, and the sampler with it |
//! | `watch` | progress, and breaking off |

pub mod baseline;
pub mod bound;
pub mod flow;
pub mod moments;
mod watch;

pub use baseline::{Baselines, baselines};
pub use bound::{BoundOptions, BoundReport, ReverseVariance, bound};
pub use flow::{FlowOptions, FlowReport, flow};
pub use moments::Moments;
pub use watch::Watch;

use crate::data::Dataset;
use crate::model::ImageModel;
use candle_core::{Device, Tensor};
use diffusion_core::denoiser::{Denoiser, LearnedVariance};
use diffusion_core::{Report, Result};
use serde::Serialize;

/// A mean over images and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
}

impl Spread {
    /// Of these values, one an image.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
        Self {
            mean,
            error: (squares / (n - 1.0).max(1.0) / n).sqrt(),
        }
    }
}

/// The grey levels of all images, whole numbers in f32, and how many levels there are.
///
/// # Shapes
/// `[N, C, H, W]`.
///
/// # Errors
/// `Unsupported` when the data are real numbers, which have densities but no probabilities.
pub fn levels(data: &Dataset) -> Result<(Tensor, usize)> {
    let Some(levels) = data.levels().filter(|levels| *levels > 1) else {
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

/// The model on a batch with these labels, which an unconditional one is not told.
pub(crate) fn denoiser<'a>(
    model: &'a ImageModel,
    labels: Option<&Tensor>,
) -> Result<Box<dyn Denoiser + 'a>> {
    let labels = labels.filter(|_| !model.classes().is_empty());
    let labels = labels.map(|l| l.to_vec1::<u32>()).transpose()?;
    let net = model.denoiser(labels.as_deref())?;
    Ok(
        match model.config().out_channels == 2 * model.config().in_channels {
            true => Box::new(LearnedVariance(net)),
            false => Box::new(net),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_file() {
        let digits = crate::data::open("digits").unwrap();
        let (k, count) = levels(&digits).unwrap();
        assert_eq!((k.dims(), count), (&[1797, 1, 8, 8][..], 17));
        let values = k.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let top = values.iter().copied().fold(0.0, f32::max);
        assert!(top == 16.0 && values.iter().all(|v| v.fract() == 0.0 && *v >= 0.0));
    }

    #[test]
    fn the_error_of_a_mean() {
        let ours = Spread::of(&[1.0, 2.0, 3.0, 6.0]);
        assert_eq!(ours.mean, 3.0);
        assert!((ours.error - (14.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
    }
}
