//! Affine maps against direct sums, finite differences and themselves on other threads.

use super::*;
use crate::gradcheck::{
    at_every_level, max_abs_difference, max_relative_error, normal,
    same_bits_on_any_number_of_threads,
};
use candle_core::Var;
use proptest::prelude::*;

fn largest(x: &Tensor) -> Result<f64> {
    max_abs_difference(x, &x.zeros_like()?)
}

#[test]
fn value_and_gradient() -> Result<()> {
    let x = Tensor::new(&[[1f64, 2.0]], &Device::Cpu)?;
    let w = Tensor::new(&[[3f64, 4.0], [5.0, 6.0], [0.0, 1.0]], x.device())?;
    let b = Tensor::new(&[0.5f64, -1.0, 0.0], x.device())?;
    assert_eq!(
        linear(&x, &w, Some(&b))?.to_vec2::<f64>()?,
        [[11.5, 16.0, 2.0]]
    );
    let inputs = [normal(1, (2, 3, 4))?, normal(2, (5, 4))?, normal(3, 5)?];
    at_every_level(|level| {
        let e = max_relative_error(|t| linear(&t[0], &t[1], Some(&t[2])), &inputs)?;
        assert!(e < 1e-6, "{level:?} {e:e}");
        let e = max_relative_error(
            |t| linear(&t[0].transpose(0, 1)?, &t[1], None),
            &inputs[..2],
        )?;
        assert!(e < 1e-6, "{level:?} {e:e}");
        let e = max_relative_error(
            |t| linear(&inputs[0], &inputs[1], Some(&t[0])),
            &inputs[2..],
        )?;
        assert!(e < 1e-6, "{level:?} bias alone {e:e}");
        Ok(())
    })?;
    assert!(linear(&inputs[0], &normal(1, (5, 3))?, None).is_err());
    assert!(linear(&inputs[0], &inputs[1], Some(&normal(3, 4)?)).is_err());
    Ok(())
}

#[test]
fn arguments_that_are_not_tracked_receive_no_gradient() -> Result<()> {
    let (x, w, b) = (normal(1, (3, 4))?, normal(2, (5, 4))?, normal(3, 5)?);
    let x_var = Var::from_tensor(&x)?;
    let grads = linear(&x_var, &w, Some(&b))?.sum_all()?.backward()?;
    assert!(grads.get(&x_var).is_some() && grads.get(&w).is_none() && grads.get(&b).is_none());
    let b_var = Var::from_tensor(&b)?;
    let grads = linear(&x, &w, Some(&b_var))?.sum_all()?.backward()?;
    assert_eq!(
        grads.get(&b_var).map(Tensor::to_vec1::<f64>).transpose()?,
        Some(vec![3.0; 5])
    );
    Ok(())
}

#[test]
fn empty_sums_and_empty_results() -> Result<()> {
    let b = normal(3, 5)?;
    let y = linear(&normal(1, (3, 0))?, &normal(2, (5, 0))?, Some(&b))?;
    assert_eq!(max_abs_difference(&y, &b.broadcast_as((3, 5))?)?, 0.0);
    let y = linear(&normal(1, (3, 0))?, &normal(2, (5, 0))?, None)?;
    assert_eq!(largest(&y)?, 0.0);
    let w = Var::from_tensor(&normal(2, (5, 4))?)?;
    let y = linear(&normal(1, (0, 4))?, &w, Some(&b))?;
    assert_eq!(y.dims(), [0, 5]);
    let grads = y.sum_all()?.backward()?;
    assert_eq!(grads.get(&w).map(largest).transpose()?, Some(0.0));
    Ok(())
}

#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    let (x, w, b) = (normal(1, (3, 4))?, normal(2, (5, 4))?, normal(3, 5)?);
    let half = |t: &Tensor| t.to_dtype(DType::BF16);
    let y = linear(&half(&x)?, &half(&w)?, Some(&half(&b)?))?;
    let rounded = |t: &Tensor| half(t)?.to_dtype(DType::F64);
    let expected = linear(&rounded(&x)?, &rounded(&w)?, Some(&rounded(&b)?))?;
    assert_eq!(y.dtype(), DType::BF16);
    assert!(max_abs_difference(&y, &expected)? < 0.004 * largest(&expected)?);
    Ok(())
}

/// Value and gradients in `f32` against the composition in `f64`, each relative to its largest.
fn error((rows, inputs, outputs): (usize, usize, usize), seed: u64) -> Result<f64> {
    let wide = [
        normal(seed, (rows, inputs))?,
        normal(seed + 1, (outputs, inputs))?,
        normal(seed + 2, outputs)?,
    ];
    let weights = normal(seed + 3, (rows, outputs))?;
    let run = |dtype: DType, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| -> Result<Vec<Tensor>> {
        let vars: Vec<Var> = wide
            .iter()
            .map(|t| Var::from_tensor(&t.to_dtype(dtype)?))
            .collect::<Result<_>>()?;
        let t: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&t)?;
        let grads = (&y * weights.to_dtype(dtype)?)?.sum_all()?.backward()?;
        let mut out = vec![y];
        out.extend(vars.iter().map(|v| grads.get(v).unwrap().clone()));
        Ok(out)
    };
    let ours = run(DType::F32, &|t| linear(&t[0], &t[1], Some(&t[2])))?;
    let exact = run(DType::F64, &|t| composed(&t[0], &t[1], Some(&t[2])))?;
    ours.iter().zip(&exact).try_fold(0f64, |worst, (a, b)| {
        Ok(worst.max(max_abs_difference(a, b)? / largest(b)?.max(1e-3)))
    })
}

#[test]
fn single_precision_equals_the_composition_in_double() -> Result<()> {
    at_every_level(|level| {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(24));
        let shapes = (1usize..150, 1usize..90, 1usize..130, 0u64..1000);
        runner
            .run(&shapes, |(rows, inputs, outputs, seed)| {
                let e = error((rows, inputs, outputs), seed).unwrap();
                prop_assert!(e < 1e-5, "{level:?} {e:e}");
                Ok(())
            })
            .map_err(candle_core::Error::wrap)?;
        // More than one stretch of terms in each of the sums.
        let e = error((600, 700, 530), 7)?;
        assert!(e < 1e-5, "{level:?} {e:e}");
        Ok(())
    })
}

#[test]
fn any_number_of_threads() -> Result<()> {
    let inputs: Vec<Tensor> = [
        normal(1, (1100, 65))?,
        normal(2, (130, 65))?,
        normal(3, 130)?,
    ]
    .iter()
    .map(|t| t.to_dtype(DType::F32))
    .collect::<Result<_>>()?;
    at_every_level(|_| {
        same_bits_on_any_number_of_threads(|| {
            let mut out = vec![];
            for rows in [9, 1100] {
                let t = [
                    inputs[0].narrow(0, 0, rows)?,
                    inputs[1].clone(),
                    inputs[2].clone(),
                ];
                let v: Vec<Var> = t.iter().map(Var::from_tensor).collect::<Result<_>>()?;
                let y = linear(&v[0], &v[1], Some(&v[2]))?;
                let grads = y.sqr()?.sum_all()?.backward()?;
                out.push(y);
                out.extend(v.iter().filter_map(|v| grads.get(v).cloned()));
            }
            assert_eq!(out.len(), 8);
            Ok(out)
        })
    })
}
