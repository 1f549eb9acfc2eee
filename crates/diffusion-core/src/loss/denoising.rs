//! The denoising objective of every Gaussian system.

use super::{TimeLaw, Weight};
use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::marginal;
use crate::predict::{Prediction, target};
use crate::schedule::{Point, Schedule};
use crate::tensor::{At, Coef, mean_per_item};
use candle_core::Tensor;
use diffusion_ops::rng::Key;
use std::sync::Arc;

/// Draws a time, adds noise, asks the network, and compares.
#[derive(Clone)]
pub struct Denoising {
    /// The forward process.
    pub schedule: Arc<dyn Schedule + Send + Sync>,
    /// How much each level counts.
    pub weight: Weight,
    /// How levels are drawn.
    pub time: TimeLaw,
}

impl Denoising {
    /// One training point an item, each a function of its key alone.
    pub fn draw(&self, keys: impl IntoIterator<Item = Key>) -> Vec<Point> {
        keys.into_iter()
            .map(|key| self.time.draw(self.schedule.as_ref(), key))
            .collect()
    }

    /// The weighted loss of every item, `[B]`, differentiable in the network's weights.
    ///
    /// ```text
    /// loss_i = w(t_i) · mean over dimensions of (ŷ_i − y_i)²
    /// ```
    ///
    /// # Shapes
    /// `x0` and `epsilon` `[B, …]`, one point an item.
    ///
    /// # Errors
    /// `Config` when the weight is infinite at a drawn point; whatever the network refuses.
    pub fn losses(
        &self,
        network: &dyn Denoiser,
        x0: &Tensor,
        epsilon: &Tensor,
        points: &[Point],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let (squares, weights) = self.squares(network, x0, epsilon, points, call)?;
        weights.times(&mean_per_item(&squares)?)
    }

    /// The weighted loss of every entry, shaped as `x0`: the terms whose mean over the dimensions is
    /// [`Denoising::losses`].
    ///
    /// ```text
    /// loss_id = w(t_i) (ŷ_id − y_id)²
    /// ```
    ///
    /// # Errors
    /// As [`Denoising::losses`].
    pub fn entries(
        &self,
        network: &dyn Denoiser,
        x0: &Tensor,
        epsilon: &Tensor,
        points: &[Point],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let (squares, weights) = self.squares(network, x0, epsilon, points, call)?;
        weights.times(&squares)
    }

    /// The squared errors, and the weight of each item.
    fn squares(
        &self,
        network: &dyn Denoiser,
        x0: &Tensor,
        epsilon: &Tensor,
        points: &[Point],
        call: &mut Call<'_>,
    ) -> Result<(Tensor, Coef)> {
        let at = At::Each(points);
        let x_t = marginal(x0, epsilon, at)?;
        let said = network.predict(&x_t, at, call)?;
        let weight = |p: &Point| self.weight.under(self.schedule.as_ref(), said.kind, p);
        squares(&said, x0, epsilon, points, (self.weight, &weight))
    }
}

/// The weighted squared error of a prediction against known data and noise, an item, `[B]`.
///
/// ```text
/// w(t_i) · mean over dimensions of (ŷ_i − y_i)²,   y_i as in [`target`]
/// ```
///
/// # Shapes
/// `x0` and `epsilon` `[B, …]`, one point an item.
///
/// # Errors
/// `Config` when the weight is infinite at a point; when shapes differ.
pub fn weighted_error(
    said: &Prediction,
    x0: &Tensor,
    epsilon: &Tensor,
    points: &[Point],
    weight: Weight,
) -> Result<Tensor> {
    let on_kind = |p: &Point| weight.on_kind(said.kind, p);
    let (squares, weights) = squares(said, x0, epsilon, points, (weight, &on_kind))?;
    weights.times(&mean_per_item(&squares)?)
}

/// The squared errors, and the weight of each item.
fn squares(
    said: &Prediction,
    x0: &Tensor,
    epsilon: &Tensor,
    points: &[Point],
    (name, weight): (Weight, &dyn Fn(&Point) -> f64),
) -> Result<(Tensor, Coef)> {
    let error = (&said.value - target(said.kind, x0, epsilon, At::Each(points))?)?;
    let weights: Vec<f64> = points.iter().map(weight).collect();
    if let Some((w, p)) = weights.iter().zip(points).find(|(w, _)| !w.is_finite()) {
        return Err(
            Report::new(format!("loss weight {name:?}"), format!("{w} at {p:?}"))
                .expected("a finite weight")
                .remedy("use another weight, or a schedule that does not reach this level")
                .config(),
        );
    }
    Ok((error.sqr()?, Coef::Each(weights)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::Gaussian;
    use crate::predict::Kind;
    use crate::schedule::Vp;
    use crate::tensor::gradient;
    use candle_core::{DType, Device};
    use diffusion_ops::rng::stream;

    fn setup(weight: Weight) -> (Denoising, Tensor, Tensor, Vec<Point>) {
        let d = Denoising {
            schedule: Arc::new(Vp::default()),
            weight,
            time: TimeLaw::Uniform,
        };
        let like = Tensor::zeros((512, 3), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(1, 0..512);
        let x0 = noise.normal(&like).unwrap().affine(0.5, 0.2).unwrap();
        let epsilon = noise.normal(&like).unwrap();
        let points = d.draw((0..512).map(|i| Key::new(1, stream::TRAIN_TIME).item(i)));
        (d, x0, epsilon, points)
    }

    /// The same belief costs the same whatever the network calls it.
    #[test]
    fn the_loss_does_not_depend_on_the_parameterisation() {
        let oracle = Gaussian::new(vec![0.0; 3], vec![1.0; 3]);
        let kinds = [
            Kind::Epsilon,
            Kind::X0,
            Kind::Velocity,
            Kind::Flow,
            Kind::Score,
            Kind::Edm {
                sigma_data: 0.5,
                negative: false,
            },
        ];
        for weight in [
            Weight::Simple,
            Weight::MinSnr { gamma: 5.0 },
            Weight::Edm { sigma_data: 0.5 },
        ] {
            let (d, x0, epsilon, points) = setup(weight);
            let all: Vec<Vec<f64>> = kinds
                .iter()
                .map(|kind| {
                    let network = from_fn(|x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
                        oracle.predict(x, at, call)?.into_kind(*kind, x, at)
                    });
                    let mut noise = CounterNoise::new(0, 0..512);
                    let mut call = Call {
                        noise: &mut noise,
                        items: 0..512,
                        tracked: true,
                    };
                    d.losses(&network, &x0, &epsilon, &points, &mut call)
                        .unwrap()
                        .to_vec1()
                        .unwrap()
                })
                .collect();
            for other in &all[1..] {
                for (a, b) in all[0].iter().zip(other) {
                    assert!(
                        (a - b).abs() < 1e-8 * a.abs().max(1.0),
                        "{weight:?}: {a} {b}"
                    );
                }
            }
        }
    }

    /// The optimum of the simple loss is the conditional mean: no constant shift of the exact
    /// denoiser does better, and the gradient there vanishes within sampling error.
    #[test]
    fn the_exact_denoiser_is_a_stationary_point() {
        let (d, x0, epsilon, points) = setup(Weight::Simple);
        let oracle = Gaussian::new(vec![0.2; 3], vec![0.5; 3]);
        let loss = |shift: &Tensor| {
            let network = from_fn(|x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
                let said = oracle.predict(x, at, call)?.epsilon(x, at)?;
                Ok(Prediction::new(Kind::Epsilon, said.broadcast_add(shift)?))
            });
            let mut noise = CounterNoise::new(0, 0..512);
            let mut call = Call {
                noise: &mut noise,
                items: 0..512,
                tracked: true,
            };
            Ok(d.losses(&network, &x0, &epsilon, &points, &mut call)?
                .mean_all()?)
        };
        let zero = Tensor::zeros((1, 3), DType::F64, &Device::Cpu).unwrap();
        let slope = gradient(&zero, loss)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        // d/dshift = 2/3 mean(ε̂ − ε), whose standard error over 512 items is below 2/3/√512.
        assert!(
            slope
                .iter()
                .all(|g| g.abs() < 4.0 * 2.0 / 3.0 / 512f64.sqrt()),
            "{slope:?}"
        );
        let at_zero = loss(&zero).unwrap().to_scalar::<f64>().unwrap();
        let moved = loss(&zero.affine(1.0, 0.5).unwrap())
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!(moved > at_zero + 0.2, "{at_zero} {moved}");
    }

    /// Row N6 of the table of promises: every weight on every kind, through a network that is a
    /// shift and a scale of its input.
    #[test]
    fn gradients_are_difference_quotients() {
        let kinds = [
            Kind::Epsilon,
            Kind::X0,
            Kind::Velocity,
            Kind::Flow,
            Kind::Score,
            Kind::Edm {
                sigma_data: 0.5,
                negative: true,
            },
        ];
        let mut worst: f64 = 0.0;
        for weight in [
            Weight::Simple,
            Weight::X0,
            Weight::Velocity,
            Weight::TruncatedSnr,
            Weight::MinSnr { gamma: 5.0 },
            Weight::P2 { gamma: 1.0, k: 1.0 },
            Weight::Edm { sigma_data: 0.5 },
        ] {
            let (d, x0, epsilon, _) = setup(weight);
            let few = |t: &Tensor| t.narrow(0, 0, 5).unwrap();
            let (x0, epsilon) = (few(&x0), few(&epsilon));
            let points: Vec<Point> = (1..=5)
                .map(|i| d.schedule.at(0.15 * f64::from(i)))
                .collect();
            for kind in kinds {
                let loss = |w: &Tensor| {
                    let network = from_fn(|x: &Tensor, _: At<'_>, _: &mut Call<'_>| {
                        let (scale, shift) = (w.narrow(0, 0, 1)?, w.narrow(0, 1, 1)?);
                        let said = x.broadcast_mul(&scale)?.broadcast_add(&shift)?;
                        Ok(Prediction::new(kind, said))
                    });
                    let mut noise = CounterNoise::new(0, 0..5);
                    let mut call = Call {
                        noise: &mut noise,
                        items: 0..5,
                        tracked: true,
                    };
                    Ok(d.losses(&network, &x0, &epsilon, &points, &mut call)?
                        .mean_all()?)
                };
                let w = [[0.7, -0.2, 1.1], [0.1, 0.0, -0.4]];
                let w = Tensor::new(&w, &Device::Cpu).unwrap();
                let error = crate::oracle::gradcheck::gradcheck(&w, loss).unwrap();
                assert!(error < 1e-6, "{weight:?} on {kind:?}: {error:e}");
                worst = worst.max(error);
            }
        }
        println!("7 weights on 6 kinds, worst error of a gradient {worst:.1e}");
    }

    #[test]
    fn an_infinite_weight_is_refused() {
        let (mut d, x0, epsilon, mut points) = setup(Weight::X0);
        points[3] = Point::new(1.0, 0.0, 1.0);
        d.weight = Weight::X0;
        let network = from_fn(|x: &Tensor, _: At<'_>, _: &mut Call<'_>| {
            Ok(Prediction::new(Kind::Epsilon, x.clone()))
        });
        let mut noise = CounterNoise::new(0, 0..512);
        let mut call = Call {
            noise: &mut noise,
            items: 0..512,
            tracked: true,
        };
        let error = d
            .losses(&network, &x0, &epsilon, &points, &mut call)
            .unwrap_err();
        assert!(error.to_string().contains("loss weight X0"), "{error}");
    }
}
