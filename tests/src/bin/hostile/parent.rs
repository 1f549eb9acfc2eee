//! Writes the files, watches the children and counts.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use diffusion_tests::hostile::{Maker, Sample};
use diffusion_tests::targets::{Bench, Format};

use crate::Args;

/// Address space of a child, KiB.
const CEILING: u64 = 1 << 20;
/// A reader that takes longer hangs.
const HANG: u128 = 1000;
/// When a silent child is given up.
const SILENCE: Duration = Duration::from_secs(20);
/// A format is given up when so many times the files asked for were made and still too few refused.
const PATIENCE: usize = 20;

#[derive(Debug, Default)]
struct Tally {
    files: usize,
    refused: usize,
    accepted: usize,
    inconsistent: usize,
    vague: usize,
    panics: usize,
    hangs: usize,
    excesses: usize,
    slowest: u128,
    worst: u64,
}

impl Tally {
    fn bad(&self) -> usize {
        self.inconsistent + self.vague + self.panics + self.hangs + self.excesses
    }
}

/// Files that are read together, and what was found about them, by number.
struct Round {
    samples: Vec<Sample>,
    findings: Vec<(usize, String)>,
}

/// Reads everything and prints the table.
pub fn run(args: &Args) -> Result<ExitCode> {
    let bench = Bench::new()?;
    println!(
        "{:<12} {:>6} {:>8} {:>9} {:>13} {:>6} {:>7} {:>6} {:>9} {:>11} {:>13}",
        "format",
        "files",
        "refused",
        "accepted",
        "contradictory",
        "vague",
        "panics",
        "hangs",
        "too much",
        "at most ms",
        "at most MiB"
    );
    let mut bad = 0;
    let mut short = 0;
    for format in Format::ALL {
        if args.format.is_some_and(|only| only != format) {
            continue;
        }
        let (tally, findings) = one(format, args, &bench)?;
        bad += tally.bad();
        short += usize::from(tally.refused < args.files);
        println!(
            "{:<12} {:>6} {:>8} {:>9} {:>13} {:>6} {:>7} {:>6} {:>9} {:>11} {:>13}",
            format.name(),
            tally.files,
            tally.refused,
            tally.accepted,
            tally.inconsistent,
            tally.vague,
            tally.panics,
            tally.hangs,
            tally.excesses,
            tally.slowest,
            tally.worst >> 10,
        );
        findings.iter().for_each(|finding| println!("  {finding}"));
    }
    if bad > 0 || short > 0 {
        println!("{bad} findings; {short} formats with fewer refused files than asked for");
        return Ok(ExitCode::FAILURE);
    }
    println!("no panic, no hang, no excess, no contradiction, no vague message");
    Ok(ExitCode::SUCCESS)
}

/// Makes files of a format and reads them until enough were refused.
fn one(format: Format, args: &Args, bench: &Bench) -> Result<(Tally, Vec<String>)> {
    let mut maker = Maker::new(format, args.seed, bench)?;
    let (mut tally, mut findings) = (Tally::default(), Vec::new());
    let most = maker.thought_of() + PATIENCE * args.files;
    while tally.files == 0 || tally.refused < args.files && tally.files < most {
        // All that somebody thought of; then a few more than are missing, since some are accepted.
        let missing = args.files.saturating_sub(tally.refused);
        let count = maker.thought_of().max(missing + missing / 4 + 8);
        let mut round = Round {
            samples: maker.by_ref().take(count).collect(),
            findings: Vec::new(),
        };
        let first = tally.files;
        tally.files += round.samples.len();
        round.read(format, bench, &mut tally)?;
        for (number, what) in &round.findings {
            let sample = &round.samples[*number];
            findings.push(format!("{}: {what}", sample.what));
            if let Some(folder) = &args.keep {
                std::fs::create_dir_all(folder)?;
                let name = format!("{}-{}-{}", format.name(), first + number, sample.name);
                std::fs::write(folder.join(name), &sample.bytes)?;
            }
        }
    }
    Ok((tally, findings))
}

impl Round {
    fn read(&mut self, format: Format, bench: &Bench, tally: &mut Tally) -> Result<()> {
        let scratch = tempfile::tempdir()?;
        let mut list = String::new();
        for (number, sample) in self.samples.iter().enumerate() {
            let folder = scratch.path().join(number.to_string());
            let path = bench.stage(format, &sample.name, &sample.bytes, &folder)?;
            list.push_str(&format!("{}\t{}\n", format.name(), path.display()));
        }
        let list_file = scratch.path().join("list");
        std::fs::write(&list_file, list)?;
        let mut next = 0;
        while next < self.samples.len() {
            next = Reader::start(&list_file, next)?.watch(self, tally)?;
        }
        Ok(())
    }

    /// Takes note of a line of a child: `number verdict millis KiB message`.
    fn count(&mut self, line: &str, tally: &mut Tally) -> Result<()> {
        let mut words = line.splitn(5, ' ');
        let mut word = || words.next().context("a short line from a child");
        let (number, verdict): (usize, &str) = (word()?.parse()?, word()?);
        let (millis, grown): (u128, u64) = (word()?.parse()?, word()?.parse()?);
        let text = word().unwrap_or_default();
        let mut find = |what: String| self.findings.push((number, what));
        match verdict {
            "refused" => tally.refused += 1,
            "vague" => {
                tally.refused += 1;
                tally.vague += 1;
                find(format!("a message that does not help: {text}"));
            }
            "accepted" => tally.accepted += 1,
            "inconsistent" => {
                tally.inconsistent += 1;
                find(format!("contradictory: {text}"));
            }
            _ => {
                tally.panics += 1;
                find(format!("panic: {text}"));
            }
        }
        tally.slowest = tally.slowest.max(millis);
        if millis > HANG {
            tally.hangs += 1;
            find(format!("{millis} ms"));
        }
        tally.worst = tally.worst.max(grown);
        let allowed = self.samples[number].allowance();
        if grown << 10 > allowed {
            tally.excesses += 1;
            find(format!(
                "{} MiB; allowed are {}",
                grown >> 10,
                allowed >> 20
            ));
        }
        Ok(())
    }
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
            // What is freed goes back to the system, so that the growth that one file causes is
            // not hidden by what another has left.
            .env(
                "GLIBC_TUNABLES",
                "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=65536:\
                 glibc.malloc.trim_threshold=65536",
            )
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
    fn watch(&mut self, round: &mut Round, tally: &mut Tally) -> Result<usize> {
        let mut current: Option<usize> = None;
        loop {
            match self.lines.recv_timeout(SILENCE) {
                Ok(line) => match line.strip_prefix("done ") {
                    Some(line) => {
                        current = None;
                        round.count(line, tally)?;
                    }
                    None => current = line.strip_prefix("start ").and_then(|n| n.parse().ok()),
                },
                Err(RecvTimeoutError::Timeout) => {
                    self.process.kill()?;
                    let number = current.context("a child that never began")?;
                    tally.hangs += 1;
                    round
                        .findings
                        .push((number, format!("silent for {SILENCE:?}")));
                    return Ok(number + 1);
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.process.wait()?;
        if let Some(number) = current {
            tally.panics += 1;
            round
                .findings
                .push((number, format!("ended the process: {status}")));
            return Ok(number + 1);
        }
        anyhow::ensure!(status.success(), "a child failed: {status}");
        Ok(round.samples.len())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Fine when it has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
