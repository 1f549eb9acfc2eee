//! Gaussian data with a diagonal covariance.

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::predict::{Kind, Prediction};
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::Tensor;

/// `x₀ ~ N(m, diag(c²))` over flat vectors, `[B, D]`.
///
/// With `S = α² c² + σ²`, per coordinate:
///
/// ```text
/// score = −(x − α m)/S,   ε* = σ (x − α m)/S,   x₀* = m + α c² (x − α m)/S
/// flow from s to t:  x_t = α_t m + √(S_t/S_s) (x_s − α_s m)
/// ```
#[derive(Clone, Debug)]
pub struct Gaussian {
    mean: Vec<f64>,
    std: Vec<f64>,
}

impl Gaussian {
    /// Data with these means and standard deviations, one a coordinate.
    ///
    /// The shorter of the two lists decides the dimension.
    pub fn new(mean: Vec<f64>, std: Vec<f64>) -> Self {
        Self { mean, std }
    }

    fn row(&self, x: &Tensor, f: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
        let values: Vec<f64> = self
            .mean
            .iter()
            .zip(&self.std)
            .map(|(m, c)| f(*m, *c))
            .collect();
        Ok(Tensor::new(values, &candle_core::Device::Cpu)?
            .unsqueeze(0)?
            .to_dtype(x.dtype())?
            .to_device(x.device())?)
    }

    /// `x − α m`, `[B, D]`.
    fn centred(&self, x: &Tensor, p: &Point) -> Result<Tensor> {
        Ok(x.broadcast_sub(&self.row(x, |m, _| p.alpha * m)?)?)
    }

    /// The score `∇ log p_t(x)`, `[B, D]`.
    ///
    /// # Errors
    /// When `x` has another dimension.
    pub fn score(&self, x: &Tensor, p: &Point) -> Result<Tensor> {
        let factor = self.row(x, |_, c| -1.0 / ((p.alpha * c).powi(2) + p.sigma.powi(2)))?;
        Ok(self.centred(x, p)?.broadcast_mul(&factor)?)
    }

    /// `E[x₀ | x]`, `[B, D]`.
    ///
    /// # Errors
    /// When `x` has another dimension.
    pub fn x0(&self, x: &Tensor, p: &Point) -> Result<Tensor> {
        let gain = self.row(x, |_, c| {
            p.alpha * c * c / ((p.alpha * c).powi(2) + p.sigma.powi(2))
        })?;
        Ok(self
            .centred(x, p)?
            .broadcast_mul(&gain)?
            .broadcast_add(&self.row(x, |m, _| m)?)?)
    }

    /// `log p_t(x)` in nats, `[B]`.
    ///
    /// # Errors
    /// When `x` has another dimension.
    pub fn log_density(&self, x: &Tensor, p: &Point) -> Result<Tensor> {
        let s = |c: f64| (p.alpha * c).powi(2) + p.sigma.powi(2);
        let quadratic = self
            .centred(x, p)?
            .sqr()?
            .broadcast_mul(&self.row(x, |_, c| -0.5 / s(c))?)?;
        let constant: f64 = self
            .std
            .iter()
            .map(|c| -0.5 * (std::f64::consts::TAU * s(*c)).ln())
            .sum();
        Ok((quadratic.sum(1)? + constant)?)
    }

    /// The exact probability flow from `from` to `to`, `[B, D]`.
    ///
    /// # Errors
    /// When `x` has another dimension.
    pub fn flow(&self, x: &Tensor, from: &Point, to: &Point) -> Result<Tensor> {
        let s = |p: &Point, c: f64| (p.alpha * c).powi(2) + p.sigma.powi(2);
        let ratio = self.row(x, |_, c| (s(to, c) / s(from, c)).sqrt())?;
        let moved = self.centred(x, from)?.broadcast_mul(&ratio)?;
        Ok(moved.broadcast_add(&self.row(x, |m, _| to.alpha * m)?)?)
    }
}

impl Denoiser for Gaussian {
    fn predict(&self, x: &Tensor, at: At<'_>, _: &mut Call<'_>) -> Result<Prediction> {
        let value = match at {
            At::All(p) => self.x0(x, &p)?,
            At::Each(points) => {
                let rows: Vec<Tensor> = points
                    .iter()
                    .enumerate()
                    .map(|(i, p)| self.x0(&x.narrow(0, i, 1)?, p))
                    .collect::<Result<_>>()?;
                Tensor::cat(&rows, 0)?
            }
        };
        Ok(Prediction::new(Kind::X0, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn score_is_the_gradient_of_the_density_and_tweedie_holds() {
        let oracle = Gaussian::new(vec![0.5, -1.0], vec![0.3, 2.0]);
        let p = Point::from_log_snr(0.0, 0.9);
        let x = Tensor::new(&[[0.2, 1.0], [-0.7, 0.1f64]], &Device::Cpu).unwrap();
        let slope =
            crate::tensor::gradient(&x, |x| Ok(oracle.log_density(x, &p)?.sum_all()?)).unwrap();
        let score = oracle.score(&x, &p).unwrap();
        let worst = |a: &Tensor, b: &Tensor| {
            (a - b)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        assert!(worst(&slope, &score) < 1e-13);
        let tweedie =
            crate::tensor::lincomb(1.0 / p.alpha, &x, p.sigma.powi(2) / p.alpha, &score).unwrap();
        assert!(worst(&tweedie, &oracle.x0(&x, &p).unwrap()) < 1e-13);
    }

    #[test]
    fn the_density_integrates_to_one() {
        let oracle = Gaussian::new(vec![0.5], vec![0.3]);
        let p = Point::new(0.0, 0.8, 0.6);
        let grid: Vec<f64> = (0..4001).map(|i| -10.0 + 0.005 * f64::from(i)).collect();
        let x = Tensor::new(grid, &Device::Cpu)
            .unwrap()
            .unsqueeze(1)
            .unwrap();
        let total = oracle
            .log_density(&x, &p)
            .unwrap()
            .exp()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!((total * 0.005 - 1.0).abs() < 1e-10);
    }

    #[test]
    fn the_flow_keeps_the_quantile() {
        let oracle = Gaussian::new(vec![0.5], vec![0.3]);
        let (a, b) = (
            Point::from_log_snr(0.0, -3.0),
            Point::from_log_snr(0.0, 4.0),
        );
        let x = Tensor::new(&[[0.9f64]], &Device::Cpu).unwrap();
        let y = oracle.flow(&x, &a, &b).unwrap();
        let z = |x: &Tensor, p: &Point| {
            let v = x.to_vec2::<f64>().unwrap()[0][0];
            (v - p.alpha * 0.5) / ((p.alpha * 0.3).powi(2) + p.sigma.powi(2)).sqrt()
        };
        assert!((z(&x, &a) - z(&y, &b)).abs() < 1e-14);
    }
}
