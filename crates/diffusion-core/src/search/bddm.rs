//! Bilateral denoising diffusion (BDDM; Lam, Wang, Su and Yu 2022): a second network that says, looking
//! at a noisy sample, how large the next step may be.
//!
//! In this file `a = √ᾱ` is the signal level, as in the paper, and `β̂` a beta of the short schedule.

use crate::denoiser::Denoiser;
use crate::error::{Report, Result};
use crate::noise::Noise;
use crate::sample::{Ancestral, Ctx, Step};
use crate::schedule::Point;
use crate::tensor::Coef;
use candle_core::Tensor;
use std::ops::Range;

/// What a beta may be at most (eq. 13): the short schedule must not have more noise left than the long
/// one, nor take a larger step than `τ` of its.
///
/// ```text
/// bound = min(1 − a_t², 1 − a_{t+τ}²/a_t²)
/// ```
pub fn training_bound(a: f64, a_later: f64) -> f64 {
    (1.0 - a * a).min(1.0 - (a_later / a).powi(2)).max(0.0)
}

/// How the logarithm in the step loss counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogTerm {
    /// Once for every dimension, as the authors' code has it and as the bound of the paper means it.
    #[default]
    PerDimension,
    /// Once for the whole sample, as the paper prints it.
    Once,
}

/// The loss of the schedule network for every item, `[B]` (algorithm 2).
///
/// ```text
/// δ = 1 − a²,    β̂ = bound · σ_φ(x)
/// L = δ/(2(δ − β̂)) ‖ε − (β̂/δ) ε_θ(x, a)‖² + ¼ ln(δ/β̂) [· D] + (D/2)(β̂/δ − 1)
/// ```
///
/// It is differentiable in the ratio `σ_φ`; the score network is frozen. With an exact `ε_θ` its
/// expectation is the logarithm alone: the best step is then the bound.
///
/// # Shapes
/// `ratio` `[B]` in (0, 1); `epsilon` and `predicted` `[B, …]`; one signal level and one bound an item.
///
/// # Errors
/// `Config` for levels that are not within (0, 1) or bounds above `δ`; when shapes differ.
pub fn step_loss(
    ratio: &Tensor,
    epsilon: &Tensor,
    predicted: &Tensor,
    levels: &[f64],
    bounds: &[f64],
    log: LogTerm,
) -> Result<Tensor> {
    let batch = epsilon.dim(0)?;
    let sound = levels
        .iter()
        .zip(bounds)
        .all(|(a, b)| *a > 0.0 && *a < 1.0 && *b > 0.0 && *b <= (1.0 - a * a) * (1.0 + 1e-9));
    if !sound || levels.len() != batch || bounds.len() != batch {
        return Err(Report::new(
            "schedule network",
            format!(
                "{} levels, {} bounds, a batch of {batch}",
                levels.len(),
                bounds.len()
            ),
        )
        .expected("one of each an item, levels within (0, 1), bounds within (0, 1 − a²]")
        .config());
    }
    let dim = (epsilon.elem_count() / batch.max(1)) as f64;
    let share: Vec<f64> = levels
        .iter()
        .zip(bounds)
        .map(|(a, b)| b / (1.0 - a * a))
        .collect();
    // q = β̂/δ. A ratio that rounds to 1 at a bound of δ would divide by zero.
    let q = Coef::Each(share).times(ratio)?.clamp(1e-12, 1.0 - 1e-6)?;
    let column = q.reshape(
        std::iter::once(batch)
            .chain(std::iter::repeat_n(1, epsilon.rank() - 1))
            .collect::<Vec<usize>>(),
    )?;
    let error = (epsilon - predicted.detach().broadcast_mul(&column)?)?;
    let square = error.sqr()?.flatten_from(1)?.sum(1)?;
    let distance = (square / q.affine(-2.0, 2.0)?)?;
    let times = match log {
        LogTerm::PerDimension => dim,
        LogTerm::Once => 1.0,
    };
    let logarithm = q.log()?.affine(-0.25 * times, 0.0)?;
    Ok(((distance + logarithm)? + q.affine(0.5 * dim, -0.5 * dim)?)?)
}

/// The long schedule that the score network was trained on, as signal levels.
#[derive(Clone, Debug, PartialEq)]
pub struct LongSchedule {
    betas: Vec<f64>,
    levels: Vec<f64>,
}

impl LongSchedule {
    /// The schedule of these betas, the cleanest step first.
    ///
    /// # Errors
    /// `Config` when there are fewer than two, or one is not within (0, 1).
    pub fn new(betas: Vec<f64>) -> Result<Self> {
        if betas.len() < 2 || betas.iter().any(|b| !(*b > 0.0 && *b < 1.0)) {
            return Err(Report::new("betas", format!("{} of them", betas.len()))
                .expected("at least two, each above 0 and below 1")
                .config());
        }
        let mut a = 1.0f64;
        let levels = betas
            .iter()
            .map(|b| {
                a *= (1.0 - b).sqrt();
                a
            })
            .collect();
        Ok(Self { betas, levels })
    }

    /// `a_t` of every step.
    pub fn levels(&self) -> &[f64] {
        &self.levels
    }

    /// The step, mostly fractional, at which the signal has this level: linear in `a` between steps,
    /// the ends beyond them.
    pub fn time(&self, a: f64) -> f64 {
        let after = self.levels.partition_point(|level| *level > a);
        match (
            after.checked_sub(1).map(|i| self.levels[i]),
            self.levels.get(after),
        ) {
            (Some(high), Some(low)) => (after - 1) as f64 + (high - a) / (high - low),
            (None, _) => 0.0,
            (_, None) => (self.levels.len() - 1) as f64,
        }
    }

    /// The point of this level.
    pub fn point(&self, a: f64) -> Point {
        Point::new(self.time(a), a, (1.0 - a * a).max(0.0).sqrt())
    }
}

/// A noise schedule made from the noisiest step down by looking at the samples (algorithm 3).
///
/// ```text
/// for n = N, N−1, …, 2:
///     x_{n−1} ~ p_θ(x_{n−1} | x_n) with (a_n, β̂_n)
///     a_{n−1} = a_n/√(1 − β̂_n)
///     β̂_{n−1} = min(β̂_n, 1 − a_{n−1}²) σ_φ(x_{n−1}),    stop below β₁ of the long schedule
/// ```
///
/// The betas rise strictly from the cleanest step up, and are above 0.
pub struct NoiseScheduler<'a> {
    /// What the score network was trained on.
    pub long: &'a LongSchedule,
    /// The score network, which is told the fractional step as its time.
    pub denoiser: &'a dyn Denoiser,
    /// `σ_φ` of a batch, one number within (0, 1).
    pub ratio: &'a dyn Fn(&Tensor) -> Result<f64>,
    /// Most steps of the schedule.
    pub most: usize,
}

impl NoiseScheduler<'_> {
    /// The betas, the cleanest step first, that begin at the signal level `a` and the beta `beta` of the
    /// noisiest step, given `x`, `[B, …]`, there; `None` when these two do not fit each other.
    ///
    /// # Errors
    /// `Numeric` when the ratio is not within (0, 1); whatever the network refuses.
    pub fn schedule(
        &self,
        x: &Tensor,
        (a, beta): (f64, f64),
        noise: &mut dyn Noise,
        items: Range<u64>,
    ) -> Result<Option<Vec<f64>>> {
        let fits = a > 0.0 && beta > 0.0 && beta < 1.0 && a <= (1.0 - beta).sqrt();
        if !fits {
            return Ok(None);
        }
        let first = self.long.betas.first().copied().unwrap_or(0.0);
        let (mut a, mut x) = (a, x.clone());
        let mut betas = vec![beta];
        let mut beta = beta;
        while betas.len() < self.most {
            let before = a / (1.0 - beta).sqrt();
            if before >= 1.0 {
                break;
            }
            let mut ctx = Ctx::new(self.denoiser, noise, items.clone());
            let (from, to) = (self.long.point(a), self.long.point(before));
            x = Ancestral::default()
                .step(&x, &from, &to, &mut ctx, &mut ())?
                .detach();
            let ratio = (self.ratio)(&x)?;
            if !(ratio > 0.0 && ratio < 1.0) {
                return Err(Report::new("schedule network", ratio)
                    .expected("a number within (0, 1)")
                    .remedy("end the network in a sigmoid, and check its weights")
                    .numeric());
            }
            let next = beta.min(1.0 - before * before) * ratio;
            if next < first || next >= beta {
                break;
            }
            (a, beta) = (before, next);
            betas.push(beta);
        }
        betas.reverse();
        Ok(Some(betas))
    }

    /// Schedules from a grid of beginnings, `n` levels between those of the long schedule's ends and `n`
    /// betas in tenths, scored; the best of each length, shortest first, least score first of equals.
    ///
    /// # Errors
    /// Whatever the networks and the score refuse.
    pub fn search(
        &self,
        x: &Tensor,
        n: usize,
        noise: &mut dyn Noise,
        items: Range<u64>,
        mut score: impl FnMut(&[f64]) -> Result<f64>,
    ) -> Result<Vec<(f64, Vec<f64>)>> {
        let ends = (self.long.levels.last(), self.long.levels.first());
        let (Some(low), Some(high)) = ends else {
            return Ok(Vec::new());
        };
        let mut best: std::collections::BTreeMap<usize, (f64, Vec<f64>)> = Default::default();
        for i in 1..=n {
            let part = i as f64 / (n + 1) as f64;
            let a = low + (high - low) * part;
            for j in 1..=n {
                let beta = j as f64 / (n + 1) as f64;
                let mut noise = noise.child((i * (n + 1) + j) as u64);
                let found = self.schedule(x, (a, beta), &mut *noise, items.clone())?;
                let Some(betas) = found else { continue };
                let value = score(&betas)?;
                let slot = best
                    .entry(betas.len())
                    .or_insert((f64::INFINITY, Vec::new()));
                if value < slot.0 {
                    *slot = (value, betas);
                }
            }
        }
        Ok(best.into_values().filter(|(s, _)| s.is_finite()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::oracle::gradcheck::gradcheck;
    use crate::schedule::BetaSchedule;
    use candle_core::{DType, Device};

    fn long() -> LongSchedule {
        let table = BetaSchedule::Linear {
            start: 1e-4,
            end: 0.02,
        };
        LongSchedule::new(table.table(200).unwrap().betas().to_vec()).unwrap()
    }

    fn normal(n: usize, dim: usize) -> Tensor {
        let like = Tensor::zeros((n, dim), DType::F64, &Device::Cpu).unwrap();
        CounterNoise::new(3, 0..n as u64).normal(&like).unwrap()
    }

    #[test]
    fn levels_and_their_fractional_steps() {
        let long = long();
        let table = BetaSchedule::Linear {
            start: 1e-4,
            end: 0.02,
        }
        .table(200)
        .unwrap();
        for t in [0usize, 1, 77, 199] {
            assert!((long.levels()[t].powi(2) - table.alpha_bar()[t]).abs() < 1e-14);
            assert!((long.time(long.levels()[t]) - t as f64).abs() < 1e-9);
        }
        let middle = 0.25 * long.levels()[10] + 0.75 * long.levels()[11];
        assert!((long.time(middle) - 10.75).abs() < 1e-9);
        assert_eq!((long.time(1.0), long.time(0.0)), (0.0, 199.0));
        assert!(LongSchedule::new(vec![0.1]).is_err());
        assert!(LongSchedule::new(vec![0.1, 1.0]).is_err());
        let (a, later) = (long.levels()[50], long.levels()[116]);
        assert_eq!(
            training_bound(a, later),
            (1.0 - a * a).min(1.0 - (later / a).powi(2))
        );
    }

    /// With an exact score the expectation of the loss is the logarithm, so it falls up to the bound; the
    /// loss as the formula has it, and its gradient.
    #[test]
    fn an_exact_score_makes_the_bound_the_best_step() {
        let (n, dim, a, bound) = (400, 16, 0.8f64, 0.2f64);
        let delta = 1.0 - a * a;
        let epsilon = normal(n, dim);
        let value = |ratio: f64| {
            let ratio = Tensor::full(ratio, n, &Device::Cpu).unwrap();
            let loss = step_loss(
                &ratio,
                &epsilon,
                &epsilon,
                &vec![a; n],
                &vec![bound; n],
                LogTerm::PerDimension,
            );
            loss.unwrap()
                .mean_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let mut before = f64::INFINITY;
        for ratio in [0.1, 0.3, 0.5, 0.7, 0.9, 0.999] {
            let q = bound * ratio / delta;
            let exact = -0.25 * dim as f64 * q.ln();
            // (δ − β̂)/(2δ) ‖ε‖² + (D/2)(β̂/δ − 1) has mean 0 and this deviation.
            let error = 0.5 * (1.0 - q) * (2.0 * dim as f64 / n as f64).sqrt();
            assert!(
                (value(ratio) - exact).abs() < 4.0 * error,
                "{ratio}: {} {exact}",
                value(ratio)
            );
            assert!(value(ratio) < before);
            before = value(ratio);
        }
        let (epsilon, said) = (normal(3, 4), normal(6, 2).reshape((3, 4)).unwrap());
        let ratio = Tensor::new(&[0.2, 0.5, 0.9f64], &Device::Cpu).unwrap();
        let (levels, bounds) = ([0.8, 0.6, 0.9], [0.2, 0.3, 0.15]);
        for log in [LogTerm::Once, LogTerm::PerDimension] {
            let of = |r: &Tensor| step_loss(r, &epsilon, &said, &levels, &bounds, log);
            let losses = of(&ratio).unwrap().to_vec1::<f64>().unwrap();
            for i in 0..3 {
                let (delta, beta) = (1.0 - levels[i] * levels[i], bounds[i] * [0.2, 0.5, 0.9][i]);
                let (e, s) = (epsilon.get(i).unwrap(), said.get(i).unwrap());
                let (e, s) = (e.to_vec1::<f64>().unwrap(), s.to_vec1::<f64>().unwrap());
                let square: f64 = e
                    .iter()
                    .zip(&s)
                    .map(|(e, s)| (e - beta / delta * s).powi(2))
                    .sum();
                let times = if log == LogTerm::Once { 1.0 } else { 4.0 };
                let exact = delta / (2.0 * (delta - beta)) * square
                    + 0.25 * times * (delta / beta).ln()
                    + 2.0 * (beta / delta - 1.0);
                assert!(
                    (losses[i] / exact - 1.0).abs() < 1e-12,
                    "{} {exact}",
                    losses[i]
                );
            }
            assert!(gradcheck(&ratio, |r| Ok(of(r)?.sum_all()?)).unwrap() < 1e-7);
        }
        let bad = step_loss(&ratio, &epsilon, &said, &levels, &[0.5; 3], LogTerm::Once);
        assert!(bad.is_err());
    }

    /// Whatever the schedule network says, betas rise within (0, 1) and the signal stays below 1.
    #[test]
    fn schedules_rise_and_keep_their_signal() {
        let long = long();
        let data = Gaussian::new(vec![0.3; 2], vec![0.5; 2]);
        let x = normal(4, 2);
        let mut lengths = std::collections::BTreeSet::new();
        for ratio in [0.05, 0.4, 0.8, 0.999] {
            let says = |_: &Tensor| Ok(ratio);
            let scheduler = NoiseScheduler {
                long: &long,
                denoiser: &data,
                ratio: &says,
                most: 12,
            };
            let mut noise = CounterNoise::new(1, 0..4);
            let found = scheduler
                .search(&x, 4, &mut noise, 0..4, |betas| {
                    assert!(betas.iter().all(|b| *b > 0.0 && *b < 1.0), "{betas:?}");
                    assert!(betas.windows(2).all(|w| w[0] < w[1]), "{betas:?}");
                    Ok(betas.iter().sum())
                })
                .unwrap();
            assert!(!found.is_empty());
            for (score, betas) in found {
                assert!((score - betas.iter().sum::<f64>()).abs() < 1e-15);
                lengths.insert(betas.len());
            }
            let begin = (0.9, 0.5);
            let none = scheduler.schedule(&x, begin, &mut noise, 0..4).unwrap();
            assert_eq!(none, None, "more noise in one step than there is");
            let some = scheduler
                .schedule(&x, (0.4, 0.5), &mut noise, 0..4)
                .unwrap()
                .unwrap();
            let signal: f64 = some.iter().rev().fold(0.4, |a, b| a / (1.0 - b).sqrt());
            assert!(
                (0.4 / (0.5f64).sqrt()..=1.0 + 1e-12).contains(&signal),
                "{signal}"
            );
        }
        assert!(lengths.len() > 3, "{lengths:?}");
        let wrong = |_: &Tensor| Ok(1.0);
        let scheduler = NoiseScheduler {
            long: &long,
            denoiser: &data,
            ratio: &wrong,
            most: 12,
        };
        let mut noise = CounterNoise::new(1, 0..4);
        assert!(
            scheduler
                .schedule(&x, (0.4, 0.5), &mut noise, 0..4)
                .is_err()
        );
    }
}
