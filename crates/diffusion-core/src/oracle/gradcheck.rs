//! Gradients against central differences.

use crate::error::{Report, Result};
use crate::tensor::gradient;
use candle_core::{DType, Tensor};

/// The largest difference between the gradient of a scalar function and its central differences,
/// relative to the larger of 1 and the largest entry of the gradient. `x` must be f64.
///
/// ```text
/// g_i ≈ (f(x + h e_i) − f(x − h e_i))/(2h),   h = 1e-6 max(1, |x_i|)
/// ```
///
/// # Errors
/// `Config` when `x` is not f64; whatever `f` refuses.
pub fn gradcheck(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<f64> {
    if x.dtype() != DType::F64 {
        return Err(Report::new("gradcheck", format!("{:?}", x.dtype()))
            .expected("f64")
            .config());
    }
    let exact = gradient(x, |x| f(x))?.flatten_all()?.to_vec1::<f64>()?;
    let base = x.flatten_all()?.to_vec1::<f64>()?;
    let value = |values: Vec<f64>| -> Result<f64> {
        Ok(f(&Tensor::from_vec(values, x.shape(), x.device())?)?.to_scalar::<f64>()?)
    };
    let scale = exact.iter().fold(1.0f64, |m, g| m.max(g.abs()));
    let mut worst = 0.0f64;
    for (i, g) in exact.iter().enumerate() {
        let h = 1e-6 * base[i].abs().max(1.0);
        let (mut up, mut down) = (base.clone(), base.clone());
        up[i] += h;
        down[i] -= h;
        worst = worst.max((g - (value(up)? - value(down)?) / (2.0 * h)).abs() / scale);
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn passes_a_right_gradient_and_catches_a_lost_one() {
        let x = Tensor::new(&[0.3, -1.2f64], &Device::Cpu).unwrap();
        assert!(gradcheck(&x, |x| Ok(x.sqr()?.sin()?.sum_all()?)).unwrap() < 1e-8);
        // Half of the dependence is cut off: the harness must notice.
        let wrong = gradcheck(&x, |x| Ok((x * x.detach())?.sum_all()?)).unwrap();
        assert!(wrong > 0.4, "{wrong}");
        assert!(gradcheck(&x.to_dtype(DType::F32).unwrap(), |x| Ok(x.sum_all()?)).is_err());
    }
}
