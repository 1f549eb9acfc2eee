//! Stored numbers of other libraries against ours.
//!
//! A fixture is a folder with a `fixture.json`, the tensors that went in and those that came out.
//! [`find`] walks folders for them, [`run`] runs one and says pass, fail or unsupported, and
//! [`Summary`] is the report. One table, [`TABLE`], maps (kind, system) to a function; what is not
//! in it is reported as unsupported, never skipped.
//!
//! | file | kind |
//! |---|---|
//! | [`scheduler`] | whole sampling runs on a model in closed form |
//! | [`tables`] | timesteps and noise levels of many runs |
//! | [`function`] | single formulas |
//! | [`module`] | networks and their parts, with gradients |
//! | [`pipeline`] | saved model folders, from the file to the image |
//! | [`authors`] | any of these, from the original authors' code |

pub mod authors;
pub mod compare;
pub mod fixture;
pub mod function;
pub mod model;
pub mod module;
pub mod pipeline;
pub mod scheduler;
pub mod tables;
pub mod training;

use anyhow::{Context, Result};
use compare::Check;
use fixture::{Fixture, Tolerance};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Runs a fixture, noting every comparison in the check.
pub type Runner = fn(&Fixture, &mut Check) -> Result<()>;

/// Which function runs which (kind, system).
pub const TABLE: &[(&str, &str, Runner)] = &[
    ("scheduler", "ddpm", scheduler::run),
    ("scheduler", "ddim", scheduler::run),
    ("scheduler", "euler", scheduler::run),
    ("scheduler", "heun", scheduler::run),
    ("scheduler", "edm_euler", scheduler::run),
    ("scheduler", "dpmsolver_multistep", scheduler::run),
    ("scheduler", "ddim_inverse", scheduler::run),
    ("scheduler", "pndm", scheduler::run),
    ("scheduler", "ipndm", scheduler::run),
    ("scheduler", "lcm", scheduler::run),
    ("scheduler", "tcd", scheduler::run),
    ("scheduler", "unclip", scheduler::run),
    ("scheduler", "euler_ancestral", scheduler::run),
    ("scheduler", "lms", scheduler::run),
    ("scheduler", "kdpm2", scheduler::run),
    ("scheduler", "kdpm2_ancestral", scheduler::run),
    ("scheduler", "dpmsolver_sde", scheduler::run),
    ("scheduler", "dpmsolver_multistep_inverse", scheduler::run),
    ("scheduler", "dpmsolver_singlestep", scheduler::run),
    ("scheduler", "deis", scheduler::run),
    ("scheduler", "unipc", scheduler::run),
    ("scheduler", "sasolver", scheduler::run),
    ("scheduler", "edm_dpmsolver_multistep", scheduler::run),
    ("scheduler", "cm_stochastic_iterative", scheduler::run),
    ("scheduler", "flow_match_euler", scheduler::run),
    ("scheduler", "flow_match_heun", scheduler::run),
    ("scheduler", "score_sde_ve", scheduler::run),
    ("scheduler", "score_sde_vp", scheduler::run),
    ("function", "forward_process", function::run),
    ("function", "timestep_embedding", function::run),
    ("function", "ema", function::run),
    ("function", "training", function::run),
    ("function", "edm", function::run),
    ("function", "guidance", function::run),
    ("function", "timesteps", tables::run),
    ("function", "autoencoder_kl", function::run),
    ("function", "dit", function::run),
    ("module", "unet2d", module::unet),
    ("module", "unet2d_adm", module::unet),
    ("module", "unet2d_ncsnpp", module::unet),
    ("module", "timestep_embedding", module::part),
    ("module", "attention", module::part),
    ("module", "resnet", module::part),
    ("pipeline", "ddpm", pipeline::run),
    ("pipeline", "ddim", pipeline::run),
];

/// Systems whose fixtures come from the original authors' code and are told apart by name.
pub const AUTHORS: &[&str] = &["openai", "score_sde", "edm", "vdm", "analytic_dpm"];

/// What became of a fixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Everything within the tolerance.
    Pass,
    /// Something outside the tolerance, or an error on the way.
    Fail,
    /// Not something that this version does.
    Unsupported,
}

/// The result of one fixture.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The folder.
    pub path: PathBuf,
    /// Its name.
    pub name: String,
    /// The thing under test.
    pub system: String,
    /// `scheduler`, `module`, `function` or `pipeline`.
    pub kind: String,
    /// What became of it.
    pub verdict: Verdict,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Largest relative difference, over stored values that are larger than the absolute
    /// tolerance.
    pub max_rel: f64,
    /// How long it took.
    pub seconds: f64,
    /// Why it failed or is unsupported; empty for a plain pass.
    pub note: String,
    /// Within which it was to agree.
    #[serde(skip)]
    pub tolerance: Tolerance,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match self.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Unsupported => "unsupported",
        };
        write!(
            f,
            "{:<44} {:<20} abs {:<8.1e} rel {:<8.1e} tol {:.0e} + {:.0e} |b|  {verdict}",
            self.name,
            self.system,
            self.max_abs,
            self.max_rel,
            self.tolerance.abs,
            self.tolerance.rel
        )?;
        match self.note.as_str() {
            "" => Ok(()),
            note => write!(f, ": {note}"),
        }
    }
}

/// The results of a walk.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// How many passed.
    pub passed: usize,
    /// How many failed.
    pub failed: usize,
    /// How many this version does not do.
    pub unsupported: usize,
    /// Each of them, in the order of their paths.
    pub fixtures: Vec<Outcome>,
}

impl Summary {
    /// Counts one more.
    pub fn add(&mut self, outcome: Outcome) {
        match outcome.verdict {
            Verdict::Pass => self.passed += 1,
            Verdict::Fail => self.failed += 1,
            Verdict::Unsupported => self.unsupported += 1,
        }
        self.fixtures.push(outcome);
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            passed,
            failed,
            unsupported,
            ..
        } = self;
        write!(
            f,
            "parity: {passed} passed, {failed} failed, {unsupported} unsupported"
        )
    }
}

/// The folders below `root` (itself included) that hold a `fixture.json`, sorted.
///
/// # Errors
/// When a folder cannot be read, or none of them holds a fixture.
pub fn find(root: &Path) -> Result<Vec<PathBuf>> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        if folder.join("fixture.json").is_file() {
            found.push(folder.to_path_buf());
            return Ok(());
        }
        let entries = std::fs::read_dir(folder)
            .with_context(|| format!("cannot read the folder {}", folder.display()))?;
        let mut children = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()
            .with_context(|| format!("cannot read the folder {}", folder.display()))?;
        children.sort();
        for child in children {
            // A link to a parent would make the walk endless.
            if child.is_dir() && !child.is_symlink() {
                walk(&child, found)?;
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(root, &mut found)?;
    anyhow::ensure!(
        !found.is_empty(),
        "{}: no fixture.json in it or below it; expected a folder of parity fixtures",
        root.display()
    );
    Ok(found)
}

/// Runs the fixture in a folder. Whatever goes wrong is part of the outcome.
pub fn run(path: &Path) -> Outcome {
    let start = Instant::now();
    let mut outcome = Outcome {
        path: path.to_path_buf(),
        name: path
            .file_name()
            .map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        system: "?".into(),
        kind: "?".into(),
        verdict: Verdict::Fail,
        max_abs: 0.0,
        max_rel: 0.0,
        seconds: 0.0,
        note: String::new(),
        tolerance: Tolerance::default(),
    };
    let fixture = match Fixture::read(path) {
        Ok(fixture) => fixture,
        Err(error) => {
            outcome.note = format!("{error:#}");
            return outcome;
        }
    };
    outcome.name.clone_from(&fixture.name);
    outcome.system.clone_from(&fixture.system);
    outcome.kind.clone_from(&fixture.kind);
    outcome.tolerance = fixture.tolerance;
    let entry = TABLE
        .iter()
        .find(|(kind, system, _)| *kind == fixture.kind && *system == fixture.system);
    let mut check = Check::new(fixture.tolerance);
    // A case of the authors' code has a name of its own; its system may be one of the table's, too.
    let named = authors::find(&fixture).or(entry.map(|(_, _, runner)| *runner));
    let result = match named {
        Some(runner) => runner(&fixture, &mut check),
        None if AUTHORS.contains(&fixture.system.as_str()) => authors::run(&fixture, &mut check),
        None => Err(unsupported(format!(
            "no {} of the system {}",
            fixture.kind, fixture.system
        ))),
    };
    // JSON has no infinity.
    outcome.max_abs = check.max_abs.min(f64::MAX);
    outcome.max_rel = check.max_rel.min(f64::MAX);
    (outcome.verdict, outcome.note) = match result {
        Err(error) if is_unsupported(&error) => (Verdict::Unsupported, format!("{error:#}")),
        Err(error) => (Verdict::Fail, format!("{error:#}")),
        Ok(()) if check.compared == 0 => (Verdict::Fail, "nothing was compared".into()),
        Ok(()) if check.failures.is_empty() => (Verdict::Pass, String::new()),
        Ok(()) => (Verdict::Fail, check.failures.join("; ")),
    };
    outcome.seconds = start.elapsed().as_secs_f64();
    outcome
}

/// An error that means: this version does not do that.
pub fn unsupported(what: impl std::fmt::Display) -> anyhow::Error {
    let report = diffusion_core::Report::new("fixture", what);
    report
        .expected("something that this version does")
        .unsupported()
        .into()
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        matches!(
            cause.downcast_ref::<diffusion_core::Error>(),
            Some(diffusion_core::Error::Unsupported(_))
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(json: &str) -> (tempfile::TempDir, Outcome) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("fixture.json"), json).unwrap();
        let outcome = run(dir.path());
        (dir, outcome)
    }

    #[test]
    fn what_is_not_in_the_table_is_unsupported_and_what_is_broken_fails() {
        let json = r#"{"name": "module.x.y", "kind": "module", "system": "x", "config": {}, "call": {},
            "tolerance": {"abs": 1e-5, "rel": 1e-5}}"#;
        let (_, outcome) = fixture(json);
        assert_eq!(outcome.verdict, Verdict::Unsupported);
        assert!(outcome.note.contains("system x"), "{}", outcome.note);
        let (_, outcome) = fixture("{");
        assert_eq!(outcome.verdict, Verdict::Fail);
        assert!(outcome.note.contains("fixture.json"), "{}", outcome.note);
        // A supported system whose tensors are missing must not pass.
        let (_, outcome) = fixture(
            &json
                .replace("\"system\": \"x\"", "\"system\": \"unet2d\"")
                .replace(
                    "\"call\": {}",
                    r#""call": {"class": "UNet2DModel", "runner": "forward"}"#,
                ),
        );
        assert_eq!(outcome.verdict, Verdict::Fail);
        assert!(outcome.note.contains("sample"), "{}", outcome.note);
    }

    #[test]
    fn a_folder_without_fixtures_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            find(dir.path())
                .unwrap_err()
                .to_string()
                .contains("no fixture.json")
        );
    }
}
