//! The bound that likelihood-weighted score matching trains (Song, Durkan, Murray and Ermon 2021,
//! "Maximum likelihood training of score-based diffusion models", theorem 3; Huang, Lim and Courville
//! 2021, "A variational perspective on diffusion-based generative models", the CT-ELBO).
//!
//! For one datum `x`, with `x_t = α x + σ z`:
//!
//! ```text
//! −log p(x) ≤ E[−log π(x_T)] + ∫_ε^T E[h_t] dt + E[−log p(x|x_ε)] − H[q(x_ε|x)]
//!
//! h_t = ½ g² (‖s + z/σ‖² − ‖z/σ‖²) − f D         by denoising
//! h_t = ½ g² ‖s‖² + g² div s − f D               implicitly: the same in expectation over z
//! ```
//!
//! The last two terms keep the bound valid though the process starts at `ε`: `p(x|x_ε)` is normal
//! around `x̂₀(x_ε)` with the variance `σ²/α²`. Without them the sum bounds the density of `x_ε`; for the
//! exact score and the exact law at the end in the place of `π` it is an equality, for every `x`.

use super::divergence::{Probe, score_and_divergence};
use super::normal_log_density;
use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::forward::marginal;
use crate::schedule::{Point, SharedSchedule};
use crate::tensor::{At, Coef, combine};
use candle_core::{DType, Tensor};
use diffusion_ops::rng::Key;

/// The bound of a process between two times.
#[derive(Clone)]
pub struct ScoreFlow {
    /// The process.
    pub schedule: SharedSchedule,
    /// `ε`.
    pub start: f64,
    /// `T`.
    pub end: f64,
    /// Deviation of the prior.
    pub prior_std: f64,
}

impl ScoreFlow {
    /// The bound over the whole span of a process.
    pub fn new(schedule: SharedSchedule) -> Self {
        let (start, end) = schedule.span();
        let last = schedule.at(end);
        Self {
            prior_std: if last.alpha < 1.0 { 1.0 } else { last.sigma },
            schedule,
            start,
            end,
        }
    }

    /// `h_t` by denoising, `[B]`, differentiable in the network's weights where the call is tracked.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn denoising(
        &self,
        denoiser: &dyn Denoiser,
        x0: &Tensor,
        z: &Tensor,
        points: &[Point],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let at = At::Each(points);
        let x_t = marginal(x0, z, at)?;
        let score = denoiser.predict(&x_t, at, call)?.score(&x_t, at)?;
        let noise = at.coef(|p| 1.0 / p.sigma);
        let error = combine(&Coef::All(1.0), &score, &noise, z)?;
        let squares = sum_per_item(&error.sqr()?)?;
        let floor = sum_per_item(&noise.times(z)?.sqr()?)?;
        let half = self.rates(points, |r| 0.5 * r.g2);
        let diffusion = combine(&half, &squares, &negated(&half), &floor)?;
        self.without_drift(&diffusion, x0, points)
    }

    /// `h_t` implicitly, `[B]`: for evaluation, the divergence has no further gradient.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn implicit(
        &self,
        denoiser: &dyn Denoiser,
        x0: &Tensor,
        z: &Tensor,
        points: &[Point],
        probe: &Probe,
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let at = At::Each(points);
        let x_t = marginal(x0, z, at)?;
        let (score, divergence) = score_and_divergence(denoiser, &x_t, at, probe, call)?;
        let squares = sum_per_item(&score.sqr()?)?;
        let diffusion = combine(
            &self.rates(points, |r| 0.5 * r.g2),
            &squares,
            &self.rates(points, |r| r.g2),
            &divergence.to_dtype(squares.dtype())?,
        )?;
        self.without_drift(&diffusion, x0, points)
    }

    /// `−log π(x_T)` for given noise, `[B]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn prior(&self, x0: &Tensor, z: &Tensor) -> Result<Tensor> {
        let x_t = marginal(x0, z, At::All(self.schedule.at(self.end)))?;
        Ok(normal_log_density(&x_t, self.prior_std)?.neg()?)
    }

    /// `−log p(x|x_ε) − H[q(x_ε|x)]` for given noise, `[B]`.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn truncation(
        &self,
        denoiser: &dyn Denoiser,
        x0: &Tensor,
        z: &Tensor,
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let p = self.schedule.at(self.start);
        let x_t = marginal(x0, z, At::All(p))?;
        let guess = denoiser
            .predict(&x_t, At::All(p), call)?
            .x0(&x_t, At::All(p))?;
        let decoder = normal_log_density(&(x0 - guess)?, p.sigma / p.alpha)?;
        let entropy =
            0.5 * dims(x0) as f64 * (1.0 + (std::f64::consts::TAU * p.sigma * p.sigma).ln());
        Ok(decoder.affine(-1.0, -entropy)?)
    }

    /// `Z = ∫ g²/σ² dt`, the normaliser of [`TimeLaw::Likelihood`](crate::loss::TimeLaw): minus the
    /// change of the log-SNR.
    pub fn normaliser(&self) -> f64 {
        self.schedule.at(self.start).log_snr() - self.schedule.at(self.end).log_snr()
    }

    /// One unbiased estimate of the bound in nats an item, `[B]` (f64): times drawn with
    /// `p(t) ∝ g²/σ²`, one `z` for all terms.
    ///
    /// # Errors
    /// Whatever the model refuses.
    pub fn estimate(
        &self,
        denoiser: &dyn Denoiser,
        x0: &Tensor,
        keys: impl IntoIterator<Item = Key>,
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let (low, high) = (
            self.schedule.at(self.start).log_snr(),
            self.schedule.at(self.end).log_snr(),
        );
        let points: Vec<Point> = keys
            .into_iter()
            .map(|key| {
                let u = key.uniform(1).first().copied().unwrap_or(0.5);
                self.schedule.at_log_snr(low + u * (high - low))
            })
            .collect();
        let z = call.noise.normal(x0)?;
        let h = self.denoising(denoiser, x0, &z, &points, call)?;
        let importance: Vec<f64> = points
            .iter()
            .map(|p| self.normaliser() * p.sigma.powi(2) / self.schedule.rates(p.t).g2)
            .collect();
        let diffusion = Coef::Each(importance).times(&h.to_dtype(DType::F64)?)?;
        let ends = (self.prior(x0, &z)? + self.truncation(denoiser, x0, &z, call)?)?;
        Ok((diffusion + ends)?)
    }

    /// `d − f D`.
    fn without_drift(&self, diffusion: &Tensor, x0: &Tensor, points: &[Point]) -> Result<Tensor> {
        let d = dims(x0) as f64;
        combine(
            &Coef::All(1.0),
            diffusion,
            &self.rates(points, |r| -r.d_log_alpha * d),
            &diffusion.ones_like()?,
        )
    }

    fn rates(&self, points: &[Point], f: impl Fn(&crate::schedule::Rates) -> f64) -> Coef {
        Coef::Each(
            points
                .iter()
                .map(|p| f(&self.schedule.rates(p.t)))
                .collect(),
        )
    }
}

fn negated(coef: &Coef) -> Coef {
    match coef {
        Coef::All(c) => Coef::All(-c),
        Coef::Each(c) => Coef::Each(c.iter().map(|c| -c).collect()),
    }
}

fn dims(x: &Tensor) -> usize {
    x.dims().iter().skip(1).product()
}

fn sum_per_item(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(1)?.sum(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::schedule::{SubVp, Ve, Vp};
    use candle_core::Device;
    use diffusion_ops::rng::stream;
    use std::sync::Arc;

    fn bounds() -> Vec<ScoreFlow> {
        let ve = Ve {
            sigma_min: 0.01,
            sigma_max: 10.0,
        };
        let mut all: Vec<ScoreFlow> = vec![
            ScoreFlow::new(Arc::new(Vp::default())),
            ScoreFlow::new(Arc::new(SubVp::default())),
            ScoreFlow::new(Arc::new(ve)),
        ];
        all[1].start = 1e-2;
        all
    }

    fn column(values: Vec<f64>) -> Tensor {
        Tensor::new(values, &Device::Cpu)
            .unwrap()
            .unsqueeze(1)
            .unwrap()
    }

    fn called<T>(n: usize, f: impl FnOnce(&mut Call<'_>) -> Result<T>) -> T {
        let mut noise = CounterNoise::new(3, 0..n as u64);
        f(&mut Call {
            noise: &mut noise,
            items: 0..n as u64,
            tracked: false,
        })
        .unwrap()
    }

    /// Expectation over z of a quadratic, exactly: three nodes of Gauss and Hermite.
    const NODES: [(f64, f64); 3] = [
        (-1.732_050_807_568_877_2, 1.0 / 6.0),
        (0.0, 2.0 / 3.0),
        (1.732_050_807_568_877_2, 1.0 / 6.0),
    ];

    /// `∫ E[h] dt` for Gaussian data at one x by Simpson's rule in ln t.
    fn integral(bound: &ScoreFlow, oracle: &Gaussian, x: f64, implicit: bool) -> f64 {
        let n = 1000;
        let (a, b) = (bound.start.max(1e-9).ln(), bound.end.ln());
        let mut total = 0.0;
        let times: Vec<f64> = (0..=n)
            .map(|i| (a + (b - a) * f64::from(i) / f64::from(n)).exp())
            .collect();
        let points: Vec<Point> = times.iter().map(|t| bound.schedule.at(*t)).collect();
        for (z, weight) in NODES {
            let (x0, z) = (column(vec![x; points.len()]), column(vec![z; points.len()]));
            let h = called(points.len(), |call| {
                if implicit {
                    bound.implicit(oracle, &x0, &z, &points, &Probe::Exact, call)
                } else {
                    bound.denoising(oracle, &x0, &z, &points, call)
                }
            });
            for (i, h) in h.to_vec1::<f64>().unwrap().iter().enumerate() {
                let simpson = match i {
                    0 => 1.0,
                    i if i == n as usize => 1.0,
                    i if i % 2 == 1 => 4.0,
                    _ => 2.0,
                };
                total += weight * simpson * h * times[i] * (b - a) / f64::from(n) / 3.0;
            }
        }
        total
    }

    /// For the exact score, and the exact law at the end, the bound is an equality for every x.
    #[test]
    fn equality_for_the_exact_score() {
        let oracle = Gaussian::new(vec![0.3], vec![0.6]);
        for mut bound in bounds() {
            // The start of VE at t = 0 has no logarithm.
            bound.start = bound.start.max(1e-3);
            for x in [0.1, -1.2] {
                let average = |p: Point| -> f64 {
                    NODES
                        .iter()
                        .map(|(z, w)| {
                            let x = column(vec![p.alpha * x + p.sigma * z]);
                            let log = oracle.log_density(&x, &p).unwrap();
                            w * log.to_vec1::<f64>().unwrap()[0]
                        })
                        .sum()
                };
                let exact = -average(bound.schedule.at(bound.start));
                let end = -average(bound.schedule.at(bound.end));
                for implicit in [false, true] {
                    let ours = end + integral(&bound, &oracle, x, implicit);
                    assert!((ours - exact).abs() < 1e-6, "{implicit}: {ours} {exact}");
                }
            }
        }
    }

    /// The whole bound, truncation included, lies above −log p(x), and close to it.
    #[test]
    fn the_estimate_is_a_bound_with_truncation() {
        let (n, x) = (20_000, 0.4);
        let oracle = Gaussian::new(vec![0.3], vec![0.6]);
        for bound in bounds() {
            let x0 = column(vec![x; n]);
            let keys = (0..n as u64).map(|i| Key::new(5, stream::TEST).item(i));
            let e = called(n, |call| bound.estimate(&oracle, &x0, keys, call));
            let e = e.to_vec1::<f64>().unwrap();
            let mean = e.iter().sum::<f64>() / n as f64;
            let var = e.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let error = 4.0 * (var / n as f64).sqrt();
            let truth = oracle
                .log_density(&column(vec![x]), &Point::data(0.0))
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()[0];
            // The gap: the decoder's, and that between the prior and the law at the end.
            assert!(mean > -truth - error, "{mean} {truth} {error}");
            assert!(mean < -truth + 0.06 + error, "{mean} {truth} {error}");
        }
    }

    #[test]
    fn normalisers_of_the_paper() {
        let vp = |t_min| Vp {
            t_min,
            ..Vp::default()
        };
        let z = |s: SharedSchedule| ScoreFlow::new(s).normaliser();
        assert!((z(Arc::new(vp(1e-5))) - 23.86).abs() < 0.01);
        assert!((z(Arc::new(SubVp(vp(1e-5)))) - 37.68).abs() < 0.01);
    }
}
