//! Convolutions in two and one dimensions.
//!
//! On the CPU the patches become the columns of one matrix ([`crate::im2col`]), so that a layer is
//! a single product for the whole batch. The columns are dropped after the forward pass and made
//! anew in the backward: they are as many times larger than the map as the kernel has taps.

use crate::cpu::{by_float, filled, half_on_cpu, native, slice, sum1, worth};
use crate::im2col::{Col2Im, Geometry, Im2Col};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor,
    bail,
};
use rayon::prelude::*;
use std::sync::Mutex;

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
/// `x [B, C, H, W]`, `weight [K, C, kh, kw]`, `bias [K]`; the result is `[B, K, Ho, Wo]` with
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
    let g = geometry(x, weight, bias, stride, padding, dilation)?;
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
    let out_channels = weight.dim(0)?;
    let matrix = weight.detach().reshape((out_channels, g.rows()))?;
    let product = matrix.matmul(&columns(&x.detach(), &g)?)?;
    let op = Conv {
        g,
        out_channels,
        product: Mutex::new(Some(product)),
    };
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op),
        None => x.apply_op2(&weight, op),
    }
}

/// One-dimensional convolution: [`conv2d`] on a map of height 1.
///
/// ```text
/// y[b, k, p] = β[k] + Σ_{c,j} w[k, c, j] · x[b, c, p·s + j·d − before]
/// ```
///
/// # Shapes
/// `x [B, C, L]`, `weight [K, C, k]`, `bias [K]`, `padding = (before, after)`; the result is
/// `[B, K, ⌊(L + before + after − d(k − 1) − 1)/s⌋ + 1]`.
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

fn geometry(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
    dilation: usize,
) -> Result<Geometry> {
    let (batch, channels, height, width) = x.dims4()?;
    let (out_channels, in_channels, kernel_h, kernel_w) = weight.dims4()?;
    if in_channels != channels {
        bail!("conv2d: the map has {channels} channels, the weight expects {in_channels}");
    }
    if let Some(bias) = bias
        && bias.dims() != [out_channels]
    {
        bail!(
            "conv2d: the bias has shape {:?}, expected [{out_channels}]",
            bias.dims()
        );
    }
    if stride == 0 || dilation == 0 || kernel_h == 0 || kernel_w == 0 {
        bail!("conv2d: stride {stride}, dilation {dilation} and kernel must be at least 1");
    }
    let out = |size: usize, pad: usize, kernel: usize| -> Result<usize> {
        let span = dilation * (kernel - 1) + 1;
        match (size + pad).checked_sub(span) {
            Some(room) => Ok(room / stride + 1),
            None => bail!(
                "conv2d: a kernel spanning {span} on a map padded to {}",
                size + pad
            ),
        }
    };
    Ok(Geometry {
        batch,
        channels,
        height,
        width,
        kernel_h,
        kernel_w,
        out_h: out(height, padding.top + padding.bottom, kernel_h)?,
        out_w: out(width, padding.left + padding.right, kernel_w)?,
        stride,
        dilation,
        top: padding.top,
        left: padding.left,
    })
}

/// The columns of an untracked map.
fn columns(x: &Tensor, g: &Geometry) -> Result<Tensor> {
    if g.is_pointwise() && g.batch == 1 {
        return x.reshape((g.rows(), g.columns()));
    }
    x.apply_op1_no_bwd(&Im2Col(*g))
}

/// Joins the product of weight and columns to the graph of its inputs.
struct Conv {
    g: Geometry,
    out_channels: usize,
    /// The product, until the forward pass takes it.
    product: Mutex<Option<Tensor>>,
}

impl Conv {
    /// `[K, B·Ho·Wo] -> [B, K, Ho, Wo]`, with the bias added on the way.
    fn forward(&self, bias: Option<(&CpuStorage, &Layout)>) -> Result<(CpuStorage, Shape)> {
        let g = &self.g;
        let shape = Shape::from((g.batch, self.out_channels, g.out_h, g.out_w));
        let taken = self.product.lock().ok().and_then(|mut slot| slot.take());
        let Some(product) = taken else {
            bail!("conv2d: the forward pass ran twice")
        };
        let (storage, layout) = product.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("conv2d: the product left the CPU")
        };
        let (plane, batch, channels) = (g.out_h * g.out_w, g.batch, self.out_channels);
        let out = by_float!(storage, "conv2d", T => {
            let product = slice::<T>(storage, layout, "conv2d")?;
            let bias = bias.map(|(s, l)| slice::<T>(s, l, "conv2d")).transpose()?;
            filled::<T>(shape.elem_count(), |out| {
                if plane > 0 {
                    out.par_chunks_mut(plane).with_min_len(worth(plane)).enumerate().for_each(|(k, out)| {
                        let (b, c) = (k / channels, k % channels);
                        let row = &product[(c * batch + b) * plane..][..plane];
                        let shift = bias.map_or(0.0, |bias| bias[c]);
                        for (o, v) in out.iter_mut().zip(row) {
                            *o = *v + shift;
                        }
                    });
                }
            })
        });
        Ok((out, shape))
    }

    /// The gradients of map, weight and bias, the last as a function of the transposed gradient.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Tensor)> {
        let g = &self.g;
        let transpose = Geometry::transpose(g.batch, self.out_channels, g.out_h, g.out_w);
        let grad = columns(&grad.detach().contiguous()?, &transpose)?;
        let grad_weight = if weight.track_op() {
            let cols = columns(&x.detach(), g)?;
            Some(grad.matmul(&cols.t()?)?.reshape(weight.shape())?)
        } else {
            None
        };
        let grad_x = if x.track_op() {
            let matrix = weight.detach().reshape((self.out_channels, g.rows()))?;
            Some(matrix.t()?.matmul(&grad)?.apply_op1_no_bwd(&Col2Im(*g))?)
        } else {
            None
        };
        Ok((grad_x, grad_weight, grad))
    }
}

impl CustomOp2 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad_x, grad_weight, _) = self.backward(x, weight, grad)?;
        Ok((grad_x, grad_weight))
    }
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(Some((s3, l3)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (grad_x, grad_weight, columns) = self.backward(x, weight, grad)?;
        let grad_bias = bias
            .track_op()
            .then(|| columns.apply_op1_no_bwd(&RowSums))
            .transpose()?;
        Ok((grad_x, grad_weight, grad_bias))
    }
}

/// `[R, N] -> [R]`.
struct RowSums;

impl CustomOp1 for RowSums {
    fn name(&self) -> &'static str {
        "row_sums"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, n) = l.shape().dims2()?;
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            filled::<T>(rows, |out| {
                out.par_iter_mut()
                    .with_min_len(worth(n))
                    .enumerate()
                    .for_each(|(r, o)| *o = sum1(&x[r * n..][..n], |v| v));
            })
        });
        Ok((out, Shape::from(rows)))
    }
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
        Some(bias) => y.broadcast_add(&bias.reshape((1, out_channels, 1, 1))?),
        None => Ok(y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, max_relative_error, normal};

    /// Batch, in, out, height, width, kernel (h, w), stride, padding, dilation.
    type Case = (
        usize,
        usize,
        usize,
        usize,
        usize,
        (usize, usize),
        usize,
        Padding,
        usize,
    );

    fn cases() -> Vec<Case> {
        let pad = |top, bottom, left, right| Padding {
            top,
            bottom,
            left,
            right,
        };
        vec![
            (2, 3, 4, 5, 7, (3, 3), 1, 1.into(), 1),
            (2, 3, 2, 5, 8, (3, 3), 2, 1.into(), 1),
            (2, 2, 3, 6, 5, (3, 3), 2, pad(0, 1, 0, 1), 1),
            (1, 2, 3, 7, 6, (3, 2), 2, pad(2, 0, 1, 3), 2),
            (3, 4, 2, 3, 5, (1, 1), 1, 0.into(), 1),
            (1, 4, 2, 3, 5, (1, 1), 1, 0.into(), 1),
            (2, 2, 2, 5, 4, (1, 1), 2, 0.into(), 1),
            (2, 2, 2, 2, 3, (5, 3), 1, pad(4, 5, 0, 2), 1),
            (1, 1, 1, 9, 1, (4, 1), 3, pad(1, 0, 0, 0), 2),
        ]
    }

    fn data(case: &Case) -> Result<[Tensor; 3]> {
        let (b, c, k, h, w, kernel, ..) = *case;
        Ok([
            normal(1, (b, c, h, w))?,
            normal(2, (k, c, kernel.0, kernel.1))?,
            normal(3, k)?,
        ])
    }

    #[test]
    fn forward_equals_the_definition() -> Result<()> {
        for case in cases() {
            let (b, c, k, h, w, kernel, s, p, d) = case;
            let [x, weight, bias] = data(&case)?;
            let y = conv2d(&x, &weight, Some(&bias), s, p, d)?;
            let (_, _, oh, ow) = y.dims4()?;
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
            let (x, weight, bias, y) = (flat(&x)?, flat(&weight)?, flat(&bias)?, flat(&y)?);
            let mut at = 0;
            for (bi, ki) in (0..b).flat_map(|b| (0..k).map(move |k| (b, k))) {
                for (o, q) in (0..oh).flat_map(|o| (0..ow).map(move |q| (o, q))) {
                    let mut sum = bias[ki];
                    for ci in 0..c {
                        for (i, j) in (0..kernel.0).flat_map(|i| (0..kernel.1).map(move |j| (i, j)))
                        {
                            let yy = (o * s + i * d) as isize - p.top as isize;
                            let xx = (q * s + j * d) as isize - p.left as isize;
                            if (0..h as isize).contains(&yy) && (0..w as isize).contains(&xx) {
                                sum += weight[((ki * c + ci) * kernel.0 + i) * kernel.1 + j]
                                    * x[((bi * c + ci) * h + yy as usize) * w + xx as usize];
                            }
                        }
                    }
                    assert!(
                        (sum - y[at]).abs() < 1e-12,
                        "{case:?} at {at}: {sum} {}",
                        y[at]
                    );
                    at += 1;
                }
            }
            assert_eq!(at, y.len());
        }
        Ok(())
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        for case in cases() {
            let (.., s, p, d) = case;
            let inputs = data(&case)?;
            let e = max_relative_error(|t| conv2d(&t[0], &t[1], Some(&t[2]), s, p, d), &inputs)?;
            assert!(e < 1e-6, "{case:?}: {e:e}");
            let e = max_relative_error(|t| conv2d(&t[0], &t[1], None, s, p, d), &inputs[..2])?;
            assert!(e < 1e-6, "{case:?} without bias: {e:e}");
        }
        Ok(())
    }

    #[test]
    fn kernel_and_composition_agree() -> Result<()> {
        for case in cases() {
            let (.., s, p, d) = case;
            let inputs = data(&case)?;
            let [x, weight, bias] = &inputs;
            let g = geometry(x, weight, Some(bias), s, p, d)?;
            let gap = max_abs_difference(
                &conv2d(x, weight, Some(bias), s, p, d)?,
                &composed(x, weight, Some(bias), &g, p)?,
            )?;
            assert!(gap < 1e-12, "{case:?}: {gap:e}");
            let e = max_relative_error(|t| composed(&t[0], &t[1], Some(&t[2]), &g, p), &inputs)?;
            assert!(e < 1e-6, "{case:?}: {e:e}");
        }
        Ok(())
    }

    #[test]
    fn one_dimension_and_half_precision() -> Result<()> {
        let inputs = [normal(1, (3, 2, 9))?, normal(2, (4, 2, 3))?, normal(3, 4)?];
        let f = |t: &[Tensor]| conv1d(&t[0], &t[1], Some(&t[2]), 2, (2, 1), 2);
        assert!(max_relative_error(f, &inputs)? < 1e-6);
        let wide = f(&inputs)?;
        let half: Vec<Tensor> = inputs
            .iter()
            .map(|t| t.to_dtype(DType::BF16))
            .collect::<Result<_>>()?;
        let half = f(&half)?;
        assert_eq!(half.dtype(), DType::BF16);
        assert!(max_abs_difference(&wide, &half)? < 0.1);
        Ok(())
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let case: Case = (4, 8, 16, 9, 11, (3, 3), 2, 1.into(), 1);
        let run = |threads: usize| -> Result<Vec<Vec<f32>>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(candle_core::Error::wrap)?.install(|| {
                let vars: Vec<candle_core::Var> = data(&case)?
                    .iter()
                    .map(|t| candle_core::Var::from_tensor(&t.to_dtype(DType::F32)?))
                    .collect::<Result<_>>()?;
                let y = conv2d(&vars[0], &vars[1], Some(&vars[2]), case.6, case.7, case.8)?;
                let grads = y.sqr()?.sum_all()?.backward()?;
                let mut all = vec![y.flatten_all()?.to_vec1::<f32>()?];
                for v in &vars {
                    all.push(grads.get(v).unwrap().flatten_all()?.to_vec1::<f32>()?);
                }
                Ok(all)
            })
        };
        assert_eq!(run(1)?, run(2)?);
        assert_eq!(run(1)?, run(5)?);
        Ok(())
    }

    #[test]
    fn bad_shapes_are_errors() -> Result<()> {
        let (x, w) = (normal(1, (1, 2, 3, 3))?, normal(2, (1, 3, 3, 3))?);
        assert!(conv2d(&x, &w, None, 1, 1, 1).is_err());
        let w = normal(2, (1, 2, 5, 5))?;
        let error = conv2d(&x, &w, None, 1, 0, 1).unwrap_err().to_string();
        assert!(error.contains("spanning 5"), "{error}");
        assert!(conv2d(&x, &w, None, 0, 2, 1).is_err());
        Ok(())
    }
}
