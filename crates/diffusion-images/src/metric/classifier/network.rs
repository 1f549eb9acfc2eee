//! The networks of the classifier.

use crate::from_nn;
use candle_core::{D, Tensor};
use diffusion_core::Result;
use diffusion_core::train::{Loss, Objective, StepCtx};
use diffusion_nn::Scope;
use diffusion_nn::layer::{Conv2d, Conv2dConfig, Linear};

/// Convolutions halve a map until its longer side has at most this many pixels.
const SMALL_MAP: usize = 8;
/// The most channels of a convolution, as a multiple of the first one's.
const WIDEN: usize = 4;

/// What turns an image into features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Two rectified layers over all pixels, for images of a few hundred pixels.
    Dense {
        /// Width of the first layer.
        hidden: usize,
    },
    /// Convolutions that halve the map until its longer side has at most 8 pixels, the first of 5×5 and
    /// the others of 3×3 pixels, one more of that size, and one rectified layer over what is left.
    Convolutional {
        /// Channels of the first convolution; they double with each further one, up to four times these.
        channels: usize,
    },
}

/// Sizes of a network: image shape (C, H, W), features, classes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub shape: (usize, usize, usize),
    pub features: usize,
    pub classes: usize,
}

/// Rectified layers, the last of which gives the features, and a linear one.
#[derive(Debug)]
pub(super) struct Layers {
    convolutions: Vec<Conv2d>,
    dense: Vec<Linear>,
    head: Linear,
}

impl Layers {
    pub(super) fn new(
        scope: &Scope,
        architecture: Architecture,
        sizes: Sizes,
    ) -> diffusion_nn::Result<Self> {
        let (channels, height, width) = sizes.shape;
        let (mut convolutions, mut widths) = (Vec::new(), Vec::new());
        match architecture {
            Architecture::Dense { hidden } => widths.extend([channels * height * width, hidden]),
            Architecture::Convolutional { channels: first } => {
                let (mut inputs, mut outputs) = (channels, first);
                let (mut height, mut width) = (height, width);
                let mut layer = |inputs, outputs, kernel, stride| {
                    let config = Conv2dConfig {
                        stride,
                        ..Conv2dConfig::same(inputs, outputs, kernel)
                    };
                    let name = scope.sub("convolutions").sub(convolutions.len());
                    convolutions.push(Conv2d::new(&name, config)?);
                    diffusion_nn::Result::Ok(())
                };
                loop {
                    let halve = height.max(width) > SMALL_MAP;
                    let kernel = if inputs == channels { 5 } else { 3 };
                    layer(inputs, outputs, kernel, if halve { 2 } else { 1 })?;
                    if !halve {
                        break;
                    }
                    (height, width) = (height.div_ceil(2), width.div_ceil(2));
                    (inputs, outputs) = (outputs, (2 * outputs).min(WIDEN * first));
                }
                widths.push(outputs * height * width);
            }
        }
        widths.push(sizes.features);
        let dense = widths.windows(2).enumerate();
        let dense = dense
            .map(|(i, w)| Linear::new(&scope.sub("dense").sub(i), w[0], w[1], true))
            .collect::<diffusion_nn::Result<Vec<_>>>()?;
        Ok(Self {
            convolutions,
            dense,
            head: Linear::new(&scope.sub("head"), sizes.features, sizes.classes, true)?,
        })
    }

    /// `[B, C, H, W]` to `[B, features]`.
    pub(super) fn features(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = images.clone();
        for layer in &self.convolutions {
            x = diffusion_ops::relu(&layer.forward(&x).map_err(from_nn)?)?;
        }
        x = x.flatten_from(1)?;
        for layer in &self.dense {
            x = diffusion_ops::relu(&layer.forward(&x).map_err(from_nn)?)?;
        }
        Ok(x)
    }

    /// `[B, C, H, W]` to `[B, classes]`.
    pub(super) fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.features(images)?).map_err(from_nn)
    }
}

/// The network in training.
pub(super) struct Fit {
    pub layers: Layers,
}

impl Objective for Fit {
    /// Images `[B, C, H, W]` and labels `[B, 1]`.
    type Batch = (Tensor, Tensor);

    fn losses(&mut self, _: usize, (x, labels): &Self::Batch, _: &StepCtx) -> Result<Vec<Loss>> {
        let logits = self.layers.logits(x)?;
        // The maximum is a constant: it cancels in the softmax.
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_likelihood = (shifted.gather(labels, 1)? - log_sum)?;
        Ok(vec![Loss::new(
            "cross-entropy",
            log_likelihood.mean_all()?.neg()?,
        )])
    }

    fn writes_parameters(&self) -> bool {
        false
    }
}
