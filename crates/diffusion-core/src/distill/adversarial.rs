//! The adversarial losses of truncated chains (TDPM; Zheng, He, Chen and Zhou 2022): a generator that
//! makes noisy samples `x_t` directly, and a discriminator that tells them from diffused data.

use crate::error::Result;
use crate::tensor::{Coef, gradient};
use candle_core::{DType, Tensor};
use diffusion_ops::relu;
use serde::{Deserialize, Serialize};

/// `softplus(x) = ln(1 + eˣ)`, elementwise, without overflow.
///
/// ```text
/// softplus(x) = max(x, 0) + ln(1 + e^{−|x|})
/// ```
///
/// # Errors
/// Those of the tensor library.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    let tail = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    Ok((relu(x)? + tail)?)
}

/// The generator's loss, `softplus(−D(G(z)))`, elementwise over the discriminator's logits.
///
/// # Errors
/// Those of the tensor library.
pub fn generator_loss(fake: &Tensor) -> Result<Tensor> {
    softplus(&fake.neg()?)
}

/// The discriminator's loss, `softplus(−D(x)) + softplus(D(G(z)))`, elementwise over its logits of real
/// and generated samples, `[B]` each.
///
/// # Errors
/// When shapes differ.
pub fn discriminator_loss(real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    Ok((softplus(&real.neg()?)? + softplus(fake)?)?)
}

/// The penalty on the discriminator's slope at real samples (R1; Mescheder, Geiger and Nowozin 2018,
/// eq. 9), an item, `[B]`.
///
/// ```text
/// R = (γ/2) ‖∇ₓ D(x)‖²,    ∂R/∂θ = γ ∂/∂θ [D(x + h g) − D(x − h g)]/(2h),   g = ∇ₓ D(x), fixed
/// ```
///
/// The gradient in the weights `θ` is that of a difference along the detached slope, since the tensor
/// library has no second derivatives; `h` makes `h g` a step of length 10⁻⁴ in f64 and 10⁻² below.
///
/// # Shapes
/// `x` `[B, …]`; `discriminator` gives one logit an item, `[B]`.
///
/// # Errors
/// Whatever the discriminator refuses.
pub fn gradient_penalty(
    discriminator: impl Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    gamma: f64,
) -> Result<Tensor> {
    let x = x.detach();
    let slope = gradient(&x, |x| Ok(discriminator(x)?.sum_all()?))?;
    let square = slope.flatten_from(1)?.sqr()?.sum(1)?;
    let norms: Vec<f64> = square
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?
        .into_iter()
        .map(f64::sqrt)
        .collect();
    let length = if x.dtype() == DType::F64 { 1e-4 } else { 1e-2 };
    let h: Vec<f64> = norms.iter().map(|n| length / n.max(1e-12)).collect();
    let along = Coef::Each(h.clone()).times(&slope)?;
    let difference = (discriminator(&(&x + &along)?)? - discriminator(&(&x - &along)?)?)?;
    let scale = h.iter().map(|h| gamma / (2.0 * h)).collect();
    // γ Δ has the right gradient; its value is moved to that of the penalty.
    let term = Coef::Each(scale).times(&difference)?;
    let value = square.affine(0.5 * gamma, 0.0)?;
    Ok((&term + (value - term.detach())?)?)
}

/// A penalty that is taken now and then, and counts for the steps between (Karras et al. 2020,
/// appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LazyR1 {
    /// `γ`, as if it were taken at every step.
    pub gamma: f64,
    /// Steps from one to the next.
    pub every: u64,
}

impl LazyR1 {
    /// The `γ` at a step, `None` where the penalty is left out.
    pub fn at(&self, step: u64) -> Option<f64> {
        let every = self.every.max(1);
        step.is_multiple_of(every)
            .then_some(self.gamma * every as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::gradcheck::gradcheck;
    use candle_core::{Device, Var};

    #[test]
    fn values_and_gradients_of_the_losses() {
        let x = Tensor::new(&[-800.0, -2.0, 0.0, 0.5, 800.0f64], &Device::Cpu).unwrap();
        let y = softplus(&x).unwrap().to_vec1::<f64>().unwrap();
        let exact = [
            0.0,
            2f64.exp().recip().ln_1p(),
            2f64.ln(),
            0.5f64.exp().ln_1p(),
            800.0,
        ];
        for (a, b) in y.iter().zip(exact) {
            assert!((a - b).abs() < 1e-14, "{a} {b}");
        }
        let logits = Tensor::new(&[-1.3, 0.2, 2.0f64], &Device::Cpu).unwrap();
        let other = Tensor::new(&[0.4, -0.7, 1.1f64], &Device::Cpu).unwrap();
        let worst = [
            gradcheck(&logits, |x| Ok(generator_loss(x)?.sum_all()?)),
            gradcheck(&logits, |x| Ok(discriminator_loss(x, &other)?.sum_all()?)),
            gradcheck(&logits, |x| Ok(discriminator_loss(&other, x)?.sum_all()?)),
        ];
        assert!(worst.into_iter().all(|w| w.unwrap() < 1e-8));
        // A discriminator that knows nothing costs 2 ln 2.
        let zero = logits.zeros_like().unwrap();
        let cost = discriminator_loss(&zero, &zero)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        assert!(cost.iter().all(|c| (c - 2.0 * 2f64.ln()).abs() < 1e-15));
    }

    /// `D(x) = a Σ x³ + b Σ x` has `∇D = 3 a x² + b`, so that everything is known.
    #[test]
    fn the_penalty_and_its_gradient_in_the_weights() {
        let a = Var::new(0.7f64, &Device::Cpu).unwrap();
        let b = Var::new(-0.4f64, &Device::Cpu).unwrap();
        let rows = [[0.3, -1.1], [0.9, 0.2f64]];
        let x = Tensor::new(&rows, &Device::Cpu).unwrap();
        let discriminator = |x: &Tensor| -> Result<Tensor> {
            let cube = (x * x.sqr()?)?.broadcast_mul(a.as_tensor())?;
            Ok((cube + x.broadcast_mul(b.as_tensor())?)?.sum(1)?)
        };
        let gamma = 3.0;
        let penalty = gradient_penalty(discriminator, &x, gamma).unwrap();
        let slope = |x: f64| 3.0 * 0.7 * x * x - 0.4;
        for (row, r) in rows.iter().zip(penalty.to_vec1::<f64>().unwrap()) {
            let exact: f64 = row.iter().map(|x| 0.5 * gamma * slope(*x).powi(2)).sum();
            assert!((r / exact - 1.0).abs() < 1e-12, "{r} {exact}");
        }
        let grads = diffusion_ops::backward(&penalty.sum_all().unwrap()).unwrap();
        let of = |v: &Var| {
            grads
                .get(v.as_tensor())
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let all = || rows.iter().flatten().copied();
        let for_a: f64 = all().map(|x| gamma * slope(x) * 3.0 * x * x).sum();
        let for_b: f64 = all().map(|x| gamma * slope(x)).sum();
        assert!((of(&a) / for_a - 1.0).abs() < 1e-7, "{} {for_a}", of(&a));
        assert!((of(&b) / for_b - 1.0).abs() < 1e-7, "{} {for_b}", of(&b));
    }

    #[test]
    fn a_lazy_penalty_counts_for_the_steps_between() {
        let lazy = LazyR1 {
            gamma: 0.05,
            every: 15,
        };
        let total: f64 = (0..150).filter_map(|step| lazy.at(step)).sum();
        assert!((total - 0.05 * 150.0).abs() < 1e-12);
        assert_eq!(lazy.at(1), None);
    }
}
