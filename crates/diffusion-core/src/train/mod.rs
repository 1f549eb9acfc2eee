//! Training: one loop for every objective, that stops and resumes at any step without changing a bit.
//!
//! A domain writes an [`Objective`] (a batch in, losses out) and a [`Source`] (items in, a batch
//! out); the [`Trainer`] does everything else.
//!
//! ```text
//! for step s = 0, 1, …, steps − 1:
//!     for each phase:
//!         g   = ∇_θ (1/accumulate) Σ_micro Σ_loss weight · value         [objective]
//!         g  ←  g · min(1, clip_norm / ‖g‖₂)                             [optim]
//!         θ  ←  AdamW(θ, g, lr(s))                                       [optim, lr]
//!     θ_ema  ←  θ_ema − (1 − decay(s + 1)) (θ_ema − θ)                   [ema]
//! ```
//!
//! Which examples a step sees and which noise they get are pure functions of (seed, step, example)
//! ([`order`], [`StepCtx`]); sums run in a fixed order. Hence the same seed gives the same bytes on
//! any number of threads, and after any interruption.
//!
//! # Example
//!
//! A line through three points:
//!
//! ```
//! use std::collections::BTreeMap;
//! use candle_core::{DType, Device, Tensor, Var};
//! use diffusion_core::Result;
//! use diffusion_core::train::*;
//!
//! struct Points;
//! impl Source for Points {
//!     type Batch = Tensor;
//!     fn len(&self) -> usize { 3 }
//!     fn batch(&self, items: &[usize], _epoch: u64) -> Result<Tensor> {
//!         let x: Vec<f32> = items.iter().map(|&i| i as f32).collect();
//!         Ok(Tensor::new(x, &Device::Cpu)?)
//!     }
//! }
//!
//! struct Line(Var);
//! impl Objective for Line {
//!     type Batch = Tensor;
//!     fn losses(&mut self, _phase: usize, x: &Tensor, _ctx: &StepCtx) -> Result<Vec<Loss>> {
//!         let error = (x.broadcast_mul(&self.0)? - (x * 2.0)?)?;
//!         Ok(vec![Loss::new("square", error.sqr()?.mean_all()?)])
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let slope = Var::zeros(1, DType::F32, &Device::Cpu)?;
//! let config = TrainConfig { steps: 200, batch_size: 3, lr: 0.1, ..TrainConfig::default() };
//! let params = BTreeMap::from([("slope".to_string(), slope.clone())]);
//! let mut trainer = Trainer::new(params, config.check()?)?;
//! trainer.run(&mut Line(slope.clone()), &Points, &mut Quiet, &Cancel::new())?;
//! assert!((slope.to_vec1::<f32>()?[0] - 2.0).abs() < 1e-2);
//! # Ok(())
//! # }
//! ```

mod config;
mod ema;
mod event;
mod guard;
mod lr;
mod metrics;
mod objective;
mod optim;
pub mod order;
mod state;
mod step;
mod trainer;

pub use config::{Checked, SaveFailure, TrainConfig};
pub use ema::{Ema, EmaRule};
pub use event::{Both, Cancel, Event, LossValue, Observer, Quiet};
pub use guard::{Guard, GuardConfig, Policy, SpikeRule};
pub use lr::LrSchedule;
pub use metrics::JsonLines;
pub use objective::{Loss, Objective, Source, StepCtx};
pub use optim::{AdamState, AdamW, AdamWConfig, Grads};
pub use trainer::{Outcome, Trainer};
