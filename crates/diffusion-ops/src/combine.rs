//! Linear combinations in one pass: what samplers do between two calls of a network.

use crate::cpu::{CHUNK, Real, buffer, half_on_cpu, native, slice, worth};
use crate::simd::{Kernel, Simd, dispatch};
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// A linear combination with one weight a tensor.
///
/// ```text
/// y = Σᵢ aᵢ xᵢ
/// ```
///
/// where the `aᵢ` are rounded to the element type first.
///
/// # Shapes
///
/// All tensors have the shape of the result.
///
/// # Errors
///
/// Without terms, or when shapes or element types differ.
pub fn combine(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let weights: Vec<[f64; 1]> = terms.iter().map(|(a, _)| [*a]).collect();
    let terms: Vec<Term<'_>> = weights
        .iter()
        .zip(terms)
        .map(|(a, (_, x))| (a.as_slice(), *x))
        .collect();
    run(&terms, 1)
}

/// A linear combination with one weight for each tensor and each element of the batch.
///
/// ```text
/// y[b] = Σᵢ aᵢ[b] xᵢ[b]
/// ```
///
/// # Shapes
///
/// `aᵢ` `[B]`, `xᵢ` `[B, …]`, the result likewise.
///
/// # Errors
///
/// As for [`combine`], and when the number of weights is not the batch size.
pub fn combine_each(terms: &[(&[f64], &Tensor)]) -> Result<Tensor> {
    let batch = match terms.first() {
        Some((_, x)) => x.dims().first().copied().unwrap_or(1),
        None => 0,
    };
    if let Some((a, x)) = terms.iter().find(|(a, _)| a.len() != batch) {
        bail!(
            "combine: {} weights for a batch {:?}; expected one for each of its {batch} elements",
            a.len(),
            x.dims()
        )
    }
    run(terms, batch)
}

type Term<'a> = (&'a [f64], &'a Tensor);

/// The combination of tensors of `rows` rows, each with its own weights.
fn run(terms: &[Term<'_>], rows: usize) -> Result<Tensor> {
    let Some((_, first)) = terms.first() else {
        bail!("combine: no terms; expected at least one")
    };
    for (_, x) in terms {
        if x.shape() != first.shape() || x.dtype() != first.dtype() {
            bail!(
                "combine: {:?} {:?} and {:?} {:?}; all terms must be alike",
                first.dtype(),
                first.dims(),
                x.dtype(),
                x.dims()
            )
        }
    }
    if terms.iter().all(|(_, x)| half_on_cpu(x)) {
        let wide = terms.iter().map(|(_, x)| x.to_dtype(DType::F32));
        let wide = wide.collect::<Result<Vec<_>>>()?;
        let terms: Vec<Term<'_>> = terms.iter().zip(&wide).map(|((a, _), x)| (*a, x)).collect();
        return run(&terms, rows)?.to_dtype(first.dtype());
    }
    if !terms.iter().all(|(_, x)| native(x) && !x.track_op()) {
        return composed(terms, rows);
    }
    let (weights, tensors): (Vec<&[f64]>, Vec<&Tensor>) = terms.iter().copied().unzip();
    let tensors = tensors
        .iter()
        .map(|x| x.contiguous())
        .collect::<Result<Vec<_>>>()?;
    let values = match first.dtype() {
        DType::F32 => kernel::<f32>(&weights, &tensors, rows)?,
        _ => kernel::<f64>(&weights, &tensors, rows)?,
    };
    values.reshape(first.shape())
}

/// The same as operations of the tensor library: on other devices, and where gradients are wanted.
fn composed(terms: &[Term<'_>], rows: usize) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (a, x) in terms {
        let term = match a {
            [a] if rows == 1 => x.affine(*a, 0.0)?,
            _ => {
                let mut shape = vec![1; x.rank()];
                shape[0] = rows;
                let a = Tensor::new(*a, &Device::Cpu)?.reshape(shape)?;
                x.broadcast_mul(&a.to_dtype(x.dtype())?.to_device(x.device())?)?
            }
        };
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    match sum {
        Some(sum) => Ok(sum),
        None => bail!("combine: no terms; expected at least one"),
    }
}

fn kernel<T: Real>(weights: &[&[f64]], tensors: &[Tensor], rows: usize) -> Result<Tensor> {
    let guards: Vec<_> = tensors.iter().map(|x| x.storage_and_layout()).collect();
    let inputs = guards
        .iter()
        .map(|(guard, layout)| match &**guard {
            Storage::Cpu(s) => slice::<T>(s, layout, "combine"),
            _ => bail!("combine: the tensor is on another device"),
        })
        .collect::<Result<Vec<&[T]>>>()?;
    let n = inputs[0].len();
    let row = (n / rows.max(1)).max(1);
    let fill = |out: &mut [T]| {
        // A chunk lies within a row, so that it has one weight a tensor.
        let each = |(r, c, out): (usize, usize, &mut [T])| {
            let start = r * row + c * CHUNK;
            let a: Vec<T> = weights.iter().map(|a| T::from_f64(a[r])).collect();
            let x: Vec<&[T]> = inputs
                .iter()
                .map(|x| &x[start..start + out.len()])
                .collect();
            dispatch(Combine { a: &a, x: &x, out });
        };
        let together = worth(row.min(CHUNK));
        out.par_chunks_mut(row)
            .enumerate()
            .flat_map(|(r, out)| {
                let chunks = out.par_chunks_mut(CHUNK).enumerate();
                chunks
                    .map(move |(c, out)| (r, c, out))
                    .with_min_len(together)
            })
            .for_each(each);
    };
    let serial = |out: &mut [T]| {
        for (r, out) in out.chunks_mut(row).enumerate() {
            let a: Vec<T> = weights.iter().map(|a| T::from_f64(a[r])).collect();
            let x: Vec<&[T]> = inputs.iter().map(|x| &x[r * row..][..out.len()]).collect();
            dispatch(Combine { a: &a, x: &x, out });
        }
    };
    // SAFETY: `Combine` writes all of its part before it reads any, and the parts cover everything.
    let out = unsafe {
        buffer(n, |out| {
            if n <= 4 * CHUNK {
                serial(out)
            } else {
                fill(out)
            }
        })
    };
    Tensor::from_vec(out, n, &Device::Cpu)
}

struct Combine<'a, T> {
    a: &'a [T],
    x: &'a [&'a [T]],
    out: &'a mut [T],
}

impl<T: Real> Kernel for Combine<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { a, x, out } = self;
        let n = out.len();
        // Each product and each sum is rounded: the numbers of the plain formula at every level.
        let done = match x {
            [x, y, z, w, ..] => {
                let (x, y, z, w) = (&x[..n], &y[..n], &z[..n], &w[..n]);
                for i in 0..n {
                    out[i] = a[0] * x[i] + a[1] * y[i] + a[2] * z[i] + a[3] * w[i];
                }
                4
            }
            [x, y, z] => {
                let (x, y, z) = (&x[..n], &y[..n], &z[..n]);
                for i in 0..n {
                    out[i] = a[0] * x[i] + a[1] * y[i] + a[2] * z[i];
                }
                3
            }
            [x, y] => {
                let (a, b, x, y) = (a[0], a[1], &x[..n], &y[..n]);
                for i in 0..n {
                    out[i] = a * x[i] + b * y[i];
                }
                2
            }
            [x] => {
                let (a, x) = (a[0], &x[..n]);
                for i in 0..n {
                    out[i] = a * x[i];
                }
                1
            }
            [] => 0,
        };
        // The chunk is still in the nearest cache.
        for (&a, x) in a[done..].iter().zip(&x[done..]) {
            let x = &x[..n];
            for i in 0..n {
                out[i] += a * x[i];
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
    use candle_core::Var;
    use proptest::prelude::*;

    fn bits(t: &Tensor) -> Vec<f64> {
        let t = t.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        t.to_vec1().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_the_composition(
            batch in 1usize..5, inner in 1usize..40, long in any::<bool>(),
            terms in 1usize..6, half in any::<bool>(),
        ) {
            let inner = if long { inner * 2000 } else { inner };
            at_every_level(|_| {
                let dtype = if half { DType::BF16 } else { DType::F32 };
                let x: Vec<Tensor> = (0..terms)
                    .map(|k| normal(k as u64, (batch, inner))?.to_dtype(dtype))
                    .collect::<Result<_>>()?;
                let a: Vec<Vec<f64>> = (0..terms).map(|k| (0..batch).map(|b| 0.3 * k as f64 - 0.7 * b as f64).collect()).collect();
                let each: Vec<Term<'_>> = a.iter().zip(&x).map(|(a, x)| (a.as_slice(), x)).collect();
                let all: Vec<(f64, &Tensor)> = a.iter().zip(&x).map(|(a, x)| (a[0], x)).collect();
                let single: Vec<Term<'_>> = a.iter().zip(&x).map(|(a, x)| (&a[..1], x)).collect();
                for (ours, terms, rows) in [(combine_each(&each)?, each, batch), (combine(&all)?, single, 1)] {
                    let plain = composed(&terms, rows)?;
                    if half {
                        let scale = bits(&plain).iter().fold(0.1, |m: f64, v| m.max(v.abs()));
                        assert!(max_abs_difference(&ours, &plain)? <= 0.02 * scale);
                    } else {
                        assert_eq!(bits(&ours), bits(&plain));
                    }
                }
                Ok(())
            }).unwrap();
        }
    }

    #[test]
    fn gradients_views_and_threads() -> Result<()> {
        let inputs = [normal(1, (2, 3))?, normal(2, (2, 3))?, normal(3, (2, 3))?];
        let error = max_relative_error(
            |t| combine(&[(0.5, &t[0]), (-2.0, &t[1]), (3.0, &t[2])]),
            &inputs,
        )?;
        assert!(error < 1e-6, "{error:e}");
        let error = max_relative_error(
            |t| combine_each(&[(&[0.5, 1.0], &t[0]), (&[-2.0, 4.0], &t[1])]),
            &inputs[..2],
        )?;
        assert!(error < 1e-6, "{error:e}");
        let turned = normal(4, (3, 2))?.t()?;
        let y = combine(&[(1.0, &turned), (2.0, &inputs[0])])?;
        let plain = (&turned + (&inputs[0] * 2.0)?)?;
        assert_eq!(max_abs_difference(&y, &plain)?, 0.0);
        assert!(combine(&[(1.0, Var::from_tensor(&turned)?.as_tensor())])?.track_op());
        at_every_level(|_| {
            same_bits_on_any_number_of_threads(|| {
                let (x, y) = (normal(5, (3, 50_000))?, normal(6, (3, 50_000))?);
                let each = combine_each(&[(&[0.1, 0.2, 0.3], &x), (&[1.0, 2.0, 3.0], &y)])?;
                Ok(vec![each, combine(&[(0.3, &x), (0.7, &y), (1.1, &x)])?])
            })
        })
    }

    #[test]
    fn misfits_and_empty_batches() -> Result<()> {
        let (x, y) = (normal(1, (2, 3))?, normal(2, (3, 2))?);
        assert!(combine(&[]).is_err());
        assert!(combine(&[(1.0, &x), (1.0, &y)]).is_err());
        assert!(combine(&[(1.0, &x), (1.0, &x.to_dtype(DType::F32)?)]).is_err());
        assert!(combine_each(&[(&[1.0], &x)]).is_err());
        let none = Tensor::zeros((0, 3), DType::F32, &Device::Cpu)?;
        assert_eq!(combine(&[(2.0, &none)])?.dims(), [0, 3]);
        assert_eq!(combine_each(&[(&[], &none)])?.dims(), [0, 3]);
        Ok(())
    }
}
