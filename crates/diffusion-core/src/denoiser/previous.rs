//! Networks that predict the previous sample (Ho et al. 2020, section 3.2, "predict μ̃").

use super::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::posterior;
use crate::predict::{Kind, Prediction};
use crate::schedule::Point;
use crate::tensor::{At, Coef, combine};
use candle_core::Tensor;

/// Reads a network whose value is the mean of `x_s` as the `x₀` that gives this mean.
///
/// ```text
/// x₀ = (x̂_s − c_x x_t)/c_{x0},   (c_x, c_{x0}) of the posterior q(x_s | x_t, x₀)
/// ```
pub struct PreviousX<D> {
    /// The network; its kind is not looked at.
    pub inner: D,
    /// The steps that it was trained on: (noisier, cleaner).
    pub steps: Vec<(Point, Point)>,
}

impl<D: Denoiser> Denoiser for PreviousX<D> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let said = self.inner.predict(x, at, call)?;
        let laws = at
            .points(x.dim(0)?)
            .iter()
            .map(
                |p| match self.steps.iter().find(|(from, _)| from.t == p.t) {
                    Some((from, to)) => Ok(posterior(from, to)),
                    None => Err(Report::new("time", p.t)
                        .expected("one of the steps that this network was trained on")
                        .remedy("predict x0, epsilon or velocity to step anywhere")
                        .config()),
                },
            )
            .collect::<Result<Vec<_>>>()?;
        let value = combine(
            &Coef::Each(laws.iter().map(|q| 1.0 / q.x0).collect()),
            &said.value,
            &Coef::Each(laws.iter().map(|q| -q.x / q.x0).collect()),
            x,
        )?;
        Ok(Prediction {
            kind: Kind::X0,
            value,
            ..said
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::CounterNoise;
    use candle_core::Device;

    #[test]
    fn the_posterior_with_this_x0_has_the_predicted_mean() {
        let (t, s) = (
            Point {
                t: 4.0,
                ..Point::from_log_snr(4.0, -0.3)
            },
            Point::from_log_snr(3.0, 0.8),
        );
        let mean = Tensor::new(&[[0.3, -1.2f64]], &Device::Cpu).unwrap();
        let told = mean.clone();
        let net = PreviousX {
            inner: from_fn(move |_: &Tensor, _, _| Ok(Prediction::new(Kind::X0, told.clone()))),
            steps: vec![(t, s)],
        };
        let x = Tensor::new(&[[0.9, 0.1f64]], &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(0, 0..1);
        let mut call = Call {
            noise: &mut noise,
            items: 0..1,
            tracked: false,
        };
        let x0 = net.predict(&x, At::All(t), &mut call).unwrap().value;
        let q = posterior(&t, &s);
        let back = crate::tensor::lincomb(q.x, &x, q.x0, &x0).unwrap();
        let gap = (back - mean).unwrap().abs().unwrap().max_all().unwrap();
        assert!(gap.to_scalar::<f64>().unwrap() < 1e-14);
        assert!(net.predict(&x, At::All(s), &mut call).is_err());
    }
}
