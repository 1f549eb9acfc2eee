//! Divergences and densities of diagonal Gaussians.

use crate::error::Result;
use candle_core::Tensor;

/// `KL(N(m₁, e^{l₁}) ‖ N(m₂, e^{l₂}))` entry by entry, in nats.
///
/// ```text
/// ½ ( l₂ − l₁ − 1 + e^{l₁ − l₂} + (m₁ − m₂)² e^{−l₂} )
/// ```
///
/// # Shapes
/// All alike; the result likewise.
///
/// # Errors
/// When shapes differ.
pub fn kl(mean1: &Tensor, log_var1: &Tensor, mean2: &Tensor, log_var2: &Tensor) -> Result<Tensor> {
    let difference = (log_var1 - log_var2)?;
    let distance = ((mean1 - mean2)?.sqr()? * log_var2.neg()?.exp()?)?;
    Ok((((difference.exp()? - difference)? + distance)? - 1.0)?.affine(0.5, 0.0)?)
}

/// `log N(x; mean, e^l)` entry by entry, in nats.
///
/// # Errors
/// When shapes differ.
pub fn log_density(x: &Tensor, mean: &Tensor, log_var: &Tensor) -> Result<Tensor> {
    let distance = ((x - mean)?.sqr()? * log_var.neg()?.exp()?)?;
    Ok(((distance + log_var)? + std::f64::consts::TAU.ln())?.affine(-0.5, 0.0)?)
}

/// `log N(x; 0, s² I)` summed over the dimensions of every item, `[B, …] → [B]`, in nats.
///
/// # Errors
/// Those of the tensor library.
pub fn log_prior(x: &Tensor, std: f64) -> Result<Tensor> {
    let constant = 2.0 * std.ln() + std::f64::consts::TAU.ln();
    let each = x.sqr()?.affine(-0.5 / (std * std), -0.5 * constant)?;
    Ok(each.flatten_from(1)?.sum(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::gradcheck::gradcheck;
    use candle_core::Device;

    fn t(v: &[f64]) -> Tensor {
        Tensor::new(v, &Device::Cpu).unwrap()
    }

    #[test]
    fn divergence_is_the_integral_of_the_log_ratio() {
        let (m1, l1, m2, l2) = (t(&[0.3]), t(&[-0.4]), t(&[-0.5]), t(&[0.7]));
        let ours = kl(&m1, &l1, &m2, &l2).unwrap().to_vec1::<f64>().unwrap()[0];
        let step = 0.002;
        let x: Vec<f64> = (0..8000).map(|i| -8.0 + step * f64::from(i)).collect();
        let all = |v: &Tensor| v.broadcast_as(8000).unwrap().contiguous().unwrap();
        let p = log_density(&t(&x), &all(&m1), &all(&l1)).unwrap();
        let q = log_density(&t(&x), &all(&m2), &all(&l2)).unwrap();
        let integral = ((p.exp().unwrap() * (p - q).unwrap())
            .unwrap()
            .sum_all()
            .unwrap())
        .to_scalar::<f64>()
        .unwrap()
            * step;
        assert!((ours - integral).abs() < 1e-9, "{ours} {integral}");
        let zero = kl(&m1, &l1, &m1, &l1).unwrap().to_vec1::<f64>().unwrap()[0];
        assert_eq!(zero, 0.0);
    }

    #[test]
    fn gradients_are_difference_quotients() {
        let (m1, l1) = (t(&[0.3, -1.0]), t(&[-0.4, 0.2]));
        let x = t(&[0.1, 0.9]);
        let of_mean = |m: &Tensor| Ok(kl(&m1, &l1, m, &l1)?.sum_all()?);
        let of_var = |l: &Tensor| Ok((kl(&m1, &l1, &x, l)? + log_density(&x, &m1, l)?)?.sum_all()?);
        assert!(gradcheck(&x, of_mean).unwrap() < 1e-7);
        assert!(gradcheck(&x, of_var).unwrap() < 1e-7);
    }

    #[test]
    fn the_prior_is_a_product_of_normals() {
        let x = t(&[0.3, -1.0]).unsqueeze(0).unwrap();
        let ours = log_prior(&x, 2.0).unwrap().to_vec1::<f64>().unwrap()[0];
        let l = x.ones_like().unwrap().affine(4f64.ln(), 0.0).unwrap();
        let each = log_density(&x, &x.zeros_like().unwrap(), &l).unwrap();
        let exact = each.sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((ours - exact).abs() < 1e-13);
    }
}
