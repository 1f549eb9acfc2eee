//! A child as its parent sees it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Model;

/// Microseconds that a child takes longer.
#[derive(Clone, Copy)]
pub struct Pace {
    /// For each step.
    pub steps: u64,
    /// For each operation on files, which it then announces.
    pub files: u64,
}

/// A child and what it has said so far.
pub struct Running {
    /// The process itself.
    pub process: Child,
    lines: Receiver<String>,
    /// The step that it resumed from, once it has started.
    pub from: Option<u64>,
    /// The last step that it announced.
    pub step: u64,
    /// Checkpoints that it did not accept.
    pub rejected: Vec<String>,
}

impl Running {
    /// Starts a child; `threads` bounds those that the tensor library uses.
    pub fn start(model: Model, out: &Path, pace: Pace, threads: usize) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args([
                "--child",
                "--model",
                model.name(),
                "--slow-steps",
                &pace.steps.to_string(),
                "--slow-files",
                &pace.files.to_string(),
                "--out",
            ])
            .arg(out)
            .env("RAYON_NUM_THREADS", threads.to_string())
            .env("CANDLE_NUM_THREADS", threads.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let stdout = process.stdout.take().context("the child has no stdout")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout)
                .lines()
                .map_while(std::io::Result::ok)
            {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            process,
            lines,
            from: None,
            step: 0,
            rejected: Vec::new(),
        })
    }

    /// The next line; none when the child has ended or `limit` is over.
    pub fn line(&mut self, limit: Duration) -> Option<String> {
        let line = self.lines.recv_timeout(limit).ok()?;
        let number = |rest: &str| rest.parse::<u64>().unwrap_or(0);
        if let Some(rest) = line.strip_prefix("started ") {
            self.from = Some(number(rest));
        } else if let Some(rest) = line.strip_prefix("step ") {
            self.step = number(rest);
        } else if line.starts_with("rejected ") {
            self.rejected.push(line.clone());
        }
        Some(line)
    }

    /// Reads on until a line begins with `prefix`; false when the child ended before.
    pub fn wait_for(&mut self, prefix: &str) -> bool {
        while let Some(line) = self.line(Duration::from_secs(60)) {
            if line.starts_with(prefix) {
                return true;
            }
        }
        false
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.drain();
        Ok(())
    }

    /// Reads what is left of its lines.
    pub fn drain(&mut self) {
        while self.line(Duration::from_secs(60)).is_some() {}
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) -> Result<()> {
        let command = format!("kill -{name} {}", self.process.id());
        ensure!(
            Command::new("sh")
                .args(["-c", &command])
                .status()?
                .success(),
            "{command} failed"
        );
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fine when it has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
