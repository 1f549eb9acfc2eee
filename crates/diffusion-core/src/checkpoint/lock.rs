//! One writer per run folder.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Seek, Write};
use std::path::{Path, PathBuf};

use fd_lock::{RwLock, RwLockWriteGuard};

use crate::error::{Error, Report, Result};

/// The file `lock` of a run folder. The system releases it when its owner ends, however it ends.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    lock: RwLock<File>,
}

/// Proof that this process is the only writer; ends when dropped.
#[derive(Debug)]
pub struct RunGuard<'a>(#[allow(dead_code, reason = "held, not read")] RwLockWriteGuard<'a, File>);

impl RunLock {
    /// Opens (or makes) the lock file of `folder`, without taking it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let path = folder.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        Ok(Self {
            path,
            lock: RwLock::new(file),
        })
    }

    /// Takes the lock without waiting and writes this process's id into it.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] naming the owner's process id when another writer holds it.
    pub fn acquire(&mut self) -> Result<RunGuard<'_>> {
        let path = self.path.clone();
        match self.lock.try_write() {
            Ok(mut guard) => {
                let text = format!("{}\n", std::process::id());
                guard
                    .set_len(0)
                    .and_then(|()| guard.rewind())
                    .and_then(|()| guard.write_all(text.as_bytes()))
                    .map_err(|e| Error::io(&path, e))?;
                Ok(RunGuard(guard))
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let owner = fs::read_to_string(&path).unwrap_or_default();
                let owner = owner.trim();
                let owner = if owner.is_empty() { "unknown" } else { owner };
                Err(
                    Report::file(&path, format_args!("in use by process {owner}"))
                        .expected("one writer for each run folder")
                        .remedy("wait for that process to end, or choose another folder")
                        .checkpoint(),
                )
            }
            Err(e) => Err(Error::io(path, e)),
        }
    }
}
