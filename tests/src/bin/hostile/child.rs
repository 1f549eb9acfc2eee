//! The process that reads: one line before each file and one after it.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::ValueEnum;
use diffusion_tests::targets::{Format, Verdict, helps, read};

static PANIC: Mutex<String> = Mutex::new(String::new());

/// Milliseconds after which a file is read again to see whether it was the file.
const SLOW: u128 = 500;

/// Reads the files of a list (`format <tab> path` a line) from number `skip` on.
pub fn read_all(list: &Path, skip: usize) -> Result<()> {
    std::panic::set_hook(Box::new(|info| {
        let text = info.to_string().replace('\n', " ");
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }));
    let list = std::fs::read_to_string(list)?;
    let mut out = std::io::stdout().lock();
    for (number, line) in list.lines().enumerate().skip(skip) {
        let (format, path) = line.split_once('\t').context("a line without a tab")?;
        let format = Format::from_str(format, true).map_err(anyhow::Error::msg)?;
        writeln!(out, "start {number}")?;
        out.flush()?;
        // Forgets the peak of the files before; where that is not allowed, growth shows only once.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let before = memory("VmRSS:").max(memory_floor());
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| read(format, Path::new(path))));
        let mut millis = start.elapsed().as_millis();
        let grown = memory("VmHWM:").saturating_sub(before);
        // A busy machine makes anything slow once; what is slow three times is slow itself.
        for _ in 0..2 {
            if millis > SLOW {
                let start = Instant::now();
                let _ = catch_unwind(AssertUnwindSafe(|| read(format, Path::new(path))));
                millis = millis.min(start.elapsed().as_millis());
            }
        }
        let (verdict, text) = match result {
            Ok(Verdict::Refused(text)) if helps(&text) => ("refused", text),
            Ok(Verdict::Refused(text)) => ("vague", text),
            Ok(Verdict::Accepted) => ("accepted", String::new()),
            Ok(Verdict::Inconsistent(text)) => ("inconsistent", text),
            Err(_) => (
                "panic",
                PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            ),
        };
        // A message is one line, and not the file.
        let text: String = text.replace(['\n', '\r'], " ").chars().take(300).collect();
        writeln!(out, "done {number} {verdict} {millis} {grown} {text}")?;
        out.flush()?;
    }
    Ok(())
}

/// The peak when it cannot be forgotten, else 0.
fn memory_floor() -> u64 {
    let (peak, now) = (memory("VmHWM:"), memory("VmRSS:"));
    if peak > now + 1024 { peak } else { 0 }
}

/// KiB of a line of the process's status.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap_or(0)
}
