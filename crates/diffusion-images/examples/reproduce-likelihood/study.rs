//! What is trained and measured, a job a system and seed.
//!
//! | system | learns | measured |
//! |---|---|---|
//! | L_simple | linear, cosine | the bound for every variance and K (linear); the flow (linear) |
//! | L_hybrid, L_vlb | cosine, learned variance | the bound; for every variance and K (hybrid) |
//! | VDM | ends fixed, learned, free; Fourier features or none | L_∞ and L_T |
//! | score matching | σ², g², g² with importance sampling | the SDE's bound, the flow, the chain's bound |
//!
//! A quick training is 0.3 M weights on 2000 batches of 128, 0.5 TFLOP; the tables of K are 5000 network calls
//! on 200 images, 0.6 TFLOP.

use crate::data::Digits;
use crate::measure;
use crate::train::{ChainLoss, Effort, Learns, STEPS, Shape, System, Trained, train};
use anyhow::Result;
use candle_core::Tensor;
use diffusion_core::loss::{TimeLaw, Weight};
use diffusion_core::schedule::Schedule;
use diffusion_images::likelihood::{ReverseVariance, Spread};
use std::time::Instant;

pub const SIMPLE: &str = "L_simple, linear";
pub const COSINE: &str = "L_simple, cosine";
pub const HYBRID: &str = "L_hybrid, cosine";
pub const BOUND: &str = "L_vlb, cosine, steps by importance";
pub const VDM: &str = "VDM, learned ends, Fourier features";
pub const VDM_PLAIN: &str = "VDM, learned ends";
pub const VDM_FIXED: &str = "VDM, fixed ends, Fourier features";
pub const VDM_FREE: &str = "VDM, free schedule";
pub const SIGMA2: &str = "score matching, weight σ²";
pub const G2: &str = "score matching, weight g²";
pub const G2_IS: &str = "score matching, weight g², importance sampling";

/// Numbers of steps of the tables.
pub const COUNTS: [usize; 5] = [10, 25, 50, 100, STEPS];

const FEATURES: &[u32] = &[2, 3];

const fn chain(name: &'static str, cosine: bool, loss: ChainLoss) -> System {
    System {
        name,
        learns: Learns::Chain { cosine, loss },
        fourier: &[],
    }
}

const fn vdm(name: &'static str, shape: Shape, fourier: &'static [u32]) -> System {
    System {
        name,
        learns: Learns::Vdm(shape),
        fourier,
    }
}

const fn flow(name: &'static str, weight: Weight, time: TimeLaw) -> System {
    System {
        name,
        learns: Learns::Flow { weight, time },
        fourier: &[],
    }
}

/// All systems, with the number of seeds of a quick run.
pub const SYSTEMS: [(System, usize); 11] = [
    (chain(SIMPLE, false, ChainLoss::Simple), 3),
    (chain(COSINE, true, ChainLoss::Simple), 3),
    (chain(HYBRID, true, ChainLoss::Hybrid), 3),
    (chain(BOUND, true, ChainLoss::Bound), 3),
    (vdm(VDM, Shape::Ends, FEATURES), 3),
    (vdm(VDM_PLAIN, Shape::Ends, &[]), 3),
    (vdm(VDM_FIXED, Shape::Fixed, FEATURES), 3),
    (vdm(VDM_FREE, Shape::Free, &[]), 1),
    (flow(SIGMA2, Weight::Simple, TimeLaw::Uniform), 3),
    (flow(G2, Weight::Likelihood, TimeLaw::Uniform), 3),
    (flow(G2_IS, Weight::Simple, TimeLaw::Likelihood), 3),
];

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    pub effort: Effort,
    /// Held-out images, and training images for the moments.
    pub images: usize,
    /// Draws of random times an image.
    pub rounds: u64,
}

/// A number of one seed.
#[derive(Clone, Debug)]
pub struct Measured {
    pub system: &'static str,
    pub metric: String,
    pub seed: u64,
    pub bits: Spread,
    pub seconds: f64,
}

/// Everything of one job.
pub struct Outcome {
    pub measured: Vec<Measured>,
    /// Terms of the bound at T steps by index, of systems that have them.
    pub terms: Option<(&'static str, Vec<f64>)>,
    /// `(t, γ)` of VDM's schedule.
    pub gamma: Option<(&'static str, Vec<(f64, f64)>)>,
    pub seed: u64,
}

/// The metric of a bound.
pub fn bound_metric(count: usize, variance: &str) -> String {
    format!("bits/dim, bound of {count} steps, {variance} variance")
}

pub const SMALL: &str = "fixed small";
pub const LARGE: &str = "fixed large";
pub const LEARNED: &str = "learned";
pub const ANALYTIC: &str = "analytic";
pub const RESIDUAL: &str = "analytic by the residual";
pub const OPTIMAL: &str = "analytic by the residual, optimal trajectory";
pub const CONTINUOUS: &str = "bits/dim, bound in continuous time";
pub const FLOW: &str = "bits/dim, probability flow, uniform dequantisation";
pub const SDE: &str = "bits/dim, bound of the SDE, uniform dequantisation";
pub const PROCESS: &str = "bits/dim, bound of 200 steps of the process, fixed large variance";

/// `L_T` of VDM.
pub fn vdm_metric(steps: usize) -> String {
    format!("bits/dim, bound of T = {steps} steps")
}

/// Trains a system with one seed and measures it.
pub fn run(system: &System, amount: Amount, digits: &Digits, seed: u64) -> Result<Outcome> {
    let trained = train(system, amount.effort, &digits.train, seed)?;
    let test = digits.test.narrow(0, 0, amount.images)?;
    let mut job = Job {
        system,
        trained: &trained,
        test,
        amount,
        outcome: Outcome {
            measured: Vec::new(),
            terms: None,
            gamma: None,
            seed,
        },
    };
    match system.learns {
        Learns::Chain { .. } => job.chain(&digits.train)?,
        Learns::Vdm(_) => job.vdm()?,
        Learns::Flow { .. } => job.flow()?,
    }
    Ok(job.outcome)
}

struct Job<'a> {
    system: &'a System,
    trained: &'a Trained,
    test: Tensor,
    amount: Amount,
    outcome: Outcome,
}

impl Job<'_> {
    fn note(&mut self, metric: impl Into<String>, bits: Spread) {
        self.outcome.measured.push(Measured {
            system: self.system.name,
            metric: metric.into(),
            seed: self.outcome.seed,
            bits,
            seconds: self.trained.seconds,
        });
    }

    /// The number of parts without an error of their own.
    fn note_plain(&mut self, metric: impl Into<String>, value: f64) {
        self.note(
            metric,
            Spread {
                mean: value,
                error: 0.0,
            },
        );
    }

    fn chain(&mut self, train: &Tensor) -> Result<()> {
        let table = self.system.table()?;
        let (net, seed) = (self.trained.denoiser(), self.outcome.seed);
        let test = self.test.clone();
        let main = if self.trained.variance {
            (LEARNED, ReverseVariance::Learned)
        } else {
            (LARGE, ReverseVariance::Large)
        };
        let whole = self.system.name == SIMPLE || self.system.name == HYBRID;
        let few = train.narrow(0, 0, self.amount.images)?;
        let (moments, residual) = match whole {
            true => (
                measure::moments(&net, &table, &few, seed)?,
                measure::residual_moments(&net, &table, &few, seed)?,
            ),
            false => (Vec::new(), Vec::new()),
        };
        let mut rules = vec![main];
        if whole {
            rules.push((SMALL, ReverseVariance::Small));
            rules.push((ANALYTIC, ReverseVariance::Analytic));
            if main.0 == LEARNED {
                rules.push((LARGE, ReverseVariance::Large));
            }
        }
        for count in COUNTS {
            if !whole && count != STEPS {
                continue;
            }
            let kept = measure::steps(&table, count, None)?;
            for (name, reverse) in &rules {
                let bound = measure::bound(&net, &table, &kept, (*reverse, &moments), &test, seed)?;
                self.note(bound_metric(count, name), measure::total(&bound)?);
                if count == STEPS && *name == main.0 {
                    self.parts(&bound)?;
                }
            }
            if !whole {
                continue;
            }
            let optimal = measure::steps(&table, count, Some(&residual))?;
            for (name, kept) in [(RESIDUAL, &kept), (OPTIMAL, &optimal)] {
                if count != STEPS || name == RESIDUAL {
                    let how = (ReverseVariance::Analytic, &residual[..]);
                    let bound = measure::bound(&net, &table, kept, how, &test, seed)?;
                    self.note(bound_metric(count, name), measure::total(&bound)?);
                }
            }
        }
        if self.system.name == SIMPLE {
            let bits = measure::flow(&net, &test, seed)?;
            self.note(FLOW, bits);
        }
        Ok(())
    }

    /// The parts of the whole bound.
    fn parts(&mut self, bound: &diffusion_core::likelihood::Bound) -> Result<()> {
        let mean = |t: &Tensor| -> Result<f64> { Ok(f64::from(t.mean_all()?.to_scalar::<f32>()?)) };
        let terms: Vec<f32> = bound.terms.mean(0)?.to_vec1()?;
        let terms: Vec<f64> = terms.into_iter().map(f64::from).collect();
        self.note_plain("bits/dim, of which the prior", mean(&bound.prior)?);
        self.note_plain("bits/dim, of which the decoder", terms[0]);
        for (low, high) in [(1, 9), (10, 99), (100, STEPS - 1)] {
            let sum = terms[low..=high].iter().sum();
            self.note_plain(format!("bits/dim, of which indices {low} to {high}"), sum);
        }
        self.outcome.terms = Some((self.system.name, terms));
        Ok(())
    }

    fn vdm(&mut self) -> Result<()> {
        let Some(gamma) = &self.trained.gamma else {
            return Ok(());
        };
        let (seed, rounds) = (self.outcome.seed, self.amount.rounds);
        let test = self.test.clone();
        let [total, reconstruction, prior, diffusion] =
            measure::vdm(self.trained, gamma, None, rounds, &test, seed)?;
        self.note_plain(CONTINUOUS, total);
        self.note_plain("bits/dim, of which the reconstruction", reconstruction);
        self.note_plain("bits/dim, of which the prior", prior);
        self.note_plain("bits/dim, of which the diffusion", diffusion);
        for steps in [10, 100, 1000] {
            let all = measure::vdm(self.trained, gamma, Some(steps), rounds, &test, seed)?;
            self.note_plain(vdm_metric(steps), all[0]);
        }
        let frozen = gamma.schedule().freeze()?;
        let (low, high) = frozen.span();
        let points = (0..=100).map(|i| low + (high - low) * f64::from(i) / 100.0);
        let curve = points.map(|t| (t, frozen.gamma(t).0)).collect();
        self.outcome.gamma = Some((self.system.name, curve));
        Ok(())
    }

    fn flow(&mut self) -> Result<()> {
        let (net, seed) = (self.trained.denoiser(), self.outcome.seed);
        let test = self.test.clone();
        let rounds = self.amount.rounds;
        self.note(SDE, measure::score_flow(&net, &test, rounds, seed)?);
        let bits = measure::flow(&net, &test, seed)?;
        self.note(FLOW, bits);
        let bound = measure::bound_of_process(&net, 200, &test, seed)?;
        self.note(PROCESS, measure::total(&bound)?);
        Ok(())
    }
}

/// About how long a job takes, in any unit.
pub fn cost(system: &System) -> f64 {
    match system.learns {
        Learns::Chain { .. } if system.name == SIMPLE || system.name == HYBRID => 2.5,
        Learns::Vdm(Shape::Free) => 2.0,
        Learns::Vdm(_) if !system.fourier.is_empty() => 1.8,
        _ => 1.2,
    }
}

/// Says on standard error that a job is done.
pub fn done(system: &System, seed: u64, start: Instant) {
    eprintln!(
        "{:5.0} s  {} (seed {seed})",
        start.elapsed().as_secs_f64(),
        system.name
    );
}
