//! Convolutions against their definition, finite differences and each other.

use super::*;
use crate::gradcheck::{
    at_every_level, max_abs_difference, max_relative_error, normal,
    same_bits_on_any_number_of_threads,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Batch, in, out, height, width, kernel (h, w), stride, padding, dilation.
type Case = (
    usize,
    usize,
    usize,
    usize,
    usize,
    (usize, usize),
    usize,
    Padding,
    usize,
);

fn cases() -> Vec<Case> {
    let pad = |top, bottom, left, right| Padding {
        top,
        bottom,
        left,
        right,
    };
    vec![
        (2, 3, 4, 5, 7, (3, 3), 1, 1.into(), 1),
        (2, 3, 2, 5, 8, (3, 3), 2, 1.into(), 1),
        (2, 2, 3, 6, 5, (3, 3), 2, pad(0, 1, 0, 1), 1),
        (1, 2, 3, 7, 6, (3, 2), 2, pad(2, 0, 1, 3), 2),
        (3, 4, 2, 3, 5, (1, 1), 1, 0.into(), 1),
        (1, 4, 2, 3, 5, (1, 1), 1, 0.into(), 1),
        (2, 2, 2, 5, 4, (1, 1), 2, 0.into(), 1),
        (2, 2, 2, 2, 3, (5, 3), 1, pad(4, 5, 0, 2), 1),
        (1, 1, 1, 9, 1, (4, 1), 3, pad(1, 0, 0, 0), 2),
    ]
}

fn data(case: &Case) -> Result<[Tensor; 3]> {
    let (b, c, k, h, w, kernel, ..) = *case;
    Ok([
        normal(1, (b, c, h, w))?,
        normal(2, (k, c, kernel.0, kernel.1))?,
        normal(3, k)?,
    ])
}

#[test]
fn forward_equals_the_definition() -> Result<()> {
    for case in cases() {
        let (b, c, k, h, w, kernel, s, p, d) = case;
        let [x, weight, bias] = data(&case)?;
        let y = conv2d(&x, &weight, Some(&bias), s, p, d)?;
        let (_, _, oh, ow) = y.dims4()?;
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
        let (x, weight, bias, y) = (flat(&x)?, flat(&weight)?, flat(&bias)?, flat(&y)?);
        let mut at = 0;
        for (bi, ki) in (0..b).flat_map(|b| (0..k).map(move |k| (b, k))) {
            for (o, q) in (0..oh).flat_map(|o| (0..ow).map(move |q| (o, q))) {
                let mut sum = bias[ki];
                for ci in 0..c {
                    for (i, j) in (0..kernel.0).flat_map(|i| (0..kernel.1).map(move |j| (i, j))) {
                        let yy = (o * s + i * d) as isize - p.top as isize;
                        let xx = (q * s + j * d) as isize - p.left as isize;
                        if (0..h as isize).contains(&yy) && (0..w as isize).contains(&xx) {
                            sum += weight[((ki * c + ci) * kernel.0 + i) * kernel.1 + j]
                                * x[((bi * c + ci) * h + yy as usize) * w + xx as usize];
                        }
                    }
                }
                assert!(
                    (sum - y[at]).abs() < 1e-12,
                    "{case:?} at {at}: {sum} {}",
                    y[at]
                );
                at += 1;
            }
        }
        assert_eq!(at, y.len());
    }
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    for case in cases() {
        let (.., s, p, d) = case;
        let inputs = data(&case)?;
        let e = max_relative_error(|t| conv2d(&t[0], &t[1], Some(&t[2]), s, p, d), &inputs)?;
        assert!(e < 1e-6, "{case:?}: {e:e}");
        let e = max_relative_error(|t| conv2d(&t[0], &t[1], None, s, p, d), &inputs[..2])?;
        assert!(e < 1e-6, "{case:?} without bias: {e:e}");
    }
    Ok(())
}

#[test]
fn kernel_and_composition_agree() -> Result<()> {
    for case in cases() {
        let (.., s, p, d) = case;
        let inputs = data(&case)?;
        let [x, weight, bias] = &inputs;
        let g = Geometry::new(x, weight, Some(bias), s, p, d)?;
        let gap = max_abs_difference(
            &conv2d(x, weight, Some(bias), s, p, d)?,
            &composed(x, weight, Some(bias), &g, p)?,
        )?;
        assert!(gap < 1e-12, "{case:?}: {gap:e}");
        let e = max_relative_error(|t| composed(&t[0], &t[1], Some(&t[2]), &g, p), &inputs)?;
        assert!(e < 1e-6, "{case:?}: {e:e}");
    }
    Ok(())
}

#[test]
fn one_dimension_and_half_precision() -> Result<()> {
    let inputs = [normal(1, (3, 2, 9))?, normal(2, (4, 2, 3))?, normal(3, 4)?];
    let f = |t: &[Tensor]| conv1d(&t[0], &t[1], Some(&t[2]), 2, (2, 1), 2);
    assert!(max_relative_error(f, &inputs)? < 1e-6);
    let wide = f(&inputs)?;
    let half: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_dtype(DType::BF16))
        .collect::<Result<_>>()?;
    let half = f(&half)?;
    assert_eq!(half.dtype(), DType::BF16);
    assert!(max_abs_difference(&wide, &half)? < 0.1);
    Ok(())
}

/// A random problem: batch, in, out, height, width, kernel, stride, padding, dilation.
fn problem() -> impl Strategy<Value = Case> {
    let pads = (0usize..3, 0usize..3, 0usize..3, 0usize..3);
    let sizes = (1usize..4, 1usize..20, 1usize..36, 1usize..15, 1usize..20);
    (sizes, (1usize..5, 1usize..5), 1usize..4, pads, 1usize..3).prop_filter_map(
        "the kernel fits",
        |((b, c, k, h, w), kernel, s, (top, bottom, left, right), d)| {
            let padding = Padding {
                top,
                bottom,
                left,
                right,
            };
            let fits =
                d * (kernel.0 - 1) < h + top + bottom && d * (kernel.1 - 1) < w + left + right;
            fits.then_some((b, c, k, h, w, kernel, s, padding, d))
        },
    )
}

/// A problem for Winograd's filters.
fn small_kernel() -> impl Strategy<Value = Case> {
    problem()
        .prop_map(|(b, c, k, h, w, _, _, p, _)| (b, c + 7, k + 7, h + 2, w + 2, (3, 3), 1, p, 1))
}

/// A line with three taps.
fn line() -> impl Strategy<Value = Case> {
    let sizes = (1usize..4, 8usize..20, 8usize..36, 1usize..90, 1usize..20);
    (sizes, 0usize..3, 0usize..40).prop_filter_map(
        "the kernel fits",
        |((b, c, k, w, d), left, right)| {
            let padding = Padding {
                top: 0,
                bottom: 0,
                left: left * d,
                right,
            };
            (2 * d < w + left * d + right).then_some((b, c, k, 1, w, (1, 3), 1, padding, d))
        },
    )
}

/// Output and all gradients, under a fixed gradient of the output.
fn everything(case: &Case, dtype: DType, per_item: bool) -> Result<Vec<Tensor>> {
    let (b, _, k, .., s, p, d) = *case;
    let [x, w, bias] = data(case)?;
    let bias = if per_item { normal(4, (b, k))? } else { bias };
    let vars = [x, w, bias].map(|t| candle_core::Var::from_tensor(&t.to_dtype(dtype)?));
    let [x, w, bias] = vars;
    let (x, w, bias) = (x?, w?, bias?);
    let y = conv2d(&x, &w, Some(&bias), s, p, d)?;
    let upstream = normal(5, y.shape().clone())?.to_dtype(dtype)?;
    let grads = (&y * &upstream)?.sum_all()?.backward()?;
    let mut all = vec![y.detach()];
    for var in [&x, &w, &bias] {
        all.push(grads.get(var).unwrap().clone());
    }
    Ok(all)
}

/// The largest difference of two lists of tensors, each relative to its largest entry.
fn worst(found: &[Tensor], expected: &[Tensor]) -> Result<f64> {
    let mut worst = 0f64;
    for (a, b) in found.iter().zip(expected) {
        let scale = max_abs_difference(b, &b.zeros_like()?)?.max(1e-30);
        worst = worst.max(max_abs_difference(a, b)? / scale);
    }
    Ok(worst)
}

/// The limit is one for the process: tests that set it take turns under `at_every_level`.
fn with_limit<R>(limit: Winograd, f: impl FnOnce() -> R) -> R {
    let before = winograd();
    set_winograd(limit);
    let out = f();
    set_winograd(before);
    out
}

#[test]
fn any_shape_in_f32_equals_f64() -> Result<()> {
    at_every_level(|level| {
        let mut runner = TestRunner::new(ProptestConfig::with_cases(24));
        let run = runner.run(&(problem(), any::<bool>()), |(case, per_item)| {
            let wide = everything(&case, DType::F64, per_item).unwrap();
            let narrow = everything(&case, DType::F32, per_item).unwrap();
            let e = worst(&narrow, &wide).unwrap();
            prop_assert!(e < 1e-5, "{level:?} {case:?}: {e:e}");
            Ok(())
        });
        run.map_err(candle_core::Error::wrap)
    })
}

#[test]
fn winograd_equals_the_sum() -> Result<()> {
    at_every_level(|level| {
        let mut runner = TestRunner::new(ProptestConfig::with_cases(24));
        let run = runner.run(
            &(prop_oneof![small_kernel(), line()], any::<bool>()),
            |(case, per_item)| {
                let exact =
                    with_limit(Winograd::Off, || everything(&case, DType::F64, per_item)).unwrap();
                for route in [Route::Two, Route::Four] {
                    for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
                        let found =
                            route::forced(route, || everything(&case, dtype, per_item)).unwrap();
                        let e = worst(&found, &exact).unwrap();
                        prop_assert!(e < bound, "{level:?} {route:?} {dtype:?} {case:?}: {e:e}");
                    }
                }
                Ok(())
            },
        );
        run.map_err(candle_core::Error::wrap)
    })
}

/// The figures that the documentation of [`Winograd`] gives.
#[test]
fn the_error_of_many_channels_is_small() -> Result<()> {
    at_every_level(|_| {
        let case: Case = (1, 512, 24, 8, 8, (3, 3), 1, 1.into(), 1);
        let exact = with_limit(Winograd::Off, || everything(&case, DType::F64, false))?;
        for (route, bound) in [
            (Route::Direct, 4e-6),
            (Route::Two, 4e-6),
            (Route::Four, 8e-6),
        ] {
            let found = route::forced(route, || everything(&case, DType::F32, false))?;
            let e = worst(&found, &exact)?;
            assert!(e < bound, "{route:?}: {e:e}");
        }
        Ok(())
    })
}

#[test]
fn bits_do_not_depend_on_the_batch() -> Result<()> {
    at_every_level(|_| {
        for (c, k, h, w) in [
            (24, 40, 13, 9),
            (64, 64, 4, 4),
            (256, 256, 2, 2),
            (3, 16, 8, 8),
        ] {
            let x = normal(1, (9, c, h, w))?.to_dtype(DType::F32)?;
            let weight = normal(2, (k, c, 3, 3))?.to_dtype(DType::F32)?;
            for (s, kernel) in [(1, &weight), (2, &weight)] {
                let all = conv2d(&x, kernel, None, s, 1, 1)?;
                for i in [0, 8] {
                    let one = conv2d(&x.narrow(0, i, 1)?, kernel, None, s, 1, 1)?;
                    assert_eq!(max_abs_difference(&one, &all.narrow(0, i, 1)?)?, 0.0);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn bits_do_not_depend_on_threads() -> Result<()> {
    let cases: [Case; 5] = [
        (4, 8, 16, 9, 11, (3, 3), 2, 1.into(), 1),
        (3, 24, 40, 13, 9, (3, 3), 1, 1.into(), 1),
        (1, 32, 64, 4, 4, (3, 3), 1, 1.into(), 1),
        (2, 6, 20, 1, 700, (1, 3), 1, Padding::hw(0, 4), 4),
        (2, 40, 33, 7, 7, (1, 1), 1, 0.into(), 1),
    ];
    at_every_level(|_| {
        for case in &cases {
            for route in [Route::Direct, Route::Two, Route::Four] {
                route::forced(route, || {
                    same_bits_on_any_number_of_threads(|| everything(case, DType::F32, true))
                })?;
            }
        }
        Ok(())
    })
}

#[test]
fn bad_shapes_are_errors() -> Result<()> {
    let (x, w) = (normal(1, (1, 2, 3, 3))?, normal(2, (1, 3, 3, 3))?);
    assert!(conv2d(&x, &w, None, 1, 1, 1).is_err());
    let w = normal(2, (1, 2, 5, 5))?;
    let error = conv2d(&x, &w, None, 1, 0, 1).unwrap_err().to_string();
    assert!(error.contains("spanning 5"), "{error}");
    assert!(conv2d(&x, &w, None, 0, 2, 1).is_err());
    Ok(())
}
