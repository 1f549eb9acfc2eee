//! A mixture of isotropic Gaussians.

use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::predict::{Kind, Prediction};
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::{D, Tensor};
use diffusion_ops::rng::Key;

/// `x₀ ~ Σ_k w_k N(m_k, c_k² I)` over flat vectors, `[B, D]`.
///
/// With `S_k = α² c_k² + σ²` and responsibilities `r_k ∝ w_k N(x; α m_k, S_k I)`:
///
/// ```text
/// x₀* = Σ_k r_k (m_k + α c_k² (x − α m_k)/S_k)
/// ```
///
/// `c_k = 0` makes it an empirical distribution: the optimum of any finite training set.
#[derive(Clone, Debug)]
pub struct Mixture {
    weight: Vec<f64>,
    mean: Vec<Vec<f64>>,
    std: Vec<f64>,
}

impl Mixture {
    /// A mixture; the weights are normalised.
    ///
    /// # Errors
    /// `Config` when the lists differ in length or a weight is not positive.
    pub fn new(weight: Vec<f64>, mean: Vec<Vec<f64>>, std: Vec<f64>) -> Result<Self> {
        if weight.is_empty() || weight.len() != mean.len() || mean.len() != std.len() {
            return Err(Report::new(
                "mixture",
                format!(
                    "{} weights, {} means, {} deviations",
                    weight.len(),
                    mean.len(),
                    std.len()
                ),
            )
            .expected("as many of each, at least one")
            .config());
        }
        let total: f64 = weight.iter().sum();
        if weight.iter().any(|w| w.is_nan() || *w <= 0.0)
            || mean.iter().any(|m| m.len() != mean[0].len())
        {
            return Err(Report::new("mixture", "weights or means that do not fit")
                .expected("positive weights and means of one dimension")
                .config());
        }
        Ok(Self {
            weight: weight.into_iter().map(|w| w / total).collect(),
            mean,
            std,
        })
    }

    /// Exact samples of the data, `[n, D]` row by row.
    pub fn samples(&self, seed: u64, stream: u64, n: usize) -> Vec<Vec<f64>> {
        (0..n as u64)
            .map(|item| {
                let key = Key::new(seed, stream).item(item);
                let u = key.uniform(1)[0];
                let mut k = 0;
                let mut cumulative = self.weight[0];
                while u >= cumulative && k + 1 < self.weight.len() {
                    k += 1;
                    cumulative += self.weight[k];
                }
                let z = key.step(1).normal(self.mean[k].len());
                self.mean[k]
                    .iter()
                    .zip(z)
                    .map(|(m, z)| m + self.std[k] * z)
                    .collect()
            })
            .collect()
    }

    fn means(&self, x: &Tensor) -> Result<Tensor> {
        Ok(Tensor::new(self.mean.clone(), &candle_core::Device::Cpu)?
            .to_dtype(x.dtype())?
            .to_device(x.device())?
            .unsqueeze(0)?)
    }

    fn column(&self, x: &Tensor, f: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
        let values: Vec<f64> = self
            .weight
            .iter()
            .zip(&self.std)
            .map(|(w, c)| f(*w, *c))
            .collect();
        Ok(Tensor::new(values, &candle_core::Device::Cpu)?
            .to_dtype(x.dtype())?
            .to_device(x.device())?
            .unsqueeze(0)?)
    }

    /// `ln(w_k N(x; α m_k, S_k I))` `[B, K]` and `x − α m_k` `[B, K, D]`.
    fn components(&self, x: &Tensor, p: &Point) -> Result<(Tensor, Tensor)> {
        let s = |c: f64| (p.alpha * c).powi(2) + p.sigma.powi(2);
        let dim = self.mean[0].len() as f64;
        let centred = x
            .unsqueeze(1)?
            .broadcast_sub(&self.means(x)?.affine(p.alpha, 0.0)?)?;
        let log = centred
            .sqr()?
            .sum(D::Minus1)?
            .broadcast_mul(&self.column(x, |_, c| -0.5 / s(c))?)?
            .broadcast_add(&self.column(x, |w, c| {
                w.ln() - 0.5 * dim * (std::f64::consts::TAU * s(c)).ln()
            })?)?;
        Ok((log, centred))
    }

    /// `log p_t(x)` in nats, `[B]`.
    ///
    /// # Errors
    /// When `x` has another dimension.
    pub fn log_density(&self, x: &Tensor, p: &Point) -> Result<Tensor> {
        Ok(self.components(x, p)?.0.log_sum_exp(D::Minus1)?)
    }

    /// `E[x₀ | x]`, `[B, D]`.
    ///
    /// # Errors
    /// When `x` has another dimension.
    pub fn x0(&self, x: &Tensor, p: &Point) -> Result<Tensor> {
        let (log, centred) = self.components(x, p)?;
        let r = softmax_rows(&log)?.unsqueeze(2)?;
        let gain = self
            .column(x, |_, c| {
                p.alpha * c * c / ((p.alpha * c).powi(2) + p.sigma.powi(2))
            })?
            .unsqueeze(2)?;
        let each = centred
            .broadcast_mul(&gain)?
            .broadcast_add(&self.means(x)?)?;
        Ok(each.broadcast_mul(&r)?.sum(1)?)
    }
}

/// Softmax over the last dimension, by the largest entry.
fn softmax_rows(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

impl Denoiser for Mixture {
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
    use crate::tensor::{gradient, lincomb};
    use candle_core::Device;

    #[test]
    fn two_points_in_one_dimension() {
        // Data ±1: x₀* = tanh(α x/σ²).
        let oracle =
            Mixture::new(vec![1.0, 1.0], vec![vec![-1.0], vec![1.0]], vec![0.0, 0.0]).unwrap();
        let p = Point::from_log_snr(0.0, 0.2);
        let x = Tensor::new(&[[-0.7], [0.1], [2.0f64]], &Device::Cpu).unwrap();
        let ours = oracle
            .x0(&x, &p)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        for (x, y) in [-0.7, 0.1, 2.0].iter().zip(ours) {
            assert!((y - (p.alpha * x / p.sigma.powi(2)).tanh()).abs() < 1e-13);
        }
    }

    #[test]
    fn tweedie_holds() {
        let oracle = Mixture::new(
            vec![0.2, 0.8],
            vec![vec![-1.0, 0.0], vec![1.0, 2.0]],
            vec![0.3, 0.5],
        )
        .unwrap();
        let p = Point::from_log_snr(0.0, -0.5);
        let x = Tensor::new(&[[0.2, 1.0], [-0.7, 0.1f64]], &Device::Cpu).unwrap();
        let score = gradient(&x, |x| Ok(oracle.log_density(x, &p)?.sum_all()?)).unwrap();
        let tweedie = lincomb(1.0 / p.alpha, &x, p.sigma.powi(2) / p.alpha, &score).unwrap();
        let worst = (tweedie - oracle.x0(&x, &p).unwrap())
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap();
        assert!(worst.to_scalar::<f64>().unwrap() < 1e-13);
    }

    #[test]
    fn samples_have_the_right_shares() {
        let oracle =
            Mixture::new(vec![1.0, 3.0], vec![vec![-4.0], vec![4.0]], vec![0.5, 0.5]).unwrap();
        let n = 4000;
        let right = oracle
            .samples(1, 1000, n)
            .iter()
            .filter(|x| x[0] > 0.0)
            .count() as f64
            / n as f64;
        assert!((right - 0.75).abs() < 4.0 * (0.75f64 * 0.25 / n as f64).sqrt());
    }

    #[test]
    fn refuses_a_mixture_that_is_none() {
        assert!(Mixture::new(vec![], vec![], vec![]).is_err());
        assert!(Mixture::new(vec![1.0, -1.0], vec![vec![0.0], vec![1.0]], vec![1.0, 1.0]).is_err());
    }
}
