//! Convolutions in two and one dimensions, and their transposes.
//!
//! On the CPU a 3×3 kernel of stride 1 goes through Winograd's minimal filtering where that is
//! cheaper ([`winograd`]), everything else through products with panels of patches ([`direct`]).

mod direct;
mod geometry;
mod op;
mod route;
mod transposed;
mod view;
mod winograd;
mod winograd_tile;
mod winograd_transform;

use crate::cpu::{half_on_cpu, native};
use crate::tape::{apply2, apply3};
use candle_core::{DType, Result, Tensor};
pub(crate) use geometry::Geometry;
use op::{Conv, bias_gradient, input_gradient, run, weight_gradient};
use route::Route;
pub use route::{WINOGRAD_VARIABLE, Winograd, set_winograd, winograd};
pub use transposed::{conv_transpose1d, conv_transpose2d};
use view::{Bias, Weight};

/// Zeros around a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding {
    /// The same number of zeros above and below (`h`), and to the left and right (`w`).
    pub fn hw(h: usize, w: usize) -> Self {
        Self {
            top: h,
            bottom: h,
            left: w,
            right: w,
        }
    }
}

impl From<usize> for Padding {
    fn from(p: usize) -> Self {
        Self::hw(p, p)
    }
}

/// Two-dimensional convolution (a cross-correlation, as everywhere in the field).
///
/// ```text
/// y[b, k, o, p] = β[k] + Σ_{c,i,j} w[k, c, i, j] · x[b, c, o·s + i·d − top, p·s + j·d − left]
/// ```
///
/// where `s` is the stride, `d` the dilation and `x` is zero outside the map.
///
/// # Shapes
/// `x [B, C, H, W]`, `weight [K, C, kh, kw]`, `bias [K]`, or `[B, K]` for a shift of each element's
/// own (such as a projected time); the result is `[B, K, Ho, Wo]` with
/// `Ho = ⌊(H + top + bottom − d(kh − 1) − 1)/s⌋ + 1`, and `Wo` likewise.
///
/// # Errors
/// If the shapes don't fit each other, a stride or dilation is zero, or the kernel is larger than
/// the padded map.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: impl Into<Padding>,
    dilation: usize,
) -> Result<Tensor> {
    let padding = padding.into();
    let g = Geometry::new(x, weight, bias, stride, padding, dilation)?;
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let bias = bias.map(wide).transpose()?;
        return conv2d(
            &wide(x)?,
            &wide(weight)?,
            bias.as_ref(),
            stride,
            padding,
            dilation,
        )?
        .to_dtype(x.dtype());
    }
    if !native(x) {
        return composed(x, weight, bias, &g, padding);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let op = Conv {
        outputs: weight.dim(0)?,
        g,
    };
    match bias {
        Some(bias) => apply3(&x, &weight, &bias.contiguous()?, op),
        None => apply2(&x, &weight, op),
    }
}

/// One-dimensional convolution: [`conv2d`] on a map of height 1.
///
/// ```text
/// y[b, k, p] = β[k] + Σ_{c,j} w[k, c, j] · x[b, c, p·s + j·d − before]
/// ```
///
/// # Shapes
/// `x [B, C, L]`, `weight [K, C, k]`, `bias [K]` or `[B, K]`, `padding = (before, after)`; the result
/// is `[B, K, ⌊(L + before + after − d(k − 1) − 1)/s⌋ + 1]`.
///
/// # Errors
/// As [`conv2d`].
pub fn conv1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: (usize, usize),
    dilation: usize,
) -> Result<Tensor> {
    let padding = Padding {
        top: 0,
        bottom: 0,
        left: padding.0,
        right: padding.1,
    };
    conv2d(
        &x.unsqueeze(2)?,
        &weight.unsqueeze(2)?,
        bias,
        stride,
        padding,
        dilation,
    )?
    .squeeze(2)
}

/// The same function from the tensor library's differentiable operations, one slice a tap.
fn composed(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    g: &Geometry,
    padding: Padding,
) -> Result<Tensor> {
    let x = x
        .pad_with_zeros(2, padding.top, padding.bottom)?
        .pad_with_zeros(3, padding.left, padding.right)?;
    let take = |x: &Tensor, dim: usize, tap: usize, out: usize| -> Result<Tensor> {
        let start = (tap * g.dilation) as u32;
        let index: Vec<u32> = (0..out).map(|o| start + (o * g.stride) as u32).collect();
        x.index_select(&Tensor::from_vec(index, out, x.device())?, dim)
    };
    let mut taps = Vec::with_capacity(g.kernel_h * g.kernel_w);
    for i in 0..g.kernel_h {
        let rows = take(&x, 2, i, g.out_h)?;
        for j in 0..g.kernel_w {
            taps.push(take(&rows, 3, j, g.out_w)?);
        }
    }
    let cols = Tensor::stack(&taps, 2)?.reshape((g.batch, g.rows(), g.out_h * g.out_w))?;
    let out_channels = weight.dim(0)?;
    let y = weight
        .reshape((1, out_channels, g.rows()))?
        .broadcast_matmul(&cols)?
        .reshape((g.batch, out_channels, g.out_h, g.out_w))?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape(((), out_channels, 1, 1))?),
        None => Ok(y),
    }
}

#[cfg(test)]
mod tests;
