//! Scaled dot-product attention.

use crate::cpu::{by_float, half_on_cpu, native};
use crate::gradient::{deliver, wanted};
use crate::tape::apply3;
use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};
use std::sync::OnceLock;

mod backward;
mod forward;
mod shape;

use shape::{Axes, Mask, Sizes, View};

/// Scaled dot-product attention (Vaswani et al. 2017, equation 1).
///
/// ```text
/// y = softmax(s Q Kᵀ + M) V,   s = 1/√d unless given
/// ```
///
/// where `M` is an additive mask (0 keeps, −∞ or a large negative number hides). A query from
/// which −∞ hides every key receives zeros.
///
/// On the CPU the scores are never in memory all at once (Dao et al. 2022): the softmax runs over
/// blocks of them, and the backward pass computes them again. The last axis of `q`, `k` and `v`
/// should be contiguous; the order of the others is free.
///
/// # Shapes
/// `q [B, h, N, d]`, `k [B, h, S, d]`, `v [B, h, S, e]`, `mask` anything that broadcasts to
/// `[B, h, N, S]`; the result is `[B, h, N, e]`.
///
/// # Errors
/// If the shapes don't fit each other.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    scale: Option<f64>,
) -> Result<Tensor> {
    attend(Axes::HeadsFirst, q, k, v, mask, scale)
}

/// [`attention`] with the heads side by side in the last axis, as an affine map leaves them.
///
/// ```text
/// y[b, :, j e..(j+1) e] = softmax(s Qⱼ Kⱼᵀ + M) Vⱼ,   Qⱼ = q[b, :, j d..(j+1) d], …
/// ```
///
/// for the heads j < h: the same as splitting the last axis, moving the heads forward, and back
/// again afterwards, without moving anything.
///
/// # Shapes
/// `q [B, N, h·d]`, `k [B, S, h·d]`, `v [B, S, h·e]`, `mask` anything that broadcasts to
/// `[B, h, N, S]`; the result is `[B, N, h·e]`.
///
/// # Errors
/// If the shapes don't fit each other, or the heads don't divide the last axis.
pub fn attention_heads(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
    scale: Option<f64>,
) -> Result<Tensor> {
    attend(Axes::HeadsLast(heads), q, k, v, mask, scale)
}

fn attend(
    axes: Axes,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    scale: Option<f64>,
) -> Result<Tensor> {
    let sizes = Sizes::new(axes, q.dims(), k.dims(), v.dims())?;
    let scale = scale.unwrap_or(1.0 / (sizes.d.max(1) as f64).sqrt());
    if half_on_cpu(q) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let y = attend(axes, &wide(q)?, &wide(k)?, &wide(v)?, mask, Some(scale))?;
        return y.to_dtype(q.dtype());
    }
    // The mask's own gradient is as large as the scores, so nothing is lost by computing them.
    let tracked_mask = mask.is_some_and(wanted);
    if !native(q) || tracked_mask || q.elem_count() * v.elem_count() == 0 {
        let [q, k, v] = [q, k, v].map(|t| axes.heads_first(t));
        return axes.back(&composed(&q?, &k?, &v?, mask, scale)?);
    }
    let mask = match mask {
        Some(mask) => {
            let mask = mask.to_dtype(q.dtype())?.contiguous()?;
            Some(mask.broadcast_as((sizes.batch, sizes.heads, sizes.n, sizes.s))?)
        }
        None => None,
    };
    let op = Attention {
        axes,
        scale,
        mask,
        normaliser: OnceLock::new(),
    };
    apply3(&rows(q)?, &rows(k)?, &rows(v)?, op)
}

/// The tensor, or a copy of it if its last axis is not contiguous.
fn rows(x: &Tensor) -> Result<Tensor> {
    match (x.dims().last(), x.stride().last()) {
        (Some(1), _) | (_, Some(1)) => Ok(x.clone()),
        _ => x.contiguous(),
    }
}

/// The same function from the tensor library's differentiable operations.
fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor> {
    // Scaling the queries costs N·d products, scaling the scores N·S.
    let q = (q.contiguous()? * scale)?;
    let mut scores = q.matmul(&k.contiguous()?.t()?)?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    // A finite shift, and a sum of at least ½ (it is at least 1 unless every key is hidden), turn
    // rows of −∞ into zeros; they change nothing else.
    let lowest = match scores.dtype() {
        DType::F16 => -6e4,
        _ => -1e30,
    };
    let shift = scores.detach().max_keepdim(3)?.maximum(lowest)?;
    let e = scores.broadcast_sub(&shift)?.exp()?;
    let sum = e.sum_keepdim(3)?.maximum(0.5)?;
    e.broadcast_div(&sum)?.matmul(&v.contiguous()?)
}

const NAME: &str = "attention";

struct Attention {
    axes: Axes,
    scale: f64,
    /// `[B, h, N, S]`, most of it by broadcasting.
    mask: Option<Tensor>,
    /// `ln Σⱼ exp(scoreᵢⱼ)` of each query, for the backward pass; ∞ where all keys are hidden.
    normaliser: OnceLock<CpuStorage>,
}

impl Attention {
    /// Calls `f` with the mask.
    fn with_mask<T: WithDType, R>(&self, f: impl FnOnce(Option<Mask<T>>) -> R) -> Result<R> {
        let Some(mask) = &self.mask else {
            return Ok(f(None));
        };
        let (storage, layout) = mask.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("{NAME}: a mask on another device than the queries")
        };
        Ok(f(Some(Mask::new(storage, layout)?)))
    }
}

impl CustomOp3 for Attention {
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
        let sizes = Sizes::new(self.axes, l1.dims(), l2.dims(), l3.dims())?;
        let shape = Shape::from(self.axes.shape(&sizes, sizes.n, sizes.e));
        let (out, normaliser) = by_float!(s1, NAME, T => {
            let q = View::<T>::new(s1, l1, self.axes, sizes.d)?;
            let k = View::<T>::new(s2, l2, self.axes, sizes.d)?;
            let v = View::<T>::new(s3, l3, self.axes, sizes.e)?;
            let (out, normaliser) =
                self.with_mask(|mask| forward::attend(sizes, self.axes, q, k, v, mask, self.scale))?;
            (T::to_cpu_storage_owned(out), T::to_cpu_storage_owned(normaliser))
        });
        // Set already only if the operation runs twice, on the same arguments.
        self.normaliser.get_or_init(|| normaliser);
        Ok((out, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = rows(&grad.detach())?;
        let (s1, l1) = q.storage_and_layout();
        let (s2, l2) = k.storage_and_layout();
        let (s3, l3) = v.storage_and_layout();
        let (s4, l4) = y.storage_and_layout();
        let (s5, l5) = grad.storage_and_layout();
        let (
            Storage::Cpu(s1),
            Storage::Cpu(s2),
            Storage::Cpu(s3),
            Storage::Cpu(s4),
            Storage::Cpu(s5),
            Some(normaliser),
        ) = (&*s1, &*s2, &*s3, &*s4, &*s5, self.normaliser.get())
        else {
            bail!("{NAME}: the backward pass takes what the CPU kernel computed")
        };
        let sizes = Sizes::new(self.axes, l1.dims(), l2.dims(), l3.dims())?;
        let [dq, dk, dv] = by_float!(s1, NAME, T => {
            let inputs = backward::Inputs {
                q: View::<T>::new(s1, l1, self.axes, sizes.d)?,
                k: View::<T>::new(s2, l2, self.axes, sizes.d)?,
                v: View::<T>::new(s3, l3, self.axes, sizes.e)?,
                y: View::<T>::new(s4, l4, self.axes, sizes.e)?,
                grad: View::<T>::new(s5, l5, self.axes, sizes.e)?,
                normaliser: T::cpu_storage_as_slice(normaliser)?,
                scale: T::from_f64(self.scale),
                wanted: [wanted(q), wanted(k), wanted(v)],
            };
            let grads =
                self.with_mask(|mask| backward::gradients(sizes, self.axes, &inputs, mask))?;
            let tensor = |(arg, grad): (&Tensor, Option<Vec<T>>)| -> Result<Option<Tensor>> {
                grad.map(|g| Tensor::from_vec(g, arg.shape(), &Device::Cpu)).transpose()
            };
            let [dq, dk, dv] = grads;
            [tensor((q, dq))?, tensor((k, dk))?, tensor((v, dv))?]
        });
        let hand_over = |arg: &Tensor, grad: Option<Tensor>| match grad {
            Some(grad) => deliver(arg, grad),
            None => Ok(None),
        };
        Ok((hand_over(q, dq)?, hand_over(k, dk)?, hand_over(v, dv)?))
    }
}

#[cfg(test)]
mod tests;
