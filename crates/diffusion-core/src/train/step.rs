//! One optimiser step. Nothing is updated with numbers that are not finite.

use candle_core::{DType, Tensor};
use diffusion_ops::first_not_finite;

use super::ema::Ema;
use super::event::LossValue;
use super::guard::Failure;
use super::objective::{Objective, Source, StepCtx};
use super::optim::Grads;
use super::order::Order;
use super::trainer::Trainer;
use crate::checkpoint::is_finite;
use crate::error::{Report, Result};

/// Above this the square of a clipped gradient would leave the range of f32.
const LARGEST_GRADIENT: f64 = 1e18;

/// A step that was made.
pub(super) struct Made {
    pub epoch: u64,
    pub loss: f64,
    pub losses: Vec<LossValue>,
    pub grad_norm: f64,
    pub lr: f64,
    /// Whether the moving average has followed.
    pub averaged: bool,
}

impl Trainer {
    /// Losses, gradients, updates. The outer error ends the run, the inner one is for the policy.
    pub(super) fn attempt<O: Objective>(
        &mut self,
        objective: &mut O,
        source: &impl Source<Batch = O::Batch>,
        order: &mut Order,
    ) -> Result<Result<Made, Failure>> {
        let step = self.progress.step;
        let lr = self.config.rate(step);
        let mut batches = Vec::with_capacity(self.config.accumulate);
        for ctx in order.step(step) {
            let items: Vec<usize> = ctx.items.iter().map(|&i| i as usize).collect();
            batches.push((source.batch(&items, ctx.epoch)?, ctx));
        }
        let mut losses = Vec::new();
        let mut squares = 0.0;
        // With one update a step and nobody else writing, the moving average is taken in the same
        // pass, and what the optimiser has not touched is as finite as it was.
        let alone = objective.phases() == 1 && !objective.writes_parameters();
        let mut bad = None;
        for phase in 0..objective.phases() {
            let mut grads = Grads::default();
            let mut values: Vec<LossValue> = Vec::new();
            for (batch, ctx) in &mut batches {
                ctx.phase = phase;
                if let Err(failure) =
                    self.backward(objective, batch, ctx, &mut grads, &mut values)?
                {
                    return Ok(Err(failure));
                }
            }
            if grads.is_empty() {
                return Err(Report::new(
                    format_args!("training step {}, phase {phase}", step + 1),
                    "no parameter received a gradient",
                )
                .expected("losses that depend on the parameters of the trainer")
                .remedy("look for detached tensors, or for parameters that were not registered")
                .config());
            }
            let norm = grads.norm()?;
            let ctx = &batches[0].1;
            if !norm.is_finite() || norm > LARGEST_GRADIENT {
                return Ok(Err(self.bad_gradient(&grads, norm, objective, ctx)?));
            }
            let scale = match self.config.clip_norm {
                // The small constant is that of torch's `clip_grad_norm_`.
                Some(most) => (most / (norm + 1e-6)).min(1.0),
                None => 1.0,
            };
            let mut average = self.ema.as_mut().filter(|_| alone).map(Ema::begin);
            bad = self
                .optim
                .update_with(&self.params, &grads, lr, scale, average.as_mut())?;
            if let Some(average) = average {
                average.finish(&self.params)?;
            }
            squares += norm * norm;
            losses.append(&mut values);
        }
        let ctx = &batches[0].1;
        objective.after_step(&losses, ctx)?;
        if !alone {
            bad = self.first_bad_weight()?;
        }
        if let Some(name) = bad {
            let why = format!("weight `{name}` is not finite after the update");
            return Ok(Err(self.failure(why, false, objective, ctx)));
        }
        let loss = losses.iter().map(|l| l.weight * l.value).sum();
        Ok(Ok(Made {
            epoch: ctx.epoch,
            loss,
            losses,
            grad_norm: squares.sqrt(),
            lr,
            averaged: alone,
        }))
    }

    fn backward<O: Objective>(
        &self,
        objective: &mut O,
        batch: &O::Batch,
        ctx: &StepCtx,
        grads: &mut Grads,
        values: &mut Vec<LossValue>,
    ) -> Result<Result<(), Failure>> {
        let share = 1.0 / self.config.accumulate as f64;
        let mut total: Option<Tensor> = None;
        for loss in objective.losses(ctx.phase, batch, ctx)? {
            if loss.value.elem_count() != 1 {
                return Err(Report::new(
                    format_args!("loss `{}`", loss.name),
                    format_args!("shape {:?}", loss.value.dims()),
                )
                .expected("one element")
                .remedy("take the mean or the sum")
                .input());
            }
            let value = loss
                .value
                .detach()
                .flatten_all()?
                .to_dtype(DType::F64)?
                .to_vec1::<f64>()?[0];
            if !value.is_finite() || !loss.weight.is_finite() {
                let dtype = loss.value.dtype();
                let why = format!(
                    "loss `{}` = {value} ({dtype:?}), weight {}",
                    loss.name, loss.weight
                );
                return Ok(Err(self.failure(why, true, objective, ctx)));
            }
            if loss.weight != 0.0 {
                let term = (loss.value.flatten_all()? * (loss.weight * share))?;
                total = Some(match total {
                    Some(sum) => {
                        let wide = widest(&sum, &term);
                        (sum.to_dtype(wide)? + term.to_dtype(wide)?)?
                    }
                    None => term.to_dtype(widest(&term, &term))?,
                });
            }
            match values.iter_mut().find(|v| v.name == loss.name) {
                Some(seen) => seen.value += value * share,
                None => values.push(LossValue {
                    phase: ctx.phase,
                    name: loss.name,
                    value: value * share,
                    weight: loss.weight,
                }),
            }
        }
        if let Some(total) = total {
            let mut store = diffusion_ops::backward(&total)?;
            let trained = self
                .params
                .iter()
                .filter(|(n, _)| objective.trains(ctx.phase, n));
            grads.add(&mut store, trained)?;
        }
        Ok(Ok(()))
    }

    fn first_bad_weight(&self) -> Result<Option<&String>> {
        let weights: Vec<&Tensor> = self.params.values().map(|v| v.as_tensor()).collect();
        let first = first_not_finite(&weights)?;
        Ok(first.and_then(|i| self.params.keys().nth(i)))
    }

    fn bad_gradient(
        &self,
        grads: &Grads,
        norm: f64,
        objective: &impl Objective,
        ctx: &StepCtx,
    ) -> Result<Failure> {
        for (name, grad) in grads.iter() {
            if !is_finite(grad)? {
                let why = format!("gradient of `{name}` ({:?}) is not finite", grad.dtype());
                return Ok(self.failure(why, true, objective, ctx));
            }
        }
        let why = format!("gradient norm {norm:e} is too large to be squared");
        Ok(self.failure(why, true, objective, ctx))
    }

    fn failure(
        &self,
        what: String,
        weights_are_sound: bool,
        objective: &impl Objective,
        ctx: &StepCtx,
    ) -> Failure {
        let mut items: Vec<String> = ctx.items.iter().take(32).map(u64::to_string).collect();
        if ctx.items.len() > items.len() {
            items.push(format!("… {} in all", ctx.items.len()));
        }
        let more = objective
            .describe(ctx.phase, ctx)
            .map(|d| format!(", {d}"))
            .unwrap_or_default();
        let why = format!(
            "step {}, phase {}, micro-batch {}: {what}; examples {}{more}",
            ctx.step + 1,
            ctx.phase,
            ctx.micro,
            items.join(" "),
        );
        Failure {
            why,
            weights_are_sound,
        }
    }
}

/// Losses are added up in f64 if one of them is, else in f32.
fn widest(a: &Tensor, b: &Tensor) -> DType {
    if a.dtype() == DType::F64 || b.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}
