//! Convolutions in two and one dimensions, and their transposes.
//!
//! On the CPU a 3×3 kernel of stride 1 goes through Winograd's minimal filtering where that is
//! cheaper ([`winograd`]), everything else through products with panels of patches ([`direct`]).

mod direct;
mod geometry;
mod route;
mod transposed;
mod winograd;
mod winograd_tile;

use crate::cpu::{Real, by_float, half_on_cpu, native, slice, sum1, worth, written};
use crate::gradient::{deliver, wanted};
use crate::simd::{Kernel, Simd, dispatch};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor,
};
pub(crate) use geometry::Geometry;
use rayon::prelude::*;
use route::Route;
pub use route::{WINOGRAD_VARIABLE, Winograd, set_winograd, winograd};
pub use transposed::{conv_transpose1d, conv_transpose2d};
use winograd_tile::{Column, F2, F4};

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

/// The weights of a convolution, seen from either side.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a, T> {
    values: &'a [T],
    outputs: usize,
    inputs: usize,
    /// Elements from one output, and from one input, to the next.
    strides: (usize, usize),
    /// Whether the taps are taken in reverse.
    flip: bool,
    taps: usize,
}

impl<'a, T: Real> Weight<'a, T> {
    /// `values [K, C, taps]`, as the forward pass uses them.
    fn new(values: &'a [T], outputs: usize, inputs: usize, taps: usize) -> Self {
        assert!(values.len() == outputs * inputs * taps);
        Self {
            values,
            outputs,
            inputs,
            strides: (inputs * taps, taps),
            flip: false,
            taps,
        }
    }

    /// As the gradient of the map uses them: from K to C, and the taps reversed.
    fn adjoint(self) -> Self {
        Self {
            outputs: self.inputs,
            inputs: self.outputs,
            strides: (self.strides.1, self.strides.0),
            flip: !self.flip,
            ..self
        }
    }

    /// The taps between output `k` and input `c`, to be read through [`Weight::tap`].
    #[inline(always)]
    fn taps(&self, k: usize, c: usize) -> &'a [T] {
        &self.values[k * self.strides.0 + c * self.strides.1..][..self.taps]
    }

    /// Where tap `i` of `n` lies.
    #[inline(always)]
    fn tap(&self, i: usize, n: usize) -> usize {
        if self.flip { n - 1 - i } else { i }
    }

    /// `[outputs, inputs · taps]`, copied if it does not lie so.
    fn matrix(&self) -> std::borrow::Cow<'a, [T]> {
        if !self.flip {
            return self.values.into();
        }
        let mut out = Vec::with_capacity(self.values.len());
        for k in 0..self.outputs {
            for c in 0..self.inputs {
                out.extend(self.taps(k, c).iter().rev());
            }
        }
        out.into()
    }
}

/// What is added to the outputs.
#[derive(Clone, Copy)]
pub(crate) enum Bias<'a, T> {
    None,
    /// `[K]`
    Shared(&'a [T]),
    /// `[B, K]`, and K.
    PerItem(&'a [T], usize),
}

impl<'a, T> Bias<'a, T> {
    fn new(values: &'a [T], layout: &Layout) -> Self {
        match layout.dims() {
            [_, outputs] => Self::PerItem(values, *outputs),
            _ => Self::Shared(values),
        }
    }

    /// The values for `n` outputs from `k` on of batch element `item`.
    #[inline(always)]
    fn of(&self, item: usize, k: usize, n: usize) -> Option<&'a [T]> {
        match self {
            Self::None => None,
            Self::Shared(values) => values.get(k..k + n),
            Self::PerItem(values, outputs) => {
                values.get(item * outputs + k..item * outputs + k + n)
            }
        }
    }
}

struct Conv {
    g: Geometry,
    outputs: usize,
}

impl Conv {
    fn forward(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (weight, lw): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let g = &self.g;
        let shape = Shape::from((g.batch, self.outputs, g.out_h, g.out_w));
        let out = by_float!(x, "conv2d", T => {
            let (x, weight) = (slice::<T>(x, lx, "conv2d")?, slice::<T>(weight, lw, "conv2d")?);
            let weight = Weight::new(weight, self.outputs, g.channels, g.taps());
            let bias = match bias {
                Some((s, l)) => Bias::new(slice::<T>(s, l, "conv2d")?, l),
                None => Bias::None,
            };
            // SAFETY: every route writes every output.
            unsafe { written::<T>(shape.elem_count(), |out| run(g, x, &weight, bias, out)) }
        });
        Ok((out, shape))
    }

    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad_weight = if wanted(weight) {
            let op = WeightGradient(self.g, self.outputs);
            deliver(
                weight,
                x.detach()
                    .apply_op2_no_bwd(grad, &op)?
                    .reshape(weight.shape())?,
            )?
        } else {
            None
        };
        let grad_x = if wanted(x) {
            let op = InputGradient(self.g, self.outputs);
            deliver(x, weight.detach().apply_op2_no_bwd(grad, &op)?)?
        } else {
            None
        };
        Ok((grad_x, grad_weight))
    }
}

/// `y = w ⋆ x + β` by the cheapest route.
fn run<T: Real>(g: &Geometry, x: &[T], weight: &Weight<'_, T>, bias: Bias<'_, T>, out: &mut [T]) {
    if out.is_empty() {
        return;
    }
    let route = Route::forward(g, weight.outputs);
    match (route, g.folded()) {
        (Route::Four, Some(g)) => {
            return winograd::forward::<Column<F4>, T>(&g, x, weight, bias, out);
        }
        (Route::Two, Some(g)) => {
            return winograd::forward::<Column<F2>, T>(&g, x, weight, bias, out);
        }
        _ => {}
    }
    match route {
        Route::Four => winograd::forward::<F4, T>(g, x, weight, bias, out),
        Route::Two => winograd::forward::<F2, T>(g, x, weight, bias, out),
        Route::Direct => direct::forward(g, weight.outputs, x, &weight.matrix(), bias, out),
    }
}

impl CustomOp2 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
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

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
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
            deliver(bias, bias_gradient(&grad, bias.rank() == 2)?)?
        } else {
            None
        };
        Ok((grad_x, grad_weight, grad_bias))
    }
}

/// `[B, K, ...] -> [K]`, or `[B, K]` for a bias of each element's own: the sums over all else.
fn bias_gradient(grad: &Tensor, per_item: bool) -> Result<Tensor> {
    grad.apply_op1_no_bwd(&PlaneSums { per_item })
}

struct PlaneSums {
    per_item: bool,
}

impl CustomOp1 for PlaneSums {
    fn name(&self) -> &'static str {
        "conv2d_bias_gradient"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, outputs) = (l.dims()[0], l.dims()[1]);
        let plane = l.dims()[2..].iter().product::<usize>();
        let (n, items) = if self.per_item {
            (batch * outputs, 1)
        } else {
            (outputs, batch)
        };
        let out = by_float!(s, self.name(), T => {
            let grad = slice::<T>(s, l, self.name())?;
            // SAFETY: every sum is written.
            unsafe {
                written::<T>(n, |out| {
                    let work = worth(plane * items);
                    out.par_iter_mut().with_min_len(work).enumerate().for_each(|(k, out)| {
                        *out = dispatch(Sum { grad, first: k * plane, step: outputs * plane, items, plane });
                    });
                })
            }
        });
        let shape = if self.per_item {
            Shape::from((batch, outputs))
        } else {
            Shape::from(outputs)
        };
        Ok((out, shape))
    }
}

/// The sum over `items` planes, in order.
struct Sum<'a, T> {
    grad: &'a [T],
    first: usize,
    step: usize,
    items: usize,
    plane: usize,
}

impl<T: Real> Kernel for Sum<'_, T> {
    type Out = T;
    #[inline(always)]
    fn run<S: Simd>(self) -> T {
        let mut sum = T::zero();
        for item in 0..self.items {
            sum += sum1(
                &self.grad[self.first + item * self.step..][..self.plane],
                |v| v,
            );
        }
        sum
    }
}

/// `∂L/∂w` from the map and the gradient of the output.
struct WeightGradient(Geometry, usize);

impl CustomOp2 for WeightGradient {
    fn name(&self) -> &'static str {
        "conv2d_weight_gradient"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (g, outputs) = (&self.0, self.1);
        let n = outputs * g.rows();
        let out = by_float!(s1, self.name(), T => {
            let (x, grad) = (slice::<T>(s1, l1, self.name())?, slice::<T>(s2, l2, self.name())?);
            // SAFETY: every route writes every weight's gradient.
            unsafe { written::<T>(n, |out| weight_gradient(g, outputs, x, grad, out)) }
        });
        Ok((out, Shape::from(n)))
    }
}

fn weight_gradient<T: Real>(g: &Geometry, outputs: usize, x: &[T], grad: &[T], out: &mut [T]) {
    if grad.is_empty() {
        out.fill(T::zero());
        return;
    }
    let route = Route::weight_gradient(g, outputs);
    match (route, g.folded()) {
        (Route::Four, Some(g)) => {
            return winograd::weight_gradient::<Column<F4>, T>(&g, outputs, x, grad, out);
        }
        (Route::Two, Some(g)) => {
            return winograd::weight_gradient::<Column<F2>, T>(&g, outputs, x, grad, out);
        }
        _ => {}
    }
    match route {
        Route::Four => {
            winograd::weight_gradient::<F4, T>(g, outputs, x, grad, out);
        }
        Route::Two => {
            winograd::weight_gradient::<F2, T>(g, outputs, x, grad, out);
        }
        Route::Direct => direct::weight_gradient(g, outputs, x, grad, out),
    }
}

/// `∂L/∂x` from the weight and the gradient of the output.
struct InputGradient(Geometry, usize);

impl CustomOp2 for InputGradient {
    fn name(&self) -> &'static str {
        "conv2d_input_gradient"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (g, outputs) = (&self.0, self.1);
        let shape = Shape::from((g.batch, g.channels, g.height, g.width));
        let out = by_float!(s1, self.name(), T => {
            let (w, grad) = (slice::<T>(s1, l1, self.name())?, slice::<T>(s2, l2, self.name())?);
            // SAFETY: every route writes the whole map.
            unsafe { written::<T>(shape.elem_count(), |out| input_gradient(g, outputs, w, grad, Bias::None, out)) }
        });
        Ok((out, shape))
    }
}

fn input_gradient<T: Real>(
    g: &Geometry,
    outputs: usize,
    weight: &[T],
    grad: &[T],
    bias: Bias<'_, T>,
    out: &mut [T],
) {
    let weights = Weight::new(weight, outputs, g.channels, g.taps());
    match g.adjoint(outputs) {
        Some(adjoint) => run(&adjoint, grad, &weights.adjoint(), bias, out),
        None => direct::input_gradient(g, outputs, weight, grad, bias, out),
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
        Some(bias) => y.broadcast_add(&bias.reshape(((), out_channels, 1, 1))?),
        None => Ok(y),
    }
}

#[cfg(test)]
mod tests;
