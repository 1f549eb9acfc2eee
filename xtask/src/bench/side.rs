//! A program that serves a case: ours, or a peer's.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::pairs::{Player, Times};
use crate::shell;

/// The first line of a side. Ours says no more than that it is ready.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Ready {
    ready: bool,
    /// Of the results, relative to their size.
    pub difference: Option<f64>,
    /// The fastest eager way.
    pub way: Option<String>,
    /// Further ways that can be asked for.
    pub ways: Vec<String>,
    /// What could not be prepared, and why.
    pub notes: Vec<String>,
}

/// Resident memory before the work, and its peak.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Peak {
    before_kb: f64,
    peak_kb: f64,
}

impl Peak {
    /// What the work took, in MB of 1024² bytes.
    pub fn megabytes(self) -> f64 {
        (self.peak_kb - self.before_kb) / 1024.0
    }
}

/// A running side.
pub struct Side {
    name: String,
    talk: Talk<BufReader<ChildStdout>, ChildStdin>,
    child: Child,
}

/// Requests and answers over a pair of pipes.
struct Talk<R, W> {
    from: R,
    to: Option<W>,
}

impl Side {
    /// Starts a side and waits until it is ready.
    pub fn start(command: &mut Command) -> Result<(Self, Ready)> {
        let name = shell::shown(command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{name}`"))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("`{name}` has no pipes");
        };
        let talk = Talk {
            from: BufReader::new(from),
            to: Some(to),
        };
        let mut side = Self { name, talk, child };
        let ready: Ready = side.explained(|talk| talk.answer())?;
        if !ready.ready {
            bail!("`{}` did not say that it is ready", side.name);
        }
        Ok((side, ready))
    }

    /// An error names the side, and how it ended if it did.
    fn explained<T>(
        &mut self,
        f: impl FnOnce(&mut Talk<BufReader<ChildStdout>, ChildStdin>) -> Result<T>,
    ) -> Result<T> {
        f(&mut self.talk).map_err(|error| {
            let ended = match self.child.try_wait() {
                Ok(Some(status)) => format!(" ({status})"),
                _ => String::new(),
            };
            error.context(format!("`{}`{ended}", self.name))
        })
    }
}

impl Player for Side {
    fn turn(&mut self, calls: usize, way: Option<&str>) -> Result<Times> {
        let request = match way {
            Some(way) => format!("run {calls} {way}"),
            None => format!("run {calls}"),
        };
        self.explained(|talk| {
            talk.ask(&request)?;
            talk.answer()
        })
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // The end of its input ends a side; whatever it still does is of no use.
        self.talk.to = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl<R: BufRead, W: Write> Talk<R, W> {
    fn ask(&mut self, request: &str) -> Result<()> {
        let to = self.to.as_mut().context("the side has been told to end")?;
        writeln!(to, "{request}")?;
        Ok(to.flush()?)
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            bail!("it ended without an answer; its message is above");
        }
        parse(&line)
    }
}

/// Runs a program to its end and reads the one line that it prints.
pub fn once<T: DeserializeOwned>(command: &mut Command) -> Result<T> {
    let text = shell::output(command)?;
    parse(text.lines().last().unwrap_or_default()).context(shell::shown(command))
}

/// A line of the protocol. JSON has no NaN and no infinity, but Python writes them.
pub fn parse<T: DeserializeOwned>(line: &str) -> Result<T> {
    let plain = line
        .replace("-Infinity", "-1e308")
        .replace("Infinity", "1e308");
    serde_json::from_str(&plain.replace("NaN", "null"))
        .map_err(|error| anyhow!("`{}` is no answer: {error}", line.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(answers: &'static str) -> Talk<&'static [u8], Vec<u8>> {
        Talk {
            from: answers.as_bytes(),
            to: Some(Vec::new()),
        }
    }

    #[test]
    fn a_request_has_an_answer() {
        let mut talk = talk("{\"wall\": [0.5, 0.25], \"cpu\": [1.0, 0.5]}\n");
        talk.ask("run 2").unwrap();
        let times: Times = talk.answer().unwrap();
        assert_eq!((times.wall, times.cpu), (vec![0.5, 0.25], vec![1.0, 0.5]));
        assert_eq!(talk.to.as_deref(), Some(b"run 2\n".as_slice()));
        let end = talk.answer::<Times>().unwrap_err().to_string();
        assert!(end.contains("ended without an answer"), "{end}");
    }

    #[test]
    fn both_first_lines_are_read() {
        let ours: Ready = parse("{\"ready\": true}").unwrap();
        assert!(ours.ready && ours.difference.is_none() && ours.ways.is_empty());
        let peer: Ready = parse(
            r#"{"ready": true, "difference": 1.5e-6, "way": "channels_last", "seconds": {"a": 1.0},
                "ways": ["bf16"], "notes": ["compiled: no compiler"], "version": "2.15"}"#,
        )
        .unwrap();
        assert_eq!(peer.difference, Some(1.5e-6));
        assert_eq!(
            (peer.way.as_deref(), peer.ways.len()),
            (Some("channels_last"), 1)
        );
        let broken: Ready = parse(r#"{"ready": true, "difference": Infinity}"#).unwrap();
        assert_eq!(broken.difference, Some(1e308));
    }

    #[test]
    fn noise_is_quoted() {
        let error = parse::<Times>("Killed\n").unwrap_err().to_string();
        assert!(error.starts_with("`Killed` is no answer"), "{error}");
    }

    #[test]
    fn memory_is_a_difference() {
        let peak: Peak = parse(r#"{"before_kb": 1024, "peak_kb": 3072}"#).unwrap();
        assert_eq!(peak.megabytes(), 2.0);
    }

    #[cfg(unix)]
    #[test]
    fn a_side_that_ends_at_once_is_named() {
        let error = Side::start(&mut Command::new("true"))
            .map(|_| ())
            .unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.starts_with("`true`") && text.contains("without an answer"),
            "{text}"
        );
    }
}
