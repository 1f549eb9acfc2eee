//! A file with one line of JSON for each logged step.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::event::{Event, Observer};
use crate::checkpoint::write_atomic;
use crate::error::{Error, Result};

/// Writes `metrics.jsonl`.
///
/// A run that was interrupted and resumed leaves the same bytes as one that was not: on start the
/// lines behind the step resumed from are cut off, and by default no line depends on the clock.
///
/// ```text
/// {"step":10,"epoch":0,"loss":0.9,"losses":{"simple":0.9},"grad_norm":1.2,"lr":0.0001}
/// {"step":12,"event":"spike","why":"…"}
/// ```
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    timed: bool,
    file: Option<File>,
}

impl JsonLines {
    /// Will write to `path`, usually in the run folder; touches nothing before the run starts.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            timed: false,
            file: None,
        }
    }

    /// Adds seconds and examples per second to each step. Two runs then differ.
    pub fn timed(self) -> Self {
        Self {
            timed: true,
            ..self
        }
    }

    /// Keeps the lines up to `step` and drops the rest, torn last lines included.
    fn cut(&mut self, step: u64) -> Result<()> {
        self.file = None;
        let io = |e| Error::io(&self.path, e);
        let old = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io(e)),
        };
        let mut kept = Vec::new();
        for line in old.split_inclusive(|&b| b == b'\n') {
            if line.ends_with(b"\n") && step_of(line).is_some_and(|s| s <= step) {
                kept.extend_from_slice(line);
            }
        }
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        write_atomic(&self.path, &kept)?;
        let file = OpenOptions::new()
            .append(true)
            .open(&self.path)
            .map_err(io)?;
        self.file = Some(file);
        Ok(())
    }

    fn line(&mut self, value: &Value) -> Result<()> {
        if let Some(file) = &mut self.file {
            // One write a line, so that a kill never leaves half of one behind.
            file.write_all(format!("{value}\n").as_bytes())
                .map_err(|e| Error::io(&self.path, e))?;
        }
        Ok(())
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Value>(line)
        .ok()?
        .get("step")?
        .as_u64()
}

impl Observer for JsonLines {
    fn on(&mut self, event: &Event) -> Result<()> {
        let note = |step: &u64, event: &str, why: &String| json!({ "step": step, "event": event, "why": why });
        match event {
            Event::Started { resumed_from } => self.cut(resumed_from.unwrap_or(0)),
            Event::RolledBack { to, .. } => self.cut(*to),
            Event::Spike { step, why } => self.line(&note(step, "spike", why)),
            Event::Skipped { step, why } => self.line(&note(step, "skipped", why)),
            Event::Evaluated { step, values } => {
                let mut line = json!({ "step": step, "event": "evaluated" });
                for (name, value) in values {
                    line[name] = json!(value);
                }
                self.line(&line)
            }
            // What a checkpoint stands for must not be lost when the power goes after it.
            Event::Saving { .. } => match &self.file {
                Some(file) => file.sync_data().map_err(|e| Error::io(&self.path, e)),
                None => Ok(()),
            },
            Event::Step {
                step,
                epoch,
                loss,
                losses,
                grad_norm,
                lr,
                seconds,
                examples_per_s,
            } => {
                let mut terms = Map::new();
                for l in losses {
                    let name = match terms.contains_key(&l.name) {
                        true => format!("{}@{}", l.name, l.phase),
                        false => l.name.clone(),
                    };
                    terms.insert(name, json!(l.value));
                }
                let mut line = json!({
                    "step": step, "epoch": epoch, "loss": loss, "losses": terms,
                    "grad_norm": grad_norm, "lr": lr,
                });
                if self.timed {
                    line["seconds"] = json!(seconds);
                    line["examples_per_s"] = json!(examples_per_s);
                }
                self.line(&line)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Event {
        Event::Step {
            step,
            epoch: 0,
            loss: 0.5 / step as f64,
            losses: Vec::new(),
            grad_norm: 1.0,
            lr: 0.1,
            seconds: step as f64,
            examples_per_s: 1.0,
        }
    }

    #[test]
    fn a_resumed_file_equals_an_uninterrupted_one() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a.jsonl"), dir.path().join("run/b.jsonl"));
        let mut whole = JsonLines::new(&a);
        whole.on(&Event::Started { resumed_from: None }).unwrap();
        (1..=9).for_each(|s| whole.on(&step(s)).unwrap());

        let mut first = JsonLines::new(&b);
        first.on(&Event::Started { resumed_from: None }).unwrap();
        (1..=7).for_each(|s| first.on(&step(s)).unwrap());
        drop(first);
        OpenOptions::new()
            .append(true)
            .open(&b)
            .unwrap()
            .write_all(b"{\"step\":8,\"ep")
            .unwrap();
        let mut second = JsonLines::new(&b);
        second
            .on(&Event::Started {
                resumed_from: Some(4),
            })
            .unwrap();
        (5..=9).for_each(|s| second.on(&step(s)).unwrap());
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
        assert_eq!(fs::read_to_string(&a).unwrap().lines().count(), 9);

        let mut fresh = JsonLines::new(&b).timed();
        fresh.on(&Event::Started { resumed_from: None }).unwrap();
        fresh.on(&step(1)).unwrap();
        let text = fs::read_to_string(&b).unwrap();
        assert!(
            text.lines().count() == 1 && text.contains("seconds"),
            "{text}"
        );
    }
}
