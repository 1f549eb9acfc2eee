//! The protocol between the `case` program and the driver, which the peers speak too.
//!
//! One line of JSON answers one line of text:
//!
//! ```text
//! (start)    {"ready": true}           once everything is built
//! run N      {"wall": [s, …], "cpu": [s, …]}      seconds of each of N calls
//! quit       (ends)
//! ```
//!
//! where `wall` is the time that passed and `cpu` the CPU time of all threads of the process.

use crate::case::{Case, find, specs};
use crate::clock::{Memory, Moment};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::io::{BufRead, Write};
use std::path::Path;

/// The most calls that one request may ask for.
const MOST: usize = 1_000_000;

/// Names and kinds of all cases, a line of JSON each.
///
/// # Errors
/// Those of writing.
pub fn list(out: &mut dyn Write) -> Result<()> {
    for spec in specs() {
        writeln!(out, "{}", serde_json::to_string(&spec)?)?;
    }
    Ok(())
}

/// Builds a case, leaves `case.safetensors` and `case.json` in `folder`, and answers requests until
/// `quit` or the end of the input.
///
/// # Errors
/// Those of the case, of the files and of the pipe; a request that is not understood.
pub fn serve(
    name: &str,
    folder: &Path,
    input: &mut dyn BufRead,
    out: &mut dyn Write,
) -> Result<()> {
    let mut case = find(name)?.build()?;
    export(case.as_ref(), folder)?;
    answer(case.as_mut(), input, out)
}

/// The most memory that building a case and calling it `calls` times takes, as a line of JSON:
/// `{"before_kb": …, "peak_kb": …}`, resident before the case was built and at its peak.
///
/// # Errors
/// Those of the case; a system that does not tell.
pub fn memory(name: &str, calls: usize, out: &mut dyn Write) -> Result<()> {
    let spec = find(name)?;
    let unknown = "this system does not tell the memory of a process; Linux does";
    Memory::reset_peak();
    let before = Memory::now().context(unknown)?;
    let mut case = spec.build()?;
    for _ in 0..calls {
        case.call()?;
    }
    let after = Memory::now().context(unknown)?;
    let line = json!({ "before_kb": before.resident, "peak_kb": after.peak });
    writeln!(out, "{line}")?;
    Ok(())
}

/// Writes what the peer needs.
fn export(case: &dyn Case, folder: &Path) -> Result<()> {
    let reference = case.reference()?;
    let path = folder.join("case.safetensors");
    candle_core::safetensors::save(&reference.tensors.into_iter().collect(), &path)
        .with_context(|| path.display().to_string())?;
    let path = folder.join("case.json");
    std::fs::write(&path, reference.config.to_string()).with_context(|| path.display().to_string())
}

fn answer(case: &mut dyn Case, input: &mut dyn BufRead, out: &mut dyn Write) -> Result<()> {
    writeln!(out, "{}", json!({ "ready": true }))?;
    out.flush()?;
    let mut line = String::new();
    loop {
        line.clear();
        if input.read_line(&mut line)? == 0 || line.trim() == "quit" {
            return Ok(());
        }
        let request = line.trim();
        let Some(calls) = request.strip_prefix("run ") else {
            bail!("request `{request}`; expected `run N` or `quit`");
        };
        let calls: usize = calls
            .parse()
            .with_context(|| format!("request `{request}`; expected a number of calls"))?;
        ensure!(
            (1..=MOST).contains(&calls),
            "request `{request}`; expected between 1 and {MOST} calls"
        );
        let mut wall = Vec::with_capacity(calls);
        let mut cpu = Vec::with_capacity(calls);
        for _ in 0..calls {
            let start = Moment::now()?;
            case.call()?;
            let (w, c) = start.elapsed()?;
            wall.push(w);
            cpu.push(c);
        }
        writeln!(out, "{}", json!({ "wall": wall, "cpu": cpu }))?;
        out.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Reference;
    use serde_json::Value;

    struct Count(usize);

    impl Case for Count {
        fn call(&mut self) -> Result<()> {
            self.0 += 1;
            Ok(())
        }

        fn reference(&self) -> Result<Reference> {
            Ok(Reference::new(json!({ "count": self.0 })))
        }
    }

    fn talk(requests: &str) -> (usize, Result<Vec<Value>>) {
        let mut case = Count(0);
        let mut out = Vec::new();
        let end = answer(&mut case, &mut requests.as_bytes(), &mut out);
        let lines = String::from_utf8(out).unwrap();
        let lines = lines.lines().map(|l| serde_json::from_str(l).unwrap());
        (case.0, end.map(|()| lines.collect()))
    }

    #[test]
    fn each_request_has_one_line() {
        let (calls, lines) = talk("run 3\nrun 1\nquit\nrun 7\n");
        let lines = lines.unwrap();
        assert_eq!(calls, 4);
        assert_eq!(lines[0]["ready"], true);
        assert_eq!(lines[1]["wall"].as_array().unwrap().len(), 3);
        assert_eq!(lines[1]["cpu"].as_array().unwrap().len(), 3);
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for request in ["run", "run many", "run 0", "run 99999999", "walk 3"] {
            let (calls, end) = talk(&format!("{request}\n"));
            let message = end.unwrap_err().to_string();
            assert!(message.contains(request) && calls == 0, "{message}");
        }
    }

    #[test]
    fn the_end_of_the_input_is_the_end() {
        assert_eq!(talk("run 2").0, 2);
    }
}
