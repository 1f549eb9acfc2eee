//! What a run reports while it runs, and how it is asked to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
