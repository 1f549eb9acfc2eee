//! The comparison with a peer: results first, then times in turns, then memory.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::pairs::{Clock, Effort, Outcome, Player, play};
use super::row::{Other, Row};
use super::side::{Peak, Ready, Side, once};
use crate::shell;

/// Results that differ by more than this are of different work.
const TOLERANCE: f64 = 1e-3;
/// Training steps before the peak of the memory is read: the second one holds all there is.
const MEMORY_STEPS: usize = 3;
/// What the peers need.
const REQUIREMENTS: &str = "benches/peers/requirements.txt";

/// What is compared, and how.
pub struct Comparison {
    /// The folder of the workspace.
    pub root: PathBuf,
    /// The Python that has the peer's packages.
    pub python: PathBuf,
    /// Numbers of threads.
    pub threads: Vec<usize>,
    /// How long.
    pub effort: Effort,
    /// Whether the peer's compiled network is timed, too.
    pub compile: bool,
    /// Whether the peer's bf16 autocast is timed, too.
    pub bf16: bool,
}

/// A case as the `case` program lists it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Listed {
    pub name: String,
    pub work: String,
}

/// What came of a comparison.
#[derive(Debug, Default)]
pub struct Found {
    pub rows: Vec<Row>,
    /// Cases that were not timed, each with the reason.
    pub refused: Vec<String>,
    pub notes: Vec<String>,
}

/// A folder for the cases' files, which goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(target: &Path) -> Result<Self> {
        let folder = target.join(format!("bench-against-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: the folder lies in the target folder, which `cargo clean` removes.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Comparison {
    /// Compares the cases of these domains whose names contain one of `filters` (or all). `keep`
    /// sees what there is after each case, so that a run that is stopped has not been for nothing.
    pub fn run(
        &self,
        domains: &[String],
        filters: &[String],
        keep: &mut dyn FnMut(&Found) -> Result<()>,
    ) -> Result<Found> {
        self.probe()?;
        let busy = busy(std::fs::read_to_string("/proc/loadavg").ok().as_deref());
        let program = self.build()?;
        let cases = select(listed(&program)?, domains, filters)?;
        let scratch = Scratch::new(&shell::target(&self.root))?;
        let mut found = Found::default();
        found.notes.extend(busy);
        for case in &cases {
            // One case that fails does not take what the others have shown.
            if let Err(error) = self.case(&program, case, &scratch.0, &mut found) {
                found.refused.push(format!("{}: {error:#}", case.name));
            }
            keep(&found)?;
        }
        Ok(found)
    }

    /// Says at once what is missing, before anything is built.
    fn probe(&self) -> Result<()> {
        let mut command = self.python(1)?;
        command.arg("probe");
        let output = command.output().with_context(|| {
            format!(
                "cannot start `{}`; name a Python that has the packages of {REQUIREMENTS} with \
                 --python PATH",
                self.python.display()
            )
        })?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.trim().lines().last().unwrap_or("no message");
        bail!(
            "`{0}` cannot run the peers ({last}); `{0} -m pip install -r {REQUIREMENTS}` installs \
             what they need, or name another Python with --python PATH",
            self.python.display()
        )
    }

    /// Builds our runner.
    fn build(&self) -> Result<PathBuf> {
        let mut command = shell::cargo(&self.root, "build");
        command.args(["--release", "-p", "diffusion-benches", "--bin", "case"]);
        let status = shell::status(&mut command)?;
        ensure!(
            status.success(),
            "`{}` ended with {status}",
            shell::shown(&command)
        );
        let name = format!("case{}", std::env::consts::EXE_SUFFIX);
        Ok(shell::target(&self.root).join("release").join(name))
    }

    /// A program with our environment whose thread pools have `threads` threads.
    fn limited(&self, program: &Path, threads: usize) -> Result<Command> {
        let mut command = Command::new(program);
        for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
            command.env(name, threads.to_string());
        }
        command.envs(environment(&self.root)?);
        Ok(command)
    }

    /// The peer's program with its threads fixed.
    fn python(&self, threads: usize) -> Result<Command> {
        let mut command = self.limited(&self.python, threads)?;
        command
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .arg(self.root.join("benches/peers/peer.py"));
        Ok(command)
    }

    fn case(&self, program: &Path, case: &Listed, folder: &Path, found: &mut Found) -> Result<()> {
        let mut single: Option<f64> = None;
        let most = self.threads.iter().copied().max();
        for &threads in &self.threads {
            let mut command = self.limited(program, threads)?;
            command.args(["serve", &case.name]).arg(folder);
            let (mut ours, _) = Side::start(&mut command)?;
            let mut command = self.python(threads)?;
            command.args(["serve", &case.name]).arg(folder);
            command.args(["--threads", &threads.to_string()]);
            command.args(self.compile.then_some("--compile"));
            command.args(self.bf16.then_some("--bf16"));
            let (mut peer, ready) = Side::start(&mut command)?;
            let notes = ready.notes.iter();
            found
                .notes
                .extend(notes.map(|note| format!("{}: {note}", case.name)));
            let Some(mut row) = measure(
                case,
                threads,
                &mut ours,
                &mut peer,
                &ready,
                self.effort,
                found,
            )?
            else {
                continue;
            };
            if threads == 1 {
                single = Some(row.1.ours_wall);
            } else {
                row.0.speedup = single.map(|one| one / row.1.ours_wall);
            }
            drop((ours, peer));
            if case.work == "train" && most == Some(threads) {
                self.memory(program, case, folder, threads, &mut row.0)?;
            }
            eprintln!(
                "{} on {threads}: {:.2}",
                case.name,
                row.0.ratio.unwrap_or_default()
            );
            found.rows.push(row.0);
        }
        Ok(())
    }

    /// Peaks of training steps, each in a fresh process.
    fn memory(
        &self,
        program: &Path,
        case: &Listed,
        folder: &Path,
        threads: usize,
        row: &mut Row,
    ) -> Result<()> {
        let steps = MEMORY_STEPS.to_string();
        let mut command = self.limited(program, threads)?;
        command.args(["memory", &case.name, &steps]);
        let ours = once::<Peak>(&mut command)?.megabytes();
        let mut command = self.python(threads)?;
        // Our setting keeps memory for the next step; the peer's peak must not grow by it.
        command.env_remove(ALLOCATOR);
        command.args(["memory", &case.name]).arg(folder);
        command.args([&steps, "--threads", &threads.to_string()]);
        if let Some(way) = &row.peer_way {
            command.args(["--way", way]);
        }
        let peer = once::<Peak>(&mut command)?.megabytes();
        row.ours_peak_mb = Some(ours);
        row.peer_peak_mb = Some(peer);
        row.memory_ratio = (peer > 0.0).then(|| ours / peer);
        Ok(())
    }
}

/// A variable of `.cargo/config.toml` that changes how much memory a process keeps.
const ALLOCATOR: &str = "GLIBC_TUNABLES";

/// The environment that cargo gives to what it starts, so that both sides have it however this
/// program was started. Variables that are set already stay as they are, as with cargo.
fn environment(root: &Path) -> Result<Vec<(String, String)>> {
    let path = root.join(".cargo/config.toml");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let config: toml::Table = toml::from_str(&text).with_context(|| path.display().to_string())?;
    let variables = config.get("env").and_then(toml::Value::as_table);
    let variables = variables.into_iter().flatten();
    variables
        .filter(|(name, _)| std::env::var_os(name).is_none())
        .map(|(name, value)| {
            let value = value.as_str().with_context(|| {
                format!(
                    "{}: env.{name} is {value}, expected a string",
                    path.display()
                )
            })?;
            Ok((name.clone(), value.to_owned()))
        })
        .collect()
}

/// A warning where other programs were at work before we began.
fn busy(loadavg: Option<&str>) -> Option<String> {
    let load: f64 = loadavg?.split_whitespace().next()?.parse().ok()?;
    (load > 0.7).then(|| {
        format!(
            "the machine was busy (load {load}) when the comparison began; wall times on several \
             threads are then as much those of the others"
        )
    })
}

fn listed(program: &Path) -> Result<Vec<Listed>> {
    let text = shell::output(Command::new(program).arg("list"))?;
    text.lines().map(super::side::parse).collect()
}

fn select(all: Vec<Listed>, domains: &[String], filters: &[String]) -> Result<Vec<Listed>> {
    let within = |case: &Listed| {
        let domain = case.name.split('/').next().unwrap_or_default();
        let wanted = filters.is_empty() || filters.iter().any(|text| case.name.contains(text));
        wanted && domains.iter().any(|name| name == domain)
    };
    let chosen: Vec<Listed> = all.iter().filter(|case| within(case)).cloned().collect();
    if chosen.is_empty() {
        let names: Vec<&str> = all.iter().map(|case| case.name.as_str()).collect();
        bail!(
            "no case of {} matches --case {}; the cases are {}",
            domains.join(", "),
            filters.join(" --case "),
            names.join(", ")
        );
    }
    Ok(chosen)
}

/// Times a case whose results agree; otherwise notes why it was not timed.
fn measure(
    case: &Listed,
    threads: usize,
    ours: &mut dyn Player,
    peer: &mut dyn Player,
    ready: &Ready,
    effort: Effort,
    found: &mut Found,
) -> Result<Option<(Row, Outcome)>> {
    let difference = match ready.difference {
        Some(difference) if difference <= TOLERANCE => difference,
        other => {
            let shown = other.map_or("an unknown amount".into(), |d| format!("{d:.1e}"));
            found.refused.push(format!(
                "{} on {threads}: the results differ by {shown} of their size, more than \
                 {TOLERANCE:.0e}; not timed",
                case.name
            ));
            return Ok(None);
        }
    };
    let clock = Clock::of(threads);
    let outcome = play(ours, peer, None, clock, effort)?;
    let mut row = Row {
        domain: case.name.split('/').next().unwrap_or_default().to_owned(),
        case: case.name.clone(),
        threads,
        ours_ms: outcome.ours * 1e3,
        ours_mad_ms: outcome.ours_mad * 1e3,
        peer_ms: Some(outcome.peer * 1e3),
        ratio: Some(outcome.ratio),
        max_abs_difference: Some(difference),
        clock: Some(clock.name()),
        pairs: Some(effort.pairs),
        peer_way: ready.way.clone(),
        ..Row::default()
    };
    for way in &ready.ways {
        let other = play(ours, peer, Some(way), clock, effort)?;
        let other = Other {
            peer_ms: other.peer * 1e3,
            ratio: other.ratio,
        };
        row.others.insert(way.clone(), other);
    }
    Ok(Some((row, outcome)))
}

#[cfg(test)]
mod tests {
    use super::super::pairs::Times;
    use super::*;

    struct Steady(f64);

    impl Player for Steady {
        fn turn(&mut self, calls: usize, way: Option<&str>) -> Result<Times> {
            let seconds = if way == Some("bf16") { 0.25 } else { self.0 };
            Ok(Times {
                wall: vec![seconds; calls],
                cpu: vec![seconds; calls],
            })
        }
    }

    const EFFORT: Effort = Effort {
        pairs: 5,
        turn_seconds: 0.1,
    };

    fn case(name: &str) -> Listed {
        Listed {
            name: name.into(),
            work: "train".into(),
        }
    }

    fn measured(line: &str) -> (Option<(Row, Outcome)>, Found) {
        let ready = super::super::side::parse(line).unwrap();
        let mut found = Found::default();
        let case = case("images/unet/train");
        let (mut ours, mut peer) = (Steady(0.5), Steady(1.0));
        let row = measure(&case, 2, &mut ours, &mut peer, &ready, EFFORT, &mut found);
        (row.unwrap(), found)
    }

    #[test]
    fn a_case_that_agrees_is_timed() {
        let (row, found) = measured(
            r#"{"ready": true, "difference": 1e-6, "way": "contiguous", "ways": ["bf16"]}"#,
        );
        let (row, _) = row.unwrap();
        assert_eq!(
            (row.ours_ms, row.peer_ms, row.ratio),
            (500.0, Some(1000.0), Some(0.5))
        );
        assert_eq!((row.domain.as_str(), row.clock), ("images", Some("wall")));
        let other = Other {
            peer_ms: 250.0,
            ratio: 2.0,
        };
        assert_eq!(row.others.get("bf16"), Some(&other));
        assert!(found.refused.is_empty());
    }

    #[test]
    fn different_results_are_not_timed() {
        for difference in ["0.002", "Infinity", "NaN"] {
            let line = format!(r#"{{"ready": true, "difference": {difference}}}"#);
            let (row, found) = measured(&line);
            assert!(row.is_none());
            let message = &found.refused[0];
            assert!(message.contains("images/unet/train on 2"), "{message}");
            assert!(message.contains("not timed"), "{message}");
        }
    }

    #[test]
    fn both_sides_have_the_environment_that_cargo_gives() {
        let root = shell::root().unwrap();
        let text = std::fs::read_to_string(root.join(".cargo/config.toml")).unwrap();
        assert!(
            text.contains(ALLOCATOR),
            "the memory of the peer depends on it"
        );
        for (name, value) in environment(&root).unwrap() {
            assert!(text.contains(&format!("{name} = \"{value}\"")), "{name}");
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(".cargo")).unwrap();
        let config = folder.path().join(".cargo/config.toml");
        std::fs::write(&config, "[env]\nBENCH_TEST_ONLY = \"7\"\n").unwrap();
        let expected = ("BENCH_TEST_ONLY".to_owned(), "7".to_owned());
        assert_eq!(environment(folder.path()).unwrap(), [expected]);
        std::fs::write(&config, "[env]\nBENCH_TEST_ONLY = 7\n").unwrap();
        let error = environment(folder.path()).unwrap_err().to_string();
        assert!(error.contains("env.BENCH_TEST_ONLY is 7"), "{error}");
    }

    #[test]
    fn a_busy_machine_is_noted() {
        let note = busy(Some("3.48 5.36 4.54 2/300 1234")).unwrap();
        assert!(note.contains("load 3.48"), "{note}");
        assert_eq!(busy(Some("0.10 5.36 4.54 2/300 1234")), None);
        assert_eq!(busy(None), None);
    }

    #[test]
    fn cases_are_chosen_by_domain_and_part_of_the_name() {
        let all = || vec![case("ops/a/f"), case("ops/b/fb"), case("images/a/train")];
        let names = |domains: &[&str], filters: &[&str]| -> Result<Vec<String>> {
            let own = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
            let chosen = select(all(), &own(domains), &own(filters))?;
            Ok(chosen.into_iter().map(|case| case.name).collect())
        };
        assert_eq!(names(&["ops"], &[]).unwrap(), ["ops/a/f", "ops/b/fb"]);
        assert_eq!(
            names(&["ops", "images"], &["/a/"]).unwrap(),
            ["ops/a/f", "images/a/train"]
        );
        let error = names(&["images"], &["b"]).unwrap_err().to_string();
        assert!(
            error.contains("--case b") && error.contains("ops/b/fb"),
            "{error}"
        );
    }

    #[test]
    fn a_python_that_is_not_there_is_one_clear_error() {
        let comparison = |python: &str| Comparison {
            root: shell::root().unwrap(),
            python: python.into(),
            threads: vec![1],
            effort: EFFORT,
            compile: false,
            bf16: false,
        };
        let error = comparison("no-such-python").run(&["ops".into()], &[], &mut |_| Ok(()));
        let text = format!("{:#}", error.unwrap_err());
        assert!(text.contains("`no-such-python`"), "{text}");
        assert!(
            text.contains("--python PATH") && text.contains(REQUIREMENTS),
            "{text}"
        );
        // A program that fails, as Python does without torch.
        #[cfg(unix)]
        {
            let error = comparison("false").run(&["ops".into()], &[], &mut |_| Ok(()));
            let text = format!("{:#}", error.unwrap_err());
            assert!(
                text.contains("`false -m pip install -r benches/peers/"),
                "{text}"
            );
        }
    }
}
