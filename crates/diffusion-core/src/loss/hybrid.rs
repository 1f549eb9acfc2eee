//! The losses of Improved DDPM: the squared error, the bound, and both (Nichol and Dhariwal 2021).

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::forward::marginal;
use crate::likelihood::Vlb;
use crate::predict::{Prediction, target};
use crate::sample::{Mean, Variance};
use crate::schedule::Point;
use crate::tensor::{At, Coef, mean_per_item};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// What is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HybridLoss {
    /// The squared error, plus the bound for a learned variance.
    Mse,
    /// The squared error plus `T/1000` times the bound: `L_simple + 0.001 L_vlb` in expectation
    /// over a uniform step.
    #[default]
    RescaledMse,
    /// The bound's term.
    Kl,
    /// `T` times the bound's term: the whole bound in expectation over a uniform step.
    RescaledKl,
}

/// Draws nothing itself: the losses of a batch at given steps with given noise.
#[derive(Clone, Debug)]
pub struct Hybrid {
    /// The steps and how they read the network. Nothing should be clipped in training.
    pub vlb: Vlb,
    /// What is minimised.
    pub loss: HybridLoss,
}

/// The losses of a batch, `[B]` each.
#[derive(Clone, Debug)]
pub struct HybridLosses {
    /// What to minimise.
    pub loss: Tensor,
    /// The squared error, where it is part of the loss.
    pub mse: Option<Tensor>,
    /// The bound's part of the loss, in bits a dimension, scaled as it enters.
    pub vb: Option<Tensor>,
}

impl Hybrid {
    /// The losses, differentiable in the network's weights.
    ///
    /// ```text
    /// L = mean ‖ŷ − y‖²/D + λ L_vb(sg[ŷ], v)
    /// ```
    ///
    /// The bound does not reach the prediction `ŷ` through the stop-gradient `sg`: only the
    /// variance `v` learns from it (section 3.1).
    ///
    /// # Shapes
    /// `x0` and `epsilon` `[B, …]`, one index of the chain an item.
    ///
    /// # Errors
    /// `Input` for an index outside the chain, `Config` when a learned variance is missing, and
    /// whatever the network refuses.
    pub fn losses(
        &self,
        network: &dyn Denoiser,
        x0: &Tensor,
        epsilon: &Tensor,
        indices: &[usize],
        call: &mut Call<'_>,
    ) -> Result<HybridLosses> {
        let hops = self.vlb.chain.at(indices)?;
        let from: Vec<Point> = hops.iter().map(|h| h.from).collect();
        let at = At::Each(&from);
        let x_t = marginal(x0, epsilon, at)?;
        let said = network.predict(&x_t, at, call)?;
        let steps = self.vlb.chain.len() as f64;
        let bound = |said: Prediction, scale: f64| -> Result<Tensor> {
            let law = self.vlb.law(said, &x_t, &hops)?;
            Ok(self.vlb.terms(&law, x0, &x_t, &hops)?.affine(scale, 0.0)?)
        };
        let of_bound = |scale: f64| -> Result<HybridLosses> {
            let vb = bound(said.clone(), scale)?;
            Ok(HybridLosses {
                loss: vb.clone(),
                mse: None,
                vb: Some(vb),
            })
        };
        let scale = match self.loss {
            HybridLoss::Kl => return of_bound(1.0),
            HybridLoss::RescaledKl => return of_bound(steps),
            HybridLoss::Mse => 1.0,
            HybridLoss::RescaledMse => steps / 1000.0,
        };
        let error = (&said.value - target(said.kind, x0, epsilon, at)?)?;
        let mse = mean_per_item(&error.sqr()?)?;
        // A network that predicts the previous mean errs by c_{x0} times the error of its x₀.
        let mse = match self.vlb.mean {
            Mean::Posterior => mse,
            Mean::Network => {
                Coef::Each(hops.iter().map(|h| h.posterior().x0.powi(2)).collect()).times(&mse)?
            }
        };
        let learned = !matches!(
            self.vlb.variance,
            Variance::FixedSmall | Variance::FixedSmallLog | Variance::FixedLarge
        );
        if !learned {
            return Ok(HybridLosses {
                loss: mse.clone(),
                mse: Some(mse),
                vb: None,
            });
        }
        let frozen = Prediction {
            value: said.value.detach(),
            x0: said.x0.as_ref().map(Tensor::detach),
            ..said.clone()
        };
        let vb = bound(frozen, scale)?;
        Ok(HybridLosses {
            loss: (&mse + &vb)?,
            mse: Some(mse),
            vb: Some(vb),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::{LearnedVariance, from_fn};
    use crate::likelihood::Decoder;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::gradcheck::gradcheck;
    use crate::predict::Kind;
    use crate::sample::Chain;
    use crate::schedule::BetaSchedule;
    use crate::tensor::gradient;
    use candle_core::Device;

    fn hybrid(loss: HybridLoss) -> Hybrid {
        let table = BetaSchedule::ddpm(20).table(20).unwrap();
        let decoder = Decoder::DiscretisedTanh { levels: 16 };
        Hybrid {
            vlb: Vlb::new(
                Chain::of_table(&table).unwrap(),
                Variance::LearnedRange,
                decoder,
            ),
            loss,
        }
    }

    /// Mean loss of a network whose output is its weights, `[3, 4]`.
    fn mean_loss(loss: HybridLoss, w: &Tensor) -> Result<Tensor> {
        let like = Tensor::zeros((3, 2), candle_core::DType::F64, &Device::Cpu)?;
        let mut noise = CounterNoise::new(1, 0..3);
        let x0 = noise.normal(&like)?.affine(0.3, 0.0)?;
        let epsilon = noise.normal(&like)?;
        let told = w.clone();
        let network = LearnedVariance(from_fn(move |_: &Tensor, _, _| {
            Ok(Prediction::new(Kind::Epsilon, told.clone()))
        }));
        let mut call = Call {
            noise: &mut noise,
            items: 0..3,
            tracked: true,
        };
        let losses = hybrid(loss).losses(&network, &x0, &epsilon, &[0, 7, 19], &mut call)?;
        Ok(losses.loss.mean_all()?)
    }

    #[test]
    fn the_bound_reaches_the_variance_only() {
        let w = [
            [0.2, -0.1, 0.3, 0.1],
            [1.0, 0.5, -0.2, 0.4],
            [0.1, 0.0, 0.9, -1.0],
        ];
        let w = Tensor::new(&w, &Device::Cpu).unwrap();
        for loss in [HybridLoss::Kl, HybridLoss::RescaledKl] {
            assert!(
                gradcheck(&w, |w| mean_loss(loss, w)).unwrap() < 1e-5,
                "{loss:?}"
            );
        }
        let slope = |loss| {
            gradient(&w, |w| mean_loss(loss, w))
                .unwrap()
                .to_vec2::<f64>()
                .unwrap()
        };
        let (one, scaled, kl) = (
            slope(HybridLoss::Mse),
            slope(HybridLoss::RescaledMse),
            slope(HybridLoss::Kl),
        );
        for i in 0..3 {
            // The prediction's half is that of the squared error, whatever the bound's weight.
            assert_eq!(one[i][..2], scaled[i][..2]);
            assert_ne!(one[i][..2], kl[i][..2]);
            for j in 2..4 {
                assert!((one[i][j] - kl[i][j]).abs() < 1e-12);
                assert!((scaled[i][j] - 0.02 * kl[i][j]).abs() < 1e-12);
            }
        }
    }
}
