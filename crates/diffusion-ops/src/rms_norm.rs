//! Normalisation of the last axis by its root mean square.

use crate::cpu::{half_on_cpu, native};
use crate::layer_norm::Rows;
use crate::tape::apply2;
use candle_core::{DType, Result, Tensor, bail};

/// Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4).
///
/// ```text
/// y = γ x/√(mean(x²) + ε)
/// ```
///
/// where the mean is over the last axis.
///
/// # Shapes
/// `x [..., D]`, `gamma [D]`; the result has the shape of `x`.
///
/// # Errors
/// If `gamma` does not have the shape `[D]`.
pub fn rms_norm(x: &Tensor, gamma: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dims().last().copied();
    if gamma.dims() != width.as_slice() || width.is_none() {
        let (x, gamma) = (x.dims(), gamma.dims());
        bail!("rms_norm: scale {gamma:?} and input {x:?}, expected [D] and [..., D]");
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        return rms_norm(&wide(x)?, &wide(gamma)?, eps)?.to_dtype(x.dtype());
    }
    let op = Rows::<false>(eps);
    if native(x) {
        apply2(&x.contiguous()?, &gamma.contiguous()?, op)
    } else {
        op.composed(x, gamma)
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

    #[test]
    fn value_and_gradient() -> Result<()> {
        let x = Tensor::new(&[[3f64, 4.0], [0.0, 2.0]], &Device::Cpu)?;
        let gamma = Tensor::new(&[1f64, 10.0], &Device::Cpu)?;
        let y = rms_norm(&x, &gamma, 0.0)?.to_vec2::<f64>()?;
        let rms = 12.5f64.sqrt();
        for (a, e) in y
            .concat()
            .iter()
            .zip([3.0 / rms, 40.0 / rms, 0.0, 200f64.sqrt()])
        {
            assert!((a - e).abs() < 1e-14, "{y:?}");
        }
        let inputs = [normal(1, (2, 3, 21))?, normal(2, 21)?];
        at_every_level(|level| {
            let run = |t: &[Tensor]| rms_norm(&t[0], &t[1], 1e-5);
            let composed = |t: &[Tensor]| Rows::<false>(1e-5).composed(&t[0], &t[1]);
            let gap = max_abs_difference(&run(&inputs)?, &composed(&inputs)?)?;
            assert!(gap < 1e-14, "{gap:e}");
            let e = max_relative_error(run, &inputs)?;
            assert!(e < 1e-6, "{level:?}: {e:e}");
            let e = max_relative_error(composed, &inputs)?;
            assert!(e < 1e-6, "composition: {e:e}");
            Ok(())
        })?;
        assert!(rms_norm(&x, &inputs[1], 0.0).is_err());
        Ok(())
    }

    #[test]
    fn f32_follows_f64_with_the_same_bits_on_any_number_of_threads() -> Result<()> {
        let all = |dtype: DType| -> Result<Vec<Tensor>> {
            let cast = |t: Tensor| Var::from_tensor(&t.to_dtype(DType::F32)?.to_dtype(dtype)?);
            let (x, gamma) = (cast(normal(1, (700, 130))?)?, cast(normal(2, 130)?)?);
            let y = rms_norm(&x, &gamma, 1e-5)?;
            let grads = (y.sqr()? * &y)?.sum_all()?.backward()?;
            let of = |v: &Var| grads.get(v).unwrap().clone();
            Ok(vec![of(&x), of(&gamma), y])
        };
        at_every_level(|level| {
            same_bits_on_any_number_of_threads(|| all(DType::F32))?;
            for (a, e) in all(DType::F32)?.iter().zip(&all(DType::F64)?) {
                let gap = max_abs_difference(a, e)? / max_abs_difference(e, &e.zeros_like()?)?;
                assert!(gap < 1e-5, "{level:?}: {gap:e}");
            }
            Ok(())
        })
    }
}
