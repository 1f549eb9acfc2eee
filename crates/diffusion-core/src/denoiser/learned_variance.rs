//! Networks with a second head for the reverse variance (Nichol and Dhariwal 2021, section 3.1).

use super::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::predict::Prediction;
use crate::tensor::At;
use candle_core::Tensor;

/// Splits a value of twice the channels into what is predicted and what is said of the variance.
pub struct LearnedVariance<D>(
    /// The network: its value is `[B, 2C, …]` for `x` `[B, C, …]`.
    pub D,
);

impl<D: Denoiser> Denoiser for LearnedVariance<D> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let said = self.0.predict(x, at, call)?;
        let channels = x.dim(1)?;
        if said.value.dim(1)? != 2 * channels {
            return Err(Report::new(
                "network with a learned variance",
                format!("{} output channels", said.value.dim(1)?),
            )
            .expected(format!("twice the {channels} of its input"))
            .config());
        }
        let half =
            |from| -> Result<Tensor> { Ok(said.value.narrow(1, from, channels)?.contiguous()?) };
        Ok(Prediction {
            value: half(0)?,
            var_mix: Some(half(channels)?),
            ..said
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::CounterNoise;
    use crate::predict::Kind;
    use crate::schedule::Point;
    use candle_core::Device;

    #[test]
    fn the_first_half_is_the_prediction() {
        let x = Tensor::new(&[[1.0, 2.0f64]], &Device::Cpu).unwrap();
        let run = |copies: usize| {
            let net = LearnedVariance(from_fn(move |x: &Tensor, _, _| {
                let parts: Vec<Tensor> = (0..copies).map(|i| (x + i as f64).unwrap()).collect();
                Ok(Prediction::new(Kind::Epsilon, Tensor::cat(&parts, 1)?))
            }));
            let mut noise = CounterNoise::new(0, 0..1);
            let mut call = Call {
                noise: &mut noise,
                items: 0..1,
                tracked: false,
            };
            net.predict(&x, At::All(Point::data(0.0)), &mut call)
        };
        let said = run(2).unwrap();
        assert_eq!(said.value.to_vec2::<f64>().unwrap(), [[1.0, 2.0]]);
        assert_eq!(
            said.var_mix.unwrap().to_vec2::<f64>().unwrap(),
            [[2.0, 3.0]]
        );
        assert!(run(1).unwrap_err().to_string().contains("twice"));
    }
}
