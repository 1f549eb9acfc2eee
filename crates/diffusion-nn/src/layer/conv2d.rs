//! A trainable convolution.

use crate::error::Result;
use crate::layer::Initial;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::Padding;

/// Sizes of a [`Conv2d`].
#[derive(Clone, Copy, Debug)]
pub struct Conv2dConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Height and width of the kernel.
    pub kernel: (usize, usize),
    /// Step between output positions.
    pub stride: usize,
    /// Zeros around the map.
    pub padding: Padding,
    /// Step between taps.
    pub dilation: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// How the weights begin.
    pub initial: Initial,
}

impl Conv2dConfig {
    /// A square kernel of odd side that keeps the size of the map.
    pub fn same(in_channels: usize, out_channels: usize, kernel: usize) -> Self {
        Self {
            in_channels,
            out_channels,
            kernel: (kernel, kernel),
            stride: 1,
            padding: (kernel / 2).into(),
            dilation: 1,
            bias: true,
            initial: Initial::FanIn,
        }
    }

    /// The same convolution, begun as said.
    pub fn begun(self, initial: Initial) -> Self {
        Self { initial, ..self }
    }
}

/// A convolution: see [`diffusion_ops::conv2d`]. Names: `weight`, `bias`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

impl Conv2d {
    /// A convolution of these sizes.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, config: Conv2dConfig) -> Result<Self> {
        let (h, w) = config.kernel;
        let (from, to, initial) = (config.in_channels, config.out_channels, config.initial);
        let fan_in = from * h * w;
        let init = initial.weight(fan_in, to * h * w);
        let weight = scope.param("weight", (to, from, h, w), init)?;
        let bias = config
            .bias
            .then(|| scope.param("bias", to, initial.bias(fan_in)))
            .transpose()?;
        Ok(Self {
            weight,
            bias,
            config,
        })
    }

    /// `[B, C, H, W] -> [B, K, H', W']`.
    ///
    /// # Errors
    /// If the channels don't fit or the map is too small.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, self.bias.as_ref())
    }

    /// As [`Conv2d::forward`], with `shift [B, K]` added to all pixels of each output plane.
    ///
    /// # Errors
    /// If the channels don't fit or the map is too small.
    pub fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => self.run(x, Some(&shift.broadcast_add(bias)?)),
            None => self.run(x, Some(shift)),
        }
    }

    fn run(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let Conv2dConfig {
            stride,
            padding,
            dilation,
            ..
        } = self.config;
        Ok(diffusion_ops::conv2d(
            x,
            &self.weight,
            bias,
            stride,
            padding,
            dilation,
        )?)
    }
}
