//! Two tensors one after the other: what joins a skip connection with the way up.

use crate::cpu::{Real, by_float, native, slice, worth, written};
use crate::gradient::{deliver, wanted};
use crate::tape::apply2;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Two tensors one after the other along `dim`.
///
/// ```text
/// y[…, i, …] = a[…, i, …]        i < n
///              b[…, i − n, …]    otherwise, with n = a.dim(dim)
/// ```
///
/// # Shapes
/// `a` and `b` alike but for `dim`, along which the result has the sum of both.
///
/// # Errors
/// When other dimensions or the element types differ.
pub fn concat(a: &Tensor, b: &Tensor, dim: usize) -> Result<Tensor> {
    let (n, m) = (a.dim(dim)?, b.dim(dim)?);
    let mut expected = a.dims().to_vec();
    expected[dim] = m;
    if b.dims() != expected || a.dtype() != b.dtype() {
        bail!(
            "concat: {:?} {:?} and {:?} {:?} along dimension {dim}; all else must be alike",
            a.dtype(),
            a.dims(),
            b.dtype(),
            b.dims()
        )
    }
    if !native(a) || !native(b) {
        return Tensor::cat(&[a, b], dim);
    }
    let inner: usize = a.dims()[dim + 1..].iter().product();
    let op = Concat {
        dim,
        lines: [n * inner, m * inner],
    };
    apply2(&a.contiguous()?, &b.contiguous()?, op)
}

/// `lines` are the lengths of what lies together of each argument.
struct Concat {
    dim: usize,
    lines: [usize; 2],
}

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [n, m] = self.lines;
        let mut dims = l1.dims().to_vec();
        dims[self.dim] += l2.dims()[self.dim];
        let out = by_float!(s1, "concat", T => {
            let (a, b) = (slice::<T>(s1, l1, "concat")?, slice::<T>(s2, l2, "concat")?);
            let fill = |out: &mut [T]| {
                let lines = out.par_chunks_mut((n + m).max(1)).enumerate();
                lines.with_min_len(worth(n + m)).for_each(|(i, out)| {
                    out[..n].copy_from_slice(&a[i * n..(i + 1) * n]);
                    out[n..].copy_from_slice(&b[i * m..(i + 1) * m]);
                });
            };
            // SAFETY: the lines cover the output, and both parts of each are written.
            unsafe { written(a.len() + b.len(), fill) }
        });
        Ok((out, Shape::from(dims)))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let part = |arg: &Tensor, from: usize, len: usize| -> Result<Option<Tensor>> {
            if !wanted(arg) {
                return Ok(None);
            }
            let part = Part {
                line: self.lines[0] + self.lines[1],
                from,
                len,
                shape: arg.shape().clone(),
            };
            deliver(arg, grad.apply_op1_no_bwd(&part)?)
        };
        let [n, m] = self.lines;
        Ok((part(a, 0, n)?, part(b, n, m)?))
    }
}

/// Of each line of `line` elements those from `from` on, as a tensor of its own.
struct Part {
    line: usize,
    from: usize,
    len: usize,
    shape: Shape,
}

impl Part {
    fn copy<T: Real>(&self, x: &[T]) -> CpuStorage {
        let fill = |out: &mut [T]| {
            let lines = out.par_chunks_mut(self.len.max(1)).enumerate();
            lines.with_min_len(worth(self.len)).for_each(|(i, out)| {
                out.copy_from_slice(&x[i * self.line + self.from..][..self.len]);
            });
        };
        // SAFETY: the lines cover the output, and all of each is written.
        unsafe { written(self.shape.elem_count(), fill) }
    }
}

impl CustomOp1 for Part {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s, "concat", T => self.copy(slice::<T>(s, l, "concat")?));
        Ok((out, self.shape.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_relative_error, normal, same_bits_on_any_number_of_threads};
    use candle_core::DType;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn equals_the_tensor_library(
            outer in 1usize..4, n in 0usize..5, m in 1usize..5, inner in 1usize..6,
            dim in 0usize..3, half in any::<bool>(),
        ) {
            let run = || -> Result<()> {
                let shape = |k| {
                    let mut dims = vec![outer, inner, 3];
                    dims[dim] = k;
                    dims
                };
                let dtype = if half { DType::BF16 } else { DType::F32 };
                let a = normal(1, shape(n))?.to_dtype(dtype)?;
                let b = normal(2, shape(m))?.to_dtype(dtype)?;
                let bits = |t: Tensor| t.to_dtype(DType::F64)?.to_vec3::<f64>();
                let expected = if n == 0 { b.clone() } else { Tensor::cat(&[&a, &b], dim)? };
                if n > 0 || !half {
                    assert_eq!(bits(concat(&a, &b, dim)?)?, bits(expected)?);
                }
                Ok(())
            };
            run().unwrap();
        }
    }

    #[test]
    fn gradients_and_threads() -> Result<()> {
        for dim in 0..3 {
            let mut dims = [2, 3, 4];
            let a = normal(3, dims.to_vec())?;
            dims[dim] = 5;
            let b = normal(4, dims.to_vec())?;
            // `b` enters twice, once by another way.
            let error = max_relative_error(
                |t| concat(&concat(&t[0], &t[1], dim)?, &t[1].sqr()?, dim)?.sqr(),
                &[a, b],
            )?;
            assert!(error < 1e-6, "{error:e}");
        }
        same_bits_on_any_number_of_threads(|| {
            let (a, b) = (normal(5, (40, 3000))?, normal(6, (40, 2000))?);
            Ok(vec![concat(&a, &b, 1)?, concat(&a, &a, 0)?])
        })
    }

    #[test]
    fn other_dimensions_must_agree() -> Result<()> {
        assert!(concat(&normal(1, (3, 2))?, &normal(2, (4, 2))?, 1).is_err());
        assert!(concat(&normal(1, (3, 2))?, &normal(2, (3, 2))?, 2).is_err());
        Ok(())
    }
}
