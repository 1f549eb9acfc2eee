//! Langevin dynamics at one noise level: the correctors of predictor-corrector samplers (Song et al.
//! 2021, algorithms 4 and 5), and NCSN's annealed sampler (Song and Ermon 2019, algorithm 1), which
//! has nothing else.
//!
//! ```text
//! x ← x + e s(x) + √(2e) z
//! ```
//!
//! `e` is small against the square of the noise level; the rules differ in how it is chosen.

use super::{Corrector, Ctx, Move, Planned, Step};
use crate::error::Result;
use crate::schedule::Point;
use crate::sde::Discretisation;
use crate::tensor::{At, Coef, combine};
use candle_core::{DType, Tensor};

/// Over what the norms of noise and score are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norms {
    /// Each item by itself: its result does not depend on the rest of the batch.
    #[default]
    PerItem,
    /// The mean of the items' norms, one step size for the batch (the authors' code).
    BatchMean,
}

/// How the step size is chosen.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StepSize {
    /// `e = 2 a (r ‖z‖/‖s‖)²`: a fixed ratio `r` of signal to noise.
    SignalToNoise {
        /// `r`, about 0.16.
        ratio: f64,
        /// Over what the norms are taken.
        norms: Norms,
    },
    /// `e = 2 a (r σ_t)²` (annealed Langevin dynamics).
    NoiseLevel {
        /// `r`.
        ratio: f64,
    },
    /// `e = ½ step σ²/σ_last²` (NCSN's schedule).
    Annealed {
        /// The step at the least noisy level, 2e-5 in the paper.
        step: f64,
        /// The least noisy level.
        sigma_last: f64,
    },
}

/// The corrector.
#[derive(Clone)]
pub struct Langevin {
    /// How the step size is chosen.
    pub size: StepSize,
    /// Steps a correction, `M`.
    pub steps: usize,
    /// The chain whose `a_i = 1 − β_i` scales the steps at a time; 1 without one, and for VE.
    pub chain: Option<Discretisation>,
}

impl Langevin {
    /// One step a correction at a fixed ratio of signal to noise, item by item.
    pub fn new(ratio: f64) -> Self {
        Self {
            size: StepSize::SignalToNoise {
                ratio,
                norms: Norms::PerItem,
            },
            steps: 1,
            chain: None,
        }
    }

    /// The step sizes `e` of a batch whose scores and noise these are.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn sizes(&self, score: &Tensor, z: &Tensor, at: At<'_>) -> Result<Coef> {
        let factor = |p: &Point| match &self.chain {
            Some(chain) => chain.kernel(p.t).alpha.powi(2),
            None => 1.0,
        };
        match self.size {
            StepSize::NoiseLevel { ratio } => {
                Ok(at.coef(|p| 2.0 * factor(p) * (ratio * p.sigma).powi(2)))
            }
            StepSize::Annealed { step, sigma_last } => {
                Ok(at.coef(|p| 0.5 * step * (p.sigma / sigma_last).powi(2)))
            }
            StepSize::SignalToNoise { ratio, norms } => {
                let (noise, signal) = (row_norms(z)?, row_norms(score)?);
                let ratios: Vec<f64> = match norms {
                    Norms::PerItem => noise.iter().zip(&signal).map(|(n, s)| n / s).collect(),
                    Norms::BatchMean => {
                        let total: f64 = noise.iter().sum();
                        vec![total / signal.iter().sum::<f64>(); noise.len()]
                    }
                };
                let points = at.points(ratios.len());
                Ok(Coef::Each(
                    points
                        .iter()
                        .zip(ratios)
                        .map(|(p, q)| 2.0 * factor(p) * (ratio * q).powi(2))
                        .collect(),
                ))
            }
        }
    }
}

/// One step of Langevin dynamics: its mean `x + e s`, and the sample `x + e s + √(2e) z`.
///
/// # Errors
/// When shapes differ.
pub fn langevin_step(
    x: &Tensor,
    score: &Tensor,
    z: &Tensor,
    sizes: &Coef,
) -> Result<(Tensor, Tensor)> {
    let mean = combine(&Coef::All(1.0), x, sizes, score)?;
    let root = match sizes {
        Coef::All(e) => Coef::All((2.0 * e).sqrt()),
        Coef::Each(e) => Coef::Each(e.iter().map(|e| (2.0 * e).sqrt()).collect()),
    };
    let next = combine(&Coef::All(1.0), &mean, &root, z)?;
    Ok((mean, next))
}

/// The Euclidean norm of every row.
fn row_norms(x: &Tensor) -> Result<Vec<f64>> {
    let squares = x.to_dtype(DType::F64)?.flatten_from(1)?.sqr()?.sum(1)?;
    Ok(squares.sqrt()?.to_vec1()?)
}

impl Corrector for Langevin {
    fn correct(&self, x: &Tensor, at: &Point, ctx: &mut Ctx<'_>) -> Result<Tensor> {
        let mut x = x.clone();
        for _ in 0..self.steps {
            let score = ctx.denoise(&x, at)?.score(&x, At::All(*at))?;
            let z = ctx.noise.normal(&x)?;
            let sizes = self.sizes(&score, &z, At::All(*at))?;
            x = langevin_step(&x, &score, &z, &sizes)?.1.detach();
        }
        Ok(x)
    }
}

/// The moves of a predictor-corrector sampler along points: at each of them a correction, then a
/// step to the next (Song et al. 2021, algorithm 1, in the order of the authors' code).
pub fn predictor_corrector(points: &[Point]) -> Vec<Move> {
    points
        .windows(2)
        .flat_map(|w| [Move::Correct(w[0]), Move::Denoise(w[0], w[1])])
        .collect()
}

/// NCSN's annealed Langevin sampler: `inner` steps at every level, noisiest first, and `last` from
/// the least noisy level to the data.
pub fn annealed_langevin<S: Step>(
    levels: &[Point],
    step: f64,
    inner: usize,
    last: S,
) -> Planned<S> {
    let mut moves: Vec<Move> = levels.iter().copied().map(Move::Correct).collect();
    let mut sigma_last = 1.0;
    if let Some(level) = levels.last() {
        moves.push(Move::Denoise(*level, Point::data(0.0)));
        sigma_last = level.sigma;
    }
    let mut plan = Planned::with_moves(last, moves);
    plan.corrector = Some(Box::new(Langevin {
        size: StepSize::Annealed { step, sigma_last },
        steps: inner,
        chain: None,
    }));
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::Gaussian;
    use crate::sample::{Euler, ReverseDiffusion, sample};
    use crate::schedule::linear::linspace;
    use crate::schedule::{Schedule, Ve};
    use candle_core::Device;

    fn moments(x: &Tensor) -> (f64, f64) {
        let v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let n = v.len() as f64;
        let mean = v.iter().sum::<f64>() / n;
        (mean, v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / n)
    }

    /// The stationary variance of Langevin dynamics with a fixed step on a normal law of variance S
    /// is S/(1 − e/(2S)): exactly what the corrector must settle at.
    #[test]
    fn settles_at_the_law_of_the_level() {
        let n = 20_000;
        let at = Point::new(0.3, 1.0, 0.5);
        let oracle = Gaussian::new(vec![0.2; n], vec![0.4; n]);
        let corrector = Langevin {
            size: StepSize::NoiseLevel { ratio: 0.3 },
            steps: 40,
            chain: None,
        };
        let mut noise = CounterNoise::new(7, 0..1);
        let x = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
        let mut ctx = Ctx::new(&oracle, &mut noise, 0..1);
        let (mean, var) = moments(&corrector.correct(&x, &at, &mut ctx).unwrap());
        let (s, e) = (0.16 + 0.25, 2.0 * (0.3f64 * 0.5).powi(2));
        let gain = (1.0 - e / s).powi(40);
        let exact = s / (1.0 - 0.5 * e / s) * (1.0 - gain * gain);
        let exact_mean = 0.2 * (1.0 - gain);
        assert_eq!(ctx.calls, 40);
        assert!(
            (mean - exact_mean).abs() < 4.0 * (exact / n as f64).sqrt(),
            "{mean}"
        );
        assert!(
            (var / exact - 1.0).abs() < 4.0 * (2.0 / n as f64).sqrt(),
            "{var}"
        );
    }

    #[test]
    fn norms_by_item_do_not_see_the_batch() {
        let score = Tensor::new(&[[3.0, 4.0], [0.3, 0.4f64]], &Device::Cpu).unwrap();
        let z = Tensor::new(&[[1.0, 0.0], [0.0, 2.0f64]], &Device::Cpu).unwrap();
        let at = At::All(Point::new(0.3, 1.0, 0.5));
        let sizes = |norms| {
            Langevin {
                size: StepSize::SignalToNoise { ratio: 0.1, norms },
                ..Langevin::new(0.1)
            }
            .sizes(&score, &z, at)
            .unwrap()
        };
        let close = |coef: Coef, exact: [f64; 2]| {
            let Coef::Each(e) = coef else {
                panic!("{coef:?}")
            };
            assert!(
                e.iter()
                    .zip(exact)
                    .all(|(a, b)| (a / b - 1.0).abs() < 1e-12)
            );
        };
        close(
            sizes(Norms::PerItem),
            [2.0 * 0.02f64.powi(2), 2.0 * 0.4f64.powi(2)],
        );
        let mean = 2.0 * (0.1f64 * 3.0 / 5.5).powi(2);
        close(sizes(Norms::BatchMean), [mean, mean]);
    }

    #[test]
    fn annealed_dynamics_sample_the_data() {
        let n = 10_000;
        let oracle = Gaussian::new(vec![1.0; n], vec![0.5; n]);
        let levels: Vec<Point> = linspace(5f64.ln(), 0.05f64.ln(), 20)
            .into_iter()
            .map(|l| Point::new(l.exp(), 1.0, l.exp()))
            .collect();
        // At the last level the step is small against 0.5²: e = 0.1 · 0.05²/2.
        let plan = annealed_langevin(&levels, 0.2 * 0.05f64.powi(2), 25, Euler::default());
        let mut noise = CounterNoise::new(7, 0..1);
        let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
        let x = noise.normal(&like).unwrap().affine(5.0, 0.0).unwrap();
        let x = sample(&plan, &oracle, x, &mut noise, 0..1).unwrap();
        let (mean, var) = moments(&x);
        assert!((mean - 1.0).abs() < 0.1, "{mean}");
        assert!((var / 0.25 - 1.0).abs() < 0.15, "{var}");
    }

    /// Two correctors a step bring a coarse predictor closer to the law.
    #[test]
    fn corrections_improve_a_coarse_predictor() {
        let n = 400;
        let ve = Ve {
            sigma_min: 0.01,
            sigma_max: 10.0,
        };
        let oracle = Gaussian::new(vec![0.5; n], vec![0.7; n]);
        let points: Vec<Point> = linspace(1.0, 0.3, 8)
            .into_iter()
            .map(|t| ve.at(t))
            .collect();
        let end = points[7];
        let exact = 0.49 + end.sigma.powi(2);
        let run = |moves: Vec<Move>| {
            let mut plan = Planned::with_moves(ReverseDiffusion::default(), moves);
            plan.corrector = Some(Box::new(Langevin {
                steps: 8,
                ..Langevin::new(0.3)
            }));
            let mut noise = CounterNoise::new(7, 0..50);
            let like = Tensor::zeros((50, n), DType::F64, &Device::Cpu).unwrap();
            let x = noise.normal(&like).unwrap().affine(10.0, 0.5).unwrap();
            let x = sample(&plan, &oracle, x, &mut noise, 0..50).unwrap();
            (moments(&x).1 / exact - 1.0).abs()
        };
        let mut moves = predictor_corrector(&points);
        assert_eq!(moves.len(), 14);
        moves.push(Move::Correct(end));
        let plain: Vec<Move> = moves
            .iter()
            .copied()
            .filter(|m| matches!(m, Move::Denoise(..)))
            .collect();
        let (with, without) = (run(moves), run(plain));
        assert!(with < 0.5 * without, "{with} {without}");
    }

    #[test]
    fn an_item_has_the_same_bits_in_any_batch() {
        let oracle = Gaussian::new(vec![0.1, -0.2], vec![0.5, 0.1]);
        let ve = Ve::default();
        let points: Vec<Point> = linspace(1.0, 0.1, 5)
            .into_iter()
            .map(|t| ve.at(t))
            .collect();
        let x = Tensor::new(&[[12.0, -3.0], [-40.0, 2.0], [1.0, 7.0f64]], &Device::Cpu).unwrap();
        let run = |from: u64, n: u64| {
            let mut plan =
                Planned::with_moves(ReverseDiffusion::default(), predictor_corrector(&points));
            plan.corrector = Some(Box::new(Langevin::new(0.16)));
            let mut noise = CounterNoise::new(0, from..from + n);
            let x = x.narrow(0, from as usize, n as usize).unwrap();
            let y = sample(&plan, &oracle, x, &mut noise, from..from + n).unwrap();
            y.to_vec2::<f64>().unwrap()
        };
        let all = run(0, 3);
        for i in 0..3 {
            assert_eq!(run(i, 1)[0], all[i as usize]);
        }
    }
}
