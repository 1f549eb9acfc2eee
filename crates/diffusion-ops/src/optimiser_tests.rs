//! The optimiser's passes against plain arithmetic.

use super::*;
use crate::gradcheck::{at_every_level, normal, same_bits_on_any_number_of_threads};
use candle_core::{Device, Var};

const RATES: AdamWRates = AdamWRates {
    beta1: 0.9,
    beta2: 0.99,
    decay: 0.999,
    rate: 0.02,
    root: 1.7,
    eps: 1e-8,
};

/// Value, gradient, moments, average.
type Slot = [Tensor; 5];

fn slots(sizes: &[usize], dtype: DType) -> Result<Vec<Slot>> {
    let of = |k: usize, i: usize, n: usize| normal((7 * i + k) as u64, n)?.to_dtype(dtype);
    let own = |t: Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(&t)?.into_inner());
    sizes
        .iter()
        .enumerate()
        .map(|(i, &n)| {
            Ok([
                own(of(0, i, n)?)?,
                of(1, i, n)?,
                own(of(2, i, n)?)?,
                own(of(3, i, n)?.sqr()?)?,
                own(of(4, i, n)?)?,
            ])
        })
        .collect()
}

fn step(slots: &[Slot], average: bool) -> Result<Option<usize>> {
    let parameters: Vec<AdamWParameter<'_>> = slots
        .iter()
        .map(|[value, grad, m, v, s]| AdamWParameter {
            value,
            grad,
            m,
            v,
            average: average.then_some(s),
            rates: RATES,
        })
        .collect();
    adamw_step(&parameters, 0.5, 0.125)
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

#[test]
fn equals_the_formula_element_by_element() -> Result<()> {
    let sizes = [1, 17, 0, 33, 5000, LARGE + 3];
    at_every_level(|_| {
        for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
            for average in [true, false] {
                let (before, after) = (slots(&sizes, dtype)?, slots(&sizes, dtype)?);
                assert_eq!(step(&after, average)?, None);
                for (old, new) in before.iter().zip(&after) {
                    let old = old.iter().map(values).collect::<Result<Vec<_>>>()?;
                    let new = new.iter().map(values).collect::<Result<Vec<_>>>()?;
                    for i in 0..old[0].len() {
                        let g = 0.5 * old[1][i];
                        let m = 0.9 * old[2][i] + 0.1 * g;
                        let v = 0.99 * old[3][i] + 0.01 * g * g;
                        let p = 0.999 * old[0][i] - 0.02 * m / (v.sqrt() * 1.7 + 1e-8);
                        let s = match average {
                            true => old[4][i] - 0.125 * (old[4][i] - p),
                            false => old[4][i],
                        };
                        for (k, expected) in [p, old[1][i], m, v, s].into_iter().enumerate() {
                            let error = (new[k][i] - expected).abs();
                            assert!(
                                error <= tolerance * expected.abs().max(1.0),
                                "{k} {i}: {error:e}"
                            );
                        }
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn fused_average_equals_the_one_taken_afterwards() -> Result<()> {
    let sizes = [5, 40_000, LARGE];
    at_every_level(|_| {
        let (one, two) = (slots(&sizes, DType::F32)?, slots(&sizes, DType::F32)?);
        step(&one, true)?;
        step(&two, false)?;
        let pairs: Vec<(&Tensor, &Tensor)> = two.iter().map(|s| (&s[4], &s[0])).collect();
        ema_step(&pairs, 0.125)?;
        for (a, b) in one.iter().zip(&two) {
            assert_eq!(values(&a[4])?, values(&b[4])?);
        }
        Ok(())
    })
}

#[test]
fn same_bits_for_any_number_of_threads() -> Result<()> {
    at_every_level(|_| {
        same_bits_on_any_number_of_threads(|| {
            let slots = slots(&[3, 900, 70_000, LARGE + 1, 2 * LARGE], DType::F32)?;
            step(&slots, true)?;
            let grads: Vec<&Tensor> = slots.iter().map(|s| &s[1]).collect();
            let sum = Tensor::new(sum_of_squares(&grads)?, &Device::Cpu)?;
            Ok(slots.into_iter().flatten().chain([sum]).collect())
        })
    })
}

#[test]
fn sums_of_squares_of_every_type() -> Result<()> {
    at_every_level(|_| {
        let all = [normal(1, (3, 70_001))?, normal(2, 5)?, normal(3, (4, 6))?];
        let exact: f64 = all
            .iter()
            .map(|t| Ok(values(t)?.iter().map(|v| v * v).sum::<f64>()))
            .sum::<Result<f64>>()?;
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-7), (DType::BF16, 1e-3)] {
            let cast = all.iter().map(|t| {
                t.t()
                    .or_else(|_| Ok::<_, candle_core::Error>(t.clone()))?
                    .to_dtype(dtype)
            });
            let cast = cast.collect::<Result<Vec<_>>>()?;
            let sum = sum_of_squares(&cast.iter().collect::<Vec<_>>())?;
            assert!(
                (sum / exact - 1.0).abs() < tolerance,
                "{dtype:?}: {sum} {exact}"
            );
        }
        assert_eq!(sum_of_squares(&[])?, 0.0);
        Ok(())
    })
}

#[test]
fn finds_what_is_not_finite_and_keeps_it_from_the_average() -> Result<()> {
    at_every_level(|_| {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let slots = slots(&[40, LARGE + 9, 70], DType::F32)?;
            let mut grad = slots[1][1].to_vec1::<f32>()?;
            *grad.last_mut().unwrap() = bad;
            let mut slots = slots;
            slots[1][1] = Tensor::new(grad, &Device::Cpu)?;
            let tensors = [&slots[0][1], &slots[1][1], &slots[2][1]];
            assert_eq!(first_not_finite(&tensors)?, Some(1));
            assert_eq!(first_not_finite(&tensors[..1])?, None);
            assert!(!sum_of_squares(&tensors)?.is_finite());
            let n = LARGE + 9;
            let before = slots[1][4].to_vec1::<f32>()?;
            assert_eq!(step(&slots, true)?, Some(1));
            let after = slots[1][4].to_vec1::<f32>()?;
            assert_eq!(before[n - 1], after[n - 1]);
            assert_ne!(before[n - 2], after[n - 2]);
        }
        Ok(())
    })
}

#[test]
fn shared_memory_is_copied_or_refused() -> Result<()> {
    let mut slots = slots(&[64, 64], DType::F64)?;
    // A gradient that is a view of a parameter: the values of before the step count.
    let gradient = values(&slots[1][0])?;
    slots[0][1] = slots[1][0].detach();
    let m = values(&slots[0][2])?;
    step(&slots, true)?;
    for (i, new) in values(&slots[0][2])?.into_iter().enumerate() {
        assert_eq!(new, 0.9 * m[i] + (1.0 - 0.9) * (gradient[i] * 0.5));
    }
    let before = values(&slots[0][0])?;
    let twice = [slots[0].clone(), slots[0].clone()];
    assert!(
        step(&twice, false)
            .unwrap_err()
            .to_string()
            .contains("share memory")
    );
    let mut misfit = slots.clone();
    misfit[1][3] = normal(1, 63)?;
    assert!(step(&misfit, false).is_err());
    assert_eq!(
        before,
        values(&slots[0][0])?,
        "nothing is written before all is checked"
    );
    assert!(ema_step(&[(&slots[0][0], &slots[0][0])], 0.1).is_err());
    Ok(())
}
