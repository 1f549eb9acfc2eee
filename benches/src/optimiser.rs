//! The update of 10 million parameters in 100 tensors: AdamW and the moving average.

use crate::case::{Case, Reference, Spec, Work, normal};
use anyhow::Result;
use candle_core::{Tensor, Var};
use diffusion_core::train::{AdamW, AdamWConfig, Ema, EmaRule, Grads};
use serde_json::json;
use std::collections::BTreeMap;

const TENSORS: usize = 100;
const ELEMENTS: usize = 100_000;
const LEARNING_RATE: f64 = 1e-3;
/// Updates after which the results are compared.
const UPDATES: u64 = 3;

pub(crate) fn specs() -> Vec<Spec> {
    vec![Spec::new("ops/adamw-ema-10m/step", Work::Op, || {
        Ok(Box::new(Update::new()?))
    })]
}

struct Update {
    parameters: BTreeMap<String, Var>,
    grads: Grads,
    optimiser: AdamW,
    average: Option<Ema>,
}

impl Update {
    fn new() -> Result<Self> {
        let mut parameters = BTreeMap::new();
        let mut loss: Option<Tensor> = None;
        let values = normal(1, &[ELEMENTS])?;
        let slopes = normal(2, &[ELEMENTS])?;
        for i in 0..TENSORS {
            // Different in every tensor, and never 0.
            let scale = 1.0 + i as f64 / TENSORS as f64;
            let var = Var::from_tensor(&(&values * scale)?)?;
            // The gradient of Σ g θ is g.
            let term = (var.as_tensor() * (&slopes * scale)?)?.sum_all()?;
            loss = Some(match loss {
                Some(sum) => (sum + term)?,
                None => term,
            });
            parameters.insert(format!("p{i:03}"), var);
        }
        let mut grads = Grads::default();
        if let Some(loss) = loss {
            grads.add(&mut diffusion_ops::backward(&loss)?, parameters.iter())?;
        }
        Ok(Self {
            average: Ema::new(EmaRule::default(), &parameters)?,
            parameters,
            grads,
            optimiser: AdamW::new(AdamWConfig::default()),
        })
    }
}

impl Case for Update {
    fn call(&mut self) -> Result<()> {
        self.optimiser
            .update(&self.parameters, &self.grads, LEARNING_RATE, 1.0)?;
        if let Some(average) = &mut self.average {
            average.update(&self.parameters)?;
        }
        Ok(())
    }

    fn reference(&self) -> Result<Reference> {
        let mut other = Self::new()?;
        let rule = EmaRule::default();
        let decays: Vec<f64> = (1..=UPDATES).map(|step| rule.decay(step)).collect();
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
        } = AdamWConfig::default();
        let mut reference = Reference::new(json!({
            "op": "adamw_ema", "work": "update", "lr": LEARNING_RATE, "betas": [beta1, beta2],
            "eps": eps, "weight_decay": weight_decay, "decays": decays,
        }));
        for (name, var) in &other.parameters {
            reference.put("weights", name, var)?;
        }
        for (name, grad) in other.grads.iter() {
            reference.put("inputs", name, grad)?;
        }
        for _ in 0..UPDATES {
            other.call()?;
        }
        for (name, var) in &other.parameters {
            reference.put("outputs", name, var)?;
        }
        if let Some(average) = &other.average {
            for (name, tensor) in average.weights()? {
                reference.put("outputs", &format!("ema-{name}"), &tensor)?;
            }
        }
        Ok(reference)
    }
}
