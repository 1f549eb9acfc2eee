//! What a run reports while it runs, and how it is asked to stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;

use crate::error::Result;

/// The value of one loss at one step.
#[derive(Clone, Debug, PartialEq)]
pub struct LossValue {
    /// The phase that gave it.
    pub phase: usize,
    /// Its name.
    pub name: String,
    /// The mean over the micro-batches, without the weight.
    pub value: f64,
    /// Its factor in the sum.
    pub weight: f64,
}

/// Something that happened in a run. Steps count those done: the first event is that of step 1.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The run begins, after the last sound checkpoint was restored.
    Started {
        /// The step of that checkpoint.
        resumed_from: Option<u64>,
    },
    /// A step that is logged.
    Step {
        /// Steps done.
        step: u64,
        /// The epoch of its first example.
        epoch: u64,
        /// The weighted sum of the losses.
        loss: f64,
        /// Each of them.
        losses: Vec<LossValue>,
        /// The norm of the gradient before clipping.
        grad_norm: f64,
        /// The learning rate.
        lr: f64,
        /// Seconds since the last logged step.
        seconds: f64,
        /// Examples per second since then.
        examples_per_s: f64,
    },
    /// A loss or a gradient far from the usual.
    Spike {
        /// The step.
        step: u64,
        /// What was seen and what is usual.
        why: String,
    },
    /// A step whose update was not made.
    Skipped {
        /// The step.
        step: u64,
        /// Why.
        why: String,
    },
    /// The run went back to its last checkpoint.
    RolledBack {
        /// The step that failed.
        step: u64,
        /// The step of the checkpoint.
        to: u64,
        /// Why.
        why: String,
    },
    /// An observer has looked at the averaged weights.
    Evaluated {
        /// Steps done.
        step: u64,
        /// What it measured, by name.
        values: Vec<(String, f64)>,
    },
    /// A checkpoint is about to be written. Whoever keeps records makes them durable now.
    Saving {
        /// Steps done.
        step: u64,
    },
    /// A checkpoint was written.
    Saved {
        /// Its folder.
        path: PathBuf,
        /// Steps done.
        step: u64,
    },
    /// A checkpoint could not be written, and the run goes on.
    SaveFailed {
        /// Steps done.
        step: u64,
        /// Why.
        why: String,
    },
    /// A checkpoint was not accepted on start.
    Rejected {
        /// Its folder.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// All steps are done.
    Finished {
        /// Steps done.
        step: u64,
    },
    /// The run stops before its end; it can be resumed.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

/// Watches a run. Any `FnMut(&Event)` is one.
pub trait Observer {
    /// Something happened.
    ///
    /// # Errors
    ///
    /// Ends the run: records that cannot be written are not dropped in silence.
    fn on(&mut self, event: &Event) -> Result<()>;

    /// Whether [`Observer::evaluate`] wants to see the weights after this step.
    fn wants(&self, _step: u64) -> bool {
        false
    }

    /// Looks at the averaged weights after a step, between two steps of the run: measures them on
    /// held-out data, draws samples. What it returns is reported as [`Event::Evaluated`]. It cannot
    /// change the run, whose random numbers depend on seed and step alone.
    ///
    /// # Errors
    ///
    /// Ends the run, as those of [`Observer::on`].
    fn evaluate(
        &mut self,
        _step: u64,
        _weights: &BTreeMap<String, Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }
}

impl<F: FnMut(&Event)> Observer for F {
    fn on(&mut self, event: &Event) -> Result<()> {
        self(event);
        Ok(())
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Observer for Quiet {
    fn on(&mut self, _event: &Event) -> Result<()> {
        Ok(())
    }
}

/// Two observers, the first one first.
#[derive(Clone, Debug, Default)]
pub struct Both<A, B>(pub A, pub B);

impl<A: Observer, B: Observer> Observer for Both<A, B> {
    fn on(&mut self, event: &Event) -> Result<()> {
        self.0.on(event)?;
        self.1.on(event)
    }

    fn wants(&self, step: u64) -> bool {
        self.0.wants(step) || self.1.wants(step)
    }

    fn evaluate(
        &mut self,
        step: u64,
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        let mut values = Vec::new();
        if self.0.wants(step) {
            values = self.0.evaluate(step, weights)?;
        }
        if self.1.wants(step) {
            values.extend(self.1.evaluate(step, weights)?);
        }
        Ok(values)
    }
}

/// An observer or none.
impl<O: Observer> Observer for Option<O> {
    fn on(&mut self, event: &Event) -> Result<()> {
        match self {
            Some(observer) => observer.on(event),
            None => Ok(()),
        }
    }

    fn wants(&self, step: u64) -> bool {
        self.as_ref().is_some_and(|observer| observer.wants(step))
    }

    fn evaluate(
        &mut self,
        step: u64,
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        match self {
            Some(observer) => observer.evaluate(step, weights),
            None => Ok(Vec::new()),
        }
    }
}

/// Asks a run to stop at the next step boundary, from another thread or a signal handler.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Nobody has asked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether somebody has asked.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// The flag itself, for a signal handler that sets it.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}
