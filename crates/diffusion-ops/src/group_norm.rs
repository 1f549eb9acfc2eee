//! Normalisation over groups of channels, with the nonlinearity that usually follows.

use crate::activation::{Activation, Function, by_activation};
use crate::cpu::{Real, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::{deliver, wanted};
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply3;
use crate::vmath::{real, squared_deviations, sum, sum_and_moment};
use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};
use rayon::prelude::*;
use std::marker::PhantomData;

/// Group normalisation (Wu and He 2018, equations 1 and 7).
///
/// ```text
/// y = γ_c (x − μ)/√(σ² + ε) + β_c
/// ```
///
/// where `μ` and `σ²` are mean and (biased) variance over the channels of a group and all
/// positions of one batch element.
///
/// # Shapes
/// `x [B, C, ...]`, `gamma [C]`, `beta [C]`; the result has the shape of `x`. With `gamma` and
/// `beta` of shape `[B, C]` each batch element has its own scale and shift.
///
/// # Errors
/// If `groups` does not divide `C` or a parameter has another shape.
pub fn group_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    group_norm_act(x, gamma, beta, groups, eps, None)
}

/// Group normalisation followed by a nonlinearity, in one pass.
///
/// ```text
/// y = a(γ_c (x − μ)/√(σ² + ε) + β_c)
/// ```
///
/// where `a` is the `activation` (the identity for `None`) and the rest is as in [`group_norm`].
///
/// # Shapes
/// Those of [`group_norm`].
///
/// # Errors
/// Those of [`group_norm`].
pub fn group_norm_act(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Result<Tensor> {
    let [batch, channels, rest @ ..] = x.dims() else {
        bail!(
            "group_norm: an input of shape {:?}, expected [B, C, ...]",
            x.dims()
        )
    };
    if groups == 0 || channels % groups != 0 {
        bail!("group_norm: {channels} channels cannot be split into {groups} groups");
    }
    let per_item = gamma.dims() == [*batch, *channels];
    if gamma.dims() != beta.dims() || !(per_item || gamma.dims() == [*channels]) {
        let (gamma, beta) = (gamma.dims(), beta.dims());
        bail!(
            "group_norm: scale {gamma:?} and shift {beta:?}, expected both [{channels}] or both \
             [{batch}, {channels}]"
        );
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let (gamma, beta) = (wide(gamma)?, wide(beta)?);
        return group_norm_act(&wide(x)?, &gamma, &beta, groups, eps, activation)?
            .to_dtype(x.dtype());
    }
    let op = Norm {
        batch: *batch,
        channels: *channels,
        groups,
        inner: rest.iter().product(),
        eps,
        per_item,
        activation,
    };
    if native(x) {
        let (gamma, beta) = (gamma.contiguous()?, beta.contiguous()?);
        apply3(&x.contiguous()?, &gamma, &beta, op)
    } else {
        op.composed(x, gamma, beta)
    }
}

/// Group normalisation with a scale and a shift for each batch element, as residual blocks apply
/// a time embedding (Dhariwal and Nichol 2021, section 3, adaptive group normalisation).
///
/// ```text
/// y = a((γ_c (x − μ)/√(σ² + ε) + β_c) (1 + s_bc) + t_bc)
/// ```
///
/// # Shapes
/// `x [B, C, ...]`, `gamma [C]`, `beta [C]`, `scale [B, C]` (`s`), `shift [B, C]` (`t`); the
/// result has the shape of `x`.
///
/// # Errors
/// Those of [`group_norm`], and if `scale` or `shift` has another shape.
pub fn group_norm_scale_shift(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Result<Tensor> {
    let expected = x.dims().get(..2).unwrap_or_default();
    if scale.dims() != expected || shift.dims() != expected {
        let (scale, shift) = (scale.dims(), shift.dims());
        bail!(
            "group_norm: scale {scale:?} and shift {shift:?} of the batch, expected {expected:?}"
        );
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let (x_wide, gamma, beta) = (wide(x)?, wide(gamma)?, wide(beta)?);
        let (scale, shift) = (wide(scale)?, wide(shift)?);
        return group_norm_scale_shift(
            &x_wide, &gamma, &beta, &scale, &shift, groups, eps, activation,
        )?
        .to_dtype(x.dtype());
    }
    let factor = (scale + 1.0)?;
    let gamma = factor.broadcast_mul(gamma)?;
    let beta = (factor.broadcast_mul(beta)? + shift)?;
    group_norm_act(x, &gamma, &beta, groups, eps, activation)
}

#[derive(Clone, Copy, Debug)]
struct Norm {
    batch: usize,
    channels: usize,
    groups: usize,
    inner: usize,
    eps: f64,
    /// Whether scale and shift are `[B, C]` rather than `[C]`.
    per_item: bool,
    activation: Option<Activation>,
}

impl Norm {
    /// Channels of one group.
    fn width(&self) -> usize {
        self.channels / self.groups
    }

    /// Elements of one group.
    fn group(&self) -> usize {
        self.width() * self.inner
    }

    /// The parameters of the group with number `k` among all groups of all batch elements.
    fn params<'a, T>(&self, k: usize, values: &'a [T]) -> &'a [T] {
        let k = if self.per_item { k } else { k % self.groups };
        &values[k * self.width()..][..self.width()]
    }

    /// The same function from the tensor library's differentiable operations.
    fn composed(&self, x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
        let grouped = x.reshape((self.batch * self.groups, self.group()))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(1)?)?;
        let std = (centred.sqr()?.mean_keepdim(1)? + self.eps)?.sqrt()?;
        let normed = centred.broadcast_div(&std)?;
        let params = (if self.per_item { self.batch } else { 1 }, self.channels, 1);
        let y = normed
            .reshape((self.batch, self.channels, self.inner))?
            .broadcast_mul(&gamma.reshape(params)?)?
            .broadcast_add(&beta.reshape(params)?)?
            .reshape(x.shape())?;
        match self.activation {
            Some(activation) => activation.apply(&y),
            None => Ok(y),
        }
    }
}

/// Mean and reciprocal standard deviation, in two passes so that a large mean costs no digits.
#[inline(always)]
fn moments<S: Simd, T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = x.len() as f64;
    let mean = real::<T>(sum::<S, T>(x).to_f64() / n);
    let variance = squared_deviations::<S, T>(x, mean).to_f64() / n;
    (mean, real(1.0 / (variance + eps).sqrt()))
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "group_norm"
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
        let out = by_float!(s1, self.name(), T => {
            let x = slice::<T>(s1, l1, self.name())?;
            let gamma = slice::<T>(s2, l2, self.name())?;
            let beta = slice::<T>(s3, l3, self.name())?;
            by_activation!(self.activation, F => forward::<F, T>(self, x, gamma, beta))
        });
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let (s1, l1) = x.storage_and_layout();
        let (s2, l2) = gamma.storage_and_layout();
        let (s3, l3) = beta.storage_and_layout();
        let (s4, l4) = grad.storage_and_layout();
        let (Storage::Cpu(s1), Storage::Cpu(s2), Storage::Cpu(s3), Storage::Cpu(s4)) =
            (&*s1, &*s2, &*s3, &*s4)
        else {
            bail!("{}: the CPU kernel takes tensors on the CPU", self.name())
        };
        let cpu = Device::Cpu;
        let [grad_x, grad_gamma, grad_beta] = by_float!(s1, self.name(), T => {
            let inputs = Inputs {
                x: slice::<T>(s1, l1, self.name())?,
                gamma: slice::<T>(s2, l2, self.name())?,
                beta: slice::<T>(s3, l3, self.name())?,
                grad: slice::<T>(s4, l4, self.name())?,
            };
            let [dx, mut dgamma, mut dbeta] =
                by_activation!(self.activation, F => backward::<F, T>(self, &inputs));
            if !self.per_item {
                [dgamma, dbeta] = [dgamma, dbeta].map(|d| sum_over_batch(&d, self.channels));
            }
            [
                Tensor::from_vec(dx, x.shape(), &cpu)?,
                Tensor::from_vec(dgamma, gamma.shape(), &cpu)?,
                Tensor::from_vec(dbeta, beta.shape(), &cpu)?,
            ]
        });
        let hand_over = |arg: &Tensor, grad: Tensor| {
            if wanted(arg) {
                deliver(arg, grad)
            } else {
                Ok(None)
            }
        };
        Ok((
            hand_over(x, grad_x)?,
            hand_over(gamma, grad_gamma)?,
            hand_over(beta, grad_beta)?,
        ))
    }
}

fn forward<F: Function, T: Real>(norm: &Norm, x: &[T], gamma: &[T], beta: &[T]) -> CpuStorage {
    let group = norm.group().max(1);
    let fill = |out: &mut [T]| {
        out.par_chunks_mut(group)
            .with_min_len(worth(group))
            .zip(x.par_chunks(group))
            .enumerate()
            .for_each(|(k, (out, x))| {
                dispatch(Forward {
                    x,
                    gamma: norm.params(k, gamma),
                    beta: norm.params(k, beta),
                    inner: norm.inner,
                    eps: norm.eps,
                    out,
                    function: PhantomData::<F>,
                });
            });
    };
    // SAFETY: the groups cover the output, and the kernel writes each line of a group.
    unsafe { written(x.len(), fill) }
}

struct Forward<'a, F, T> {
    x: &'a [T],
    gamma: &'a [T],
    beta: &'a [T],
    inner: usize,
    eps: f64,
    out: &'a mut [T],
    function: PhantomData<F>,
}

impl<F: Function, T: Real> Kernel for Forward<'_, F, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (mean, rstd) = moments::<S, T>(self.x, self.eps);
        let lines = self.x.chunks_exact(self.inner);
        let lines = lines.zip(self.out.chunks_exact_mut(self.inner));
        for ((x, out), (gamma, beta)) in lines.zip(self.gamma.iter().zip(self.beta)) {
            let (scale, shift) = (rstd * *gamma, *beta);
            for (o, v) in out.iter_mut().zip(x) {
                *o = F::value::<S, T>(S::mul_add(*v - mean, scale, shift));
            }
        }
    }
}

struct Inputs<'a, T> {
    x: &'a [T],
    gamma: &'a [T],
    beta: &'a [T],
    grad: &'a [T],
}

/// The gradients of x, and of γ and β for each batch element, `[B, C]`.
fn backward<F: Function, T: Real>(norm: &Norm, inputs: &Inputs<'_, T>) -> [Vec<T>; 3] {
    let (group, width) = (norm.group().max(1), norm.width().max(1));
    let params = norm.batch * norm.channels;
    let mut dx = Vec::new();
    let mut dgamma = vec![real::<T>(0.0); params];
    let mut dbeta = vec![real::<T>(0.0); params];
    let fill = |dx: &mut [T]| {
        let outs = dx.par_chunks_mut(group).zip(
            dgamma
                .par_chunks_mut(width)
                .zip(dbeta.par_chunks_mut(width)),
        );
        let data = inputs
            .x
            .par_chunks(group)
            .zip(inputs.grad.par_chunks(group));
        outs.with_min_len(worth(group))
            .zip(data)
            .enumerate()
            .for_each(|(k, ((dx, (dgamma, dbeta)), (x, grad)))| {
                dispatch(Backward {
                    x,
                    grad,
                    gamma: norm.params(k, inputs.gamma),
                    beta: norm.params(k, inputs.beta),
                    inner: norm.inner,
                    eps: norm.eps,
                    dx,
                    dgamma,
                    dbeta,
                    function: PhantomData::<F>,
                });
            });
    };
    assert_eq!(inputs.x.len(), inputs.grad.len());
    if !inputs.x.is_empty() {
        // SAFETY: the groups cover x, and the kernel writes each line of a group before it reads.
        dx = unsafe { crate::cpu::buffer(inputs.x.len(), fill) };
    }
    [dx, dgamma, dbeta]
}

/// With z = γ x̂ + β, x̂ = (x − μ) r, h = g a′(z) and n elements of the group:
/// dβ = Σ h and dγ = Σ h x̂ over a channel, and
/// dx = r (γ h − Σ γ dβ/n − x̂ Σ γ dγ/n).
struct Backward<'a, F, T> {
    x: &'a [T],
    grad: &'a [T],
    gamma: &'a [T],
    beta: &'a [T],
    inner: usize,
    eps: f64,
    dx: &'a mut [T],
    dgamma: &'a mut [T],
    dbeta: &'a mut [T],
    function: PhantomData<F>,
}

impl<F: Function, T: Real> Kernel for Backward<'_, F, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (mean, rstd) = moments::<S, T>(self.x, self.eps);
        let inner = self.inner;
        let (mut of_beta, mut of_gamma) = (0.0, 0.0);
        for c in 0..self.gamma.len() {
            let (x, grad) = (
                &self.x[c * inner..][..inner],
                &self.grad[c * inner..][..inner],
            );
            let h = &mut self.dx[c * inner..][..inner];
            let (scale, shift) = (rstd * self.gamma[c], self.beta[c]);
            for ((h, v), g) in h.iter_mut().zip(x).zip(grad) {
                *h = *g * F::slope::<S, T>(S::mul_add(*v - mean, scale, shift));
            }
            let [total, dot] = sum_and_moment::<S, T>(h, x, mean);
            let dot = dot * rstd;
            (self.dbeta[c], self.dgamma[c]) = (total, dot);
            of_beta += (total * self.gamma[c]).to_f64();
            of_gamma += (dot * self.gamma[c]).to_f64();
        }
        let n = self.x.len() as f64;
        let offset = real::<T>(-of_beta / n) * rstd;
        let slope = real::<T>(-of_gamma / n) * rstd * rstd;
        for c in 0..self.gamma.len() {
            let (x, h) = (
                &self.x[c * inner..][..inner],
                &mut self.dx[c * inner..][..inner],
            );
            let scale = rstd * self.gamma[c];
            for (h, v) in h.iter_mut().zip(x) {
                *h = S::mul_add(*h, scale, S::mul_add(*v - mean, slope, offset));
            }
        }
    }
}

/// Σ over the rows of `[B, C]`, in order.
fn sum_over_batch<T: Real>(values: &[T], channels: usize) -> Vec<T> {
    let mut out = vec![real::<T>(0.0); channels];
    for row in values.chunks_exact(channels.max(1)) {
        out.iter_mut().zip(row).for_each(|(o, v)| *o += *v);
    }
    out
}

#[cfg(test)]
#[path = "group_norm_tests.rs"]
mod tests;
