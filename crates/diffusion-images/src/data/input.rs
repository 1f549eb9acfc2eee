//! Reading whole files with a bound, and refusing what is not a file.

use diffusion_core::{Error, Report, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The length of a regular file; pipes and devices could block or never end.
pub(super) fn check_regular(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if meta.is_file() {
        Ok(meta.len())
    } else {
        let found = if meta.is_dir() {
            "a folder"
        } else {
            "a pipe or device"
        };
        Err(Report::file(path, found)
            .expected("a regular file")
            .remedy("save the data to a file first")
            .input())
    }
}

/// The bytes of a regular file of at most `limit` bytes.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let length = check_regular(path)?;
    if length > limit {
        return Err(Report::file(path, format!("{length} bytes"))
            .expected(format!("at most {limit} bytes"))
            .remedy("store the image smaller")
            .limit());
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(length as usize)
        .map_err(|_| out_of_memory(path, length))?;
    // The bound holds even if the file grows while it is read.
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.is_empty() {
        return Err(Report::file(path, "an empty file")
            .expected("image data")
            .remedy("copy or download the file again")
            .input());
    }
    Ok(bytes)
}

/// The system refused to lend `bytes` bytes.
pub(super) fn out_of_memory(path: &Path, bytes: u64) -> Error {
    Report::file(
        path,
        format!("{bytes} bytes are needed, which this machine does not have"),
    )
    .remedy("use fewer or smaller images")
    .limit()
}
