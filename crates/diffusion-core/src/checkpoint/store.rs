//! Saving, finding, verifying and pruning checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::encode::{Encoder, is_finite};
use super::manifest::{FileSeal, Manifest, digest};
use super::storage::Storage;
use super::tensors::decode_safetensors;
use crate::error::{Error, Report, Result};
use crate::limits::Limits;

const MANIFEST: &str = "MANIFEST.json";
const STATE: &str = "state.json";
const TENSORS: &str = ".safetensors";
const TEMPORARY: &str = ".tmp-";

/// Everything that a checkpoint holds.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Optimiser steps done.
    pub step: u64,
    /// Groups of tensors; the group `params` becomes the file `params.safetensors`.
    pub groups: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// The JSON text of `state.json`.
    pub state: Vec<u8>,
    /// The smaller the better; what [`Keep::best`] goes by.
    pub score: Option<f64>,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// The newest ones; at least 1.
    pub last: usize,
    /// Those whose step is a multiple of this.
    pub every: Option<u64>,
    /// Those with the smallest score.
    pub best: usize,
}

impl Default for Keep {
    fn default() -> Self {
        Self {
            last: 3,
            every: None,
            best: 0,
        }
    }
}

/// A checkpoint that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

/// What was found on start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The newest checkpoint that verifies; none when there is no checkpoint at all.
    pub snapshot: Option<Snapshot>,
    /// Newer ones that do not.
    pub rejected: Vec<Rejected>,
}

/// The folder `checkpoints` of a run.
pub struct Checkpoints {
    storage: Box<dyn Storage>,
    root: PathBuf,
    keep: Keep,
    limits: Limits,
    rejected: BTreeSet<u64>,
}

impl fmt::Debug for Checkpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoints")
            .field("root", &self.root)
            .field("keep", &self.keep)
            .finish()
    }
}

impl Checkpoints {
    /// Opens `<run>/checkpoints`, makes it if need be, and deletes what interrupted writers left in it
    /// and in `<run>`.
    /// The caller holds the [`RunLock`](super::RunLock).
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn open(run: &Path, storage: Box<dyn Storage>, keep: Keep) -> Result<Self> {
        let root = run.join("checkpoints");
        let limits = Limits::default();
        let mut this = Self {
            storage,
            root,
            keep,
            limits,
            rejected: BTreeSet::new(),
        };
        let root = this.root.clone();
        this.storage
            .create_dir(&root)
            .map_err(|e| Error::io(&root, e))?;
        this.storage.sync_dir(run).map_err(|e| Error::io(run, e))?;
        // The run folder may be new as well, and a checkpoint in a folder without a name is lost.
        if let Some(parent) = run.parent() {
            match this.storage.sync_dir(parent) {
                // Not ours to open, hence not made by this run.
                Err(e) if e.kind() == ErrorKind::PermissionDenied => {}
                result => result.map_err(|e| Error::io(parent, e))?,
            }
        }
        // Single files of the run are replaced through temporary ones, too.
        for folder in [run, &root] {
            for name in this
                .storage
                .list(folder)
                .map_err(|e| Error::io(folder, e))?
            {
                if name.starts_with(TEMPORARY) {
                    this.remove_tree(&folder.join(name))?;
                }
            }
        }
        Ok(this)
    }

    /// Where the checkpoint of `step` is, or would be.
    pub fn path(&self, step: u64) -> PathBuf {
        self.root.join(format!("step-{step:09}"))
    }

    /// The steps that have a checkpoint, sound or not, in rising order.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(|n| step_of(n)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint and prunes old ones.
    ///
    /// # Errors
    ///
    /// [`Error::Numeric`] naming the first tensor that is not finite, before anything is written;
    /// [`Error::Io`] when the system refuses. The checkpoints from before are then still there.
    pub fn save(&mut self, snapshot: &Snapshot) -> Result<PathBuf> {
        refuse_non_finite(snapshot)?;
        let tag = format!("{}-{}", snapshot.step, std::process::id());
        let temporary = self.root.join(format!("{TEMPORARY}{tag}"));
        let target = self.path(snapshot.step);
        if let Err(error) = self.write(&temporary, snapshot) {
            // A best effort: the next start deletes it too.
            let _ = self.remove_tree(&temporary);
            return Err(error);
        }
        let aside = self.root.join(format!("{TEMPORARY}old-{tag}"));
        // Only a rejected checkpoint can be in the way: its step is reached for the second time.
        let replaces = self
            .names()?
            .iter()
            .any(|n| step_of(n) == Some(snapshot.step));
        if replaces {
            self.rename(&target, &aside)?;
        }
        self.rename(&temporary, &target)?;
        self.sync_dir()?;
        self.rejected.remove(&snapshot.step);
        if replaces {
            self.remove_tree(&aside)?;
        }
        self.prune(snapshot.step)?;
        Ok(target)
    }

    /// Finds the newest checkpoint that verifies.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] when there are checkpoints but none that verifies, with every reason;
    /// [`Error::Io`] when the folder cannot be listed.
    pub fn load(&mut self) -> Result<Loaded> {
        let mut loaded = Loaded::default();
        for step in self.steps()?.into_iter().rev() {
            match self.load_step(step) {
                Ok(snapshot) => {
                    loaded.snapshot = Some(snapshot);
                    return Ok(loaded);
                }
                Err(why) => {
                    self.rejected.insert(step);
                    loaded.rejected.push(Rejected {
                        path: self.path(step),
                        why,
                    });
                }
            }
        }
        if loaded.rejected.is_empty() {
            return Ok(loaded);
        }
        let reasons: Vec<String> = loaded
            .rejected
            .iter()
            .map(|r| format!("{}: {}", r.path.display(), r.why))
            .collect();
        Err(Report::file(
            &self.root,
            format!("no usable checkpoint: {}", reasons.join("; ")),
        )
        .expected("at least one that verifies")
        .remedy("restore the folder from a copy, or remove it to start again")
        .checkpoint())
    }

    fn load_step(&self, step: u64) -> Result<Snapshot, String> {
        let folder = self.path(step);
        let manifest = self.manifest(&folder)?;
        if manifest.step != step {
            return Err(format!(
                "{MANIFEST}: step {}; expected {step}",
                manifest.step
            ));
        }
        let mut there: BTreeSet<String> = self
            .storage
            .list(&folder)
            .map_err(|e| e.to_string())?
            .into_iter()
            .collect();
        there.remove(MANIFEST);
        let listed: BTreeSet<String> = manifest.files.keys().cloned().collect();
        if let Some(name) = there.symmetric_difference(&listed).next() {
            let what = if listed.contains(name) {
                "missing"
            } else {
                "not in the manifest"
            };
            return Err(format!("{name}: {what}"));
        }
        let mut snapshot = Snapshot {
            step,
            score: manifest.score(),
            ..Snapshot::default()
        };
        for (name, seal) in &manifest.files {
            let path = folder.join(name);
            let read = || self.storage.read(&path).map_err(|e| format!("{name}: {e}"));
            let (mut reader, len) = read()?;
            if len != seal.bytes {
                return Err(format!("{name}: {len} bytes; expected {}", seal.bytes));
            }
            if digest(&mut *reader).map_err(|e| format!("{name}: {e}"))? != *seal {
                return Err(format!("{name}: its contents do not match the digest"));
            }
            drop(reader);
            let (mut reader, len) = read()?;
            if let Some(group) = name.strip_suffix(TENSORS) {
                let tensors = decode_safetensors(&mut *reader, len, Path::new(name), &self.limits)
                    .map_err(|e| e.to_string())?;
                snapshot.groups.insert(group.to_string(), tensors);
            } else {
                reader
                    .read_to_end(&mut snapshot.state)
                    .map_err(|e| format!("{name}: {e}"))?;
            }
        }
        Ok(snapshot)
    }

    fn manifest(&self, folder: &Path) -> Result<Manifest, String> {
        let of = |why: &dyn fmt::Display| format!("{MANIFEST}: {why}");
        let (reader, len) = self
            .storage
            .read(&folder.join(MANIFEST))
            .map_err(|e| of(&e))?;
        if len > self.limits.json_bytes {
            return Err(of(&format_args!("{len} bytes long")));
        }
        let mut bytes = Vec::new();
        reader
            .take(len + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| of(&e))?;
        Manifest::parse(&bytes).map_err(|e| of(&e))
    }

    fn write(&mut self, folder: &Path, snapshot: &Snapshot) -> Result<()> {
        self.storage
            .create_dir(folder)
            .map_err(|e| Error::io(folder, e))?;
        let mut files = BTreeMap::new();
        for (group, tensors) in &snapshot.groups {
            let encoder = Encoder::new(tensors, &BTreeMap::new())?;
            let name = format!("{group}{TENSORS}");
            let seal = self.write_file(&folder.join(&name), |sink| encoder.write(sink))?;
            files.insert(name, seal);
        }
        let seal = self.write_file(&folder.join(STATE), |sink| sink(&snapshot.state))?;
        files.insert(STATE.to_string(), seal);
        let path = folder.join(MANIFEST);
        let bytes = Manifest::new(snapshot.step, snapshot.score, files)
            .to_bytes()
            .map_err(|e| Report::file(&path, e).checkpoint())?;
        self.write_file(&path, |sink| sink(&bytes))?;
        self.storage
            .sync_dir(folder)
            .map_err(|e| Error::io(folder, e))
    }

    fn write_file(
        &mut self,
        path: &Path,
        produce: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<FileSeal> {
        let io = |e| Error::io(path, e);
        self.storage.create(path).map_err(io)?;
        let mut hasher = blake3::Hasher::new();
        let mut bytes = 0;
        produce(&mut |piece| {
            hasher.update(piece);
            bytes += piece.len() as u64;
            self.storage.append(path, piece).map_err(io)
        })?;
        self.storage.sync_file(path).map_err(io)?;
        Ok(FileSeal {
            bytes,
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }

    /// Deletes what [`Keep`] does not keep. Rejected ones don't count, or they could push out the
    /// only sound one; newer ones than `newest` are rejected ones whose step will come again.
    fn prune(&mut self, newest: u64) -> Result<()> {
        let steps = self.steps()?;
        let sound: Vec<u64> = steps
            .iter()
            .copied()
            .filter(|s| *s <= newest && !self.rejected.contains(s))
            .collect();
        let mut kept: BTreeSet<u64> = sound
            .iter()
            .rev()
            .take(self.keep.last.max(1))
            .copied()
            .collect();
        if let Some(every) = self.keep.every {
            kept.extend(
                sound
                    .iter()
                    .filter(|&&s| every > 0 && s.is_multiple_of(every)),
            );
        }
        if self.keep.best > 0 {
            let mut scored: Vec<(f64, u64)> = sound
                .iter()
                .filter_map(|&s| Some((self.manifest(&self.path(s)).ok()?.score()?, s)))
                .collect();
            scored.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            kept.extend(scored.iter().take(self.keep.best).map(|(_, s)| *s));
        }
        for step in steps
            .into_iter()
            .filter(|s| *s <= newest && !kept.contains(s))
        {
            // Renamed first, so that a half deleted folder never looks like a checkpoint.
            let doomed = self.root.join(format!("{TEMPORARY}prune-{step}"));
            self.rename(&self.path(step), &doomed)?;
            self.remove_tree(&doomed)?;
            self.rejected.remove(&step);
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        self.storage
            .list(&self.root)
            .map_err(|e| Error::io(&self.root, e))
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.storage
            .rename(from, to)
            .map_err(|e| Error::io(from, e))
    }

    fn sync_dir(&mut self) -> Result<()> {
        self.storage
            .sync_dir(&self.root)
            .map_err(|e| Error::io(&self.root, e))
    }

    fn remove_tree(&mut self, folder: &Path) -> Result<()> {
        let names = match self.storage.list(folder) {
            Ok(names) => names,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            // A stray file that bears a temporary name.
            Err(e) if e.kind() == ErrorKind::NotADirectory => {
                return self
                    .storage
                    .remove_file(folder)
                    .map_err(|e| Error::io(folder, e));
            }
            Err(e) => return Err(Error::io(folder, e)),
        };
        for name in names {
            let path = folder.join(name);
            self.storage
                .remove_file(&path)
                .map_err(|e| Error::io(&path, e))?;
        }
        self.storage
            .remove_dir(folder)
            .map_err(|e| Error::io(folder, e))
    }
}

fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.parse().ok()?;
    (format!("{step:09}") == digits).then_some(step)
}

fn refuse_non_finite(snapshot: &Snapshot) -> Result<()> {
    for (group, tensors) in &snapshot.groups {
        for (name, tensor) in tensors {
            if !is_finite(tensor)? {
                return Err(Report::new(
                    format_args!("checkpoint of step {}: {group}: `{name}`", snapshot.step),
                    "NaN or infinity",
                )
                .expected("finite numbers")
                .remedy("nothing was written; resume from the checkpoint before")
                .numeric());
            }
        }
    }
    Ok(())
}
