//! Group normalisation against its composition, finite differences and itself.

use super::*;
use crate::gradcheck::{
    at_every_level, max_abs_difference, max_relative_error, normal,
    same_bits_on_any_number_of_threads,
};
use candle_core::Var;
use proptest::prelude::*;

fn inputs(b: usize, c: usize, rest: &[usize]) -> Result<[Tensor; 3]> {
    let shape = [&[b, c], rest].concat();
    Ok([
        ((normal(1, shape)? * 2.0)? + 3.0)?,
        normal(2, c)?,
        normal(3, c)?,
    ])
}

fn largest(t: &Tensor) -> Result<f64> {
    max_abs_difference(t, &t.zeros_like()?)
}

#[test]
fn kernel_composition_and_finite_differences_agree() -> Result<()> {
    for (b, c, groups, rest, activation) in [
        (2, 6, 3, vec![3, 5], None),
        (3, 4, 4, vec![7], Some(Activation::Silu)),
        (2, 8, 1, vec![], Some(Activation::Mish)),
        (1, 4, 2, vec![1, 19], Some(Activation::Gelu)),
        (2, 2, 1, vec![70], Some(Activation::GeluTanh)),
    ] {
        let [x, gamma, beta] = inputs(b, c, &rest)?;
        for per_item in [false, true] {
            let data = if per_item {
                [x.clone(), normal(4, (b, c))?, normal(5, (b, c))?]
            } else {
                [x.clone(), gamma.clone(), beta.clone()]
            };
            let norm = Norm {
                batch: b,
                channels: c,
                groups,
                inner: rest.iter().product(),
                eps: 1e-5,
                per_item,
                activation,
            };
            let run = |t: &[Tensor]| group_norm_act(&t[0], &t[1], &t[2], groups, 1e-5, activation);
            let oracle = |t: &[Tensor]| norm.composed(&t[0], &t[1], &t[2]);
            at_every_level(|level| {
                let gap = max_abs_difference(&run(&data)?, &oracle(&data)?)?;
                assert!(gap < 1e-12, "{gap:e}");
                let e = max_relative_error(run, &data)?;
                assert!(e < 1e-6, "{norm:?} at {level:?}: {e:e}");
                Ok(())
            })?;
            let e = max_relative_error(oracle, &data)?;
            assert!(e < 1e-6, "composition: {e:e}");
        }
    }
    Ok(())
}

#[test]
fn scale_and_shift_follow_the_formula() -> Result<()> {
    let [x, gamma, beta] = inputs(2, 4, &[5])?;
    let data = [x, gamma, beta, normal(6, (2, 4))?, normal(7, (2, 4))?];
    let silu = Some(Activation::Silu);
    let run =
        |t: &[Tensor]| group_norm_scale_shift(&t[0], &t[1], &t[2], &t[3], &t[4], 2, 1e-5, silu);
    let oracle = |t: &[Tensor]| {
        let y = group_norm(&t[0], &t[1], &t[2], 2, 1e-5)?;
        y.broadcast_mul(&(t[3].unsqueeze(2)? + 1.0)?)?
            .broadcast_add(&t[4].unsqueeze(2)?)?
            .silu()
    };
    let gap = max_abs_difference(&run(&data)?, &oracle(&data)?)?;
    assert!(gap < 1e-13, "{gap:e}");
    let e = max_relative_error(run, &data)?;
    assert!(e < 1e-6, "{e:e}");
    let half: Vec<Tensor> = data
        .iter()
        .map(|t| t.to_dtype(DType::BF16))
        .collect::<Result<_>>()?;
    assert_eq!(run(&half)?.dtype(), DType::BF16);
    let short = data[3].narrow(0, 0, 1)?;
    assert!(
        group_norm_scale_shift(
            &data[0], &data[1], &data[2], &short, &data[4], 2, 1e-5, silu
        )
        .is_err()
    );
    Ok(())
}

/// The result and all gradients of Σ y³.
fn all(data: &[Tensor], groups: usize, act: Option<Activation>) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> = data.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let y = group_norm_act(&vars[0], &vars[1], &vars[2], groups, 1e-5, act)?;
    let grads = (y.sqr()? * &y)?.sum_all()?.backward()?;
    let mut out = vec![y];
    for v in &vars {
        out.push(grads.get(v).unwrap().clone());
    }
    Ok(out)
}

// Groups of a handful of values are left out: there the gradient of x is a small difference of large
// numbers, which 32 bits do not hold to 1e-5.
proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn f32_follows_f64(
        b in 1usize..4, width in 1usize..5, groups in 1usize..4, n in 16usize..150, seed in 0u64..99
    ) {
        at_every_level(|level| {
            let c = width * groups;
            let data = [normal(seed, (b, c, n))?, normal(2, c)?, normal(3, c)?];
            let cast = |dtype| data.iter().map(|t| t.to_dtype(DType::F32)?.to_dtype(dtype))
                .collect::<Result<Vec<_>>>();
            for act in [None, Some(Activation::Silu)] {
                let wide = all(&cast(DType::F64)?, groups, act)?;
                for (a, e) in all(&cast(DType::F32)?, groups, act)?.iter().zip(&wide) {
                    let gap = max_abs_difference(a, e)? / largest(e)?;
                    assert!(gap < 1e-5, "{b} {c} {groups} {n} {act:?} at {level:?}: {gap:e}");
                }
            }
            Ok(())
        }).unwrap();
    }
}

#[test]
fn a_large_mean_costs_no_digits() -> Result<()> {
    let x = normal(1, (2, 4, 50))?;
    let wide = Tensor::ones(4, DType::F64, &Device::Cpu)?;
    let (gamma, beta) = (wide.to_dtype(DType::F32)?, wide.zeros_like()?);
    let shifted = ((&x * 0.5)? + 4096.0)?.to_dtype(DType::F32)?;
    let exact = group_norm(&shifted.to_dtype(DType::F64)?, &wide, &beta, 2, 1e-5)?;
    at_every_level(|level| {
        let ours = group_norm(&shifted, &gamma, &beta.to_dtype(DType::F32)?, 2, 1e-5)?;
        let gap = max_abs_difference(&exact, &ours)?;
        assert!(gap < 2e-3, "{level:?}: {gap:e}");
        Ok(())
    })
}

#[test]
fn bits_do_not_depend_on_threads() -> Result<()> {
    let data: Vec<Tensor> = inputs(5, 12, &[90, 70])?
        .iter()
        .map(|t| t.to_dtype(DType::F32))
        .collect::<Result<_>>()?;
    at_every_level(|_| same_bits_on_any_number_of_threads(|| all(&data, 3, Some(Activation::Silu))))
}

#[test]
fn only_tracked_arguments_receive_gradients() -> Result<()> {
    let [x, gamma, beta] = inputs(2, 4, &[6])?;
    let gamma = Var::from_tensor(&gamma)?;
    let grads = group_norm(&x, &gamma, &beta, 2, 1e-5)?.sqr()?.backward()?;
    assert!(grads.get(&gamma).is_some() && grads.get(&x).is_none() && grads.get(&beta).is_none());
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
    assert!(group_norm(&x, &gamma.unsqueeze(0)?, &beta, 3, 1e-5).is_err());
    let empty = x.narrow(2, 0, 0)?;
    assert_eq!(
        group_norm(&empty, &gamma, &beta, 3, 1e-5)?.dims(),
        [1, 6, 0]
    );
    Ok(())
}
