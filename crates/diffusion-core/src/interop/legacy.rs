//! The file that PyTorch wrote before version 1.6: pickles one after the other, then raw numbers.
//!
//! ```text
//! magic number | protocol | facts about the machine | object | keys of the storages
//! then for each key in this order: number of elements (8 bytes), elements
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::unpickle::{Flaw, Step, View, programs};
use crate::error::{Error, Report, Result};
use crate::limits::Limits;

/// How such a file begins: the pickle of its magic number, and of the protocol 1001.
pub const MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.";

/// An open file, read up to its numbers.
pub struct Legacy {
    path: PathBuf,
    file: File,
    len: u64,
    /// First byte and bytes of each storage.
    places: BTreeMap<String, (u64, u64)>,
}

impl Legacy {
    /// Whether a file begins as one of this form.
    ///
    /// # Errors
    /// `Io` when it cannot be read.
    pub fn is_one(path: &Path) -> Result<bool> {
        let io = |e| Error::io(path, e);
        let mut start = Vec::new();
        let file = File::open(path).map_err(io)?;
        file.take(MAGIC.len() as u64)
            .read_to_end(&mut start)
            .map_err(io)?;
        Ok(start == MAGIC)
    }

    /// Reads the pickles of a file and finds its storages; the named tensors of the object come
    /// beside it.
    ///
    /// # Errors
    /// `Limit` above `limits`, `Io` when it cannot be read; what else is wrong comes as a [`Flaw`].
    pub fn open(path: &Path, limits: &Limits) -> Result<Step<(Self, BTreeMap<String, View>)>> {
        let io = |e| Error::io(path, e);
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let bytes = format!("{}: bytes", path.display());
        Limits::require(bytes, len, limits.file_bytes, "file_bytes")?;
        let head_len = len.min(limits.json_bytes.saturating_add(MAGIC.len() as u64));
        let mut head = Vec::with_capacity(head_len as usize);
        (&mut file)
            .take(head_len)
            .read_to_end(&mut head)
            .map_err(io)?;
        let read = match programs(head.get(MAGIC.len()..).unwrap_or_default(), limits) {
            Ok(read) => read,
            // The pickles may go on where the head ends.
            Err(Flaw::Wrong(_)) if head_len < len => {
                return Ok(Err(Flaw::TooMany(
                    "bytes of pickles",
                    limits.json_bytes,
                    "json_bytes",
                )));
            }
            Err(flaw) => return Ok(Err(flaw)),
        };
        let mut legacy = Self {
            path: path.to_path_buf(),
            file,
            len,
            places: BTreeMap::new(),
        };
        let mut at = (MAGIC.len() + read.end) as u64;
        for key in read.keys {
            let Some(width) = read.classes.get(&key).and_then(|class| width(class)) else {
                // Its numbers could only be skipped if their width were known.
                let class = read.classes.get(&key).map_or("nothing", String::as_str);
                let found = format!("the storage {key:?} of the class {class}");
                return Ok(Err(Flaw::Wrong(found)));
            };
            let count = u64::from_le_bytes(legacy.bytes::<8>(at)?);
            let size = count.checked_mul(width).filter(|size| {
                let end = at.checked_add(8).and_then(|start| start.checked_add(*size));
                end.is_some_and(|end| end <= len)
            });
            let Some(size) = size else {
                let found = format!("{count} numbers of the storage {key:?}, beyond its end");
                return Ok(Err(Flaw::Wrong(found)));
            };
            legacy.places.insert(key, (at + 8, size));
            at += 8 + size;
        }
        Ok(Ok((legacy, read.views)))
    }

    /// The bytes of the file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The bytes of a storage.
    ///
    /// # Errors
    /// `Input` when there is none under this key, `Io` when it cannot be read.
    pub fn read(&mut self, key: &str) -> Result<Vec<u8>> {
        let Some((at, size)) = self.places.get(key).copied() else {
            return Err(Report::file(&self.path, format!("no storage {key:?}"))
                .expected("the numbers of every tensor")
                .remedy("the file is damaged: copy or download it again")
                .input());
        };
        let mut bytes = vec![0; size as usize];
        self.exactly(at, &mut bytes)?;
        Ok(bytes)
    }

    fn bytes<const N: usize>(&mut self, at: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.exactly(at, &mut bytes)?;
        Ok(bytes)
    }

    fn exactly(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        if at.saturating_add(bytes.len() as u64) > self.len {
            return Err(Report::file(&self.path, "a file that breaks off")
                .expected("the numbers of every tensor")
                .remedy("the file is damaged: copy or download it again")
                .input());
        }
        let read = self.file.seek(SeekFrom::Start(at));
        let read = read.and_then(|_| self.file.read_exact(bytes));
        read.map_err(|e| Error::io(&self.path, e))
    }
}

/// Bytes of an element of a storage of this class.
fn width(class: &str) -> Option<u64> {
    Some(match class {
        "DoubleStorage" | "LongStorage" => 8,
        "FloatStorage" | "IntStorage" => 4,
        "HalfStorage" | "BFloat16Storage" | "ShortStorage" => 2,
        "ByteStorage" | "BoolStorage" | "CharStorage" => 1,
        _ => return None,
    })
}
