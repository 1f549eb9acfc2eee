//! Writes the files, watches the children and counts.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use diffusion_tests::hostile::{Sample, files};
use diffusion_tests::targets::{Bench, Format};

use crate::Args;

/// Address space of a child, KiB.
const CEILING: u64 = 1 << 20;
/// A reader that takes longer hangs.
const HANG: u128 = 1000;
/// When a silent child is given up.
const SILENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Tally {
    files: usize,
    refused: usize,
    accepted: usize,
    inconsistent: usize,
    panics: usize,
    hangs: usize,
    excesses: usize,
    worst: u64,
    findings: Vec<(usize, String)>,
}

impl Tally {
    fn bad(&self) -> usize {
        self.inconsistent + self.panics + self.hangs + self.excesses
    }
}

/// Reads everything and prints the table.
pub fn run(args: &Args) -> Result<ExitCode> {
    let bench = Bench::new()?;
    println!(
        "{:<12} {:>6} {:>8} {:>9} {:>13} {:>7} {:>6} {:>9}  memory at worst",
        "format", "files", "refused", "accepted", "contradictory", "panics", "hangs", "too much"
    );
    let mut bad = 0;
    for format in Format::ALL {
        if args.format.is_some_and(|only| only != format) {
            continue;
        }
        let samples = files(format, args.files, args.seed, &bench)?;
        let tally = one(format, &samples, &bench)?;
        bad += tally.bad();
        println!(
            "{:<12} {:>6} {:>8} {:>9} {:>13} {:>7} {:>6} {:>9}  {} MiB",
            format.name(),
            tally.files,
            tally.refused,
            tally.accepted,
            tally.inconsistent,
            tally.panics,
            tally.hangs,
            tally.excesses,
            tally.worst >> 10,
        );
        for (number, what) in &tally.findings {
            let sample = &samples[*number];
            println!("  {}: {what}", sample.what);
            if let Some(folder) = &args.keep {
                std::fs::create_dir_all(folder)?;
                let name = format!("{}-{number}-{}", format.name(), sample.name);
                std::fs::write(folder.join(name), &sample.bytes)?;
            }
        }
    }
    if bad > 0 {
        println!("{bad} findings");
        return Ok(ExitCode::FAILURE);
    }
    println!("no panic, no hang, no excess, no contradiction");
    Ok(ExitCode::SUCCESS)
}

fn one(format: Format, samples: &[Sample], bench: &Bench) -> Result<Tally> {
    let scratch = tempfile::tempdir()?;
    let mut list = String::new();
    for (number, sample) in samples.iter().enumerate() {
        let folder = scratch.path().join(number.to_string());
        let path = bench.stage(format, &sample.name, &sample.bytes, &folder)?;
        list.push_str(&format!("{}\t{}\n", format.name(), path.display()));
    }
    let list_file = scratch.path().join("list");
    std::fs::write(&list_file, list)?;
    let mut tally = Tally {
        files: samples.len(),
        ..Tally::default()
    };
    let mut next = 0;
    while next < samples.len() {
        let mut reader = Reader::start(&list_file, next)?;
        next = reader.watch(samples, &mut tally)?;
    }
    Ok(tally)
}

/// A child and what it says.
struct Reader {
    process: Child,
    lines: Receiver<String>,
}

impl Reader {
    fn start(list: &Path, skip: usize) -> Result<Self> {
        let own: PathBuf = std::env::current_exe()?;
        let limit = format!("ulimit -v {CEILING} 2>/dev/null; ulimit -c 0; exec \"$@\"");
        let mut process = Command::new("sh")
            .args(["-c", &limit, "sh"])
            .arg(own)
            .arg("--child")
            .arg(list)
            .args(["--skip", &skip.to_string()])
            // Threads cost address space, not memory.
            .env("RAYON_NUM_THREADS", "2")
            .env("MALLOC_ARENA_MAX", "2")
            // Large blocks go back to the system, so that one file does not pay for another.
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a child")?;
        let output = process.stdout.take().context("a child without output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { process, lines })
    }

    /// Counts what the child says until it ends, and gives the number of the next file.
    fn watch(&mut self, samples: &[Sample], tally: &mut Tally) -> Result<usize> {
        let mut current = None;
        let mut next = samples.len();
        loop {
            match self.lines.recv_timeout(SILENCE) {
                Ok(line) => match line.strip_prefix("done ") {
                    Some(line) => {
                        current = None;
                        count(line, samples, tally)?;
                    }
                    None => current = line.strip_prefix("start ").and_then(|n| n.parse().ok()),
                },
                Err(RecvTimeoutError::Timeout) => {
                    self.process.kill()?;
                    let number: usize = current.context("a child that never began")?;
                    tally.hangs += 1;
                    tally
                        .findings
                        .push((number, format!("silent for {SILENCE:?}")));
                    next = number + 1;
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.process.wait()?;
        if next == samples.len()
            && let Some(number) = current
        {
            tally.panics += 1;
            tally
                .findings
                .push((number, format!("ended the process: {status}")));
            return Ok(number + 1);
        }
        anyhow::ensure!(
            status.success() || next < samples.len(),
            "a child failed: {status}"
        );
        Ok(next)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `number verdict millis KiB message`.
fn count(line: &str, samples: &[Sample], tally: &mut Tally) -> Result<()> {
    let mut words = line.splitn(5, ' ');
    let mut word = || words.next().context("a short line from a child");
    let (number, verdict): (usize, &str) = (word()?.parse()?, word()?);
    let (millis, grown): (u128, u64) = (word()?.parse()?, word()?.parse()?);
    let text = word().unwrap_or_default();
    match verdict {
        "refused" => tally.refused += 1,
        "accepted" => tally.accepted += 1,
        "inconsistent" => {
            tally.inconsistent += 1;
            tally
                .findings
                .push((number, format!("contradictory: {text}")));
        }
        _ => {
            tally.panics += 1;
            tally.findings.push((number, format!("panic: {text}")));
        }
    }
    if millis > HANG {
        tally.hangs += 1;
        tally.findings.push((number, format!("{millis} ms")));
    }
    tally.worst = tally.worst.max(grown);
    let allowed = samples[number].allowance();
    if grown << 10 > allowed {
        tally.excesses += 1;
        let found = format!("{} MiB; allowed are {}", grown >> 10, allowed >> 20);
        tally.findings.push((number, found));
    }
    Ok(())
}
