//! Attention against its composition, finite differences and itself on other threads.

use super::*;
use crate::gradcheck::{
    at_every_level, max_abs_difference, max_relative_error, normal,
    same_bits_on_any_number_of_threads,
};
use crate::rng::{Key, stream};
use candle_core::{D, Var};
use proptest::prelude::*;

const HIDDEN: f64 = f64::NEG_INFINITY;

fn largest(x: &Tensor) -> Result<f64> {
    max_abs_difference(x, &x.zeros_like()?)
}

/// A mask that hides about a third of the keys, and all of them from the last query.
fn hiding(seed: u64, (b, h, n, s): (usize, usize, usize, usize)) -> Result<Tensor> {
    let mut values = Key::new(seed, stream::TEST).normal(b * h * n * s);
    for (i, v) in values.iter_mut().enumerate() {
        if *v < -0.4 || (n > 1 && i / s % n == n - 1) {
            *v = HIDDEN;
        }
    }
    Tensor::from_vec(values, (b, h, n, s), &Device::Cpu)
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    let inputs = [
        normal(1, (2, 3, 4, 5))?,
        normal(2, (2, 3, 6, 5))?,
        normal(3, (2, 3, 6, 2))?,
        normal(4, (1, 1, 4, 6))?,
    ];
    let swapped = [
        normal(1, (2, 4, 3, 5))?,
        normal(2, (2, 6, 3, 5))?,
        normal(3, (2, 6, 3, 5))?,
    ];
    let long = [
        normal(5, (1, 1, 3, 2))?,
        normal(6, (1, 1, 81, 2))?,
        normal(7, (1, 1, 81, 1))?,
    ];
    let hide = hiding(8, (1, 1, 3, 81))?;
    at_every_level(|level| {
        let e = max_relative_error(
            |t| attention(&t[0], &t[1], &t[2], Some(&t[3]), None),
            &inputs,
        )?;
        assert!(e < 1e-6, "tracked mask, {level:?}: {e:e}");
        let e = max_relative_error(
            |t| attention(&t[0], &t[1], &t[2], Some(&inputs[3]), None),
            &inputs[..3],
        )?;
        assert!(e < 1e-6, "mask, {level:?}: {e:e}");
        let e = max_relative_error(
            |t| {
                let t: Vec<Tensor> = t.iter().map(|t| t.transpose(1, 2)).collect::<Result<_>>()?;
                attention(&t[0], &t[1], &t[2], None, Some(0.3))
            },
            &swapped,
        )?;
        assert!(e < 1e-6, "strided, {level:?}: {e:e}");
        let e = max_relative_error(
            |t| {
                let t: Vec<Tensor> = t.iter().map(|t| t.flatten(2, 3)).collect::<Result<_>>()?;
                attention_heads(&t[0], &t[1], &t[2], 3, None, Some(-0.3))
            },
            &swapped,
        )?;
        assert!(e < 1e-6, "heads, {level:?}: {e:e}");
        let e = max_relative_error(|t| attention(&t[0], &t[1], &t[2], Some(&hide), None), &long)?;
        assert!(e < 1e-6, "in parts, {level:?}: {e:e}");
        Ok(())
    })
}

#[test]
fn equal_keys_average_and_a_mask_hides() -> Result<()> {
    let q = normal(1, (1, 1, 2, 3))?;
    let k = Tensor::zeros_like(&normal(1, (1, 1, 4, 3))?)?;
    let v = normal(2, (1, 1, 4, 3))?;
    let y = attention(&q, &k, &v, None, None)?;
    let mean = v.mean_keepdim(2)?;
    let gap = y
        .broadcast_sub(&mean)?
        .abs()?
        .flatten_all()?
        .max(D::Minus1)?;
    assert!(gap.to_scalar::<f64>()? < 1e-15);
    let mask = Tensor::new(&[[[[HIDDEN, 0.0, HIDDEN, HIDDEN]]]], &Device::Cpu)?;
    let y = attention(&q, &k, &v, Some(&mask), None)?;
    assert_eq!(
        y.get(0)?.get(0)?.get(1)?.to_vec1::<f64>()?,
        v.get(0)?.get(0)?.get(1)?.to_vec1::<f64>()?
    );
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_refused() -> Result<()> {
    let (q, k) = (normal(1, (1, 2, 2, 4))?, normal(2, (1, 2, 3, 4))?);
    assert!(attention(&q, &k.narrow(3, 0, 2)?, &k, None, None).is_err());
    assert!(attention(&q, &k, &k.narrow(2, 0, 2)?, None, None).is_err());
    let mask = normal(3, (1, 1, 2, 4))?;
    assert!(attention(&q, &k, &k, Some(&mask), None).is_err());
    let flat = normal(1, (1, 2, 8))?;
    assert!(attention(&flat, &flat, &flat, None, None).is_err());
    for heads in [0, 3] {
        let e = attention_heads(&flat, &flat, &flat, heads, None, None).unwrap_err();
        assert!(e.to_string().contains(&format!("h = {heads}")), "{e}");
    }
    Ok(())
}

#[test]
fn hidden_queries_receive_and_give_nothing() -> Result<()> {
    let (q, k, v) = (
        Var::from_tensor(&normal(1, (1, 2, 3, 4))?)?,
        Var::from_tensor(&normal(2, (1, 2, 5, 4))?)?,
        Var::from_tensor(&normal(3, (1, 2, 5, 4))?)?,
    );
    let mask = Tensor::full(HIDDEN, (3, 5), &Device::Cpu)?;
    for f in [
        attention(&q, &k, &v, Some(&mask), None)?,
        composed(&q, &k, &v, Some(&mask), 0.5)?,
    ] {
        assert_eq!(largest(&f)?, 0.0);
        let grads = f.sum_all()?.backward()?;
        for var in [&q, &k, &v] {
            assert_eq!(largest(grads.get(var).unwrap())?, 0.0);
        }
    }
    Ok(())
}

#[test]
fn scores_far_apart_do_not_overflow() -> Result<()> {
    let (q, k, v) = (
        (normal(1, (1, 1, 70, 8))? * 60.0)?,
        normal(2, (1, 1, 90, 8))?,
        normal(3, (1, 1, 90, 8))?,
    );
    let expected = composed(&q, &k, &v, None, 1.0)?;
    let single = |t: &Tensor| t.to_dtype(DType::F32);
    let y = attention(&single(&q)?, &single(&k)?, &single(&v)?, None, Some(1.0))?;
    // Scores in the hundreds have an absolute rounding error of 1e-5 to 1e-4.
    let e = max_abs_difference(&y, &expected)? / largest(&expected)?;
    assert!(e < 3e-4, "{e:e}");
    let mask = Tensor::full(-1e5f32, (70, 1), &Device::Cpu)?;
    let shifted = attention(
        &single(&q)?,
        &single(&k)?,
        &single(&v)?,
        Some(&mask),
        Some(0.0),
    )?;
    let mean = single(&v)?.mean_keepdim(2)?.broadcast_as(shifted.shape())?;
    assert!(max_abs_difference(&shifted, &mean)? < 1e-6);
    Ok(())
}

#[test]
fn half_precision_and_only_the_gradients_wanted() -> Result<()> {
    let wide = [
        normal(1, (1, 2, 3, 4))?,
        normal(2, (1, 2, 5, 4))?,
        normal(3, (1, 2, 5, 4))?,
    ];
    let [q, k, v] = wide.each_ref().map(|t| t.to_dtype(DType::BF16));
    let (q, k, v) = (q?, k?, v?);
    let y = attention(&q, &k, &v, None, None)?;
    let exact = |t: &Tensor| t.to_dtype(DType::F64);
    let expected = composed(&exact(&q)?, &exact(&k)?, &exact(&v)?, None, 0.5)?;
    assert_eq!(y.dtype(), DType::BF16);
    assert!(max_abs_difference(&y, &expected)? < 0.004 * largest(&expected)?);
    for tracked in 0..3 {
        let vars: Vec<Var> = wide.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let t: Vec<Tensor> = (0..3)
            .map(|i| match i == tracked {
                true => vars[i].as_tensor().clone(),
                false => wide[i].clone(),
            })
            .collect();
        let all = attention(&vars[0], &vars[1], &vars[2], None, None)?;
        let all = all.sqr()?.sum_all()?.backward()?;
        let y = attention(&t[0], &t[1], &t[2], None, None)?;
        let one = y.sqr()?.sum_all()?.backward()?;
        for i in 0..3 {
            let (a, b) = (one.get(&vars[i]), all.get(&vars[i]).unwrap());
            assert_eq!(a.is_some(), i == tracked);
            if let Some(a) = a {
                assert!(max_abs_difference(a, b)? < 1e-15);
            }
        }
    }
    Ok(())
}

/// `[B, h, N, S, d, e]`.
type Dims = [usize; 6];

/// How the arguments come.
#[derive(Clone, Copy, Debug)]
enum Form {
    Contiguous,
    /// Views of `[B, N, h, d]`.
    Swapped,
    /// Views whose last axis is not contiguous.
    Scattered,
    /// `[B, N, h·d]`.
    Heads,
}

/// Value and gradients of q, k, v `[B, h, N, d]` in `f32` through `form`.
fn ours(form: Form, t: &[Tensor], mask: Option<&Tensor>, weights: &Tensor) -> Result<Vec<Tensor>> {
    let heads = t[0].dim(1)?;
    let back = |t: &Tensor| -> Result<Tensor> {
        match form {
            Form::Contiguous => Ok(t.clone()),
            Form::Swapped => t.transpose(1, 2),
            Form::Scattered => t.transpose(2, 3),
            Form::Heads => {
                let (b, n, width) = t.dims3()?;
                t.reshape((b, n, heads, width / heads))?.transpose(1, 2)
            }
        }
    };
    let vars: Vec<Var> = t
        .iter()
        .map(|t| {
            let t = t.to_dtype(DType::F32)?;
            Var::from_tensor(&match form {
                Form::Contiguous => t,
                Form::Swapped => t.transpose(1, 2)?.contiguous()?,
                Form::Scattered => t.transpose(2, 3)?.contiguous()?,
                Form::Heads => t.transpose(1, 2)?.flatten_from(2)?,
            })
        })
        .collect::<Result<_>>()?;
    let [q, k, v] = [&vars[0], &vars[1], &vars[2]];
    let y = match form {
        Form::Heads => back(&attention_heads(q, k, v, heads, mask, None)?)?,
        _ => attention(&back(q)?, &back(k)?, &back(v)?, mask, None)?,
    };
    let grads = (&y * weights.to_dtype(DType::F32)?)?
        .sum_all()?
        .backward()?;
    let mut out = vec![y];
    for v in &vars {
        out.push(back(grads.get(v).unwrap())?);
    }
    Ok(out)
}

/// The largest error of the value or a gradient, relative to its largest entry.
fn error(form: Form, [b, h, n, s, d, e]: Dims, mask: Option<&Tensor>, seed: u64) -> Result<f64> {
    let t = [
        normal(seed, (b, h, n, d))?,
        normal(seed + 1, (b, h, s, d))?,
        normal(seed + 2, (b, h, s, e))?,
    ];
    let weights = normal(seed + 3, (b, h, n, e))?;
    let got = ours(form, &t, mask, &weights)?;
    let vars: Vec<Var> = t.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let y = composed(&vars[0], &vars[1], &vars[2], mask, 1.0 / (d as f64).sqrt())?;
    let grads = (&y * weights)?.sum_all()?.backward()?;
    let mut exact = vec![y];
    exact.extend(vars.iter().map(|v| grads.get(v).unwrap().clone()));
    // The gradients are differences of terms of the order 1 and more, which with a single key
    // cancel to nothing: below 1 their errors are measured against those.
    got.iter().zip(&exact).try_fold(0f64, |worst, (a, b)| {
        Ok(worst.max(max_abs_difference(a, b)? / largest(b)?.max(1.0)))
    })
}

/// One of the ways in which a mask may broadcast.
fn mask_of(kind: usize, [b, h, n, s, ..]: Dims, seed: u64) -> Result<Option<Tensor>> {
    let whole = hiding(seed, (b, h, n, s))?;
    Ok(Some(match kind {
        0 => return Ok(None),
        1 => whole,
        2 => whole.narrow(0, 0, 1)?.narrow(1, 0, 1)?,
        3 => normal(seed, (b, 1, 1, s))?,
        4 => normal(seed, (h, n, 1))?,
        _ => normal(seed, (s, n))?.t()?,
    }))
}

#[test]
fn single_precision_equals_the_composition_in_double() -> Result<()> {
    at_every_level(|level| {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(32));
        let dims = (
            1usize..3,
            1usize..4,
            1usize..90,
            1usize..90,
            1usize..40,
            1usize..40,
        );
        let forms = prop::sample::select(vec![
            Form::Contiguous,
            Form::Swapped,
            Form::Scattered,
            Form::Heads,
        ]);
        runner
            .run(
                &(dims, forms, 0usize..6, 0u64..1000),
                |(dims, form, kind, seed)| {
                    let dims = [dims.0, dims.1, dims.2, dims.3, dims.4, dims.5];
                    let mask = mask_of(kind, dims, seed).unwrap();
                    let e = error(form, dims, mask.as_ref(), seed).unwrap();
                    prop_assert!(e < 1e-5, "{level:?} {dims:?} mask {kind}: {e:e}");
                    Ok(())
                },
            )
            .map_err(candle_core::Error::wrap)?;
        // More keys than are handled at once, in one part and in several.
        for (b, h) in [(2, 4), (1, 1)] {
            let dims = [b, h, 130, 600, 40, 33];
            for kind in [0, 1, 5] {
                let mask = mask_of(kind, dims, 9)?;
                let e = error(Form::Heads, dims, mask.as_ref(), 9)?;
                assert!(e < 1e-5, "{level:?} {b} {h} mask {kind}: {e:e}");
            }
        }
        Ok(())
    })
}

#[test]
fn any_number_of_threads() -> Result<()> {
    at_every_level(|_| {
        for dims in [[1, 1, 150, 300, 20, 24], [3, 3, 70, 66, 17, 16]] {
            let [b, h, n, s, d, e] = dims;
            let t = [
                normal(1, (b, h, n, d))?,
                normal(2, (b, h, s, d))?,
                normal(3, (b, h, s, e))?,
            ];
            let weights = normal(4, (b, h, n, e))?;
            let mask = mask_of(1, dims, 5)?;
            same_bits_on_any_number_of_threads(|| {
                let mut out = ours(Form::Contiguous, &t, mask.as_ref(), &weights)?;
                out.extend(ours(Form::Heads, &t, None, &weights)?);
                Ok(out)
            })?;
        }
        Ok(())
    })
}
