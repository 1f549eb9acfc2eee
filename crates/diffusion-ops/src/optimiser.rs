//! What an optimiser does to all parameters of a model, in one pass over memory and one parallel
//! region for all small ones: a network has hundreds of tensors, most of them tiny.

#[path = "optimiser_access.rs"]
mod access;
#[path = "optimiser_kernel.rs"]
mod kernel;

use crate::cpu::{by_float, half_on_cpu, native, slice};
use crate::simd::dispatch;
use access::{alike, cpu, memory, slice_mut, with};
use candle_core::{CpuStorage, DType, Layout, Result, Tensor, WithDType, bail};
use kernel::{Adam, Finite, Follow, Number, Numbers, Squares};
use rayon::prelude::*;
use std::collections::BTreeSet;

/// Elements of one task. The sums of squares are taken task by task, so this decides their bits.
const TASK: usize = 32_768;

/// Tensors of at least so many elements are cut into tasks, others are grouped into one.
const LARGE: usize = 4 * TASK;

/// The numbers of one update of [`adamw_step`]; they differ between parameters only because each
/// counts its updates by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWRates {
    /// β₁, the decay of the first moment.
    pub beta1: f64,
    /// β₂, the decay of the second moment.
    pub beta2: f64,
    /// What the parameter is multiplied by: `1 − lr λ`.
    pub decay: f64,
    /// `lr / (1 − β₁ᵗ)`.
    pub rate: f64,
    /// `1 / √(1 − β₂ᵗ)`.
    pub root: f64,
    /// ε.
    pub eps: f64,
}

/// One parameter of [`adamw_step`], with everything that belongs to it.
#[derive(Clone, Copy, Debug)]
pub struct AdamWParameter<'a> {
    /// The parameter; changed in place.
    pub value: &'a Tensor,
    /// Its gradient.
    pub grad: &'a Tensor,
    /// The first moment; changed in place.
    pub m: &'a Tensor,
    /// The second moment; changed in place.
    pub v: &'a Tensor,
    /// Its moving average, if that is to follow in the same pass; changed in place.
    pub average: Option<&'a Tensor>,
    /// The numbers of the update.
    pub rates: AdamWRates,
}

/// Whether [`adamw_step`] and [`ema_step`] take this tensor: `f32` or `f64` on the CPU, contiguous.
pub fn updates_in_place(tensor: &Tensor) -> bool {
    native(tensor) && tensor.is_contiguous()
}

/// One update of AdamW (Loshchilov and Hutter 2019, algorithm 2) for many parameters, and of their
/// moving averages.
///
/// ```text
/// g ← scale · g
/// m ← β₁ m + (1 − β₁) g
/// v ← β₂ v + (1 − β₂) g²
/// θ ← decay · θ − rate · m / (√v · root + ε)
/// s ← s − pull · (s − θ)                          where θ is finite
/// ```
///
/// where `scale` is the factor of gradient clipping and `s` the moving average. Returns the index
/// of the first parameter that is not finite afterwards.
///
/// # Shapes
///
/// All tensors of a parameter have the same shape and element type.
///
/// # Errors
///
/// If shapes or element types differ, a tensor is not [in place](updates_in_place), or two of those
/// that are written share their memory; nothing has been written then.
pub fn adamw_step(
    parameters: &[AdamWParameter<'_>],
    scale: f64,
    pull: f64,
) -> Result<Option<usize>> {
    let mut written = BTreeSet::new();
    for (i, p) in parameters.iter().enumerate() {
        for t in [Some(p.value), Some(p.m), Some(p.v), p.average]
            .into_iter()
            .flatten()
        {
            alike("adamw", i, p.value, t)?;
            if !written.insert(memory(t)?) {
                bail!("adamw: two tensors that are written share memory (parameter {i})")
            }
        }
        alike("adamw", i, p.value, p.grad)?;
    }
    // A gradient that is a parameter's own memory must keep its values while that is written.
    let grads: Vec<Tensor> = parameters
        .iter()
        .map(|p| match written.contains(&memory(p.grad)?) {
            true => p.grad.detach().force_contiguous(),
            false => Ok(p.grad.clone()),
        })
        .collect::<Result<_>>()?;
    let tasks: Vec<usize> = parameters.iter().map(|p| p.value.elem_count()).collect();
    let finite = for_each(&tasks, |i, split| {
        let p = &parameters[i];
        let run = |part: Part<'_>| part.run(&grads[i], p, scale, pull, split);
        with(p.value, |value| {
            with(p.m, |m| {
                with(p.v, |v| match p.average {
                    Some(s) => with(s, |s| {
                        run(Part {
                            value,
                            m,
                            v,
                            average: Some(s),
                        })
                    }),
                    None => run(Part {
                        value,
                        m,
                        v,
                        average: None,
                    }),
                })
            })
        })
    })?;
    Ok(finite.into_iter().position(|finite| !finite))
}

/// One update of moving averages: `(average, parameter)`.
///
/// ```text
/// s ← s − pull · (s − θ)
/// ```
///
/// # Errors
///
/// As for [`adamw_step`].
pub fn ema_step(pairs: &[(&Tensor, &Tensor)], pull: f64) -> Result<()> {
    let mut written = BTreeSet::new();
    for (i, (average, value)) in pairs.iter().enumerate() {
        alike("ema", i, average, average)?;
        alike("ema", i, average, value)?;
        written.insert(memory(average)?);
    }
    let values = pairs
        .iter()
        .map(|(_, v)| memory(v))
        .collect::<Result<Vec<_>>>()?;
    if written.len() < pairs.len() || values.iter().any(|v| written.contains(v)) {
        bail!("ema: an average shares memory with another or with a parameter")
    }
    let tasks: Vec<usize> = pairs.iter().map(|(s, _)| s.elem_count()).collect();
    for_each(&tasks, |i, split| {
        let (average, value) = pairs[i];
        with(average, |(s, layout)| {
            by_float!(s, "ema", T => {
                let s = slice_mut::<T>(s, layout)?;
                let (guard, layout) = value.storage_and_layout();
                let p = slice::<T>(cpu(&guard)?, layout, "ema")?;
                let size = if split { TASK } else { s.len().max(1) };
                let pull = T::from_f64(pull);
                let each = |(s, p): (&mut [T], &[T])| dispatch(Follow { s, p, pull });
                if split {
                    s.par_chunks_mut(size).zip(p.par_chunks(size)).for_each(each);
                } else {
                    each((s, p));
                }
            });
            Ok(())
        })
    })?;
    Ok(())
}

/// Σ x² over all elements of all tensors, in `f64` and in a fixed order.
///
/// # Errors
///
/// Those of a copy from a device.
pub fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    Ok(by_task(tensors, Job::Squares)?.into_iter().sum())
}

/// The index of the first tensor that holds NaN or an infinity.
///
/// # Errors
///
/// Those of a copy from a device.
pub fn first_not_finite(tensors: &[&Tensor]) -> Result<Option<usize>> {
    let bad = by_task(tensors, Job::NotFinite)?;
    Ok(bad.into_iter().position(|count| count > 0.0))
}

#[derive(Clone, Copy)]
enum Job {
    Squares,
    NotFinite,
}

/// One number a tensor: the sum over its tasks in their order.
fn by_task(tensors: &[&Tensor], job: Job) -> Result<Vec<f64>> {
    let tensors: Vec<Tensor> = tensors
        .iter()
        .map(|t| {
            let t = t.detach();
            let t = if half_on_cpu(&t) {
                t.to_dtype(DType::F32)?
            } else {
                t
            };
            if native(&t) {
                t.contiguous()
            } else {
                elsewhere(&t, job)
            }
        })
        .collect::<Result<_>>()?;
    let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let mut tasks: Vec<(usize, Task<'_>)> = Vec::new();
    for (i, (guard, layout)) in guards.iter().enumerate() {
        // What was reduced on its own device comes as its result.
        if !native(&tensors[i]) {
            continue;
        }
        match cpu(guard)? {
            s @ CpuStorage::F32(_) => {
                let all = slice::<f32>(s, layout, "optimiser")?;
                tasks.extend(all.chunks(TASK).map(|c| (i, Task::F32(c))));
            }
            s => {
                let all = slice::<f64>(s, layout, "optimiser")?;
                tasks.extend(all.chunks(TASK).map(|c| (i, Task::F64(c))));
            }
        }
    }
    let elements: usize = tensors.iter().map(Tensor::elem_count).sum();
    let together = (TASK * tasks.len() / elements.max(1)).max(1);
    let parts: Vec<(usize, f64)> = tasks
        .par_iter()
        .with_min_len(together)
        .map(|(i, task)| {
            let part = match *task {
                Task::F32(x) => reduce(x, job),
                Task::F64(x) => reduce(x, job),
            };
            (*i, part)
        })
        .collect();
    let mut sums = vec![0.0; tensors.len()];
    for (i, part) in parts {
        sums[i] += part;
    }
    Ok(sums)
}

enum Task<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

fn reduce<T: Number>(x: &[T], job: Job) -> f64 {
    match job {
        Job::Squares => dispatch(Squares(x)),
        Job::NotFinite => f64::from(u8::from(!dispatch(Finite(x)))),
    }
}

/// The number of a tensor on another device, as a tensor of one element on the CPU whose square,
/// or whose being finite, is that number.
fn elsewhere(t: &Tensor, job: Job) -> Result<Tensor> {
    let wide = t.flatten_all()?.to_dtype(DType::F64)?;
    let cpu = candle_core::Device::Cpu;
    match job {
        Job::Squares => wide.sqr()?.sum_keepdim(0)?.sqrt()?.to_device(&cpu),
        // 0 · x is 0 where x is finite and NaN elsewhere.
        Job::NotFinite => wide.affine(0.0, 0.0)?.sum_keepdim(0)?.to_device(&cpu),
    }
}

type Locked<'a> = (&'a mut CpuStorage, &'a Layout);

/// The tensors of one parameter that are written, while they are locked.
struct Part<'a> {
    value: Locked<'a>,
    m: Locked<'a>,
    v: Locked<'a>,
    average: Option<Locked<'a>>,
}

impl Part<'_> {
    /// Whether the parameter is finite afterwards.
    fn run(
        self,
        grad: &Tensor,
        parameter: &AdamWParameter<'_>,
        scale: f64,
        pull: f64,
        split: bool,
    ) -> Result<bool> {
        let r = &parameter.rates;
        by_float!(&*self.value.0, "adamw", T => {
            let (guard, layout) = grad.storage_and_layout();
            let g = slice::<T>(cpu(&guard)?, layout, "adamw")?;
            let p = slice_mut::<T>(self.value.0, self.value.1)?;
            let m = slice_mut::<T>(self.m.0, self.m.1)?;
            let v = slice_mut::<T>(self.v.0, self.v.1)?;
            let s = self.average.map(|(s, layout)| slice_mut::<T>(s, layout)).transpose()?;
            let of = T::from_f64;
            let c = Numbers {
                scale: of(scale),
                keep: [of(r.beta1), of(r.beta2)],
                add: [of(1.0 - r.beta1), of(1.0 - r.beta2)],
                decay: of(r.decay),
                rate: of(r.rate),
                root: of(r.root),
                eps: of(r.eps),
                pull: of(pull),
            };
            if !split {
                return Ok(dispatch(Adam { p, m, v, g, s, c }));
            }
            let rows = p
                .par_chunks_mut(TASK)
                .zip(m.par_chunks_mut(TASK))
                .zip(v.par_chunks_mut(TASK))
                .zip(g.par_chunks(TASK));
            Ok(match s {
                Some(s) => rows
                    .zip(s.par_chunks_mut(TASK))
                    .map(|((((p, m), v), g), s)| dispatch(Adam { p, m, v, g, s: Some(s), c }))
                    .reduce(|| true, |a, b| a & b),
                None => rows
                    .map(|(((p, m), v), g)| dispatch(Adam { p, m, v, g, s: None, c }))
                    .reduce(|| true, |a, b| a & b),
            })
        })
    }
}

/// Runs `f(i, split)` for every tensor, given their sizes: large ones one by one, each to be split
/// into tasks; the others unsplit, in one parallel region. A task never waits for others while it
/// holds a lock that they could want.
fn for_each<R: Send + Clone>(
    sizes: &[usize],
    f: impl Fn(usize, bool) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut all: Vec<Option<R>> = vec![None; sizes.len()];
    let (mut small, mut elements) = (Vec::new(), 0);
    for (i, slot) in all.iter_mut().enumerate() {
        if sizes[i] < LARGE {
            small.push((i, slot));
            elements += sizes[i];
        } else {
            *slot = Some(f(i, true)?);
        }
    }
    let together = (TASK * small.len() / elements.max(1)).clamp(1, small.len().max(1));
    small
        .par_iter_mut()
        .with_min_len(together)
        .try_for_each(|(i, slot)| {
            **slot = Some(f(*i, false)?);
            Ok::<(), candle_core::Error>(())
        })?;
    Ok(all.into_iter().flatten().collect())
}

#[cfg(test)]
#[path = "optimiser_tests.rs"]
mod tests;
