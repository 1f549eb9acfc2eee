//! The convolution as an operation of the graph, and the route of each of its products.

use super::winograd_tile::{Column, F2, F4};
use super::{Bias, Geometry, Route, Weight, direct, winograd};
use crate::cpu::{Real, by_float, slice, sum1, worth, written};
use crate::gradient::{deliver, wanted};
use crate::simd::{Kernel, Simd, dispatch};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

pub(super) struct Conv {
    pub g: Geometry,
    pub outputs: usize,
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
pub(super) fn run<T: Real>(
    g: &Geometry,
    x: &[T],
    weight: &Weight<'_, T>,
    bias: Bias<'_, T>,
    out: &mut [T],
) {
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
pub(super) fn bias_gradient(grad: &Tensor, per_item: bool) -> Result<Tensor> {
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

pub(super) fn weight_gradient<T: Real>(
    g: &Geometry,
    outputs: usize,
    x: &[T],
    grad: &[T],
    out: &mut [T],
) {
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

pub(super) fn input_gradient<T: Real>(
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
