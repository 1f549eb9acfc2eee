//! A Gaussian, or a small mixture of them, fitted to noisy samples: where a truncated chain may start
//! without a generator.

use super::partial::Start;
use crate::error::{Report, Result};
use crate::noise::Noise;
use crate::schedule::Point;
use candle_core::{DType, Device, Tensor};
use diffusion_ops::rng::Key;
use std::ops::Range;

/// Variances below this are held up: a component must not fall on one sample.
const LEAST_VARIANCE: f64 = 1e-6;

/// `Σ_k w_k N(m_k, diag(v_k))` over flat samples.
#[derive(Clone, Debug, PartialEq)]
pub struct MixtureFit {
    weight: Vec<f64>,
    mean: Vec<Vec<f64>>,
    variance: Vec<Vec<f64>>,
}

impl MixtureFit {
    /// The mixture of `k` components that fits `samples`, `[N, …]`, by `rounds` of expectation
    /// maximisation (Dempster, Laird and Rubin 1977); with one component the Gaussian of their moments.
    ///
    /// ```text
    /// r_nk ∝ w_k N(x_n; m_k, v_k),   w_k = Σ_n r_nk/N,   m_k, v_k: moments weighted by r_nk
    /// ```
    ///
    /// The first means are samples that lie apart: each next one is drawn by its squared distance from
    /// those before (k-means++), from `key`.
    ///
    /// # Errors
    /// `Config` when there are fewer samples than components, or no components.
    pub fn fit(samples: &Tensor, k: usize, rounds: usize, key: Key) -> Result<Self> {
        let rows: Vec<Vec<f64>> = samples
            .flatten_from(1)?
            .to_dtype(DType::F64)?
            .to_device(&Device::Cpu)?
            .to_vec2()?;
        if k == 0 || rows.len() < k {
            return Err(
                Report::new("fit", format!("{k} components to {} samples", rows.len()))
                    .expected("at least one component, and as many samples")
                    .config(),
            );
        }
        let all = moments(&rows, &vec![1.0; rows.len()]);
        let mut fit = Self {
            weight: vec![1.0 / k as f64; k],
            mean: spread(&rows, k, key),
            variance: vec![all.1; k],
        };
        if k == 1 {
            fit.mean = vec![all.0];
            return Ok(fit);
        }
        for _ in 0..rounds {
            let mut shares = vec![Vec::with_capacity(rows.len()); k];
            for row in &rows {
                let logs = fit.components(row);
                let total = log_sum_exp(&logs);
                for (share, log) in shares.iter_mut().zip(logs) {
                    share.push((log - total).exp());
                }
            }
            for (i, share) in shares.iter().enumerate() {
                let mass: f64 = share.iter().sum();
                // A component without samples keeps its place.
                if mass > 1e-9 {
                    (fit.mean[i], fit.variance[i]) = moments(&rows, share);
                }
                fit.weight[i] = (mass / rows.len() as f64).max(1e-12);
            }
        }
        Ok(fit)
    }

    /// `ln(w_k N(x; m_k, v_k))` of every component.
    fn components(&self, x: &[f64]) -> Vec<f64> {
        let normal = |m: &[f64], v: &[f64]| -> f64 {
            let terms = x.iter().zip(m.iter().zip(v));
            terms
                .map(|(x, (m, v))| -0.5 * ((x - m).powi(2) / v + (std::f64::consts::TAU * v).ln()))
                .sum()
        };
        self.weight
            .iter()
            .zip(self.mean.iter().zip(&self.variance))
            .map(|(w, (m, v))| w.ln() + normal(m, v))
            .collect()
    }

    /// The log-density at a flat sample, in nats.
    pub fn log_density(&self, x: &[f64]) -> f64 {
        log_sum_exp(&self.components(x))
    }

    /// Weights, means and variances of the components.
    pub fn parameters(&self) -> (&[f64], &[Vec<f64>], &[Vec<f64>]) {
        (&self.weight, &self.mean, &self.variance)
    }
}

impl Start for MixtureFit {
    /// Draws of the mixture: a component by a first normal number of the item, the sample by the others.
    fn draw(
        &self,
        like: &Tensor,
        _: &Point,
        noise: &mut dyn Noise,
        _: Range<u64>,
    ) -> Result<Tensor> {
        let rows = |z: Tensor| -> Result<Vec<Vec<f64>>> {
            let z = z.flatten_from(1)?.to_dtype(DType::F64)?;
            Ok(z.to_device(&Device::Cpu)?.to_vec2()?)
        };
        let choice = rows(noise.normal(&like.flatten_from(1)?.narrow(1, 0, 1)?)?)?;
        let mut values = rows(noise.normal(like)?)?;
        let dim = self.mean.first().map_or(0, Vec::len);
        for (row, choice) in values.iter_mut().zip(choice) {
            if row.len() != dim {
                return Err(
                    Report::new("start", format!("samples of {} values", row.len()))
                        .expected(format!("{dim}, as was fitted"))
                        .config(),
                );
            }
            // Φ of a normal number is uniform.
            let z = choice.first().copied().unwrap_or(0.0);
            let u = 0.5 * libm::erfc(-z / std::f64::consts::SQRT_2);
            let mut so_far = 0.0;
            let last = self.weight.len().saturating_sub(1);
            let found = self.weight.iter().position(|w| {
                so_far += w;
                u < so_far
            });
            let k = found.unwrap_or(last);
            for (x, (m, v)) in row
                .iter_mut()
                .zip(self.mean[k].iter().zip(&self.variance[k]))
            {
                *x = m + v.sqrt() * *x;
            }
        }
        let flat: Vec<f64> = values.into_iter().flatten().collect();
        Ok(Tensor::from_vec(flat, like.shape(), &Device::Cpu)?
            .to_dtype(like.dtype())?
            .to_device(like.device())?)
    }
}

/// Mean and variance of each coordinate, rows weighted.
fn moments(rows: &[Vec<f64>], weight: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mass: f64 = weight.iter().sum();
    let dim = rows.first().map_or(0, Vec::len);
    let (mut mean, mut variance) = (vec![0.0; dim], vec![0.0; dim]);
    for (row, w) in rows.iter().zip(weight) {
        for (m, x) in mean.iter_mut().zip(row) {
            *m += w / mass * x;
        }
    }
    for (row, w) in rows.iter().zip(weight) {
        for ((v, m), x) in variance.iter_mut().zip(&mean).zip(row) {
            *v += w / mass * (x - m).powi(2);
        }
    }
    for v in &mut variance {
        *v = v.max(LEAST_VARIANCE);
    }
    (mean, variance)
}

/// `k` rows that lie apart.
fn spread(rows: &[Vec<f64>], k: usize, key: Key) -> Vec<Vec<f64>> {
    let first = key.below(rows.len() as u64) as usize;
    let mut chosen = vec![rows[first].clone()];
    let apart =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum() };
    let mut nearest: Vec<f64> = rows.iter().map(|row| apart(row, &rows[first])).collect();
    for step in 1..k as u64 {
        let total: f64 = nearest.iter().sum();
        let mut left = total * key.step(step).uniform(1)[0];
        let next = nearest.iter().position(|d| {
            left -= d;
            left < 0.0
        });
        let row = &rows[next.unwrap_or(rows.len() - 1)];
        for (near, other) in nearest.iter_mut().zip(rows) {
            *near = near.min(apart(row, other));
        }
        chosen.push(row.clone());
    }
    chosen
}

fn log_sum_exp(values: &[f64]) -> f64 {
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + values.iter().map(|v| (v - most).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::marginal;
    use crate::noise::CounterNoise;
    use crate::oracle::Mixture;
    use crate::schedule::{Schedule, Vp};
    use crate::tensor::At;
    use diffusion_ops::rng::stream;

    fn truth() -> Mixture {
        Mixture::new(vec![0.3, 0.7], vec![vec![-1.0], vec![1.0]], vec![0.2, 0.1]).unwrap()
    }

    /// Samples of `q(x_t)`.
    fn noisy(p: &Point, n: usize) -> Tensor {
        let x0 = Tensor::new(truth().samples(1, stream::TEST, n), &Device::Cpu).unwrap();
        let z = CounterNoise::new(2, 0..n as u64).normal(&x0).unwrap();
        marginal(&x0, &z, At::All(*p)).unwrap()
    }

    /// `KL(fit ‖ q(x_t))` by quadrature.
    fn divergence(fit: &MixtureFit, p: &Point) -> f64 {
        let step = 0.01;
        let grid: Vec<f64> = (0..1201).map(|i| -6.0 + step * f64::from(i)).collect();
        let x = Tensor::new(grid.clone(), &Device::Cpu)
            .unwrap()
            .unsqueeze(1)
            .unwrap();
        let exact = truth()
            .log_density(&x, p)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        grid.iter()
            .zip(exact)
            .map(|(x, exact)| {
                let log = fit.log_density(&[*x]);
                step * log.exp() * (log - exact)
            })
            .sum()
    }

    /// The later a chain is cut, the better a Gaussian describes it: what a truncated chain lives by.
    #[test]
    fn a_gaussian_fits_better_the_later_the_cut() {
        let key = Key::new(1, stream::TEST);
        let mut before = f64::INFINITY;
        for t in [0.1, 0.2, 0.3, 0.4, 0.5] {
            let p = Vp::default().at(t);
            let fit = MixtureFit::fit(&noisy(&p, 4000), 1, 0, key).unwrap();
            let kl = divergence(&fit, &p);
            assert!(kl > 0.0 && kl < before, "{t}: {kl} {before}");
            before = kl;
        }
        assert!(before < 0.02, "{before}");
    }

    #[test]
    fn two_components_find_two_modes() {
        let key = Key::new(1, stream::TEST);
        let p = Vp::default().at(0.1);
        let samples = noisy(&p, 4000);
        let one = MixtureFit::fit(&samples, 1, 0, key).unwrap();
        let two = MixtureFit::fit(&samples, 2, 40, key).unwrap();
        let (a, b) = (divergence(&one, &p), divergence(&two, &p));
        assert!(b < 5e-3 && b < 0.05 * a, "{a} {b}");
        let (weight, mean, variance) = two.parameters();
        let low = usize::from(mean[0][0] > mean[1][0]);
        // Four standard errors of a share, and of a mean.
        assert!((weight[low] - 0.3).abs() < 4.0 * (0.21f64 / 4000.0).sqrt() + 0.01);
        let v = (0.2 * p.alpha).powi(2) + p.sigma.powi(2);
        assert!((mean[low][0] + p.alpha).abs() < 4.0 * (v / 1200.0).sqrt() + 0.01);
        assert!((variance[low][0] / v - 1.0).abs() < 4.0 * (2.0 / 1200.0f64).sqrt() + 0.05);
    }

    #[test]
    fn draws_have_the_moments_of_the_fit_and_belong_to_their_items() {
        let fit = MixtureFit {
            weight: vec![0.25, 0.75],
            mean: vec![vec![-1.0, 0.0], vec![1.0, 2.0]],
            variance: vec![vec![0.04, 0.01], vec![0.09, 0.25]],
        };
        let p = Vp::default().at(0.5);
        let draw = |items: Range<u64>| {
            let n = (items.end - items.start) as usize;
            let like = Tensor::zeros((n, 1, 2), DType::F64, &Device::Cpu).unwrap();
            let mut noise = CounterNoise::new(4, items.clone());
            let x = fit.draw(&like, &p, &mut noise, items).unwrap();
            assert_eq!(x.dims(), [n, 1, 2]);
            x.flatten_from(1).unwrap().to_vec2::<f64>().unwrap()
        };
        let all = draw(0..8000);
        assert_eq!(draw(17..18)[0], all[17]);
        let low = all.iter().filter(|x| x[0] < 0.0).count() as f64 / 8000.0;
        assert!(
            (low - 0.25).abs() < 4.0 * (0.1875f64 / 8000.0).sqrt(),
            "{low}"
        );
        let mean = all.iter().map(|x| x[1]).sum::<f64>() / 8000.0;
        let var = 0.25 * 0.01 + 0.75 * 0.25 + 0.1875 * 4.0;
        assert!(
            (mean - 1.5).abs() < 4.0 * (var / 8000.0f64).sqrt(),
            "{mean}"
        );
        let like = Tensor::zeros((1, 3), DType::F64, &Device::Cpu).unwrap();
        assert!(
            fit.draw(&like, &p, &mut CounterNoise::new(4, 0..1), 0..1)
                .is_err()
        );
        let few = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        assert!(MixtureFit::fit(&few, 3, 5, Key::new(1, stream::TEST)).is_err());
    }
}
