//! A variance-preserving network inside a variance-exploding sampler.

use super::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::predict::{Kind, Prediction};
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::Tensor;

/// Runs a VP denoiser on VE samples, as k-diffusion does.
///
/// ```text
/// x̂ = x/α is a VE sample with σ̂ = σ/α;   the network sees x = x̂/√(1 + σ̂²)
/// ```
///
/// Times are passed on untouched.
pub struct VpInVe<D>(
    /// The VP denoiser.
    pub D,
);

impl<D: Denoiser> Denoiser for VpInVe<D> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let to_vp = |p: &Point| {
            let alpha = p.sigma.hypot(1.0).recip();
            Point {
                t: p.t,
                alpha,
                sigma: p.sigma * alpha,
            }
        };
        if at.any(|p| p.alpha != 1.0) {
            return Err(
                Report::new("a VP network in a VE sampler", "a point with alpha != 1")
                    .expected("points of a variance-exploding grid")
                    .config(),
            );
        }
        let input = at.coef(|p| to_vp(p).alpha).times(x)?;
        let said = match at {
            At::All(p) => self.0.predict(&input, At::All(to_vp(&p)), call)?,
            At::Each(points) => {
                let points: Vec<Point> = points.iter().map(to_vp).collect();
                self.0.predict(&input, At::Each(&points), call)?
            }
        };
        let kind = match said.kind {
            // Neither depends on the frame.
            Kind::Epsilon | Kind::X0 => said.kind,
            // A VP velocity is EDM's output for unit data with the sign turned.
            Kind::Velocity => Kind::Edm {
                sigma_data: 1.0,
                negative: true,
            },
            other => {
                return Err(
                    Report::new("a VP network in a VE sampler", format!("{other:?}"))
                        .expected("epsilon, x0 or velocity")
                        .unsupported(),
                );
            }
        };
        Ok(Prediction { kind, ..said })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::predict::target;

    /// The same data seen from both frames give the same x₀ and ε, whatever the network predicts.
    #[test]
    fn frames_agree() {
        let oracle = Gaussian::new(vec![0.3, -1.0], vec![0.5, 2.0]);
        let x = Tensor::new(&[[0.4, 1.1], [-2.0, 0.2f64]], &candle_core::Device::Cpu).unwrap();
        for kind in [Kind::Epsilon, Kind::X0, Kind::Velocity] {
            let vp = from_fn(|x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
                let exact = oracle.predict(x, at, call)?;
                let value = target(kind, &exact.x0(x, at)?, &exact.epsilon(x, at)?, at)?;
                Ok(Prediction::new(kind, value))
            });
            let mut noise = CounterNoise::new(0, 0..2);
            let mut call = Call {
                noise: &mut noise,
                items: 0..2,
                tracked: false,
            };
            let at = At::All(Point::new(3.0, 1.0, 1.7));
            let seen = VpInVe(vp)
                .predict(&x, at, &mut call)
                .unwrap()
                .x0(&x, at)
                .unwrap();
            let exact = oracle
                .predict(&x, at, &mut call)
                .unwrap()
                .x0(&x, at)
                .unwrap();
            let worst = (seen - exact)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap();
            assert!(worst < 1e-13, "{kind:?}: {worst}");
        }
    }
}
