//! Normalisation over the last axis.

use crate::cpu::{Real, buffer, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::{deliver, wanted};
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply3;
use crate::vmath::{real, squared_deviations, sum, weighted_sum_and_moment};
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};
use rayon::prelude::*;

/// Layer normalisation (Ba et al. 2016, equation 4).
///
/// ```text
/// y = γ (x − μ)/√(σ² + ε) + β
/// ```
///
/// where `μ` and `σ²` are mean and (biased) variance over the last axis.
///
/// # Shapes
/// `x [..., D]`, `gamma [D]`, `beta [D]`; the result has the shape of `x`.
///
/// # Errors
/// If a parameter does not have the shape `[D]`.
pub fn layer_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dims().last().copied();
    if gamma.dims() != width.as_slice() || beta.dims() != width.as_slice() || width.is_none() {
        let (x, gamma, beta) = (x.dims(), gamma.dims(), beta.dims());
        bail!(
            "layer_norm: scale {gamma:?}, shift {beta:?} and input {x:?}, expected [D], [D] and [..., D]"
        );
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        return layer_norm(&wide(x)?, &wide(gamma)?, &wide(beta)?, eps)?.to_dtype(x.dtype());
    }
    if native(x) {
        let (gamma, beta) = (gamma.contiguous()?, beta.contiguous()?);
        apply3(&x.contiguous()?, &gamma, &beta, Rows::<true>(eps))
    } else {
        Rows::<true>(eps).composed(x, gamma)?.broadcast_add(beta)
    }
}

/// The normalisation of rows with this ε: of their deviations from the mean (layer normalisation)
/// or of themselves (root-mean-square normalisation).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<const CENTRED: bool>(pub f64);

impl<const CENTRED: bool> Rows<CENTRED> {
    /// γ x̂ from the tensor library's differentiable operations.
    pub(crate) fn composed(&self, x: &Tensor, gamma: &Tensor) -> Result<Tensor> {
        let last = x.rank() - 1;
        let x = if CENTRED {
            x.broadcast_sub(&x.mean_keepdim(last)?)?
        } else {
            x.clone()
        };
        let std = (x.sqr()?.mean_keepdim(last)? + self.0)?.sqrt()?;
        x.broadcast_div(&std)?.broadcast_mul(gamma)
    }

    fn forward<T: Real>(&self, x: &[T], gamma: &[T], beta: Option<&[T]>) -> CpuStorage {
        let width = gamma.len().max(1);
        let block = width * worth(width);
        let fill = |out: &mut [T]| {
            out.par_chunks_mut(block)
                .zip(x.par_chunks(block))
                .for_each(|(out, x)| {
                    dispatch(Forward::<CENTRED, T> {
                        x,
                        gamma,
                        beta,
                        eps: self.0,
                        out,
                    });
                });
        };
        // SAFETY: the blocks cover the output, which consists of whole rows that the kernel writes.
        unsafe { written(x.len(), fill) }
    }

    /// The gradients of x, of γ, and of β.
    fn backward<T: Real>(&self, x: &[T], gamma: &[T], grad: &[T]) -> [Vec<T>; 3] {
        let width = gamma.len();
        assert_eq!(x.len(), grad.len());
        if x.is_empty() {
            let zeros = vec![real::<T>(0.0); width];
            return [Vec::new(), zeros.clone(), zeros];
        }
        // At most 64 blocks, so that the sums of the blocks stay small.
        let rows = x.len() / width;
        let block = rows.div_ceil(64).max(worth(width).min(rows)) * width;
        let blocks = x.len().div_ceil(block);
        let mut partial = vec![real::<T>(0.0); blocks * 2 * width];
        let fill = |dx: &mut [T]| {
            dx.par_chunks_mut(block)
                .zip(partial.par_chunks_mut(2 * width))
                .zip(x.par_chunks(block).zip(grad.par_chunks(block)))
                .for_each(|((dx, partial), (x, grad))| {
                    let (dgamma, dbeta) = partial.split_at_mut(width);
                    dispatch(Backward::<CENTRED, T> {
                        x,
                        gamma,
                        grad,
                        eps: self.0,
                        dx,
                        dgamma,
                        dbeta,
                    });
                });
        };
        // SAFETY: as in `forward`.
        let dx = unsafe { buffer(x.len(), fill) };
        let mut sums = vec![real::<T>(0.0); 2 * width];
        for block in partial.chunks_exact(2 * width) {
            sums.iter_mut().zip(block).for_each(|(s, v)| *s += *v);
        }
        let dbeta = sums.split_off(width);
        [dx, sums, dbeta]
    }

    /// [`Self::backward`] on tensors.
    fn gradients(&self, x: &Tensor, gamma: &Tensor, grad: &Tensor) -> Result<[Tensor; 3]> {
        const NAME: &str = "layer_norm_backward";
        let grad = grad.detach().contiguous()?;
        let (s1, l1) = x.storage_and_layout();
        let (s2, l2) = gamma.storage_and_layout();
        let (s3, l3) = grad.storage_and_layout();
        let (Storage::Cpu(s1), Storage::Cpu(s2), Storage::Cpu(s3)) = (&*s1, &*s2, &*s3) else {
            bail!("{NAME}: the CPU kernel takes tensors on the CPU")
        };
        Ok(by_float!(s1, NAME, T => {
            let (x_values, gamma_values) = (slice::<T>(s1, l1, NAME)?, slice::<T>(s2, l2, NAME)?);
            let grad = slice::<T>(s3, l3, NAME)?;
            let [dx, dgamma, dbeta] = self.backward(x_values, gamma_values, grad);
            [
                Tensor::from_vec(dx, x.shape(), &Device::Cpu)?,
                Tensor::from_vec(dgamma, gamma.shape(), &Device::Cpu)?,
                Tensor::from_vec(dbeta, gamma.shape(), &Device::Cpu)?,
            ]
        }))
    }
}

fn hand_over(arg: &Tensor, grad: Tensor) -> Result<Option<Tensor>> {
    if wanted(arg) {
        deliver(arg, grad)
    } else {
        Ok(None)
    }
}

impl CustomOp3 for Rows<true> {
    fn name(&self) -> &'static str {
        "layer_norm"
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
        let out = by_float!(s1, "layer_norm", T => {
            let x = slice::<T>(s1, l1, "layer_norm")?;
            let gamma = slice::<T>(s2, l2, "layer_norm")?;
            self.forward(x, gamma, Some(slice::<T>(s3, l3, "layer_norm")?))
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
        let [grad_x, grad_gamma, grad_beta] = self.gradients(x, gamma, grad)?;
        Ok((
            hand_over(x, grad_x)?,
            hand_over(gamma, grad_gamma)?,
            hand_over(beta, grad_beta)?,
        ))
    }
}

impl CustomOp2 for Rows<false> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s1, "rms_norm", T => {
            let x = slice::<T>(s1, l1, "rms_norm")?;
            self.forward(x, slice::<T>(s2, l2, "rms_norm")?, None)
        });
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [grad_x, grad_gamma, _] = self.gradients(x, gamma, grad)?;
        Ok((hand_over(x, grad_x)?, hand_over(gamma, grad_gamma)?))
    }
}

/// Mean (0 unless centred) and reciprocal of √(mean square + ε) of a row.
#[inline(always)]
fn moments<S: Simd, const CENTRED: bool, T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = x.len() as f64;
    let mean = if CENTRED {
        real::<T>(sum::<S, T>(x).to_f64() / n)
    } else {
        real(0.0)
    };
    let square = squared_deviations::<S, T>(x, mean).to_f64() / n;
    (mean, real(1.0 / (square + eps).sqrt()))
}

struct Forward<'a, const CENTRED: bool, T> {
    x: &'a [T],
    gamma: &'a [T],
    beta: Option<&'a [T]>,
    eps: f64,
    out: &'a mut [T],
}

impl<const CENTRED: bool, T: Real> Kernel for Forward<'_, CENTRED, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let width = self.gamma.len();
        for (x, out) in self
            .x
            .chunks_exact(width)
            .zip(self.out.chunks_exact_mut(width))
        {
            let (mean, rstd) = moments::<S, CENTRED, T>(x, self.eps);
            let rows = out.iter_mut().zip(x).zip(self.gamma);
            if let Some(beta) = self.beta {
                for (((o, v), gamma), beta) in rows.zip(beta) {
                    *o = S::mul_add((*v - mean) * rstd, *gamma, *beta);
                }
            } else {
                for ((o, v), gamma) in rows {
                    *o = *v * rstd * *gamma;
                }
            }
        }
    }
}

/// With x̂ = (x − μ) r and h = γ g: dx = r (h − mean(h) − x̂ mean(h x̂)), without the first mean
/// unless centred; dγ = Σ g x̂ and dβ = Σ g over the rows.
struct Backward<'a, const CENTRED: bool, T> {
    x: &'a [T],
    gamma: &'a [T],
    grad: &'a [T],
    eps: f64,
    dx: &'a mut [T],
    dgamma: &'a mut [T],
    dbeta: &'a mut [T],
}

impl<const CENTRED: bool, T: Real> Kernel for Backward<'_, CENTRED, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let gamma = self.gamma;
        let width = gamma.len();
        let n = width as f64;
        let (dgamma, dbeta) = (&mut self.dgamma[..width], &mut self.dbeta[..width]);
        let rows = self
            .x
            .chunks_exact(width)
            .zip(self.grad.chunks_exact(width));
        for (dx, (x, grad)) in self.dx.chunks_exact_mut(width).zip(rows) {
            let (mean, rstd) = moments::<S, CENTRED, T>(x, self.eps);
            let [total, dot] = weighted_sum_and_moment::<S, T>(grad, gamma, x, mean);
            let offset = if CENTRED { total.to_f64() / n } else { 0.0 };
            let offset = real::<T>(-offset) * rstd;
            let slope = real::<T>(-dot.to_f64() / n) * rstd * rstd;
            for i in 0..width {
                let (g, normed) = (grad[i], (x[i] - mean) * rstd);
                dx[i] = S::mul_add(g * gamma[i], rstd, S::mul_add(normed, slope, offset));
                dgamma[i] = S::mul_add(g, normed, dgamma[i]);
                if CENTRED {
                    dbeta[i] += g;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{
        at_every_level, max_abs_difference, max_relative_error, normal,
        same_bits_on_any_number_of_threads,
    };
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    #[test]
    fn value_and_gradient() -> Result<()> {
        let x = Tensor::new(&[[1f64, 3.0]], &Device::Cpu)?;
        let gamma = Tensor::new(&[2f64, 2.0], &Device::Cpu)?;
        let beta = Tensor::new(&[0.5f64, 0.0], &Device::Cpu)?;
        let y = layer_norm(&x, &gamma, &beta, 0.0)?.to_vec2::<f64>()?;
        assert_eq!(y, [[-1.5, 2.0]]);
        let inputs = [normal(1, (2, 3, 21))?, normal(2, 21)?, normal(3, 21)?];
        at_every_level(|level| {
            let e = max_relative_error(|t| layer_norm(&t[0], &t[1], &t[2], 1e-5), &inputs)?;
            assert!(e < 1e-6, "{level:?}: {e:e}");
            Ok(())
        })?;
        let composed = |t: &[Tensor]| {
            Rows::<true>(1e-5)
                .composed(&t[0], &t[1])?
                .broadcast_add(&t[2])
        };
        let e = max_relative_error(composed, &inputs)?;
        assert!(e < 1e-6, "composition: {e:e}");
        assert!(layer_norm(&x, &inputs[1], &beta, 0.0).is_err());
        assert!(layer_norm(&x.sum_all()?, &x.sum_all()?, &x.sum_all()?, 0.0).is_err());
        let empty = x.narrow(0, 0, 0)?;
        assert_eq!(layer_norm(&empty, &gamma, &beta, 0.0)?.dims(), [0, 2]);
        Ok(())
    }

    /// The result and all gradients of Σ y³.
    fn all(data: &[Tensor]) -> Result<Vec<Tensor>> {
        let vars: Vec<Var> = data.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let y = layer_norm(&vars[0], &vars[1], &vars[2], 1e-5)?;
        let grads = (y.sqr()? * &y)?.sum_all()?.backward()?;
        let mut out = vec![y];
        for v in &vars {
            out.push(grads.get(v).unwrap().clone());
        }
        Ok(out)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn f32_follows_f64(rows in 1usize..40, width in 4usize..200, seed in 0u64..99) {
            at_every_level(|level| {
                let data = [normal(seed, (rows, width))?, normal(2, width)?, normal(3, width)?];
                let cast = |dtype| data.iter().map(|t| t.to_dtype(DType::F32)?.to_dtype(dtype))
                    .collect::<Result<Vec<_>>>();
                let wide = all(&cast(DType::F64)?)?;
                for (a, e) in all(&cast(DType::F32)?)?.iter().zip(&wide) {
                    let gap = max_abs_difference(a, e)? / max_abs_difference(e, &e.zeros_like()?)?;
                    assert!(gap < 1e-5, "{rows} {width} at {level:?}: {gap:e}");
                }
                Ok(())
            }).unwrap();
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<()> {
        let data = [normal(1, (1000, 130))?, normal(2, 130)?, normal(3, 130)?];
        let data: Vec<Tensor> = data
            .iter()
            .map(|t| t.to_dtype(DType::F32))
            .collect::<Result<_>>()?;
        at_every_level(|_| same_bits_on_any_number_of_threads(|| all(&data)))
    }
}
