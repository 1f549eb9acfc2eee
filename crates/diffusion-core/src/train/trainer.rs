//! The loop.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Var;

use super::config::{Checked, SaveFailure};
use super::ema::Ema;
use super::event::{Cancel, Event, Observer};
use super::guard::{Failure, Policy};
use super::objective::{Objective, Source};
use super::optim::AdamW;
use super::order::Order;
use super::state::Progress;
use super::step::Made;
use crate::checkpoint::{Checkpoints, DiskStorage, RunLock, Snapshot, Storage, is_finite};
use crate::error::{Report, Result};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished {
        /// Steps done.
        step: u64,
    },
    /// [`Cancel`] was set; the state was saved.
    Interrupted {
        /// Steps done.
        step: u64,
    },
    /// The time was up; the state was saved.
    OutOfTime {
        /// Steps done.
        step: u64,
    },
}

/// Trains a set of parameters; see the [module](super) for the algorithm and an example.
pub struct Trainer {
    pub(super) params: BTreeMap<String, Var>,
    pub(super) config: Checked,
    pub(super) optim: AdamW,
    pub(super) ema: Option<Ema>,
    pub(super) progress: Progress,
    pub(super) identity: String,
    pub(super) config_change_allowed: bool,
    folder: Option<PathBuf>,
    storage: Option<Box<dyn Storage>>,
}

impl fmt::Debug for Trainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trainer")
            .field("parameters", &self.params.len())
            .field("config", &self.config)
            .field("step", &self.progress.step)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// The last checkpoint of a run in memory, where there is one.
struct Run<'a> {
    checkpoints: Option<Checkpoints>,
    saved: Option<u64>,
    observer: &'a mut dyn Observer,
}

impl Trainer {
    /// A trainer of `params`, which it changes in place.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) without parameters;
    /// [`Error::Numeric`](crate::Error::Numeric) when one is not finite.
    pub fn new(params: BTreeMap<String, Var>, config: Checked) -> Result<Self> {
        if params.is_empty() {
            return Err(Report::new("trainer: parameters", "none")
                .expected("at least one variable")
                .remedy("collect the parameters of the network")
                .config());
        }
        for (name, var) in &params {
            if !is_finite(var)? {
                return Err(
                    Report::new(format_args!("parameter `{name}`"), "NaN or infinity")
                        .expected("finite numbers")
                        .remedy("check its initialisation or the file that it came from")
                        .numeric(),
                );
            }
        }
        Ok(Self {
            optim: AdamW::new(config.adamw.clone()),
            ema: Ema::new(config.ema.clone(), &params)?,
            params,
            config,
            progress: Progress::default(),
            identity: String::new(),
            config_change_allowed: false,
            folder: None,
            storage: None,
        })
    }

    /// Keeps checkpoints under `folder`, and resumes from there.
    pub fn run_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
            ..self
        }
    }

    /// What decides the numbers beside the training configuration (model and data, as text). A
    /// checkpoint with another identity is refused.
    pub fn identity(self, identity: impl Into<String>) -> Self {
        Self {
            identity: identity.into(),
            ..self
        }
    }

    /// Keeps the checkpoints of the next run in another storage than the disk.
    pub fn storage(self, storage: Box<dyn Storage>) -> Self {
        Self {
            storage: Some(storage),
            ..self
        }
    }

    /// Accepts a checkpoint that another configuration wrote.
    pub fn allow_config_change(self) -> Self {
        Self {
            config_change_allowed: true,
            ..self
        }
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.progress.step
    }

    /// The parameters.
    pub fn params(&self) -> &BTreeMap<String, Var> {
        &self.params
    }

    /// Copies the averaged weights into the parameters, to evaluate or save the network with them.
    /// Training on from there is training from the averaged weights.
    ///
    /// # Errors
    ///
    /// Those of the copies.
    pub fn use_ema(&mut self) -> Result<()> {
        for (name, tensor) in self.ema()? {
            if let Some(var) = self.params.get(&name) {
                var.set(&tensor)?;
            }
        }
        Ok(())
    }

    /// Trains until the last step, the end of the time, or until `cancel` is set. With a run folder
    /// it first resumes from the newest sound checkpoint there.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) when another process uses the run folder, or
    /// its checkpoints are all damaged or of another configuration;
    /// [`Error::Numeric`](crate::Error::Numeric) when numbers leave the finite and the policy is to
    /// stop; and whatever objective, source, observer and storage report.
    pub fn run<O: Objective, S: Source<Batch = O::Batch>>(
        &mut self,
        objective: &mut O,
        source: &S,
        observer: &mut dyn Observer,
        cancel: &Cancel,
    ) -> Result<Outcome> {
        let rollback = matches!(self.config.guard.policy, Policy::Rollback { .. });
        if rollback && self.folder.is_none() {
            return Err(
                Report::new("train.guard.policy", "rollback without a run folder")
                    .expected("a run folder, for the checkpoint to go back to")
                    .remedy("give one, or choose another policy")
                    .config(),
            );
        }
        if objective.phases() == 0 || objective.phases() > 256 {
            return Err(Report::new("objective: phases", objective.phases())
                .expected("between 1 and 256")
                .config());
        }
        let mut order = Order::new(
            self.config.seed,
            source.len(),
            self.config.batch_size,
            self.config.accumulate,
        )?;
        let mut lock = self.folder.as_deref().map(RunLock::open).transpose()?;
        let _guard = lock.as_mut().map(RunLock::acquire).transpose()?;
        let mut run = Run {
            checkpoints: None,
            saved: None,
            observer,
        };
        if let Some(folder) = self.folder.clone() {
            self.resume(&folder, objective, &mut run)?;
        }
        run.observer.on(&Event::Started {
            resumed_from: run.saved,
        })?;
        if rollback && run.saved.is_none() {
            self.save(objective, &mut run)?;
        }
        let started = Instant::now();
        let mut logged = (started, self.progress.step);
        while self.progress.step < self.config.steps {
            let late = self
                .config
                .max_minutes
                .is_some_and(|m| started.elapsed().as_secs_f64() / 60.0 >= m);
            if late || cancel.is_set() {
                self.save(objective, &mut run)?;
                let step = self.progress.step;
                run.observer.on(&Event::Interrupted { step })?;
                return Ok(match late {
                    true => Outcome::OutOfTime { step },
                    false => Outcome::Interrupted { step },
                });
            }
            let before = self.progress.step;
            self.advance(objective, source, &mut order, &mut run, &mut logged)?;
            let step = self.progress.step;
            // A step that was left out or rolled back is not a new one to look at.
            if self.progress.skipped_in_row == 0 && run.observer.wants(step) && before < step {
                let values = run.observer.evaluate(step, &self.ema()?)?;
                run.observer.on(&Event::Evaluated { step, values })?;
            }
            if step.is_multiple_of(self.config.checkpoint_every) {
                self.progress.close_period();
                self.save(objective, &mut run)?;
            }
        }
        self.save(objective, &mut run)?;
        let step = self.progress.step;
        run.observer.on(&Event::Finished { step })?;
        Ok(Outcome::Finished { step })
    }

    /// One step, and what the policy makes of it.
    fn advance<O: Objective, S: Source<Batch = O::Batch>>(
        &mut self,
        objective: &mut O,
        source: &S,
        order: &mut Order,
        run: &mut Run<'_>,
        logged: &mut (Instant, u64),
    ) -> Result<()> {
        let step = self.progress.step + 1;
        if self.progress.left_out.contains(&self.progress.step) {
            self.progress.step = step;
            let why = "left out after a rollback".to_string();
            return run.observer.on(&Event::Skipped { step, why });
        }
        let made = match self.attempt(objective, source, order)? {
            Ok(made) => made,
            Err(failure) => return self.fail(failure, objective, run),
        };
        let spike =
            self.progress
                .guard
                .observe(&self.config.guard.spike, made.loss, made.grad_norm);
        if let Some(why) = spike {
            run.observer.on(&Event::Spike {
                step,
                why: why.clone(),
            })?;
            if matches!(self.config.guard.policy, Policy::Rollback { .. }) {
                let why = format!("step {step}: {why}");
                return self.fail(
                    Failure {
                        why,
                        weights_are_sound: false,
                    },
                    objective,
                    run,
                );
            }
        }
        if let Some(ema) = self.ema.as_mut().filter(|_| !made.averaged) {
            ema.update(&self.params)?;
        }
        self.progress.step = step;
        self.progress.skipped_in_row = 0;
        self.progress.loss_sum += made.loss;
        self.progress.loss_count += 1;
        if step.is_multiple_of(self.config.log_every) || step == self.config.steps {
            let seconds = logged.0.elapsed().as_secs_f64();
            let examples = step.saturating_sub(logged.1) * order.examples_per_step();
            *logged = (Instant::now(), step);
            let Made {
                epoch,
                loss,
                losses,
                grad_norm,
                lr,
                ..
            } = made;
            let examples_per_s = examples as f64 / seconds.max(1e-9);
            run.observer.on(&Event::Step {
                step,
                epoch,
                loss,
                losses,
                grad_norm,
                lr,
                seconds,
                examples_per_s,
            })?;
        }
        Ok(())
    }

    /// A step failed: stop, leave it out, or go back.
    fn fail(
        &mut self,
        failure: Failure,
        objective: &mut impl Objective,
        run: &mut Run<'_>,
    ) -> Result<()> {
        let step = self.progress.step + 1;
        match self.config.guard.policy {
            Policy::Skip {
                max_in_row,
                max_fraction,
            } if failure.weights_are_sound => {
                let most = (max_fraction * self.config.steps as f64).ceil() as u64;
                self.progress.skipped += 1;
                self.progress.skipped_in_row += 1;
                let (all, row) = (self.progress.skipped, self.progress.skipped_in_row);
                if row > max_in_row || all > most.max(max_in_row) {
                    let why = format!("{}; the {row}. in a row, {all} in all", failure.why);
                    return Err(self.stopped(&why, run));
                }
                self.progress.step = step;
                run.observer.on(&Event::Skipped {
                    step,
                    why: failure.why,
                })
            }
            Policy::Rollback { max_in_row } => {
                let rollbacks = self.progress.rollbacks + 1;
                if rollbacks > max_in_row {
                    let why = format!("{}; {max_in_row} rollbacks did not help", failure.why);
                    return Err(self.stopped(&why, run));
                }
                let mut left_out = self.progress.left_out.clone();
                left_out.insert(self.progress.step);
                let (snapshot, _) = Self::load(run)?;
                let Some(snapshot) = snapshot else {
                    return Err(self.stopped(&failure.why, run));
                };
                let to = snapshot.step;
                self.restore(objective, &snapshot)?;
                run.saved = Some(to);
                self.progress.left_out = left_out;
                self.progress.rollbacks = rollbacks;
                run.observer.on(&Event::RolledBack {
                    step,
                    to,
                    why: failure.why,
                })
            }
            _ => Err(self.stopped(&failure.why, run)),
        }
    }

    fn stopped(&self, why: &str, run: &Run<'_>) -> crate::Error {
        let stands = match run.saved {
            Some(step) => format!("the checkpoint of step {step} stands"),
            None => "there is no checkpoint".to_string(),
        };
        Report::new("training", why)
            .expected("finite numbers")
            .remedy(format!(
                "{stands}; nothing that is not finite was saved; lower the learning rate, look at \
                 these examples, or choose another train.guard.policy"
            ))
            .numeric()
    }

    fn resume(
        &mut self,
        folder: &Path,
        objective: &mut impl Objective,
        run: &mut Run<'_>,
    ) -> Result<()> {
        let storage = self
            .storage
            .take()
            .unwrap_or_else(|| Box::new(DiskStorage::new()));
        run.checkpoints = Some(Checkpoints::open(folder, storage, self.config.keep())?);
        let (snapshot, rejected) = Self::load(run)?;
        for event in &rejected {
            run.observer.on(event)?;
        }
        if let Some(snapshot) = snapshot {
            self.restore(objective, &snapshot)?;
            run.saved = Some(snapshot.step);
        }
        Ok(())
    }

    fn load(run: &mut Run<'_>) -> Result<(Option<Snapshot>, Vec<Event>)> {
        let Some(checkpoints) = &mut run.checkpoints else {
            return Ok((None, Vec::new()));
        };
        let loaded = checkpoints.load()?;
        let rejected = loaded
            .rejected
            .into_iter()
            .map(|r| Event::Rejected {
                path: r.path,
                why: r.why,
            })
            .collect();
        Ok((loaded.snapshot, rejected))
    }

    /// Writes a checkpoint of the present step unless there is one.
    fn save(&mut self, objective: &impl Objective, run: &mut Run<'_>) -> Result<()> {
        let step = self.progress.step;
        if run.saved == Some(step) {
            return Ok(());
        }
        let Some(checkpoints) = &mut run.checkpoints else {
            return Ok(());
        };
        run.observer.on(&Event::Saving { step })?;
        self.progress.left_out.retain(|&s| s >= step);
        match checkpoints.save(&self.snapshot(objective)?) {
            Ok(path) => {
                run.saved = Some(step);
                self.progress.rollbacks = 0;
                run.observer.on(&Event::Saved { path, step })
            }
            Err(error @ crate::Error::Io { .. })
                if self.config.save_failure == SaveFailure::Continue =>
            {
                tracing::warn!(step, %error, "a checkpoint could not be written");
                run.observer.on(&Event::SaveFailed {
                    step,
                    why: error.to_string(),
                })
            }
            Err(error) => Err(error),
        }
    }
}
