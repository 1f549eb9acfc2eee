//! The operations on files that the checkpoint protocol is made of.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use super::atomic::sync_folder;

/// A place for checkpoints. Each call is one operation that can fail, or be the last before a power
/// cut, by itself; [`fault`](super::fault) counts them.
///
/// What a call changes need not be durable when it returns: contents are durable after
/// [`sync_file`](Storage::sync_file), names after [`sync_dir`](Storage::sync_dir) of the folder that
/// holds them.
pub trait Storage: Send {
    /// Makes a folder and those above it; fine when it is there.
    fn create_dir(&mut self, path: &Path) -> io::Result<()>;
    /// Makes an empty file, or empties the one there, for [`append`](Storage::append).
    fn create(&mut self, path: &Path) -> io::Result<()>;
    /// Adds bytes to the end of a file.
    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Makes the contents of a file durable.
    fn sync_file(&mut self, path: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&mut self, path: &Path) -> io::Result<()>;
    /// Moves a file or folder in one step.
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()>;
    /// Deletes a file.
    fn remove_file(&mut self, path: &Path) -> io::Result<()>;
    /// Deletes an empty folder.
    fn remove_dir(&mut self, path: &Path) -> io::Result<()>;
    /// The names in a folder, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Opens a file; also its length.
    fn read(&self, path: &Path) -> io::Result<(Box<dyn Read + '_>, u64)>;
}

/// The disk.
#[derive(Debug, Default)]
pub struct DiskStorage {
    open: Option<(PathBuf, File)>,
}

impl DiskStorage {
    /// The disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The file that is being written. Keeping it open lets fsync report a failed write-back.
    fn file(&mut self, path: &Path) -> io::Result<&mut File> {
        let open = match self.open.take() {
            Some((at, file)) if at == path => (at, file),
            _ => (
                path.to_path_buf(),
                OpenOptions::new().append(true).open(path)?,
            ),
        };
        Ok(&mut self.open.insert(open).1)
    }
}

impl Storage for DiskStorage {
    fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create(&mut self, path: &Path) -> io::Result<()> {
        self.open = None;
        let file = File::create(path)?;
        self.open = Some((path.to_path_buf(), file));
        Ok(())
    }

    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.file(path)?.write_all(bytes)
    }

    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        self.file(path)?.sync_all()?;
        self.open = None;
        Ok(())
    }

    fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        sync_folder(path)
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn read(&self, path: &Path) -> io::Result<(Box<dyn Read + '_>, u64)> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok((Box::new(BufReader::new(file)), len))
    }
}
