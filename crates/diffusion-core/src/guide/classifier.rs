//! Classifier guidance (Dhariwal and Nichol 2021).

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::tensor::{At, combine, gradient};
use candle_core::Tensor;

/// Adds the gradient of a classifier's log-probability to the score.
///
/// ```text
/// ε_g = ε − s σ_t ∇_x log p(y | x_t)
/// ```
///
/// The classifier must know noisy inputs: it is given `x_t` and where it stands.
pub struct ClassifierGuided<D, F> {
    /// The unguided denoiser.
    pub inner: D,
    /// `log p(y | x_t)` of every element, `[B]`, differentiable in `x_t`.
    pub log_prob: F,
    /// The scale `s`.
    pub scale: f64,
}

impl<D, F> Denoiser for ClassifierGuided<D, F>
where
    D: Denoiser,
    F: Fn(&Tensor, At<'_>) -> Result<Tensor>,
{
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let said = self.inner.predict(x, at, call)?;
        // A clip of the inner denoiser counts: the noise is that of the corrected data.
        let epsilon = said.epsilon_of_x0(x, at)?;
        // Elements are independent, so the gradient of the sum holds every element's own.
        let slope = gradient(x, |x| Ok((self.log_prob)(x, at)?.sum_all()?))?;
        let value = combine(
            &at.coef(|_| 1.0),
            &epsilon,
            &at.coef(|p| -self.scale * p.sigma),
            &slope,
        )?;
        Ok(Prediction {
            kind: Kind::Epsilon,
            value,
            x0: None,
            ..said
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Mixture;
    use crate::schedule::Point;
    use candle_core::Device;

    /// With the exact `p(y | x_t)` and scale 1, guidance turns the marginal score into the
    /// class-conditional one.
    #[test]
    fn the_exact_classifier_gives_the_conditional_score() {
        let both =
            Mixture::new(vec![0.3, 0.7], vec![vec![-1.0], vec![2.0]], vec![0.4, 0.7]).unwrap();
        let first = Mixture::new(vec![1.0], vec![vec![-1.0]], vec![0.4]).unwrap();
        let log_prob = |x: &Tensor, at: At<'_>| {
            let p = at.points(1)[0];
            Ok(first
                .log_density(x, &p)?
                .sub(&both.log_density(x, &p)?)?
                .affine(1.0, 0.3f64.ln())?)
        };
        let guided = ClassifierGuided {
            inner: &both,
            log_prob,
            scale: 1.0,
        };
        let x = Tensor::new(&[[0.2], [-1.0], [1.5f64]], &Device::Cpu).unwrap();
        let at = At::All(Point::from_log_snr(0.0, -0.4));
        let mut noise = CounterNoise::new(0, 0..3);
        let mut call = Call {
            noise: &mut noise,
            items: 0..3,
            tracked: false,
        };
        let ours = guided
            .predict(&x, at, &mut call)
            .unwrap()
            .epsilon(&x, at)
            .unwrap();
        let exact = first
            .predict(&x, at, &mut call)
            .unwrap()
            .epsilon(&x, at)
            .unwrap();
        let worst = (ours - exact)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!(worst < 1e-13, "{worst}");
    }
}
