//! Normalisation over groups of channels.

use crate::cpu::{Real, by_float, filled, half_on_cpu, native, slice, sum1, sum2, worth};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

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
/// `x [B, C, ...]`, `gamma [C]`, `beta [C]`; the result has the shape of `x`.
///
/// # Errors
/// If `groups` does not divide `C` or a parameter does not have the shape `[C]`.
pub fn group_norm(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    groups: usize,
    eps: f64,
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
    if gamma.dims() != [*channels] || beta.dims() != [*channels] {
        let (gamma, beta) = (gamma.dims(), beta.dims());
        bail!("group_norm: scale {gamma:?} and shift {beta:?}, expected [{channels}]");
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        return group_norm(&wide(x)?, &wide(gamma)?, &wide(beta)?, groups, eps)?
            .to_dtype(x.dtype());
    }
    let inner = rest.iter().product();
    let op = Norm {
        batch: *batch,
        channels: *channels,
        groups,
        inner,
        eps,
    };
    if native(x) {
        x.contiguous()?
            .apply_op3(&gamma.contiguous()?, &beta.contiguous()?, op)
    } else {
        op.composed(x, gamma, beta)
    }
}

/// Sizes of a normalisation; layer normalisation is the case of one group and `inner = 1`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub batch: usize,
    pub channels: usize,
    pub groups: usize,
    pub inner: usize,
    pub eps: f64,
}

impl Norm {
    /// Elements of one group.
    fn group(&self) -> usize {
        self.channels / self.groups * self.inner
    }

    /// The channels of the group with number `k` among all groups of all batch elements.
    fn params<'a, T>(&self, k: usize, values: &'a [T]) -> &'a [T] {
        let width = self.channels / self.groups;
        &values[k % self.groups * width..][..width]
    }

    /// The same function from the tensor library's differentiable operations.
    pub(crate) fn composed(&self, x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
        let grouped = x.reshape((self.batch * self.groups, self.group()))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(1)?)?;
        let std = (centred.sqr()?.mean_keepdim(1)? + self.eps)?.sqrt()?;
        let normed = centred.broadcast_div(&std)?;
        let params = (1, self.channels, 1);
        normed
            .reshape((self.batch, self.channels, self.inner))?
            .broadcast_mul(&gamma.reshape(params)?)?
            .broadcast_add(&beta.reshape(params)?)?
            .reshape(x.shape())
    }
}

/// Mean and reciprocal standard deviation, in two passes so that a large mean costs no digits.
fn moments<T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = x.len() as f64;
    let mean = T::from_f64(sum1(x, |v| v).to_f64() / n);
    let variance = sum1(x, |v| (v - mean) * (v - mean)).to_f64() / n;
    (mean, T::from_f64(1.0 / (variance + eps).sqrt()))
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
            filled::<T>(x.len(), |out| forward(self, x, gamma, beta, out))
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
        let (x_value, grad) = (x.detach(), grad.detach().contiguous()?);
        let grad_x = if x.track_op() {
            Some(x_value.apply_op3_no_bwd(&gamma.detach(), &grad, &InputGradient(*self))?)
        } else {
            None
        };
        if !gamma.track_op() && !beta.track_op() {
            return Ok((grad_x, None, None));
        }
        let both = x_value.apply_op2_no_bwd(&grad, &ParameterGradient(*self))?;
        Ok((grad_x, Some(both.get(0)?), Some(both.get(1)?)))
    }
}

fn forward<T: Real>(norm: &Norm, x: &[T], gamma: &[T], beta: &[T], out: &mut [T]) {
    let (group, inner) = (norm.group().max(1), norm.inner.max(1));
    out.par_chunks_mut(group)
        .with_min_len(worth(group))
        .zip(x.par_chunks(group))
        .enumerate()
        .for_each(|(k, (out, x))| {
            let (mean, rstd) = moments(x, norm.eps);
            let (gamma, beta) = (norm.params(k, gamma), norm.params(k, beta));
            if inner == 1 {
                for c in 0..x.len() {
                    out[c] = (x[c] - mean) * rstd * gamma[c] + beta[c];
                }
                return;
            }
            let lines = out.chunks_exact_mut(inner).zip(x.chunks_exact(inner));
            for (c, (out, x)) in lines.enumerate() {
                let scale = rstd * gamma[c];
                for (o, v) in out.iter_mut().zip(x) {
                    *o = (*v - mean) * scale + beta[c];
                }
            }
        });
}

/// With x̂ = (x − μ)/s and h = γ g: ∂L/∂x = (h − mean(h) − x̂ mean(h x̂))/s.
struct InputGradient(Norm);

impl CustomOp3 for InputGradient {
    fn name(&self) -> &'static str {
        "group_norm_input_gradient"
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
            let grad = slice::<T>(s3, l3, self.name())?;
            filled::<T>(x.len(), |out| input_gradient(&self.0, x, gamma, grad, out))
        });
        Ok((out, l1.shape().clone()))
    }
}

fn input_gradient<T: Real>(norm: &Norm, x: &[T], gamma: &[T], grad: &[T], out: &mut [T]) {
    let (group, inner) = (norm.group().max(1), norm.inner.max(1));
    let inputs = x.par_chunks(group).zip(grad.par_chunks(group));
    out.par_chunks_mut(group)
        .with_min_len(worth(group))
        .zip(inputs)
        .enumerate()
        .for_each(|(k, (out, (x, grad)))| {
            let (mean, rstd) = moments(x, norm.eps);
            let gamma = norm.params(k, gamma);
            // `out` holds h while its two means are taken.
            for (c, (out, grad)) in out.chunks_mut(inner).zip(grad.chunks(inner)).enumerate() {
                for (o, g) in out.iter_mut().zip(grad) {
                    *o = *g * gamma[c];
                }
            }
            let n = x.len() as f64;
            let mean_h = T::from_f64(sum1(out, |h| h).to_f64() / n);
            let dot = sum2(out, x, |h, v| h * (v - mean)).to_f64() / n;
            let slope = T::from_f64(dot * rstd.to_f64() * rstd.to_f64());
            for (o, v) in out.iter_mut().zip(x) {
                *o = (*o - mean_h - (*v - mean) * slope) * rstd;
            }
        });
}

/// `[2, C]`: ∂L/∂γ = Σ g x̂ and ∂L/∂β = Σ g over batch and positions.
struct ParameterGradient(Norm);

impl CustomOp2 for ParameterGradient {
    fn name(&self) -> &'static str {
        "group_norm_parameter_gradient"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s1, self.name(), T => {
            let x = slice::<T>(s1, l1, self.name())?;
            let grad = slice::<T>(s2, l2, self.name())?;
            filled::<T>(2 * self.0.channels, |out| parameter_gradient(&self.0, x, grad, out))
        });
        Ok((out, Shape::from((2, self.0.channels))))
    }
}

fn parameter_gradient<T: Real>(norm: &Norm, x: &[T], grad: &[T], out: &mut [T]) {
    let (group, inner) = (norm.group(), norm.inner);
    let width = norm.channels / norm.groups;
    if group == 0 {
        return;
    }
    let (gammas, betas) = out.split_at_mut(norm.channels);
    let outs = gammas
        .par_chunks_mut(width)
        .with_min_len(worth(group * norm.batch))
        .zip(betas.par_chunks_mut(width));
    // One task a group: each sum runs over the batch in order, whatever the number of threads.
    outs.enumerate().for_each(|(k, (gammas, betas))| {
        for b in 0..norm.batch {
            let at = (b * norm.groups + k) * group;
            let (x, grad) = (&x[at..][..group], &grad[at..][..group]);
            let (mean, rstd) = moments(x, norm.eps);
            if inner == 1 {
                for c in 0..width {
                    gammas[c] += grad[c] * (x[c] - mean) * rstd;
                    betas[c] += grad[c];
                }
                continue;
            }
            let lines = x.chunks_exact(inner).zip(grad.chunks_exact(inner));
            for (c, (x, grad)) in lines.enumerate() {
                gammas[c] += sum2(grad, x, |g, v| g * (v - mean)) * rstd;
                betas[c] += sum1(grad, |g| g);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, max_relative_error, normal};

    fn inputs(b: usize, c: usize, rest: &[usize]) -> Result<[Tensor; 3]> {
        let shape = [&[b, c], rest].concat();
        Ok([
            ((normal(1, shape)? * 2.0)? + 3.0)?,
            normal(2, c)?,
            normal(3, c)?,
        ])
    }

    #[test]
    fn kernel_composition_and_finite_differences_agree() -> Result<()> {
        for (b, c, groups, rest) in [
            (2, 6, 3, vec![3, 5]),
            (3, 4, 4, vec![7]),
            (2, 8, 1, vec![]),
            (1, 4, 2, vec![1, 19]),
        ] {
            let data = inputs(b, c, &rest)?;
            let norm = Norm {
                batch: b,
                channels: c,
                groups,
                inner: rest.iter().product(),
                eps: 1e-5,
            };
            let run = |t: &[Tensor]| group_norm(&t[0], &t[1], &t[2], groups, 1e-5);
            let oracle = |t: &[Tensor]| norm.composed(&t[0], &t[1], &t[2]);
            let gap = max_abs_difference(&run(&data)?, &oracle(&data)?)?;
            assert!(gap < 1e-12, "{gap:e}");
            let e = max_relative_error(run, &data)?;
            assert!(e < 1e-6, "{b} {c} {groups} {rest:?}: {e:e}");
            let e = max_relative_error(oracle, &data)?;
            assert!(e < 1e-6, "composition: {e:e}");
        }
        Ok(())
    }

    #[test]
    fn a_large_mean_costs_no_digits() -> Result<()> {
        let x = normal(1, (2, 4, 50))?;
        let (one, zero) = (
            x.ones_like()?.narrow(0, 0, 1)?,
            x.zeros_like()?.narrow(0, 0, 1)?,
        );
        let (gamma, beta) = (one.get(0)?.narrow(1, 0, 1)?, zero.get(0)?.narrow(1, 0, 1)?);
        let param = |t: &Tensor| t.squeeze(1)?.to_dtype(DType::F32);
        let shifted = ((&x * 0.5)? + 4096.0)?.to_dtype(DType::F32)?;
        let exact = group_norm(
            &shifted.to_dtype(DType::F64)?,
            &gamma.squeeze(1)?,
            &beta.squeeze(1)?,
            2,
            1e-5,
        )?;
        let ours = group_norm(&shifted, &param(&gamma)?, &param(&beta)?, 2, 1e-5)?;
        let gap = max_abs_difference(&exact, &ours)?;
        assert!(gap < 2e-3, "{gap:e}");
        Ok(())
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let data = inputs(5, 12, &[9, 7])?;
        let run = |threads: usize| -> Result<Vec<Vec<f32>>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(candle_core::Error::wrap)?.install(|| {
                let vars: Vec<candle_core::Var> = data
                    .iter()
                    .map(|t| candle_core::Var::from_tensor(&t.to_dtype(DType::F32)?))
                    .collect::<Result<_>>()?;
                let y = group_norm(&vars[0], &vars[1], &vars[2], 3, 1e-5)?;
                let grads = (y.sqr()? * &y)?.sum_all()?.backward()?;
                let mut all = vec![y.flatten_all()?.to_vec1::<f32>()?];
                for v in &vars {
                    all.push(grads.get(v).unwrap().flatten_all()?.to_vec1::<f32>()?);
                }
                Ok(all)
            })
        };
        assert_eq!(run(1)?, run(2)?);
        Ok(())
    }

    #[test]
    fn bad_shapes_are_errors() -> Result<()> {
        let [x, gamma, beta] = inputs(1, 6, &[2])?;
        let error = group_norm(&x, &gamma, &beta, 4, 1e-5)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("6 channels cannot be split into 4 groups"),
            "{error}"
        );
        assert!(group_norm(&x, &gamma.narrow(0, 0, 3)?, &beta, 3, 1e-5).is_err());
        Ok(())
    }
}
