//! What a domain writes: losses from a batch, and batches from items.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, WithDType};
use diffusion_ops::rng::{Key, stream};

use super::event::LossValue;
use crate::error::Result;

/// Turns a batch into losses. Networks and other state live inside.
pub trait Objective {
    /// What a [`Source`] gives.
    type Batch;

    /// How many updates a step makes, one after the other (players that alternate); usually 1.
    fn phases(&self) -> usize {
        1
    }

    /// Whether `phase` updates the parameter called `name`.
    fn trains(&self, phase: usize, name: &str) -> bool {
        let _ = (phase, name);
        true
    }

    /// The losses of a batch; the gradient is that of their weighted sum.
    ///
    /// # Errors
    ///
    /// Whatever the networks report; it ends the run.
    fn losses(&mut self, phase: usize, batch: &Self::Batch, ctx: &StepCtx) -> Result<Vec<Loss>>;

    /// Called once after the updates of a step, before the moving average.
    ///
    /// # Errors
    ///
    /// Ends the run.
    fn after_step(&mut self, losses: &[LossValue], ctx: &StepCtx) -> Result<()> {
        let _ = (losses, ctx);
        Ok(())
    }

    /// Whether [`Objective::after_step`] may write to parameters. Without that (and with one phase)
    /// the moving average is taken in the same pass over memory as the update, to the same effect.
    fn writes_parameters(&self) -> bool {
        true
    }

    /// What a message about a failed step should say beside the items, such as the range of times.
    fn describe(&self, phase: usize, ctx: &StepCtx) -> Option<String> {
        let _ = (phase, ctx);
        None
    }

    /// State beyond the parameters (a queue, statistics of losses by time), for checkpoints.
    ///
    /// # Errors
    ///
    /// Those of copies from a device.
    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    /// Takes back what [`Objective::state`] gave; the tensors are on the CPU.
    ///
    /// # Errors
    ///
    /// When the state does not fit.
    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let _ = state;
        Ok(())
    }
}

/// A data set that gives any items as a batch.
pub trait Source {
    /// What an [`Objective`] takes.
    type Batch;

    /// The number of items.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The items with these indices, in this order. A pure function of its arguments: augmentation
    /// draws from the counter-based stream of (item, epoch).
    ///
    /// # Errors
    ///
    /// When an item cannot be read; it ends the run.
    fn batch(&self, items: &[usize], epoch: u64) -> Result<Self::Batch>;
}

/// One term of the objective.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Its name in logs.
    pub name: String,
    /// A tensor with one element.
    pub value: Tensor,
    /// Its factor in the sum; with 0 it is only logged.
    pub weight: f64,
}

impl Loss {
    /// A term with weight 1.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        Self {
            name: name.into(),
            value,
            weight: 1.0,
        }
    }

    /// The same term with another weight.
    pub fn weight(self, weight: f64) -> Self {
        Self { weight, ..self }
    }
}

/// Where training stands, and the random numbers that belong there.
///
/// An example's numbers depend on (seed, stream, example, step, phase) alone, not on what else is in
/// the batch or how the step is split into micro-batches. If an example occurs more than once in a
/// step (a data set smaller than the batch, the seam between epochs), each occurrence has its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepCtx {
    /// The run's seed.
    pub seed: u64,
    /// Optimiser steps done before this one.
    pub step: u64,
    /// The micro-batch within the step.
    pub micro: u64,
    /// The epoch of the batch's first example.
    pub epoch: u64,
    /// Indices of the batch's examples.
    pub items: Vec<u64>,
    /// For each example, how often it has occurred in this step before.
    pub repeats: Vec<u64>,
    /// The phase within the step.
    pub phase: usize,
}

/// Bits of an item's index; the rest counts its repeats within a step.
const ITEM_BITS: u32 = 40;
/// Phases that have their own numbers.
const MAX_PHASES: u64 = 256;

impl StepCtx {
    /// A first micro-batch, phase and epoch; for tests and for code that draws like the trainer.
    pub fn new(seed: u64, step: u64, items: Vec<u64>) -> Self {
        let repeats = vec![0; items.len()];
        Self {
            seed,
            step,
            items,
            repeats,
            ..Self::default()
        }
    }

    /// The key of the `i`-th example of the batch in a stream of [`diffusion_ops::rng::stream`].
    pub fn key(&self, stream: u64, i: usize) -> Key {
        let item = self.items.get(i).copied().unwrap_or(0);
        let repeat = self.repeats.get(i).copied().unwrap_or(0);
        Key::new(self.seed, stream)
            .item(item | repeat << ITEM_BITS)
            .step(self.step * MAX_PHASES + self.phase as u64)
    }

    /// The key of the `i`-th example's noise.
    pub fn noise_key(&self, i: usize) -> Key {
        self.key(stream::TRAIN_NOISE, i)
    }

    /// The key of the `i`-th example's diffusion time.
    pub fn time_key(&self, i: usize) -> Key {
        self.key(stream::TRAIN_TIME, i)
    }

    /// The key of the `i`-th example's dropout.
    pub fn dropout_key(&self, i: usize) -> Key {
        self.key(stream::DROPOUT, i)
    }

    /// Standard normal noise for each example.
    ///
    /// # Shapes
    ///
    /// `shape` is that of one example, `[…]`; the result is `[batch, …]`.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn noise(&self, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let noise = match dtype {
            DType::F32 => self.drawn(shape, Key::fill_normal_f32)?,
            _ => self.drawn(shape, Key::fill_normal)?,
        };
        Ok(noise.to_dtype(dtype)?.to_device(device)?)
    }

    fn drawn<T: WithDType>(&self, shape: &[usize], draw: impl Fn(Key, &mut [T])) -> Result<Tensor> {
        let size: usize = shape.iter().product();
        let mut values = vec![T::zero(); size * self.items.len()];
        for (i, chunk) in values.chunks_exact_mut(size.max(1)).enumerate() {
            draw(self.noise_key(i), chunk);
        }
        let mut dims = vec![self.items.len()];
        dims.extend_from_slice(shape);
        Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
    }

    /// One uniform diffusion time in `[0, 1)` for each example.
    pub fn times(&self) -> Vec<f64> {
        (0..self.items.len())
            .map(|i| self.time_key(i).uniform(1)[0])
            .collect()
    }

    /// One uniform diffusion step in `0..steps` for each example.
    pub fn time_steps(&self, steps: u64) -> Vec<u64> {
        (0..self.items.len())
            .map(|i| self.time_key(i).below(steps))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_belongs_to_the_example_and_not_to_the_batch() {
        let ctx = |items: &[u64]| StepCtx::new(5, 9, items.to_vec());
        let noise = |c: &StepCtx| {
            c.noise(&[2, 3], DType::F32, &Device::Cpu)
                .unwrap()
                .to_vec3::<f32>()
                .unwrap()
        };
        let (all, one) = (ctx(&[4, 7, 2]), ctx(&[7]));
        assert_eq!(noise(&all)[1], noise(&one)[0]);
        assert_eq!(all.times()[1], one.times()[0]);
        assert_eq!(all.time_steps(1000)[1], one.time_steps(1000)[0]);
        assert_ne!(noise(&all)[0], noise(&all)[1]);
    }

    #[test]
    fn step_phase_and_repeat_change_the_noise() {
        let base = StepCtx::new(5, 9, vec![3]);
        let keys = [
            base.noise_key(0),
            base.time_key(0),
            base.dropout_key(0),
            StepCtx {
                step: 10,
                ..base.clone()
            }
            .noise_key(0),
            StepCtx {
                phase: 1,
                ..base.clone()
            }
            .noise_key(0),
            StepCtx {
                repeats: vec![1],
                ..base.clone()
            }
            .noise_key(0),
            StepCtx {
                seed: 6,
                ..base.clone()
            }
            .noise_key(0),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[..i].iter().all(|b| a != b));
        }
        assert_eq!(
            base.noise_key(0),
            StepCtx {
                micro: 3,
                epoch: 2,
                ..base.clone()
            }
            .noise_key(0)
        );
    }
}
