//! The systems, and how each of them learns.

use crate::data::{DIMS, LEVELS, Levels, on_scale};
use crate::net::{Mlp, Sizes};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser, LearnedVariance, Network, TimeCode};
use diffusion_core::likelihood::{Decoder, Vlb};
use diffusion_core::loss::vdm::{Vdm, VdmDraw, even_times};
use diffusion_core::loss::{Denoising, Hybrid, HybridLoss, SecondMoment, TimeLaw, Weight};
use diffusion_core::noise::CounterNoise;
use diffusion_core::predict::Kind;
use diffusion_core::sample::{Chain, Variance};
use diffusion_core::schedule::{
    BetaSchedule, LearnedSchedule, LinearGamma, MonotoneGamma, ScalarGamma, Table, Vp,
};
use diffusion_core::tensor::Coef;
use diffusion_core::train::{
    Cancel, EmaRule, Loss, LrSchedule, Objective, Quiet, StepCtx, TrainConfig, Trainer,
};
use diffusion_images::from_nn;
use diffusion_nn::{Init, Scope, Store};
use diffusion_ops::rng::{Key, stream};
use std::sync::Arc;

/// Steps of the tables.
pub const STEPS: usize = 1000;
/// `γ` at the ends of VDM: −13.3 + 2 ln(256/16) keeps the noise of a bin as it is for 256 levels.
pub const GAMMA: (f64, f64) = (-7.75, 5.0);
/// Where the continuous process starts: `σ = 0.0105`, a sixth of half a bin.
pub const START: f64 = 1e-3;
/// Features of the free part of VDM's schedule.
const FEATURES: usize = 64;

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Learns {
    /// A chain of 1000 steps, with a cosine or a linear table.
    Chain { cosine: bool, loss: ChainLoss },
    /// VDM's bound in continuous time.
    Vdm(Shape),
    /// Score matching of the VP process on dequantised levels.
    Flow { weight: Weight, time: TimeLaw },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ChainLoss {
    Simple,
    Hybrid,
    /// The bound itself, steps drawn by importance.
    Bound,
}

/// What of `γ(t)` is learned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Fixed,
    /// A straight line between learned ends.
    Ends,
    /// The ends by the bound, the shape between them by the variance of its estimate.
    Free,
}

/// A system.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct System {
    pub name: &'static str,
    pub learns: Learns,
    pub fourier: &'static [u32],
}

impl System {
    /// The table of a chain.
    pub fn table(&self) -> Result<Table> {
        let cosine = matches!(self.learns, Learns::Chain { cosine: true, .. });
        let betas = match cosine {
            true => BetaSchedule::Cosine,
            false => BetaSchedule::ddpm(STEPS),
        };
        Ok(betas.table(STEPS)?)
    }
}

/// The continuous process of the score-based systems; the linear table is its discretisation.
pub fn vp() -> Vp {
    Vp {
        t_min: START,
        ..Vp::default()
    }
}

/// The size of a training.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub width: usize,
    pub blocks: usize,
    pub steps: u64,
    pub batch: usize,
}

/// A trained system.
pub struct Trained {
    pub net: Mlp,
    pub variance: bool,
    pub gamma: Option<Gamma>,
    pub seconds: f64,
}

/// VDM's schedule.
pub enum Gamma {
    Fixed(LinearGamma),
    Ends(ScalarGamma),
    Free(MonotoneGamma),
}

impl Gamma {
    fn new(shape: Shape, scope: &Scope) -> diffusion_nn::Result<Self> {
        let number = |name: &str, value| scope.param(name, 1, Init::Const(value));
        let (min, max) = GAMMA;
        let normal = Init::Normal { std: 1.0 };
        Ok(match shape {
            Shape::Fixed => Self::Fixed(LinearGamma { min, max }),
            Shape::Ends => Self::Ends(ScalarGamma {
                w: number("w", max - min)?,
                b: number("b", min)?,
            }),
            Shape::Free => Self::Free(MonotoneGamma {
                l1_kernel: scope.param("l1", (1, 1), Init::Const(max - min))?,
                l1_bias: number("l1_bias", min)?,
                l2_kernel: scope.param("l2", (1, FEATURES), normal)?,
                l2_bias: scope.param("l2_bias", FEATURES, Init::Const(0.0))?,
                l3_kernel: scope.param("l3", (FEATURES, 1), normal)?,
                ends: Some((number("gamma0", min)?, number("gamma1", max)?)),
            }),
        })
    }

    pub fn schedule(&self) -> &dyn LearnedSchedule {
        match self {
            Self::Fixed(gamma) => gamma,
            Self::Ends(gamma) => gamma,
            Self::Free(gamma) => gamma,
        }
    }
}

impl Trained {
    /// The network as a denoiser; `γ` tells it the time.
    pub fn denoiser(&self) -> Box<dyn Denoiser + '_> {
        denoiser(&self.net, self.variance)
    }
}

fn denoiser(net: &Mlp, variance: bool) -> Box<dyn Denoiser + '_> {
    let network = Network::new(Kind::Epsilon, TimeCode::Gamma, move |x, gamma| {
        net.forward(x, gamma).map_err(from_nn)
    });
    match variance {
        true => Box::new(LearnedVariance(network)),
        false => Box::new(network),
    }
}

struct Task {
    net: Mlp,
    variance: bool,
    how: How,
}

enum How {
    Chain(Hybrid, Option<SecondMoment>),
    Vdm(Gamma),
    Flow(Denoising),
}

fn of_chain(
    net: &dyn Denoiser,
    (hybrid, resample): (&Hybrid, Option<&mut SecondMoment>),
    k: &Tensor,
    ctx: &StepCtx,
) -> diffusion_core::Result<Tensor> {
    let batch = k.dim(0)?;
    let keys = (0..batch).map(|i| ctx.time_key(i));
    let (steps, weights): (Vec<usize>, Vec<f64>) = match &resample {
        Some(resample) => resample.draw(keys).into_iter().unzip(),
        None => keys
            .map(|key| (key.below(STEPS as u64) as usize, 1.0))
            .unzip(),
    };
    let epsilon = ctx.noise(&[DIMS], DType::F32, &Device::Cpu)?;
    let mut noise = CounterNoise::new(0, 0..batch as u64);
    let mut call = Call {
        noise: &mut noise,
        items: 0..batch as u64,
        tracked: true,
    };
    let losses = hybrid.losses(net, &on_scale(k)?, &epsilon, &steps, &mut call)?;
    if let Some(resample) = resample {
        let values: Vec<f32> = losses.loss.detach().to_vec1()?;
        let values: Vec<f64> = values.into_iter().map(f64::from).collect();
        resample.update(&steps, &values)?;
    }
    Ok(Coef::Each(weights).times(&losses.loss)?.mean_all()?)
}

fn of_vdm(net: &Mlp, gamma: &Gamma, k: &Tensor, ctx: &StepCtx) -> diffusion_core::Result<Tensor> {
    let batch = k.dim(0)?;
    // One number a step for the times of the whole batch.
    let key = Key::new(ctx.seed, stream::TRAIN_TIME).item(u64::MAX);
    let u = key.step(ctx.step).uniform(1)[0];
    let draw = VdmDraw {
        epsilon0: values(ctx, batch, |i| ctx.key(stream::AUGMENT, i).normal(DIMS))?,
        epsilon: ctx.noise(&[DIMS], DType::F32, &Device::Cpu)?,
        times: even_times(u, batch),
    };
    let network = |z: &Tensor, gamma: &Tensor| net.forward(z, gamma).map_err(from_nn);
    let free = match gamma {
        Gamma::Free(gamma) if ctx.phase == 0 => Some(gamma.learning_ends()),
        Gamma::Free(gamma) => Some(gamma.learning_interior()),
        _ => None,
    };
    let vdm = Vdm {
        schedule: match &free {
            Some(gamma) => gamma,
            None => gamma.schedule(),
        },
        levels: LEVELS,
        steps: None,
    };
    let losses = vdm.losses(&network, k, &draw)?;
    match ctx.phase {
        0 => losses.bits(),
        _ => losses.second_moment(),
    }
}

fn of_flow(
    net: &dyn Denoiser,
    objective: &Denoising,
    k: &Tensor,
    ctx: &StepCtx,
) -> diffusion_core::Result<Tensor> {
    let batch = k.dim(0)?;
    let u = values(ctx, batch, |i| ctx.key(stream::AUGMENT, i).uniform(DIMS))?;
    let bin = 2.0 / (LEVELS - 1) as f64;
    let x = (on_scale(k)? + u.affine(bin, -0.5 * bin)?)?;
    let points = objective.draw((0..batch).map(|i| ctx.time_key(i)));
    let epsilon = ctx.noise(&[DIMS], DType::F32, &Device::Cpu)?;
    let mut noise = CounterNoise::new(0, 0..batch as u64);
    let mut call = Call {
        noise: &mut noise,
        items: 0..batch as u64,
        tracked: true,
    };
    let losses = objective.losses(net, &x, &epsilon, &points, &mut call)?;
    Ok(losses.mean_all()?)
}

/// `[B, 64]` of numbers that belong to the examples of a batch.
fn values(
    ctx: &StepCtx,
    batch: usize,
    draw: impl Fn(usize) -> Vec<f64>,
) -> diffusion_core::Result<Tensor> {
    debug_assert_eq!(ctx.items.len(), batch);
    let all: Vec<f32> = (0..batch).flat_map(draw).map(|v| v as f32).collect();
    Ok(Tensor::from_vec(all, (batch, DIMS), &Device::Cpu)?)
}

impl Objective for Task {
    type Batch = Tensor;

    fn phases(&self) -> usize {
        match self.how {
            How::Vdm(Gamma::Free(_)) => 2,
            _ => 1,
        }
    }

    /// The interior of a schedule has its own phase.
    fn trains(&self, phase: usize, name: &str) -> bool {
        let interior = name.starts_with("gamma.l");
        interior == (phase == 1)
    }

    fn losses(&mut self, _: usize, k: &Tensor, ctx: &StepCtx) -> diffusion_core::Result<Vec<Loss>> {
        let net = denoiser(&self.net, self.variance);
        let loss = match &mut self.how {
            How::Chain(hybrid, resample) => of_chain(&net, (hybrid, resample.as_mut()), k, ctx)?,
            How::Vdm(gamma) => of_vdm(&self.net, gamma, k, ctx)?,
            How::Flow(objective) => of_flow(&net, objective, k, ctx)?,
        };
        Ok(vec![Loss::new("loss", loss)])
    }

    fn writes_parameters(&self) -> bool {
        false
    }
}

fn how(system: &System, scope: &Scope) -> Result<How> {
    Ok(match system.learns {
        Learns::Vdm(shape) => How::Vdm(Gamma::new(shape, &scope.sub("gamma"))?),
        Learns::Flow { weight, time } => How::Flow(Denoising {
            schedule: Arc::new(vp()),
            weight,
            time,
        }),
        Learns::Chain { loss, .. } => {
            let variance = match loss {
                ChainLoss::Simple => Variance::FixedLarge,
                ChainLoss::Hybrid | ChainLoss::Bound => Variance::LearnedRange,
            };
            let chain = Chain::of_table(&system.table()?)?;
            let vlb = Vlb::new(chain, variance, Decoder::Discretised { levels: LEVELS });
            let resample = matches!(loss, ChainLoss::Bound)
                .then(|| SecondMoment::new(STEPS, 10, 0.001))
                .transpose()?;
            let loss = match loss {
                ChainLoss::Bound => HybridLoss::RescaledKl,
                _ => HybridLoss::RescaledMse,
            };
            How::Chain(Hybrid { vlb, loss }, resample)
        }
    })
}

/// Trains a system on levels `[N, 64]`.
pub fn train(system: &System, effort: Effort, levels: &Tensor, seed: u64) -> Result<Trained> {
    let start = std::time::Instant::now();
    let variance = matches!(
        system.learns,
        Learns::Chain {
            loss: ChainLoss::Hybrid | ChainLoss::Bound,
            ..
        }
    );
    let sizes = Sizes {
        dims: DIMS,
        width: effort.width,
        blocks: effort.blocks,
        variance,
        fourier: system.fourier,
    };
    let shape = match system.learns {
        Learns::Vdm(shape) => Some(shape),
        _ => None,
    };
    let store = Store::new(seed, DType::F32, &Device::Cpu);
    let mut task = Task {
        net: Mlp::new(sizes, &store.root().sub("net"))?,
        variance,
        how: how(system, &store.root())?,
    };
    let config = TrainConfig {
        steps: effort.steps,
        batch_size: effort.batch,
        lr: 1e-3,
        schedule: LrSchedule::Cosine {
            warmup: 50.min(effort.steps / 2),
            cycles: 0.5,
        },
        ema: EmaRule::Plain {
            decay: 0.998,
            update_after_step: 0,
            min_decay: 0.0,
        },
        seed,
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(store.named(), config.check()?)?;
    trainer.run(&mut task, &Levels(levels), &mut Quiet, &Cancel::new())?;
    let weights = trainer.ema()?;
    let (net, gamma) = Store::serve(&weights, DType::F32, &Device::Cpu, |scope| {
        let gamma = shape.map(|shape| Gamma::new(shape, &scope.sub("gamma")));
        Ok((Mlp::new(sizes, &scope.sub("net"))?, gamma.transpose()?))
    })?;
    Ok(Trained {
        net,
        variance,
        gamma,
        seconds: start.elapsed().as_secs_f64(),
    })
}
