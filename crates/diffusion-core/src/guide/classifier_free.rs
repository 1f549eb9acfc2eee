//! Classifier-free guidance (Ho and Salimans 2022).

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::predict::Prediction;
use crate::tensor::{At, Coef, lincomb};
use candle_core::{D, DType, Tensor};

/// Extrapolates from the unconditional to the conditional belief.
///
/// ```text
/// ε_g = ε(∅) + w (ε(c) − ε(∅))
/// ```
///
/// `w = 0` is unconditional, `w = 1` conditional, `w > 1` sharper. (The paper's own weight counts
/// from one less.) Applied to whatever kind the network predicts, which is the same thing, as
/// conversions are affine with equal parts for both.
pub struct ClassifierFree<C, U> {
    /// The denoiser that holds the condition.
    pub conditional: C,
    /// The denoiser without one.
    pub unconditional: U,
    /// The weight `w`.
    pub weight: f64,
    /// How much of the guided value's spread is brought back to the conditional one's
    /// (Lin et al. 2023, section 3.4): 0 for none, 0.7 as the paper advises.
    pub rescale: f64,
}

impl<C: Denoiser, U: Denoiser> Denoiser for ClassifierFree<C, U> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let conditional = self.conditional.predict(x, at, call)?;
        if self.weight == 1.0 && self.rescale == 0.0 {
            return Ok(conditional);
        }
        let unconditional =
            self.unconditional
                .predict(x, at, call)?
                .into_kind(conditional.kind, x, at)?;
        let guided = guide(&conditional.value, &unconditional.value, self.weight)?;
        let value = rescale(&guided, &conditional.value, self.rescale)?;
        Ok(Prediction {
            value,
            x0: None,
            ..conditional
        })
    }
}

/// `u + w (c − u)`.
///
/// # Errors
/// When shapes differ.
pub fn guide(conditional: &Tensor, unconditional: &Tensor, weight: f64) -> Result<Tensor> {
    lincomb(weight, conditional, 1.0 - weight, unconditional)
}

/// Brings the spread of a guided value back to that of the conditional one, item by item
/// (Lin et al. 2023, eq. 15 and 16).
///
/// ```text
/// g' = g · std(c)/std(g),   result = φ g' + (1 − φ) g
/// ```
///
/// # Errors
/// When shapes differ.
pub fn rescale(guided: &Tensor, conditional: &Tensor, amount: f64) -> Result<Tensor> {
    if amount == 0.0 {
        return Ok(guided.clone());
    }
    let std = |x: &Tensor| -> Result<Vec<f64>> {
        // The unbiased estimator, as the authors use.
        Ok(x.to_dtype(DType::F64)?
            .flatten_from(1)?
            .var(D::Minus1)?
            .sqrt()?
            .to_vec1::<f64>()?)
    };
    let scale: Vec<f64> = std(conditional)?
        .into_iter()
        .zip(std(guided)?)
        .map(|(c, g)| amount * c / g + (1.0 - amount))
        .collect();
    Coef::Each(scale).times(guided)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Mixture;
    use crate::schedule::Point;
    use candle_core::Device;

    /// Two classes of a mixture: the guided score is the gradient of
    /// `log p(x) + w log p(c | x)`, Bayes' rule with a tempered likelihood.
    #[test]
    fn guidance_is_tempered_bayes() {
        let both = Mixture::new(
            vec![0.5, 0.5],
            vec![vec![-1.0, 0.5], vec![2.0, 0.0]],
            vec![0.4, 0.7],
        )
        .unwrap();
        let first = Mixture::new(vec![1.0], vec![vec![-1.0, 0.5]], vec![0.4]).unwrap();
        let x = Tensor::new(&[[0.2, 0.3], [-1.0, 1.0f64]], &Device::Cpu).unwrap();
        let p = Point::from_log_snr(0.0, 0.4);
        for weight in [0.0, 1.0, 3.5] {
            let guided = ClassifierFree {
                conditional: &first,
                unconditional: &both,
                weight,
                rescale: 0.0,
            };
            let mut noise = CounterNoise::new(0, 0..2);
            let mut call = Call {
                noise: &mut noise,
                items: 0..2,
                tracked: false,
            };
            let score = guided
                .predict(&x, At::All(p), &mut call)
                .unwrap()
                .score(&x, At::All(p))
                .unwrap();
            let exact = crate::tensor::gradient(&x, |x| {
                let (all, one) = (both.log_density(x, &p)?, first.log_density(x, &p)?);
                Ok(lincomb(1.0 - weight, &all, weight, &one)?.sum_all()?)
            })
            .unwrap();
            let worst = (score - exact)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap();
            assert!(worst < 1e-12, "w = {weight}: {worst}");
        }
    }

    #[test]
    fn full_rescaling_restores_the_conditional_spread() {
        let c = Tensor::new(&[[1.0, 2.0, 4.0f64]], &Device::Cpu).unwrap();
        let g = guide(&c, &c.affine(-2.0, 1.0).unwrap(), 7.5).unwrap();
        let r = rescale(&g, &c, 1.0).unwrap();
        let var = |t: &Tensor| t.var(1).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((var(&r) / var(&c) - 1.0).abs() < 1e-12);
        assert!((var(&g) / var(&c) - 1.0).abs() > 1.0);
    }
}
