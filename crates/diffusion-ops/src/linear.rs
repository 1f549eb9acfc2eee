//! Affine maps of the last axis.

use crate::bias::add_last;
use crate::cpu::{by_float, half_on_cpu, native, slice};
use crate::gradient::{deliver, wanted};
use crate::tape::{apply2, apply3};
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor,
    WithDType, bail,
};

mod kernel;
pub(crate) mod panels;

use kernel::{Right2d, product, weight_gradient};

/// An affine map of the last axis.
///
/// ```text
/// y = x Wᵀ + β
/// ```
///
/// # Shapes
/// `x [..., I]`, `weight [O, I]`, `bias [O]`; the result is `[..., O]`.
///
/// # Errors
/// If the last axis of `x` is not `I`, or the bias not of length `O`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    if x.dims().last() != Some(&inputs) {
        bail!(
            "linear: an input of shape {:?}, expected [..., {inputs}]",
            x.dims()
        )
    }
    if let Some(bias) = bias
        && bias.dims() != [outputs]
    {
        bail!(
            "linear: a bias of shape {:?}, expected [{outputs}]",
            bias.dims()
        )
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let bias = bias.map(wide).transpose()?;
        return linear(&wide(x)?, &wide(weight)?, bias.as_ref())?.to_dtype(x.dtype());
    }
    if !native(x) {
        return composed(x, weight, bias);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        Some(bias) => apply3(&x, &weight, &bias.contiguous()?, Affine),
        None => apply2(&x, &weight, Affine),
    }
}

/// The same map from the tensor library's differentiable operations.
fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = shape[..shape.len() - 1].iter().product::<usize>();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let y = x.reshape((rows, inputs))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => add_last(&y, bias)?,
        None => y,
    };
    y.reshape(shape)
}

const NAME: &str = "linear";

struct Affine;

/// Outputs, inputs and rows of an affine map.
fn sizes(x: &Shape, weight: &Shape) -> Result<(usize, usize, usize)> {
    let (outputs, inputs) = weight.dims2()?;
    let rows = x.dims()[..x.rank() - 1].iter().product();
    Ok((outputs, inputs, rows))
}

fn forward(
    (s1, l1): (&CpuStorage, &Layout),
    (s2, l2): (&CpuStorage, &Layout),
    bias: Option<(&CpuStorage, &Layout)>,
) -> Result<(CpuStorage, Shape)> {
    let (outputs, inputs, rows) = sizes(l1.shape(), l2.shape())?;
    let out = by_float!(s1, NAME, T => {
        let (x, w) = (slice::<T>(s1, l1, NAME)?, slice::<T>(s2, l2, NAME)?);
        let bias = bias.map(|(s, l)| slice::<T>(s, l, NAME)).transpose()?;
        let y = product((rows, outputs, inputs), x, w, Right2d::Transposed, bias);
        T::to_cpu_storage_owned(y)
    });
    let mut shape = l1.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    Ok((out, Shape::from(shape)))
}

/// ```text
/// ∂L/∂x = G W,   ∂L/∂W = Gᵀ x,   ∂L/∂β = Σ_rows G,   G = ∂L/∂y
/// ```
fn backward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<[Option<Tensor>; 3]> {
    let (outputs, inputs, rows) = sizes(x.shape(), weight.shape())?;
    let grad = grad.detach().contiguous()?;
    let (s1, l1) = x.storage_and_layout();
    let (s2, l2) = weight.storage_and_layout();
    let (s3, l3) = grad.storage_and_layout();
    let (Storage::Cpu(s1), Storage::Cpu(s2), Storage::Cpu(s3)) = (&*s1, &*s2, &*s3) else {
        bail!("{NAME}: the CPU kernel takes tensors on the CPU")
    };
    let with_bias = bias.is_some_and(wanted);
    let cpu = Device::Cpu;
    let (mut dx, mut dw, mut db) = (None, None, None);
    by_float!(s3, NAME, T => {
        let g = slice::<T>(s3, l3, NAME)?;
        if wanted(x) {
            let w = slice::<T>(s2, l2, NAME)?;
            let grad = product((rows, inputs, outputs), g, w, Right2d::Plain, None);
            dx = Some(Tensor::from_vec(grad, x.shape(), &cpu)?);
        }
        if wanted(weight) || with_bias {
            let x = slice::<T>(s1, l1, NAME)?;
            let inputs = if wanted(weight) { inputs } else { 0 };
            let x = if wanted(weight) { x } else { &[] };
            let (weights, biases) = weight_gradient((outputs, inputs, rows), g, x);
            if wanted(weight) {
                dw = Some(Tensor::from_vec(weights, weight.shape(), &cpu)?);
            }
            if with_bias {
                db = Some(Tensor::from_vec(biases, outputs, &cpu)?);
            }
        }
    });
    let hand_over = |arg: Option<&Tensor>, grad: Option<Tensor>| match (arg, grad) {
        (Some(arg), Some(grad)) => deliver(arg, grad),
        _ => Ok(None),
    };
    Ok([
        hand_over(Some(x), dx)?,
        hand_over(Some(weight), dw)?,
        hand_over(bias, db)?,
    ])
}

impl CustomOp2 for Affine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        forward((s1, l1), (s2, l2), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = backward(x, weight, None, grad)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        NAME
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
        forward((s1, l1), (s2, l2), Some((s3, l3)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = backward(x, weight, Some(bias), grad)?;
        Ok((dx, dw, db))
    }
}

#[cfg(test)]
#[path = "linear/tests.rs"]
mod tests;
