//! `log p` by the probability flow (Song et al. 2021, section 4.3 and appendix D.2).
//!
//! ```text
//! log p_ε(x_ε) = log π(x_T) + ∫_ε^T div v(x_t, t) dt,   v = f x − ½ g² s,   dx/dt = v from x_ε
//! ```
//!
//! `div v = f D − ½ g² div s`; a probe stands for the whole Jacobian of `v`, so that `D` becomes `v·v`, which
//! differs for normal probes (the authors' code). What is measured is the law of the flow that starts from the prior `π`, at
//! time `ε`; no correction for the noise that is left there is part of it.

use super::divergence::{Divergence, Probe, score_and_divergence};
use super::normal_log_density;
use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::ode::{Control, DormandPrince};
use crate::schedule::{Point, SharedSchedule};
use crate::tensor::At;
use candle_core::{DType, Device, Tensor};

/// The method.
#[derive(Clone)]
pub struct OdeLikelihood {
    /// The process.
    pub schedule: SharedSchedule,
    /// Where the data is taken to stand, 1e-5 in the paper.
    pub start: f64,
    /// Where the prior stands.
    pub end: f64,
    /// Deviation of the prior: 1 for VP and sub-VP, `σ_max` for VE.
    pub prior_std: f64,
    /// How the divergence is found; a probe is kept over the trajectory.
    pub divergence: Divergence,
    /// The solver and its tolerances.
    pub solver: DormandPrince,
}

/// What came out, an entry an item.
#[derive(Clone, Debug)]
pub struct OdeSolution {
    /// `log π(x_T) + change` in nats.
    pub log_density: Vec<f64>,
    /// `∫ div v dt` in nats.
    pub change: Vec<f64>,
    /// `x_T`, f64, shaped as the data.
    pub latent: Tensor,
    /// Evaluations of the right-hand side.
    pub evaluations: usize,
}

impl OdeLikelihood {
    /// From `start` to the end of a process, with its noise level there as the prior's deviation.
    pub fn new(schedule: SharedSchedule, start: f64) -> Self {
        let end = schedule.span().1;
        let last = schedule.at(end);
        Self {
            // VP ends a hair below 1; its prior is the standard normal law.
            prior_std: if last.alpha < 1.0 { 1.0 } else { last.sigma },
            schedule,
            start,
            end,
            divergence: Divergence::default(),
            solver: DormandPrince::default(),
        }
    }

    /// The log-density of every item of `x`, `[B, …]`; the probe is drawn from the call's noise.
    ///
    /// # Errors
    /// Those of the solver, and whatever the model refuses.
    pub fn log_density(
        &self,
        denoiser: &dyn Denoiser,
        x: &Tensor,
        call: &mut Call<'_>,
    ) -> Result<OdeSolution> {
        let probe = self.divergence.probe(x, call.noise)?;
        self.with_probe(denoiser, x, &probe, call)
    }

    /// As [`OdeLikelihood::log_density`] with a given probe.
    ///
    /// # Errors
    /// As there.
    pub fn with_probe(
        &self,
        denoiser: &dyn Denoiser,
        x: &Tensor,
        probe: &Probe,
        call: &mut Call<'_>,
    ) -> Result<OdeSolution> {
        let like = x.to_dtype(DType::F64)?;
        let rows = x.dim(0)?;
        let dims: usize = x.dims().iter().skip(1).product();
        // A row is the item and the integral so far.
        let mut y = Vec::with_capacity(rows * (dims + 1));
        let data: Vec<f64> = like.flatten_all()?.to_vec1()?;
        for row in data.chunks(dims.max(1)) {
            y.extend_from_slice(row);
            y.push(0.0);
        }
        let identity = probe.identity(rows, dims)?;
        let mut flow = |t: &[f64], y: &[f64]| -> Result<Vec<f64>> {
            let x = states(y, dims, &like)?;
            let points: Vec<Point> = t.iter().map(|t| self.schedule.at(*t)).collect();
            let at = match (self.solver.control, points.first()) {
                (Control::Whole, Some(p)) => At::All(*p),
                _ => At::Each(&points),
            };
            let (score, divergence) = score_and_divergence(denoiser, &x, at, probe, call)?;
            let score: Vec<f64> = score.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
            let divergence: Vec<f64> = divergence.to_vec1()?;
            let mut out = Vec::with_capacity(y.len());
            let rows = y.chunks(dims + 1).zip(score.chunks(dims.max(1)));
            let traces = divergence.into_iter().zip(&identity);
            for (((row, score), (div, one)), t) in rows.zip(traces).zip(t) {
                let r = self.schedule.rates(*t);
                let velocity = row.iter().zip(score);
                out.extend(velocity.map(|(x, s)| r.d_log_alpha * x - 0.5 * r.g2 * s));
                out.push(r.d_log_alpha * one - 0.5 * r.g2 * div);
            }
            Ok(out)
        };
        let solution = self
            .solver
            .solve(&mut flow, rows, &y, (self.start, self.end))?;
        let change: Vec<f64> = solution
            .y
            .chunks(dims + 1)
            .filter_map(|row| row.last().copied())
            .collect();
        let latent = states(&solution.y, dims, &like)?;
        let prior: Vec<f64> = normal_log_density(&latent, self.prior_std)?.to_vec1()?;
        Ok(OdeSolution {
            log_density: prior.iter().zip(&change).map(|(p, c)| p + c).collect(),
            change,
            latent,
            evaluations: solution.evaluations,
        })
    }
}

/// The items of the rows of a state, without the integrals.
fn states(y: &[f64], dims: usize, like: &Tensor) -> Result<Tensor> {
    let x: Vec<f64> = y
        .chunks(dims + 1)
        .flat_map(|row| row.iter().take(dims).copied())
        .collect();
    Ok(Tensor::from_vec(x, like.shape(), &Device::Cpu)?.to_device(like.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::{Gaussian, Mixture};
    use crate::schedule::{SubVp, Ve, Vp};
    use std::sync::Arc;

    fn schedules() -> [(SharedSchedule, f64); 3] {
        let ve = Ve {
            sigma_min: 0.01,
            sigma_max: 10.0,
        };
        [
            (Arc::new(Vp::default()), 1e-3),
            (Arc::new(SubVp::default()), 1e-2),
            (Arc::new(ve), 1e-5),
        ]
    }

    fn run(method: &OdeLikelihood, model: &dyn Denoiser, x: &Tensor, seed: u64) -> OdeSolution {
        let n = x.dim(0).unwrap() as u64;
        let mut noise = CounterNoise::new(seed, 0..n);
        let mut call = Call {
            noise: &mut noise,
            items: 0..n,
            tracked: false,
        };
        method.log_density(model, x, &mut call).unwrap()
    }

    /// With the exact law at the end in the place of the prior the density is exact, to 1e-4 nats a
    /// dimension, for every process.
    #[test]
    fn exact_densities_of_oracles() {
        let gaussian = Gaussian::new(vec![0.3, -0.5], vec![0.6, 0.9]);
        let mixture = Mixture::new(
            vec![0.4, 0.6],
            vec![vec![-1.0, 0.3], vec![0.8, -0.4]],
            vec![0.4, 0.6],
        )
        .unwrap();
        type Law<'a> = &'a dyn Fn(&Tensor, &Point) -> Result<Tensor>;
        let laws: [(&dyn Denoiser, Law<'_>); 2] = [
            (&gaussian, &|x, p| gaussian.log_density(x, p)),
            (&mixture, &|x, p| mixture.log_density(x, p)),
        ];
        let x = Tensor::new(&[[0.2, 0.4], [-0.9, 0.0f64]], &Device::Cpu).unwrap();
        for (schedule, start) in schedules() {
            for (model, law) in laws {
                let method = OdeLikelihood {
                    divergence: Divergence::Exact,
                    ..OdeLikelihood::new(schedule.clone(), start)
                };
                let out = run(&method, model, &x, 0);
                let exact: Vec<f64> = law(&x, &schedule.at(start)).unwrap().to_vec1().unwrap();
                let end: Vec<f64> = law(&out.latent, &schedule.at(1.0))
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                for ((c, e), exact) in out.change.iter().zip(end).zip(exact) {
                    assert!((c + e - exact).abs() < 2e-4, "{} {exact}", c + e);
                }
            }
        }
    }

    #[test]
    fn probes_are_unbiased_over_trajectories() {
        let n = 120;
        let mixture = Mixture::new(
            vec![0.4, 0.6],
            vec![vec![-1.0, 0.3], vec![0.8, -0.4]],
            vec![0.4, 0.6],
        )
        .unwrap();
        let one = Tensor::new(&[[0.2, 0.4f64]], &Device::Cpu).unwrap();
        let mut method = OdeLikelihood::new(Arc::new(Vp::default()), 0.05);
        method.divergence = Divergence::Exact;
        let exact = run(&method, &mixture, &one, 0).log_density[0];
        let x = one.broadcast_as((n, 2)).unwrap().contiguous().unwrap();
        method.divergence = Divergence::Rademacher;
        let all = run(&method, &mixture, &x, 3).log_density;
        let mean = all.iter().sum::<f64>() / n as f64;
        let var = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        let error = 4.0 * (var / n as f64).sqrt() + 1e-4;
        assert!(
            var > 1e-6 && (mean - exact).abs() < error,
            "{mean} {exact} ± {error}"
        );
    }

    #[test]
    fn the_priors_of_the_processes() {
        assert_eq!(
            OdeLikelihood::new(Arc::new(Vp::default()), 1e-5).prior_std,
            1.0
        );
        let ve = OdeLikelihood::new(Arc::new(Ve::default()), 1e-5);
        assert!((ve.prior_std - 50.0).abs() < 1e-9);
    }
}
