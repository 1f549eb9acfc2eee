//! The reverse SDE with adaptive steps (Jolicoeur-Martineau et al. 2021, "Gotta go fast when
//! generating data with score-based models", algorithm 1).
//!
//! Every item has its own time and step, and follows its own Brownian path: a rejected step is
//! tried again with the first part of the increment that was there, so that the accept test cannot
//! choose among draws. The authors draw again after a rejection, which widens the law of the samples in
//! low dimensions.

use super::ode::{rows_of, tensor_of};
use super::{Ctx, Finish, Observer, Progress, Solver};
use crate::error::{Error, Report, Result};
use crate::schedule::{Point, SharedSchedule};
use candle_core::{DType, Tensor};

/// An error below this counts as this: the step grows by a finite factor.
const LEAST_ERROR: f64 = 1e-10;

/// The sampler: Euler and Maruyama inside the stochastic improved Euler method.
///
/// ```text
/// x′ = x − h [f x − g² s](x, t) + g(t) ΔW
/// x̃  = x − h [f x − g² s](x′, t − h) + g(t − h) ΔW,   x″ = ½ (x′ + x̃)
/// δ = max(e_abs, e_rel max(|x′|, |x′_prev|)),   E = rms((x′ − x″)/δ)
/// accepted if E ≤ 1: x ← x″;   h ← min(t_left, θ h E^{−r})
/// ```
///
/// The noise of these processes does not depend on `x`, so that Itô's and Stratonovich's readings
/// are one.
#[derive(Clone)]
pub struct AdaptiveSde {
    /// The process.
    pub schedule: SharedSchedule,
    /// Where the samples given to it stand.
    pub start: f64,
    /// Where it stops: 1e-3 for VP, 1e-5 for VE.
    pub end: f64,
    /// `e_rel`, from 0.01 (as good as a thousand steps) to 0.1.
    pub relative: f64,
    /// `e_abs`, one grey level: 2/256 for data in `[−1, 1]`.
    pub absolute: f64,
    /// `θ`, below 1.
    pub safety: f64,
    /// `r`, between ½ and 1.
    pub exponent: f64,
    /// The first step.
    pub first: f64,
    /// What follows at the end.
    pub finish: Finish,
    /// Attempts after which the run is given up.
    pub max_steps: usize,
}

impl AdaptiveSde {
    /// The authors' constants over the whole span of a process.
    pub fn new(schedule: SharedSchedule) -> Self {
        let (end, start) = schedule.span();
        Self {
            schedule,
            start,
            end,
            relative: 0.02,
            absolute: 2.0 / 256.0,
            safety: 0.9,
            exponent: 0.9,
            first: 0.01,
            finish: Finish::Denoised,
            max_steps: 100_000,
        }
    }

    fn check(&self) -> Result<()> {
        let bad = [
            ("start", self.start, self.start > self.end),
            ("relative", self.relative, self.relative >= 0.0),
            ("absolute", self.absolute, self.absolute > 0.0),
            (
                "safety",
                self.safety,
                self.safety > 0.0 && self.safety < 1.0,
            ),
            ("exponent", self.exponent, self.exponent > 0.0),
            ("first", self.first, self.first > 0.0),
        ];
        match bad.iter().find(|(_, _, good)| !good) {
            Some((name, value, _)) => Err(Report::new(format!("adaptive_sde: {name}"), value)
                .expected("a start after the end, tolerances and steps above 0, safety below 1")
                .config()),
            None => Ok(()),
        }
    }

    /// `f x − g² s` for rows that stand at their own times.
    fn drift(&self, x: &[f64], t: &[f64], like: &Tensor, ctx: &mut Ctx<'_>) -> Result<Vec<f64>> {
        let points: Vec<Point> = t.iter().map(|t| self.schedule.at(*t)).collect();
        let tensor = tensor_of(x.to_vec(), like)?;
        let said = ctx.denoise_each(&tensor, &points)?;
        let mut drift = rows_of(&said.score(&tensor, crate::tensor::At::Each(&points))?)?;
        let width = x.len() / t.len().max(1);
        for ((row, x), t) in drift
            .chunks_mut(width.max(1))
            .zip(x.chunks(width.max(1)))
            .zip(t)
        {
            let rates = self.schedule.rates(*t);
            for (d, x) in row.iter_mut().zip(x) {
                *d = rates.d_log_alpha * x - rates.g2 * *d;
            }
        }
        Ok(drift)
    }
}

/// One item on its way.
struct Walk {
    t: f64,
    h: f64,
}

impl Solver for AdaptiveSde {
    fn solve(&self, x: Tensor, ctx: &mut Ctx<'_>, watch: &mut dyn Observer) -> Result<Tensor> {
        self.check()?;
        let dtype = x.dtype();
        let like = x.to_dtype(DType::F64)?;
        let (rows, mut state) = (x.dim(0)?, rows_of(&x)?);
        let width = (state.len() / rows.max(1)).max(1);
        let mut previous = state.clone();
        let mut walks: Vec<Walk> = (0..rows)
            .map(|_| Walk {
                t: self.start,
                h: self.first.min(self.start - self.end),
            })
            .collect();
        let mut attempts = 0;
        while walks.iter().any(|w| w.t > self.end) {
            if attempts == self.max_steps {
                return Err(Report::new("steps of the adaptive sampler", attempts)
                    .expected("the end to be reached within them")
                    .remedy("loosen the tolerances, or raise max_steps")
                    .limit());
            }
            attempts += 1;
            let now: Vec<f64> = walks.iter().map(|w| w.t).collect();
            let then: Vec<f64> = walks
                .iter()
                .map(|w| {
                    if w.h >= w.t - self.end {
                        self.end
                    } else {
                        w.t - w.h
                    }
                })
                .collect();
            let spans: Vec<(f64, f64)> = now.iter().copied().zip(then.iter().copied()).collect();
            let dw = rows_of(&ctx.noise.brownian_each(&like, &spans)?)?;
            let moved = |drift: &[f64], times: &[f64]| -> Vec<f64> {
                let mut out = state.clone();
                for (row, x) in out.chunks_mut(width).enumerate() {
                    let (h, g) = (
                        now[row] - then[row],
                        self.schedule.rates(times[row]).g2.sqrt(),
                    );
                    let at = row * width;
                    for ((x, d), w) in x.iter_mut().zip(&drift[at..]).zip(&dw[at..]) {
                        *x += g * w - h * d;
                    }
                }
                out
            };
            let euler = moved(&self.drift(&state, &now, &like, ctx)?, &now);
            let other = moved(&self.drift(&euler, &then, &like, ctx)?, &then);
            for (row, walk) in walks.iter_mut().enumerate() {
                if walk.t <= self.end {
                    continue;
                }
                let range = row * width..(row + 1) * width;
                let mut sum = 0.0;
                for i in range.clone() {
                    let scale = self.relative * euler[i].abs().max(previous[i].abs());
                    let error = 0.5 * (euler[i] - other[i]) / scale.max(self.absolute);
                    sum += error * error;
                }
                let error = (sum / width as f64).sqrt();
                if !error.is_finite() {
                    return Err(Report::new(
                        format!("adaptive sampler at t = {}", walk.t),
                        "NaN or infinity",
                    )
                    .remedy("check the model's weights, or stop at a noisier time")
                    .numeric());
                }
                let length = walk.t - then[row];
                if error <= 1.0 {
                    for i in range {
                        state[i] = 0.5 * (euler[i] + other[i]);
                        previous[i] = euler[i];
                    }
                    walk.t = then[row];
                }
                walk.h = self.safety * length * error.max(LEAST_ERROR).powf(-self.exponent);
            }
            let behind = walks.iter().map(|w| w.t).fold(self.end, f64::max);
            let x = tensor_of(state.clone(), &like)?;
            let progress = Progress {
                done: attempts,
                total: attempts,
                calls: ctx.calls,
                at: self.schedule.at(behind),
                x: &x,
            };
            if watch.step(&progress).is_break() {
                return Err(Error::Interrupted);
            }
        }
        let at = self.schedule.at(self.end);
        let x = self.finish.apply(tensor_of(state, &like)?, &at, ctx)?;
        Ok(x.to_dtype(dtype)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::Gaussian;
    use crate::sample::sample;
    use crate::schedule::{Schedule, Ve, Vp};
    use candle_core::Device;
    use std::sync::Arc;

    fn solver() -> AdaptiveSde {
        AdaptiveSde {
            finish: Finish::None,
            ..AdaptiveSde::new(Arc::new(Vp::default()))
        }
    }

    /// On one Brownian path the adaptive solution is that of many small steps, rejections or not:
    /// no draw is thrown away.
    #[test]
    fn follows_the_solution_on_its_brownian_path() {
        let (vp, n) = (Vp::default(), 2);
        let oracle = Gaussian::new(vec![0.1, -0.2], vec![0.5, 0.5]);
        let like = Tensor::zeros((n, 2), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(11, 0..n as u64);
        let start = noise.normal(&like).unwrap();
        let tight = AdaptiveSde {
            relative: 1e-4,
            absolute: 2e-3,
            end: 0.05,
            ..solver()
        };
        let mut ctx = Ctx::new(&oracle, &mut noise, 0..n as u64);
        let ours = rows_of(&tight.solve(start.clone(), &mut ctx, &mut ()).unwrap()).unwrap();
        let mut x = start;
        let steps = 1500;
        let dt = (1.0 - 0.05) / f64::from(steps);
        for k in 0..steps {
            let t = 1.0 - f64::from(k) * dt;
            let score = oracle.score(&x, &vp.at(t)).unwrap();
            let rates = vp.rates(t);
            let z = noise.brownian(&like, t, t - dt).unwrap();
            let z = z.affine(dt.sqrt().recip(), 0.0).unwrap();
            x = crate::sde::euler_maruyama(&x, &score, &rates, dt, &z).unwrap();
        }
        for (a, b) in ours.iter().zip(rows_of(&x).unwrap()) {
            assert!((a - b).abs() < 0.02, "{a} {b}");
        }
    }

    #[test]
    fn the_law_of_the_samples_is_that_of_the_data() {
        let (b, d) = (60, 64);
        let oracle = Gaussian::new(vec![0.3; d], vec![0.5; d]);
        let mut noise = CounterNoise::new(5, 0..b as u64);
        let like = Tensor::zeros((b, d), DType::F64, &Device::Cpu).unwrap();
        let x = noise.normal(&like).unwrap();
        let solver = AdaptiveSde {
            relative: 0.1,
            ..solver()
        };
        let x = sample(&solver, &oracle, x, &mut noise, 0..b as u64).unwrap();
        let v = rows_of(&x).unwrap();
        let n = v.len() as f64;
        let mean = v.iter().sum::<f64>() / n;
        let var = v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / n;
        let p = Vp::default().at(1e-3);
        let exact = (p.alpha * 0.5).powi(2) + p.sigma.powi(2);
        assert!(
            (mean - p.alpha * 0.3).abs() < 4.0 * (exact / n).sqrt(),
            "{mean}"
        );
        assert!(
            (var / exact - 1.0).abs() < 4.0 * (2.0 / n).sqrt(),
            "{var} {exact}"
        );
    }

    #[test]
    fn an_item_has_the_same_bits_in_any_batch() {
        let oracle = Gaussian::new(vec![0.1, -0.2], vec![0.5, 0.1]);
        let x = Tensor::new(&[[1.2, -0.3], [-0.4, 2.0], [0.1, 0.0f64]], &Device::Cpu).unwrap();
        let loose = AdaptiveSde {
            relative: 0.5,
            absolute: 0.1,
            ..solver()
        };
        let run = |from: u64, n: u64| {
            let mut noise = CounterNoise::new(0, from..from + n);
            let x = x.narrow(0, from as usize, n as usize).unwrap();
            rows_of(&sample(&loose, &oracle, x, &mut noise, from..from + n).unwrap()).unwrap()
        };
        let all = run(0, 3);
        for i in 0..3 {
            assert_eq!(run(i as u64, 1), all[2 * i..2 * i + 2]);
        }
    }

    /// Without drift both estimates are one: the error is zero, and the second step goes to the end.
    #[test]
    fn a_vanishing_error_does_not_divide_by_zero() {
        let flat = crate::denoiser::from_fn(|x: &Tensor, _: crate::tensor::At<'_>, _: &mut _| {
            use crate::predict::{Kind, Prediction};
            Ok(Prediction::new(Kind::Score, x.zeros_like()?))
        });
        // Levels so close together that g hardly changes.
        let ve = Ve {
            sigma_min: 1.0,
            sigma_max: 1.0 + 1e-9,
        };
        let solver = AdaptiveSde {
            finish: Finish::None,
            ..AdaptiveSde::new(Arc::new(ve))
        };
        let mut noise = CounterNoise::new(0, 0..1);
        let mut ctx = Ctx::new(&flat, &mut noise, 0..1);
        let x = Tensor::new(&[[1.2, -0.3f64]], &Device::Cpu).unwrap();
        let y = solver.solve(x, &mut ctx, &mut ()).unwrap();
        assert_eq!(ctx.calls, 4);
        assert!(rows_of(&y).unwrap().iter().all(|v| v.is_finite()));
    }
}
