//! Finite-difference checks of gradients, for this workspace's tests and for its users'.

use crate::rng::{Key, stream};
use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};

/// Reproducible standard normal test data in `f64`.
///
/// # Errors
/// Those of tensor creation.
pub fn normal(seed: u64, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let values = Key::new(seed, stream::TEST).normal(shape.elem_count());
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The largest error of the gradient of `f` in any of its inputs, relative to the largest entry
/// of that input's gradient.
///
/// ```text
/// L(x) = Σ w ⊙ f(x),   ∂L/∂xᵢ ≈ (L(x + h eᵢ) − L(x − h eᵢ)) / 2h
/// ```
///
/// where `w` are fixed random weights, so that no error can cancel, and `h = 1e-5`. Inputs must
/// be `f64` tensors on the CPU.
///
/// # Errors
/// If an input is not `f64`, if one receives no gradient, or whatever `f` returns.
pub fn max_relative_error(
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
) -> Result<f64> {
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tracked)?;
    let weights = normal(0x9e37, out.shape().clone())?;
    let grads = (&out * &weights)?.sum_all()?.backward()?;
    let h = 1e-5;
    let mut worst = 0f64;
    for (k, input) in inputs.iter().enumerate() {
        if input.dtype() != DType::F64 {
            bail!("gradcheck: input {k} is {:?}, expected f64", input.dtype());
        }
        let Some(grad) = grads.get(&tracked[k]) else {
            bail!("gradcheck: input {k} received no gradient");
        };
        let grad = grad.flatten_all()?.to_vec1::<f64>()?;
        let values = input.flatten_all()?.to_vec1::<f64>()?;
        let scale = grad.iter().fold(1e-3, |m: f64, g| m.max(g.abs()));
        for i in 0..values.len() {
            let at = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[i] += delta;
                let mut all = inputs.to_vec();
                all[k] = Tensor::from_vec(moved, input.shape().clone(), &Device::Cpu)?;
                (f(&all)? * &weights)?.sum_all()?.to_scalar::<f64>()
            };
            let numeric = (at(h)? - at(-h)?) / (2.0 * h);
            worst = worst.max((numeric - grad[i]).abs() / scale);
        }
    }
    Ok(worst)
}

/// The largest absolute difference between two tensors of equal shape.
///
/// # Errors
/// If the shapes differ.
pub fn max_abs_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let d = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?
        .abs()?
        .flatten_all()?;
    Ok(d.to_vec1::<f64>()?.into_iter().fold(0.0, f64::max))
}

/// Runs a test at every SIMD level that the processor has, one test at a time.
#[cfg(test)]
pub(crate) fn at_every_level(test: impl Fn(crate::Level) -> Result<()>) -> Result<()> {
    use crate::{Level, set_level};
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _held = LOCK
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        if set_level(level) == level {
            let outcome = test(level);
            set_level(Level::Avx512);
            outcome?;
        }
    }
    Ok(())
}

/// Runs a function on pools of 1, 2 and 4 threads; the results must have the same bits.
#[cfg(test)]
pub(crate) fn same_bits_on_any_number_of_threads(
    f: impl Fn() -> Result<Vec<Tensor>> + Sync,
) -> Result<()> {
    let run = |threads: usize| -> Result<Vec<Vec<u64>>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.map_err(candle_core::Error::wrap)?.install(|| {
            f()?.iter()
                .map(|t| {
                    let wide = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                    Ok(wide.into_iter().map(f64::to_bits).collect())
                })
                .collect()
        })
    };
    let one = run(1)?;
    for threads in [2, 4] {
        if run(threads)? != one {
            bail!("{threads} threads give other bits than one");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_a_right_gradient_and_sees_a_wrong_one() -> Result<()> {
        let x = normal(1, (3, 4))?;
        let good = max_relative_error(|t| t[0].sqr()? * &t[0], std::slice::from_ref(&x))?;
        assert!(good < 1e-8, "{good:e}");
        // Half of the dependence is hidden from the graph.
        let bad = max_relative_error(|t| t[0].detach() * &t[0], &[x])?;
        assert!(bad > 0.1, "{bad:e}");
        Ok(())
    }
}
