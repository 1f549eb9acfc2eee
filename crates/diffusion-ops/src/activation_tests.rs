//! Values, gradients and extremes of the pointwise nonlinearities.

use super::*;
use crate::gradcheck::{
    at_every_level, max_abs_difference, max_relative_error, normal,
    same_bits_on_any_number_of_threads,
};
use candle_core::{Device, Var};
use proptest::prelude::*;

const ALL: [Activation; 5] = [
    Activation::Silu,
    Activation::Mish,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
];

#[test]
fn known_values() -> Result<()> {
    // Values at 1 and −2 from the definitions, computed with 30 digits.
    let x = Tensor::new(&[1f64, -2.0, 0.0], &Device::Cpu)?;
    let check = |y: Tensor, expected: [f64; 2]| -> Result<()> {
        let y = y.to_vec1::<f64>()?;
        assert!((y[0] - expected[0]).abs() < 1e-15, "{y:?}");
        assert!((y[1] - expected[1]).abs() < 1e-15, "{y:?}");
        assert_eq!(y[2], 0.0);
        Ok(())
    };
    check(silu(&x)?, [0.731_058_578_630_004_9, -0.238_405_844_044_235])?;
    check(
        mish(&x)?,
        [0.865_098_388_267_310_3, -0.252_501_482_695_708_9],
    )?;
    check(
        gelu(&x)?,
        [0.841_344_746_068_543, -0.045_500_263_896_358_41],
    )?;
    check(
        gelu_tanh(&x)?,
        [0.841_191_990_608_276_7, -0.045_402_305_912_224_98],
    )?;
    check(relu(&x)?, [1.0, 0.0])
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    let x = [(normal(1, (7, 13))? * 3.0)?];
    at_every_level(|level| {
        for f in ALL {
            let e = max_relative_error(|t| f.apply(&t[0]), &x)?;
            assert!(e < 1e-6, "{f:?} at {level:?}: {e:e}");
        }
        Ok(())
    })?;
    for f in ALL {
        let e = max_relative_error(|t| f.composed(&t[0]), &x)?;
        assert!(e < 1e-6, "composition of {f:?}: {e:e}");
        let gap = max_abs_difference(&f.apply(&x[0])?, &f.composed(&x[0])?)?;
        assert!(gap < 1e-14, "{f:?}: {gap:e}");
    }
    Ok(())
}

/// Value and gradient of Σ w f(x).
fn both(f: Activation, x: &Tensor, w: &Tensor) -> Result<[Tensor; 2]> {
    let x = Var::from_tensor(x)?;
    let y = f.apply(&x)?;
    let grads = (&y * w)?.sum_all()?.backward()?;
    Ok([y, grads.get(&x).unwrap().clone()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn f32_follows_f64(n in 1usize..300, scale in 0.1f64..12.0, seed in 0u64..1000) {
        at_every_level(|level| {
            let x = (normal(seed, n)? * scale)?.to_dtype(DType::F32)?;
            let w = normal(seed + 1, n)?.to_dtype(DType::F32)?;
            for f in ALL {
                let wide = both(f, &x.to_dtype(DType::F64)?, &w.to_dtype(DType::F64)?)?;
                for (a, e) in both(f, &x, &w)?.iter().zip(&wide) {
                    let largest = max_abs_difference(e, &e.zeros_like()?)?.max(1e-3);
                    let gap = max_abs_difference(a, e)? / largest;
                    assert!(gap < 3e-6, "{f:?} at {level:?}: {gap:e}");
                }
            }
            Ok(())
        }).unwrap();
    }
}

#[test]
fn bits_do_not_depend_on_threads() -> Result<()> {
    let x = (normal(1, 3 * CHUNK + 17)? * 4.0)?.to_dtype(DType::F32)?;
    at_every_level(|_| {
        for f in ALL {
            same_bits_on_any_number_of_threads(|| Ok(both(f, &x, &x)?.to_vec()))?;
        }
        Ok(())
    })
}

#[test]
fn extremes_stay_finite() -> Result<()> {
    at_every_level(|level| {
        let x = Var::new(
            &[-1e30f32, -1e4, -100.0, 100.0, 1e4, f32::NAN],
            &Device::Cpu,
        )?;
        for f in ALL {
            let y = f.apply(&x)?;
            let grads = y.sum_all()?.backward()?;
            let (y, g) = (
                y.to_vec1::<f32>()?,
                grads.get(&x).unwrap().to_vec1::<f32>()?,
            );
            assert_eq!(y[3..5], [100.0, 1e4], "{f:?} at {level:?}");
            assert_eq!(g[3..5], [1.0, 1.0], "{f:?} at {level:?}");
            for k in 0..3 {
                assert!(
                    y[k].abs() < 1e-30 && g[k].abs() < 1e-30,
                    "{f:?}: {y:?} {g:?}"
                );
            }
            assert!(y[5].is_nan(), "{f:?} at {level:?}");
        }
        Ok(())
    })
}

#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    let x = (normal(1, 500)? * 3.0)?.to_dtype(DType::F16)?;
    at_every_level(|_| {
        for f in ALL {
            let y = f.apply(&x)?;
            assert_eq!(y.dtype(), DType::F16);
            let wide = f.apply(&x.to_dtype(DType::F32)?)?.to_dtype(DType::F16)?;
            assert_eq!(max_abs_difference(&y, &wide)?, 0.0);
        }
        Ok(())
    })
}
