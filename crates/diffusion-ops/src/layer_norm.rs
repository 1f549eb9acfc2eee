//! Normalisation over the last axis.

use crate::cpu::{half_on_cpu, native};
use crate::group_norm::Norm;
use candle_core::{DType, Result, Tensor, bail};

/// Layer normalisation (Ba et al. 2016, equation 4).
///
/// ```text
/// y = γ (x − μ)/√(σ² + ε) + β
/// ```
///
/// where `μ` and `σ²` are mean and (biased) variance over the last axis.
///
/// # Shapes
/// `x [..., D]`, `gamma [D]`, `beta [D]`; the result has the shape of `x`.
///
/// # Errors
/// If a parameter does not have the shape `[D]`.
pub fn layer_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f64) -> Result<Tensor> {
    let Some((&channels, rest)) = x.dims().split_last() else {
        bail!("layer_norm: an input without axes, expected [..., D]")
    };
    if gamma.dims() != [channels] || beta.dims() != [channels] {
        let (gamma, beta) = (gamma.dims(), beta.dims());
        bail!("layer_norm: scale {gamma:?} and shift {beta:?}, expected [{channels}]");
    }
    if half_on_cpu(x) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        return layer_norm(&wide(x)?, &wide(gamma)?, &wide(beta)?, eps)?.to_dtype(x.dtype());
    }
    let op = Norm {
        batch: rest.iter().product(),
        channels,
        groups: 1,
        inner: 1,
        eps,
    };
    if native(x) {
        x.contiguous()?
            .apply_op3(&gamma.contiguous()?, &beta.contiguous()?, op)
    } else {
        op.composed(x, gamma, beta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_relative_error, normal};
    use candle_core::Device;

    #[test]
    fn value_and_gradient() -> Result<()> {
        let x = Tensor::new(&[[1f64, 3.0]], &Device::Cpu)?;
        let gamma = Tensor::new(&[2f64, 2.0], &Device::Cpu)?;
        let beta = Tensor::new(&[0.5f64, 0.0], &Device::Cpu)?;
        assert_eq!(
            layer_norm(&x, &gamma, &beta, 0.0)?.to_vec2::<f64>()?,
            [[-1.5, 2.0]]
        );
        let inputs = [normal(1, (2, 3, 21))?, normal(2, 21)?, normal(3, 21)?];
        let e = max_relative_error(|t| layer_norm(&t[0], &t[1], &t[2], 1e-5), &inputs)?;
        assert!(e < 1e-6, "{e:e}");
        assert!(layer_norm(&x, &inputs[1], &beta, 0.0).is_err());
        Ok(())
    }
}
