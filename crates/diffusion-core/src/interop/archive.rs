//! The members of a zip archive that are stored without compression, as PyTorch writes them.
//!
//! ```text
//! end record, at most 64 KiB from the end → central directory → one header a member → its data
//! ```
//!
//! Nothing is unpacked, so that a small file cannot claim to be a large one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Error, Report, Result};
use crate::limits::Limits;

/// An open archive.
pub struct Archive {
    path: PathBuf,
    file: File,
    len: u64,
    claimed: u64,
    members: BTreeMap<String, Member>,
}

#[derive(Clone, Copy)]
struct Member {
    header: u64,
    size: u64,
}

const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

impl Archive {
    /// Reads the directory of an archive.
    ///
    /// # Errors
    /// `Input` when it is no zip archive or a damaged one, `Unsupported` when a member is
    /// compressed, `Limit` above `limits`, `Io` when it cannot be read.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let bytes = format_args!("{}: bytes", path.display()).to_string();
        Limits::require(bytes, len, limits.file_bytes, "file_bytes")?;
        let mut magic = [0; 4];
        let n = file.read(&mut magic).map_err(io)?;
        if n < 4 || word(&magic, 0) != Some(LOCAL) {
            let found = match magic {
                [0x80, ..] => "a pickle that torch.save did not write",
                [b'<', ..] => "a web page or another text",
                _ => "no zip archive",
            };
            return Err(Report::file(path, found)
                .expected("a file that torch.save wrote")
                .remedy("download it again, or save it again with a present PyTorch")
                .input());
        }
        let mut archive = Self {
            path: path.to_path_buf(),
            file,
            len,
            claimed: 0,
            members: BTreeMap::new(),
        };
        archive.read_directory(limits)?;
        Ok(archive)
    }

    /// The bytes of the archive.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The names of the members.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The bytes of a member.
    ///
    /// # Errors
    /// `Input` when there is none of this name, `Limit` when it is longer than `limit`.
    pub fn read(&mut self, name: &str, limit: u64, field: &str) -> Result<Vec<u8>> {
        let Some(member) = self.members.get(name).copied() else {
            return Err(self.damaged(format!("no member {name:?}")));
        };
        let at = format!("{}: bytes of {name}", self.path.display());
        Limits::require(at, member.size, limit, field)?;
        let header = self.bytes(member.header, 30)?;
        let (Some(LOCAL), Some(n), Some(m)) =
            (word(&header, 0), half(&header, 26), half(&header, 28))
        else {
            return Err(self.damaged(format!("no header in front of member {name:?}")));
        };
        self.bytes(
            member.header + 30 + u64::from(n) + u64::from(m),
            member.size,
        )
    }

    fn read_directory(&mut self, limits: &Limits) -> Result<()> {
        let tail_len = self.len.min(22 + 0xffff);
        let tail_at = self.len - tail_len;
        let tail = self.bytes(tail_at, tail_len)?;
        let end = (0..tail.len().saturating_sub(21))
            .rev()
            .find(|&i| word(&tail, i) == Some(END));
        let Some(end) = end else {
            return Err(self.damaged("no directory at the end".into()));
        };
        let field = |i| u64::from(word(&tail, end + i).unwrap_or(0));
        let (mut size, mut start) = (field(12), field(16));
        if size == 0xffff_ffff || start == 0xffff_ffff {
            let locator = end
                .checked_sub(20)
                .filter(|&i| word(&tail, i) == Some(LOCATOR64));
            let Some(record) = locator.and_then(|i| long(&tail, i + 8)) else {
                return Err(self.damaged("no 64-bit directory".into()));
            };
            let record = self.bytes(record, 56)?;
            let (Some(END64), Some(s), Some(at)) =
                (word(&record, 0), long(&record, 40), long(&record, 48))
            else {
                return Err(self.damaged("no 64-bit directory".into()));
            };
            (size, start) = (s, at);
        }
        let at = format!("{}: bytes of its directory", self.path.display());
        Limits::require(at, size, limits.json_bytes, "json_bytes")?;
        let directory = self.bytes(start, size)?;
        let mut rest = directory.as_slice();
        while !rest.is_empty() {
            let Some(length) = self.entry(rest)? else {
                return Err(self.damaged("a damaged directory".into()));
            };
            rest = &rest[length..];
            let at = format!("{}: members", self.path.display());
            Limits::require(
                at,
                self.members.len() as u64,
                limits.tensors as u64,
                "tensors",
            )?;
        }
        Ok(())
    }

    /// Takes one entry of the directory and gives its length; `None` when it is cut off.
    fn entry(&mut self, entry: &[u8]) -> Result<Option<usize>> {
        let parts = (
            word(entry, 0),
            half(entry, 10),
            half(entry, 28),
            half(entry, 30),
        );
        let (Some(CENTRAL), Some(method), Some(n), Some(m)) = parts else {
            return Ok(None);
        };
        let (n, m) = (usize::from(n), usize::from(m));
        let length = 46 + n + m + usize::from(half(entry, 32).unwrap_or(0));
        if entry.len() < length {
            return Ok(None);
        }
        let name = String::from_utf8_lossy(&entry[46..46 + n]).into_owned();
        let mut values = [20, 24, 42].map(|i| u64::from(word(entry, i).unwrap_or(0)));
        let mut extra = &entry[46 + n..46 + n + m];
        while let (Some(id), Some(size)) = (half(extra, 0), half(extra, 2)) {
            let end = (4 + usize::from(size)).min(extra.len());
            if id == 1 {
                // Only the fields that did not fit are here, uncompressed size first.
                let mut at = 4;
                for i in [1, 0, 2] {
                    if values[i] == 0xffff_ffff
                        && let Some(value) = long(&extra[..end], at)
                    {
                        values[i] = value;
                        at += 8;
                    }
                }
            }
            extra = &extra[end..];
        }
        let [packed, size, header] = values;
        if method != 0 || packed != size {
            return Err(
                Report::file(&self.path, format!("member {name:?} is compressed"))
                    .expected("members as torch.save stores them, uncompressed")
                    .remedy("save the file again with torch.save")
                    .unsupported(),
            );
        }
        if header.checked_add(size).is_none_or(|end| end > self.len) {
            return Err(self.damaged(format!("member {name:?} of {size} bytes at {header}")));
        }
        // Members lie one after the other, each behind a header of 30 bytes: what claims more would
        // make a reader read the same bytes again and again.
        self.claimed = self.claimed.saturating_add(size).saturating_add(30);
        if self.claimed > self.len {
            return Err(self.damaged("members that overlap".into()));
        }
        if self.members.contains_key(&name) {
            return Err(self.damaged(format!("the member {name:?} twice")));
        }
        self.members.insert(name, Member { header, size });
        Ok(Some(length))
    }

    fn bytes(&mut self, at: u64, size: u64) -> Result<Vec<u8>> {
        if at.checked_add(size).is_none_or(|end| end > self.len) {
            return Err(self.damaged(format!("{size} bytes at {at} of {}", self.len)));
        }
        let mut bytes = vec![0; size as usize];
        let read = self
            .file
            .seek(SeekFrom::Start(at))
            .and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|e| Error::io(&self.path, e))?;
        Ok(bytes)
    }

    fn damaged(&self, found: String) -> Error {
        Report::file(&self.path, found)
            .expected("a whole zip archive")
            .remedy("the file is damaged or cut off: copy or download it again")
            .input()
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from(half(bytes, at)?) | u32::from(half(bytes, at + 2)?) << 16)
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(word(bytes, at)?) | u64::from(word(bytes, at + 4)?) << 32)
}
