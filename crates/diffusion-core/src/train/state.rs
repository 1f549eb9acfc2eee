//! Everything that a run needs to go on, as a checkpoint and back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::ema::{copies, same_layout};
use super::guard::Guard;
use super::objective::Objective;
use super::optim::AdamState;
use super::trainer::Trainer;
use crate::checkpoint::Snapshot;
use crate::error::{Error, Report, Result};

const FORMAT: u32 = 1;
pub(super) const PARAMS: &str = "params";
pub(super) const EMA: &str = "ema";
pub(super) const ADAM_M: &str = "adam_m";
pub(super) const ADAM_V: &str = "adam_v";
pub(super) const OBJECTIVE: &str = "objective";

/// What changes from step to step beside tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Progress {
    /// Optimiser steps done, skipped ones included.
    pub step: u64,
    pub guard: Guard,
    /// Skipped steps, all and the last ones in a row.
    pub skipped: u64,
    pub skipped_in_row: u64,
    /// Steps that failed before a rollback: their updates are left out.
    pub left_out: BTreeSet<u64>,
    /// Rollbacks since the last checkpoint. Not saved: a checkpoint ends the row.
    pub rollbacks: u64,
    /// Sum and number of losses in the present period of `checkpoint_every` steps.
    pub loss_sum: f64,
    pub loss_count: u64,
    /// The mean loss of the period before: what the best checkpoints are chosen by.
    pub score: Option<f64>,
}

impl Progress {
    /// Ends a period between two regular checkpoints.
    pub fn close_period(&mut self) {
        self.score = (self.loss_count > 0).then(|| self.loss_sum / self.loss_count as f64);
        (self.loss_sum, self.loss_count) = (0.0, 0);
    }
}

/// An f64 as the shortest decimal that reads back as the same bits; a JSON number need not.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Exact(f64);

impl Serialize for Exact {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{:?}", self.0))
    }
}

impl<'de> Deserialize<'de> for Exact {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse()
            .map(Exact)
            .map_err(|e| de::Error::custom(format!("`{text}`: {e}")))
    }
}

/// `state.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    format: u32,
    crate_version: String,
    step: u64,
    /// Examples seen: the cursor in the data.
    cursor: u64,
    seed: u64,
    /// The learning rate of the next step, for the reader.
    lr: Exact,
    ema_count: u64,
    adam_updates: BTreeMap<String, u64>,
    losses: Vec<Exact>,
    grad_norm: Exact,
    seen: u64,
    skipped: u64,
    skipped_in_row: u64,
    left_out: BTreeSet<u64>,
    loss_sum: Exact,
    loss_count: u64,
    score: Option<Exact>,
    config_hash: String,
    config: Value,
}

impl Trainer {
    /// A checkpoint of the present state. Its tensors are the live ones: write it, or copy them,
    /// before the next step.
    ///
    /// # Errors
    ///
    /// Those of the objective's state.
    pub fn snapshot(&self, objective: &impl Objective) -> Result<Snapshot> {
        let adam = self.optim.state();
        let config = self.config.decisive(&self.identity);
        let guard = &self.progress.guard;
        let step = self.progress.step;
        let saved = Saved {
            format: FORMAT,
            crate_version: env!("CARGO_PKG_VERSION").into(),
            step,
            cursor: step * self.config.batch_size as u64 * self.config.accumulate as u64,
            seed: self.config.seed,
            lr: Exact(self.config.rate(step)),
            ema_count: self.ema.as_ref().map_or(0, |e| e.count()),
            adam_updates: adam.updates,
            losses: guard.losses.iter().map(|&l| Exact(l)).collect(),
            grad_norm: Exact(guard.grad_norm),
            seen: guard.seen,
            skipped: self.progress.skipped,
            skipped_in_row: self.progress.skipped_in_row,
            left_out: self.progress.left_out.clone(),
            loss_sum: Exact(self.progress.loss_sum),
            loss_count: self.progress.loss_count,
            score: self.progress.score.map(Exact),
            config_hash: hash(&config),
            config,
        };
        let mut state = serde_json::to_vec_pretty(&saved).map_err(|e| broken(&e))?;
        state.push(b'\n');
        let params = self
            .params
            .iter()
            .map(|(n, v)| (n.clone(), v.as_tensor().detach()))
            .collect();
        let mut groups = BTreeMap::from([
            (PARAMS.to_string(), params),
            (ADAM_M.to_string(), adam.m),
            (ADAM_V.to_string(), adam.v),
            (OBJECTIVE.to_string(), objective.state()?),
        ]);
        if let Some(ema) = &self.ema {
            groups.insert(EMA.to_string(), ema.shadow().clone());
        }
        Ok(Snapshot {
            step,
            groups,
            state,
            score: self.progress.score,
        })
    }

    /// Takes back a checkpoint: parameters (in the variables given to [`Trainer::new`]), average,
    /// moments, statistics and the objective's state.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] when it was written by another configuration (unless
    /// [`Trainer::allow_config_change`]) or for another model; nothing is changed then.
    pub fn restore(&mut self, objective: &mut impl Objective, snapshot: &Snapshot) -> Result<()> {
        let saved: Saved = serde_json::from_slice(&snapshot.state).map_err(|e| broken(&e))?;
        if saved.format != FORMAT {
            return Err(Report::new("checkpoint: state.json: format", saved.format)
                .expected(FORMAT)
                .remedy("resume with the version that wrote the checkpoint")
                .checkpoint());
        }
        if !self.config_change_allowed {
            self.refuse_other_config(&saved)?;
        }
        let empty = BTreeMap::new();
        let group = |name: &str| snapshot.groups.get(name).unwrap_or(&empty);
        same_layout(
            PARAMS,
            group(PARAMS),
            self.params.iter().map(|(n, v)| (n, &**v)),
        )?;
        let mut optim = self.optim.clone();
        let (m, v) = (group(ADAM_M).clone(), group(ADAM_V).clone());
        optim.restore(
            &self.params,
            &AdamState {
                m,
                v,
                updates: saved.adam_updates,
            },
        )?;
        let ema = match self.ema.clone() {
            Some(mut ema) => {
                // A run that begins to average takes the weights as they are.
                let weights = snapshot.groups.get(EMA).unwrap_or(group(PARAMS));
                ema.restore(saved.ema_count, weights)?;
                Some(ema)
            }
            None => None,
        };
        objective.restore(group(OBJECTIVE))?;
        for (name, var) in &self.params {
            if let Some(tensor) = group(PARAMS).get(name) {
                var.set(&tensor.to_device(var.device())?)?;
            }
        }
        self.optim = optim;
        self.ema = ema;
        self.progress = Progress {
            step: saved.step,
            guard: Guard {
                losses: saved.losses.iter().map(|l| l.0).collect(),
                grad_norm: saved.grad_norm.0,
                seen: saved.seen,
            },
            skipped: saved.skipped,
            skipped_in_row: saved.skipped_in_row,
            left_out: saved.left_out,
            rollbacks: 0,
            loss_sum: saved.loss_sum.0,
            loss_count: saved.loss_count,
            score: saved.score.map(|s| s.0),
        };
        Ok(())
    }

    /// The weights to sample with: a copy of the moving average, or of the parameters when there is
    /// none.
    ///
    /// # Errors
    ///
    /// Those of the copies.
    pub fn ema(&self) -> Result<BTreeMap<String, candle_core::Tensor>> {
        match &self.ema {
            Some(ema) => ema.weights(),
            None => copies(self.params.iter().map(|(n, v)| (n, &**v))),
        }
    }

    fn refuse_other_config(&self, saved: &Saved) -> Result<()> {
        let now = self.config.decisive(&self.identity);
        if saved.config_hash == hash(&now) {
            return Ok(());
        }
        let mut differences = Vec::new();
        if let (Value::Object(old), Value::Object(new)) = (&saved.config, &now) {
            for (field, value) in new {
                let before = old.get(field).unwrap_or(&Value::Null);
                if before != value {
                    differences.push(format!("{field} was {before}, is {value}"));
                }
            }
        }
        Err(Report::new(
            format_args!("checkpoint of step {}: configuration", saved.step),
            differences.join("; "),
        )
        .expected("the configuration that the run was started with")
        .remedy("restore it, choose another run folder, or allow the change")
        .checkpoint())
    }
}

fn hash(config: &Value) -> String {
    blake3::hash(config.to_string().as_bytes())
        .to_hex()
        .to_string()
}

fn broken(error: &dyn fmt::Display) -> Error {
    Report::new("checkpoint: state.json", error)
        .expected("the state of a training run")
        .remedy("resume with the version that wrote the checkpoint")
        .checkpoint()
}
