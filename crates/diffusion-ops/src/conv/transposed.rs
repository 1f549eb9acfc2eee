//! Transposed convolutions: the gradient of a convolution with respect to its map, as a layer.

use super::{Bias, Geometry, Padding, Weight, bias_gradient, input_gradient, run, weight_gradient};
use crate::cpu::{by_float, half_on_cpu, native, slice, written};
use crate::gradient::{deliver, wanted};
use crate::tape::{apply2, apply3};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

/// Transposed convolution, the adjoint of [`conv2d`](crate::conv2d) with the same weight.
///
/// ```text
/// y[b, c, o·s + i·d − top, p·s + j·d − left] += w[k, c, i, j] · x[b, k, o, p],   y = β[c] + that
/// ```
///
/// # Shapes
/// `x [B, K, H, W]`, `weight [K, C, kh, kw]`, `bias [C]`; the result is `[B, C, Ho, Wo]` with
/// `Ho = (H − 1)s + d(kh − 1) + 1 − top − bottom + output_padding.0`, and `Wo` likewise.
///
/// # Errors
/// If the shapes don't fit each other, a stride or dilation is zero, the output padding is not
/// smaller than the stride, or nothing would be left of the map.
pub fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: (usize, usize),
    padding: impl Into<Padding>,
    output_padding: (usize, usize),
    dilation: usize,
) -> Result<Tensor> {
    let padding = padding.into();
    let (batch, inputs, height, width) = x.dims4()?;
    let (outputs, channels, kernel_h, kernel_w) = weight.dims4()?;
    if outputs != inputs {
        bail!("conv_transpose2d: the map has {inputs} channels, the weight expects {outputs}");
    }
    if stride.0 == 0 || stride.1 == 0 || dilation == 0 || kernel_h == 0 || kernel_w == 0 {
        bail!(
            "conv_transpose2d: stride {stride:?}, dilation {dilation} and kernel must be at least 1"
        );
    }
    if stride.0 != stride.1 {
        // Every second row zero, say, is a map that the square stride knows how to handle.
        return stretched(x, weight, bias, stride, padding, output_padding, dilation);
    }
    let stride = stride.0;
    if output_padding.0 >= stride || output_padding.1 >= stride {
        bail!(
            "conv_transpose2d: output padding {output_padding:?}, expected less than the stride {stride}"
        );
    }
    if let Some(bias) = bias
        && bias.dims() != [channels]
    {
        bail!(
            "conv_transpose2d: the bias has shape {:?}, expected [{channels}]",
            bias.dims()
        );
    }
    let out = |size: usize, kernel: usize, pad: usize, extra: usize| -> Result<usize> {
        let full = size.saturating_sub(1) * stride + dilation * (kernel - 1) + 1 + extra;
        match full.checked_sub(pad) {
            Some(out) if out > 0 && size > 0 => Ok(out),
            _ => bail!("conv_transpose2d: padding {pad} leaves nothing of {full}"),
        }
    };
    let g = Geometry {
        batch,
        channels,
        height: out(
            height,
            kernel_h,
            padding.top + padding.bottom,
            output_padding.0,
        )?,
        width: out(
            width,
            kernel_w,
            padding.left + padding.right,
            output_padding.1,
        )?,
        kernel_h,
        kernel_w,
        out_h: height,
        out_w: width,
        stride,
        dilation,
        top: padding.top,
        left: padding.left,
        cut: None,
    };
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let bias = bias.map(wide).transpose()?;
        let (x32, weight) = (wide(x)?, wide(weight)?);
        let stride = (stride, stride);
        let y = conv_transpose2d(
            &x32,
            &weight,
            bias.as_ref(),
            stride,
            padding,
            output_padding,
            dilation,
        )?;
        return y.to_dtype(x.dtype());
    }
    if !native(x) {
        return composed(x, weight, bias, &g);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let op = Transposed { g, outputs };
    match bias {
        Some(bias) => apply3(&x, &weight, &bias.contiguous()?, op),
        None => apply2(&x, &weight, op),
    }
}

/// Transposed convolution in one dimension: [`conv_transpose2d`] on a map of height 1.
///
/// # Shapes
/// `x [B, K, L]`, `weight [K, C, k]`, `bias [C]`, `padding = (before, after)`; the result is
/// `[B, C, (L − 1)s + d(k − 1) + 1 − before − after + output_padding]`.
///
/// # Errors
/// As [`conv_transpose2d`].
pub fn conv_transpose1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: (usize, usize),
    output_padding: usize,
    dilation: usize,
) -> Result<Tensor> {
    let padding = Padding {
        top: 0,
        bottom: 0,
        left: padding.0,
        right: padding.1,
    };
    conv_transpose2d(
        &x.unsqueeze(2)?,
        &weight.unsqueeze(2)?,
        bias,
        (stride, stride),
        padding,
        (0, output_padding),
        dilation,
    )?
    .squeeze(2)
}

/// Strides that differ: the map with zeros between its rows and columns, then stride 1.
fn stretched(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: (usize, usize),
    padding: Padding,
    output_padding: (usize, usize),
    dilation: usize,
) -> Result<Tensor> {
    if output_padding.0 >= stride.0 || output_padding.1 >= stride.1 {
        bail!(
            "conv_transpose2d: output padding {output_padding:?}, expected less than the stride {stride:?}"
        );
    }
    let (batch, channels, height, width) = x.dims4()?;
    let x = x
        .reshape((batch, channels, height, 1, width, 1))?
        .pad_with_zeros(5, 0, stride.1 - 1)?
        .pad_with_zeros(3, 0, stride.0 - 1)?
        .reshape((batch, channels, height * stride.0, width * stride.1))?;
    // The zeros after the last row and column go, but for the output padding: rows beyond the
    // last one of the map are zeros anyway.
    let x = x
        .narrow(2, 0, height * stride.0 - (stride.0 - 1) + output_padding.0)?
        .narrow(3, 0, width * stride.1 - (stride.1 - 1) + output_padding.1)?
        .contiguous()?;
    conv_transpose2d(&x, weight, bias, (1, 1), padding, (0, 0), dilation)
}

struct Transposed {
    /// Of the convolution whose adjoint this is.
    g: Geometry,
    outputs: usize,
}

impl Transposed {
    fn forward(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (weight, lw): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (g, name) = (&self.g, "conv_transpose2d");
        let shape = Shape::from((g.batch, g.channels, g.height, g.width));
        let out = by_float!(x, name, T => {
            let (x, weight) = (slice::<T>(x, lx, name)?, slice::<T>(weight, lw, name)?);
            let bias = match bias {
                Some((s, l)) => Bias::new(slice::<T>(s, l, name)?, l),
                None => Bias::None,
            };
            // SAFETY: the whole map is written.
            unsafe {
                written::<T>(shape.elem_count(), |out| {
                    input_gradient(g, self.outputs, weight, x, bias, out);
                })
            }
        });
        Ok((out, shape))
    }

    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let op = |weights| Gradient {
            g: self.g,
            outputs: self.outputs,
            weights,
        };
        let grad_weight = if wanted(weight) {
            let gradient = grad.apply_op2_no_bwd(&x.detach(), &op(true))?;
            deliver(weight, gradient.reshape(weight.shape())?)?
        } else {
            None
        };
        let grad_x = if wanted(x) {
            let gradient = grad.apply_op2_no_bwd(&weight.detach(), &op(false))?;
            deliver(x, gradient.reshape(x.shape())?)?
        } else {
            None
        };
        Ok((grad_x, grad_weight))
    }
}

impl CustomOp2 for Transposed {
    fn name(&self) -> &'static str {
        "conv_transpose2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), (s2, l2), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, weight, &grad.detach().contiguous()?)
    }
}

impl CustomOp3 for Transposed {
    fn name(&self) -> &'static str {
        "conv_transpose2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), (s2, l2), Some((s3, l3)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let (grad_x, grad_weight) = self.backward(x, weight, &grad)?;
        let grad_bias = if wanted(bias) {
            deliver(bias, bias_gradient(&grad, false)?)?
        } else {
            None
        };
        Ok((grad_x, grad_weight, grad_bias))
    }
}

/// From the gradient of the result: that of the weight (with the map), or of the map (with the
/// weight), which is the convolution itself.
struct Gradient {
    g: Geometry,
    outputs: usize,
    weights: bool,
}

impl CustomOp2 for Gradient {
    fn name(&self) -> &'static str {
        "conv_transpose2d_gradient"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (g, outputs) = (&self.g, self.outputs);
        let n = if self.weights {
            outputs * g.rows()
        } else {
            g.batch * outputs * g.out_plane()
        };
        let out = by_float!(s1, self.name(), T => {
            let grad = slice::<T>(s1, l1, self.name())?;
            let other = slice::<T>(s2, l2, self.name())?;
            // SAFETY: all of either gradient is written.
            unsafe {
                written::<T>(n, |out| {
                    if self.weights {
                        weight_gradient(g, outputs, grad, other, out);
                    } else {
                        let weight = Weight::new(other, outputs, g.channels, g.taps());
                        run(g, grad, &weight, Bias::None, out);
                    }
                })
            }
        });
        Ok((out, Shape::from(n)))
    }
}

/// The same function from the tensor library's differentiable operations: the map with zeros
/// between its pixels, convolved with the flipped weight.
fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, g: &Geometry) -> Result<Tensor> {
    let (batch, inputs, height, width) = x.dims4()?;
    let s = g.stride;
    let x = if s > 1 {
        x.reshape((batch, inputs, height, 1, width, 1))?
            .pad_with_zeros(5, 0, s - 1)?
            .pad_with_zeros(3, 0, s - 1)?
            .reshape((batch, inputs, height * s, width * s))?
            .narrow(2, 0, (height - 1) * s + 1)?
            .narrow(3, 0, (width - 1) * s + 1)?
    } else {
        x.clone()
    };
    let reach = (g.dilation * (g.kernel_h - 1), g.dilation * (g.kernel_w - 1));
    let (h, w) = (x.dim(2)?, x.dim(3)?);
    // The full correlation, cut to what the padding leaves.
    let below = (g.top + g.height).saturating_sub(h + reach.0);
    let right = (g.left + g.width).saturating_sub(w + reach.1);
    let x = x
        .pad_with_zeros(2, reach.0, reach.0 + below)?
        .pad_with_zeros(3, reach.1, reach.1 + right)?
        .narrow(2, g.top, g.height + reach.0)?
        .narrow(3, g.left, g.width + reach.1)?;
    let reversed =
        |n: usize| Tensor::from_vec((0..n as u32).rev().collect::<Vec<_>>(), n, x.device());
    let flipped = weight
        .index_select(&reversed(g.kernel_h)?, 2)?
        .index_select(&reversed(g.kernel_w)?, 3)?
        .transpose(0, 1)?
        .contiguous()?;
    let forward = Geometry {
        channels: inputs,
        height: g.height + reach.0,
        width: g.width + reach.1,
        out_h: g.height,
        out_w: g.width,
        stride: 1,
        top: 0,
        left: 0,
        ..*g
    };
    super::composed(
        &x.contiguous()?,
        &flipped,
        bias,
        &forward,
        Padding::default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{at_every_level, max_abs_difference, max_relative_error, normal};

    #[test]
    fn is_the_adjoint_of_the_convolution() -> Result<()> {
        at_every_level(|_| {
            for (h, w, kernel, s, p, d) in [
                (5, 7, (3, 3), 1, Padding::from(1), 1),
                (4, 3, (4, 4), 2, 1.into(), 1),
                (
                    3,
                    5,
                    (3, 2),
                    3,
                    Padding {
                        top: 0,
                        bottom: 1,
                        left: 1,
                        right: 0,
                    },
                    2,
                ),
            ] {
                let y = normal(1, (2, 3, h, w))?;
                let weight = normal(2, (3, 2, kernel.0, kernel.1))?;
                for extra in [0, s - 1] {
                    let up = conv_transpose2d(&y, &weight, None, (s, s), p, (extra, extra), d)?;
                    let x = normal(3, up.shape().clone())?;
                    // ⟨conv(x), y⟩ = ⟨x, convᵀ(y)⟩
                    let down = crate::conv2d(&x, &weight, None, s, p, d)?;
                    let narrow = down.narrow(2, 0, h)?.narrow(3, 0, w)?;
                    let left = (narrow * &y)?.sum_all()?.to_scalar::<f64>()?;
                    let right = (&x * &up)?.sum_all()?.to_scalar::<f64>()?;
                    assert!(
                        (left - right).abs() < 1e-10 * left.abs().max(1.0),
                        "{left} {right}"
                    );
                }
            }
            Ok(())
        })
    }

    #[test]
    fn gradients_and_composition() -> Result<()> {
        for (h, w, kernel, s, p, extra, d) in [
            (3, 4, (3, 3), 1, Padding::from(1), (0, 0), 1),
            (3, 2, (4, 4), 2, 1.into(), (1, 0), 1),
            (
                2,
                3,
                (3, 2),
                3,
                Padding {
                    top: 0,
                    bottom: 1,
                    left: 1,
                    right: 0,
                },
                (2, 1),
                2,
            ),
        ] {
            let t = [
                normal(1, (2, 3, h, w))?,
                normal(2, (3, 2, kernel.0, kernel.1))?,
                normal(3, 2)?,
            ];
            let f = |t: &[Tensor]| conv_transpose2d(&t[0], &t[1], Some(&t[2]), (s, s), p, extra, d);
            let e = max_relative_error(f, &t)?;
            assert!(e < 1e-6, "{e:e}");
            let y = f(&t)?;
            let g = Geometry {
                batch: 2,
                channels: 2,
                height: y.dim(2)?,
                width: y.dim(3)?,
                kernel_h: kernel.0,
                kernel_w: kernel.1,
                out_h: h,
                out_w: w,
                stride: s,
                dilation: d,
                top: p.top,
                left: p.left,
                cut: None,
            };
            let gap = max_abs_difference(&y, &composed(&t[0], &t[1], Some(&t[2]), &g)?)?;
            assert!(gap < 1e-12, "{gap:e}");
        }
        Ok(())
    }

    #[test]
    fn strides_may_differ() -> Result<()> {
        let t = [normal(1, (2, 3, 3, 4))?, normal(2, (3, 2, 3, 8))?];
        let f = |t: &[Tensor]| {
            let padding = Padding::hw(1, 2);
            conv_transpose2d(&t[0], &t[1], None, (1, 4), padding, (0, 1), 1)
        };
        // (W − 1)·4 + 7 + 1 − 4 + 1 = 17
        assert_eq!(f(&t)?.dims4()?, (2, 2, 3, 17));
        assert!(max_relative_error(f, &t)? < 1e-6);
        let line = conv_transpose1d(
            &normal(1, (1, 2, 5))?,
            &normal(2, (2, 3, 4))?,
            None,
            2,
            (1, 1),
            0,
            1,
        )?;
        assert_eq!(line.dims3()?, (1, 3, 10));
        Ok(())
    }

    #[test]
    fn bad_shapes_are_errors() -> Result<()> {
        let (x, w) = (normal(1, (1, 2, 3, 3))?, normal(2, (3, 2, 3, 3))?);
        assert!(conv_transpose2d(&x, &w, None, (1, 1), 0, (0, 0), 1).is_err());
        let w = normal(2, (2, 3, 3, 3))?;
        assert!(conv_transpose2d(&x, &w, None, (0, 1), 0, (0, 0), 1).is_err());
        assert!(conv_transpose2d(&x, &w, None, (2, 2), 0, (2, 0), 1).is_err());
        assert!(conv_transpose2d(&x, &w, None, (1, 1), 9, (0, 0), 1).is_err());
        Ok(())
    }
}
