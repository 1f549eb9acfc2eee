//! Progress on standard error, when somebody looks.

use crate::out::note;
use diffusion_core::Result;
use diffusion_core::sample;
use diffusion_core::train::{Cancel, Event, Observer};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::Instant;

/// A bar of `total` steps; without a terminal, a line now and then; nothing when quiet.
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
    last_line: Instant,
    cancel: Cancel,
    finished: u64,
}

impl Progress {
    /// Progress over `total` units.
    pub fn new(total: u64, quiet: bool, cancel: &Cancel) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) =
            ProgressStyle::with_template("{bar:30} {pos}/{len}  {elapsed}, {eta} left  {msg}")
        {
            bar.set_style(style);
        }
        Self {
            bar,
            lines: !terminal && !quiet,
            last_line: Instant::now(),
            cancel: cancel.clone(),
            finished: 0,
        }
    }

    fn say(&self, text: &str) {
        if self.lines {
            note!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    /// Shows how far the work is; breaks off when it was cancelled.
    pub fn at(&self, done: f64) -> ControlFlow<()> {
        self.bar.set_position(done as u64);
        if self.cancel.is_set() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// Takes the bar away.
    pub fn done(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Progress {
    fn on(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Started {
                resumed_from: Some(step),
            } => {
                self.bar.set_position(*step);
                self.say(&format!("resumed from step {step}"));
            }
            Event::Step {
                step,
                loss,
                lr,
                examples_per_s,
                ..
            } => {
                self.bar.set_position(*step);
                let text = format!("loss {loss:.4}  lr {lr:.1e}  {examples_per_s:.0} images/s");
                self.bar.set_message(text.clone());
                if self.lines && self.last_line.elapsed().as_secs() >= 10 {
                    self.last_line = Instant::now();
                    note!("step {step}  {text}");
                }
            }
            Event::Evaluated { step, values } => {
                let values: Vec<String> = values
                    .iter()
                    .map(|(name, value)| format!("{} {value:.4}", name.replace('_', " ")))
                    .collect();
                self.say(&format!("step {step}: {}", values.join(", ")));
            }
            Event::Spike { step, why } => self.say(&format!("step {step}: spike: {why}")),
            Event::Skipped { step, why } => self.say(&format!("step {step}: skipped: {why}")),
            Event::RolledBack { step, to, why } => {
                self.say(&format!("step {step}: rolled back to {to}: {why}"));
            }
            Event::SaveFailed { step, why } => {
                self.say(&format!(
                    "step {step}: the checkpoint could not be written: {why}"
                ));
            }
            Event::Rejected { path, why } => {
                self.say(&format!("rejected checkpoint {}: {why}", path.display()));
            }
            Event::Interrupted { step } => self.say(&format!("interrupted at step {step}: saved")),
            _ => {}
        }
        Ok(())
    }
}

impl sample::Observer for Progress {
    fn step(&mut self, progress: &sample::Progress<'_>) -> ControlFlow<()> {
        self.bar.set_position(self.finished + progress.done as u64);
        if progress.done == progress.total {
            self.finished += progress.total as u64;
        }
        if self.cancel.is_set() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
