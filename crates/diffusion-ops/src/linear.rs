//! Affine maps of the last axis.

use crate::bias::add_last;
use crate::cpu::half_on_cpu;
use candle_core::{DType, Result, Tensor, bail};

/// An affine map of the last axis.
///
/// ```text
/// y = x Wᵀ + β
/// ```
///
/// # Shapes
/// `x [..., I]`, `weight [O, I]`, `bias [O]`; the result is `[..., O]`.
///
/// # Errors
/// If the last axis of `x` is not `I`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == inputs => *last = outputs,
        _ => bail!(
            "linear: an input of shape {:?}, expected [..., {inputs}]",
            x.dims()
        ),
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let bias = bias.map(wide).transpose()?;
        return linear(&wide(x)?, &wide(weight)?, bias.as_ref())?.to_dtype(x.dtype());
    }
    let rows = shape[..shape.len() - 1].iter().product::<usize>();
    let y = x.reshape((rows, inputs))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => add_last(&y, bias)?,
        None => y,
    };
    y.reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_relative_error, normal};

    #[test]
    fn value_and_gradient() -> Result<()> {
        let x = Tensor::new(&[[1f64, 2.0]], &candle_core::Device::Cpu)?;
        let w = Tensor::new(&[[3f64, 4.0], [5.0, 6.0], [0.0, 1.0]], x.device())?;
        let b = Tensor::new(&[0.5f64, -1.0, 0.0], x.device())?;
        assert_eq!(
            linear(&x, &w, Some(&b))?.to_vec2::<f64>()?,
            [[11.5, 16.0, 2.0]]
        );
        let inputs = [normal(1, (2, 3, 4))?, normal(2, (5, 4))?, normal(3, 5)?];
        let e = max_relative_error(|t| linear(&t[0], &t[1], Some(&t[2])), &inputs)?;
        assert!(e < 1e-6, "{e:e}");
        let e = max_relative_error(
            |t| linear(&t[0].transpose(0, 1)?, &t[1], None),
            &inputs[..2],
        )?;
        assert!(e < 1e-6, "{e:e}");
        assert!(linear(&inputs[0], &normal(1, (5, 3))?, None).is_err());
        Ok(())
    }
}
