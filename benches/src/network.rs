//! Training steps and sampling calls of any network.

use crate::case::{Case, Reference, Spec, Work, normal};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use diffusion_core::train::{
    Cancel, Event, Loss, Objective, Outcome, Source, StepCtx, TrainConfig, Trainer,
};
use diffusion_nn::{Scope, Store};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::rc::Rc;

/// The parameters begin from this seed.
const SEED: u64 = 1;
/// Gradients of larger tensors are not compared: the small ones have passed through the large.
const COMPARED: usize = 40_000;

/// More steps than anybody waits for.
const ENDLESS: u64 = 1_000_000_000;

/// A network on the inputs in their order.
pub(crate) type Forward = Box<dyn Fn(&[Tensor]) -> diffusion_nn::Result<Tensor>>;

/// A network that has not been built, and what it is run on.
pub(crate) trait Plan {
    /// The peer's name of the network.
    fn network(&self) -> &'static str;
    /// The sizes that the peer needs.
    fn config(&self) -> Value;
    /// Builds it.
    fn build(&self, scope: &Scope) -> diffusion_nn::Result<Forward>;
    /// Names and values of the inputs for a batch; the output has the shape of `shape`.
    fn inputs(&self, batch: usize) -> Result<Vec<(&'static str, Tensor)>>;
    /// The shape of the output.
    fn shape(&self, batch: usize) -> Vec<usize>;
}

/// The cases of a network: a training step, and calls on batches of these sizes.
pub(crate) fn specs(
    name: &str,
    plan: impl Plan + 'static,
    train: usize,
    calls: &[usize],
) -> Vec<Spec> {
    let plan: Rc<dyn Plan> = Rc::new(plan);
    let kept = plan.clone();
    let step = move || -> Result<Box<dyn Case>> { Ok(Box::new(Training::new(&kept, train)?)) };
    let mut specs = vec![Spec::new(format!("{name}/train"), Work::Train, step)];
    for &batch in calls {
        let kept = plan.clone();
        let call = move || -> Result<Box<dyn Case>> { Ok(Box::new(Sampling::new(&kept, batch)?)) };
        specs.push(Spec::new(format!("{name}/call-b{batch}"), Work::Call, call));
    }
    specs
}

/// A fresh network.
fn fresh(plan: &Rc<dyn Plan>) -> Result<(Store, Forward)> {
    let store = Store::new(SEED, DType::F32, &Device::Cpu);
    let forward = plan.build(&store.root())?;
    Ok((store, forward))
}

/// Values without names.
fn values(inputs: &[(&'static str, Tensor)]) -> Vec<Tensor> {
    inputs.iter().map(|(_, tensor)| tensor.clone()).collect()
}

/// Weights and inputs for the peer.
fn reference(
    plan: &Rc<dyn Plan>,
    work: &str,
    store: &Store,
    inputs: &[(&'static str, Tensor)],
) -> Result<Reference> {
    let config = json!({ "network": plan.network(), "work": work, "config": plan.config() });
    let mut reference = Reference::new(config);
    for (name, tensor) in store.frozen()? {
        reference.put("weights", &name, &tensor)?;
    }
    for (name, tensor) in inputs {
        reference.put("inputs", name, tensor)?;
    }
    Ok(reference)
}

fn mean_square(y: &Tensor, target: &Tensor) -> candle_core::Result<Tensor> {
    (y - target)?.sqr()?.mean_all()
}

/// Mean squared error against a fixed target.
struct Regression(Forward);

/// Always the same batch.
struct Fixed {
    inputs: Vec<Tensor>,
    target: Tensor,
    size: usize,
}

impl Source for Fixed {
    type Batch = (Vec<Tensor>, Tensor);

    fn len(&self) -> usize {
        self.size
    }

    fn batch(&self, _items: &[usize], _epoch: u64) -> diffusion_core::Result<Self::Batch> {
        Ok((self.inputs.clone(), self.target.clone()))
    }
}

impl Objective for Regression {
    type Batch = (Vec<Tensor>, Tensor);

    fn losses(
        &mut self,
        _phase: usize,
        (inputs, target): &Self::Batch,
        _ctx: &StepCtx,
    ) -> diffusion_core::Result<Vec<Loss>> {
        let y = (self.0)(inputs).map_err(candle_core::Error::wrap)?;
        Ok(vec![Loss::new("mse", mean_square(&y, target)?)])
    }
}

/// A step of the trainer: forward, mean squared error, backward, AdamW, moving average.
struct Training {
    plan: Rc<dyn Plan>,
    batch: usize,
    trainer: Trainer,
    objective: Regression,
    source: Fixed,
}

impl Training {
    fn new(plan: &Rc<dyn Plan>, batch: usize) -> Result<Self> {
        let (store, forward) = fresh(plan)?;
        let config = TrainConfig {
            steps: ENDLESS,
            batch_size: batch,
            clip_norm: None,
            checkpoint_every: ENDLESS,
            log_every: 1,
            ..TrainConfig::default()
        };
        Ok(Self {
            plan: plan.clone(),
            batch,
            trainer: Trainer::new(store.named(), config.check()?)?,
            objective: Regression(forward),
            source: Fixed {
                inputs: values(&plan.inputs(batch)?),
                target: target(plan, batch)?,
                size: batch,
            },
        })
    }
}

fn target(plan: &Rc<dyn Plan>, batch: usize) -> Result<Tensor> {
    normal(99, &plan.shape(batch))
}

impl Case for Training {
    fn call(&mut self) -> Result<()> {
        let cancel = Cancel::new();
        let before = self.trainer.step();
        let mut stop = |event: &Event| {
            if matches!(event, Event::Step { .. }) {
                cancel.set();
            }
        };
        let outcome = self
            .trainer
            .run(&mut self.objective, &self.source, &mut stop, &cancel)?;
        let step = before + 1;
        ensure!(
            outcome == Outcome::Interrupted { step },
            "one training step ended as {outcome:?}, expected an interruption after step {step}"
        );
        Ok(())
    }

    fn reference(&self) -> Result<Reference> {
        let (store, forward) = fresh(&self.plan)?;
        let inputs = self.plan.inputs(self.batch)?;
        let mut reference = reference(&self.plan, "train", &store, &inputs)?;
        let target = target(&self.plan, self.batch)?;
        reference.put("inputs", "target", &target)?;
        let y = forward(&values(&inputs))?;
        reference.put("outputs", "y", &y)?;
        let grads = diffusion_ops::backward(&mean_square(&y, &target)?)?;
        for (name, var) in store.named() {
            if var.elem_count() <= COMPARED {
                let grad = grads
                    .get(&var)
                    .with_context(|| format!("`{name}` has no gradient"))?;
                reference.put("gradients", &name, grad)?;
            }
        }
        Ok(reference)
    }
}

/// A forward pass on frozen weights.
struct Sampling {
    plan: Rc<dyn Plan>,
    store: Store,
    forward: Forward,
    inputs: Vec<(&'static str, Tensor)>,
}

impl Sampling {
    fn new(plan: &Rc<dyn Plan>, batch: usize) -> Result<Self> {
        let (store, _) = fresh(plan)?;
        let weights: BTreeMap<String, Tensor> = store.frozen()?;
        let forward = Store::serve(&weights, DType::F32, &Device::Cpu, |scope| {
            plan.build(scope)
        })?;
        Ok(Self {
            plan: plan.clone(),
            store,
            forward,
            inputs: plan.inputs(batch)?,
        })
    }
}

impl Case for Sampling {
    fn call(&mut self) -> Result<()> {
        let y = (self.forward)(&values(&self.inputs))?;
        std::hint::black_box(y);
        Ok(())
    }

    fn reference(&self) -> Result<Reference> {
        let mut reference = reference(&self.plan, "call", &self.store, &self.inputs)?;
        let y = (self.forward)(&values(&self.inputs))?;
        reference.put("outputs", "y", &y)?;
        Ok(reference)
    }
}
