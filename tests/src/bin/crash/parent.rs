//! The parent: kills, resumes, compares.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use diffusion_ops::rng::{Key, stream};

use crate::running::{Pace, Running};
use crate::{Args, Model};

/// Every file of a run but the lock, by relative path.
fn contents(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if path.is_dir() {
            out.extend(
                contents(&path)?
                    .into_iter()
                    .map(|(n, b)| (format!("{name}/{n}"), b)),
            );
        } else if name != "lock" {
            out.insert(name, fs::read(path)?);
        }
    }
    Ok(out)
}

/// Names in the folder of checkpoints; none before it exists.
fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

fn newest(run: &Path) -> u64 {
    let steps = checkpoints(run);
    steps
        .iter()
        .filter_map(|n| n.strip_prefix("step-")?.parse().ok())
        .max()
        .unwrap_or(0)
}

fn same(expected: &BTreeMap<String, Vec<u8>>, run: &Path) -> Result<()> {
    let found = contents(run)?;
    for name in expected.keys().chain(found.keys()) {
        match (expected.get(name), found.get(name)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(_), Some(_)) => bail!("{name}: other bytes than those of the reference run"),
            (Some(_), None) => bail!("{name}: missing"),
            _ => bail!("{name}: left behind"),
        }
    }
    Ok(())
}

/// As fast as it can.
const FULL: Pace = Pace { steps: 0, files: 0 };
/// So slow that a kill lands where it is meant to.
const SLOW: Pace = Pace {
    steps: 2000,
    files: 2000,
};
/// Steps so slow that a signal arrives within one.
const STEADY: Pace = Pace {
    steps: 10_000,
    files: 0,
};
/// Threads of the children, but for the one that shows that they don't matter.
const THREADS: usize = 2;
/// What is trained, in turn.
const MODELS: [Model; 2] = [Model::Mlp, Model::Unet];
/// Kills before a run is let to its end.
const KILLS_PER_RUN: u64 = 5;

struct Tally {
    kills: u64,
    exact: u64,
    inside: u64,
}

fn reference(model: Model, scratch: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let run = scratch.join(format!("{}-whole", model.name()));
    let mut running = Running::start(model, &run, FULL, THREADS)?;
    ensure!(
        running.wait_for("finished "),
        "the run without kills did not finish"
    );
    running.drain();
    contents(&run)
}

/// Checks what a start found: the newest checkpoint, and at most one interval lost.
fn check_start(running: &Running, expected: u64, before: u64, every: u64) -> Result<u64> {
    let from = running.from.context("the child ended before it started")?;
    ensure!(
        running.rejected.is_empty(),
        "{}",
        running.rejected.join("; ")
    );
    ensure!(
        from == expected,
        "resumed from step {from}, the newest checkpoint is {expected}"
    );
    let lost = before.saturating_sub(from);
    ensure!(lost <= every, "lost {lost} steps, an interval has {every}");
    Ok(lost)
}

fn one_run(
    model: Model,
    run: &Path,
    plan: Key,
    kills: u64,
    expected: &BTreeMap<String, Vec<u8>>,
    tally: &mut Tally,
) -> Result<()> {
    let every = model.config().checkpoint_every;
    let (mut before, mut done) = (0, 0);
    let mut attempt = 0;
    while done < kills {
        let here = attempt * 8;
        let draw = |n: u64, bound| plan.step(here + n).below(bound);
        attempt += 1;
        let wanted = newest(run);
        let aim_inside = draw(0, 2) == 0;
        let mut running = Running::start(model, run, SLOW, THREADS)?;
        let alive = if aim_inside {
            let mut alive = true;
            for _ in 0..=draw(1, 2) {
                alive = alive && running.wait_for("saving ");
            }
            for _ in 0..=draw(2, 16) {
                alive = alive && running.wait_for("op ");
            }
            alive
        } else {
            std::thread::sleep(Duration::from_millis(draw(3, 400)));
            running.process.try_wait()?.is_none()
        };
        running.kill()?;
        if !alive {
            // It finished before the kill: that is no kill, and the run has nothing left to lose.
            break;
        }
        let inside = checkpoints(run).iter().any(|n| n.starts_with(".tmp-"));
        let lost = match running.from {
            Some(_) => check_start(&running, wanted, before, every)?,
            None => 0,
        };
        before = before.max(running.step).max(wanted);
        done += 1;
        tally.kills += 1;
        tally.inside += u64::from(inside);
        println!(
            "kill {:>3}: {} at step {:>3}, {}, had resumed from {} and lost {lost} steps",
            tally.kills,
            model.name(),
            running.step.max(wanted),
            if inside {
                "inside a checkpoint write"
            } else {
                "between writes"
            },
            running
                .from
                .map_or("nothing yet".to_string(), |s| format!("step {s}")),
        );
    }
    let wanted = newest(run);
    let mut running = Running::start(model, run, FULL, THREADS)?;
    let finished = running.wait_for("finished ");
    running.drain();
    ensure!(finished, "the run did not finish after {done} kills");
    check_start(&running, wanted, before, every)?;
    same(expected, run)?;
    tally.exact += done;
    Ok(())
}

/// Sends SIGTERM and SIGINT in turn, at steps that the seed chooses.
fn signals(args: &Args, scratch: &Path, expected: &[BTreeMap<String, Vec<u8>>; 2]) -> Result<()> {
    let mut slowest = Duration::ZERO;
    for number in 0..args.signals {
        let plan = Key::new(args.seed, stream::TEST).item(u64::MAX - number);
        let (name, code) = [("TERM", 143), ("INT", 130)][number as usize % 2];
        let which = usize::from(number % 5 == 4);
        let model = MODELS[which];
        let run = scratch.join(format!("signal-{number}"));
        let at = 1 + plan.below(25);
        let took =
            one_signal(model, &run, name, code, at, &expected[which]).with_context(|| {
                format!("signal {number} ({}), SIG{name} at step {at}", model.name())
            })?;
        slowest = slowest.max(took);
        fs::remove_dir_all(&run)?;
    }
    println!(
        "signals: {} of {} saved within a step, ended with their code within {} ms and resumed \
         bit-exact",
        args.signals,
        args.signals,
        slowest.as_millis()
    );
    Ok(())
}

/// Signals a run when it reaches a step, checks what it saves, and resumes it to the end.
fn one_signal(
    model: Model,
    run: &Path,
    name: &str,
    code: i32,
    at: u64,
    expected: &BTreeMap<String, Vec<u8>>,
) -> Result<Duration> {
    let mut running = Running::start(model, run, STEADY, THREADS)?;
    ensure!(
        running.wait_for(&format!("step {at}")),
        "the child did not reach step {at}"
    );
    let reached = Instant::now();
    running.signal(name)?;
    let sent = reached.elapsed();
    let status = running.process.wait()?;
    let took = reached.elapsed();
    running.drain();
    ensure!(
        status.code() == Some(code),
        "{status}; expected exit code {code}"
    );
    ensure!(took < Duration::from_secs(2), "took {took:?}");
    let stopped = running.step;
    ensure!(
        newest(run) == stopped,
        "stopped after step {stopped} and saved step {}",
        newest(run)
    );
    // The step that was under way, and those for which sending the signal took long enough.
    let late = sent.as_micros() as u64 / STEADY.steps;
    ensure!(
        stopped <= at + 1 + late,
        "went on to step {stopped}; the signal took {sent:?}"
    );
    let mut resumed = Running::start(model, run, FULL, THREADS)?;
    ensure!(
        resumed.wait_for("finished "),
        "the resumed run did not finish"
    );
    resumed.drain();
    check_start(&resumed, stopped, stopped, 0)?;
    same(expected, run)?;
    Ok(took)
}

fn second_writer(model: Model, scratch: &Path) -> Result<()> {
    let run = scratch.join("two-writers");
    let mut first = Running::start(model, &run, SLOW, THREADS)?;
    ensure!(first.wait_for("step "), "the first writer did not start");
    let mut second = Running::start(model, &run, FULL, THREADS)?;
    let line = second
        .line(Duration::from_secs(10))
        .context("the second writer said nothing")?;
    let owner = format!("in use by process {}", first.process.id());
    ensure!(
        line.starts_with("refused after ") && line.contains(&owner),
        "second writer: {line}"
    );
    let ms: u64 = line
        .split(' ')
        .nth(2)
        .and_then(|n| n.parse().ok())
        .context("no time")?;
    ensure!(ms < 100, "the second writer was refused only after {ms} ms");
    ensure!(
        second.process.wait()?.code() == Some(1),
        "the second writer did not fail"
    );
    ensure!(
        first.process.try_wait()?.is_none(),
        "the first writer ended"
    );
    println!(
        "second writer: refused after {ms} ms, naming process {}",
        first.process.id()
    );
    Ok(())
}

/// A folder that goes when the program ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("diffusion-crash-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left lies in the system's folder for temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The whole examination.
pub fn kill_and_compare(args: &Args) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut tally = Tally {
        kills: 0,
        exact: 0,
        inside: 0,
    };
    let expected = [
        reference(MODELS[0], &scratch.0)?,
        reference(MODELS[1], &scratch.0)?,
    ];
    let mut round = 0;
    while tally.kills < args.kills {
        let which = round as usize % 2;
        let run = scratch.0.join(format!("run-{round}"));
        let plan = Key::new(args.seed, stream::TEST).item(round);
        let kills = KILLS_PER_RUN.min(args.kills - tally.kills);
        let before = (tally.kills, tally.inside);
        one_run(
            MODELS[which],
            &run,
            plan,
            kills,
            &expected[which],
            &mut tally,
        )
        .with_context(|| {
            format!(
                "run {round} ({}), after kill {}",
                MODELS[which].name(),
                tally_text(before)
            )
        })?;
        fs::remove_dir_all(&run)?;
        round += 1;
        ensure!(
            round < 10 * args.kills + 10,
            "the children end before they can be killed"
        );
    }
    signals(args, &scratch.0, &expected)?;
    second_writer(Model::Mlp, &scratch.0)?;
    println!(
        "crash: {} kills, {} bit-exact, {} inside a write",
        tally.kills, tally.exact, tally.inside
    );
    ensure!(tally.exact == tally.kills, "not all runs were bit-exact");
    ensure!(
        tally.inside * 3 >= tally.kills,
        "fewer than a third of the kills were inside a write"
    );
    Ok(())
}

fn tally_text((kills, inside): (u64, u64)) -> String {
    format!("{kills} ({inside} inside a write)")
}
