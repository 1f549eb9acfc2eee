//! Single files that are either the old one or the new one, whatever happens in between.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::Tensor;
use tempfile::NamedTempFile;

use super::encode::Encoder;
use crate::error::{Error, Result};

/// Replaces the file at `path` by `bytes`: a temporary file in the same folder, fsync, rename,
/// fsync of the folder. A device or a pipe is written to as it is.
///
/// # Errors
///
/// [`Error::Io`]; the old file is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| {
        file.write_all(bytes).map_err(|e| Error::io(path, e))
    })
}

/// Replaces the file at `path` by a safetensors file, like [`write_atomic`]. The same tensors and
/// metadata give the same bytes.
///
/// # Errors
///
/// [`Error::Io`], or [`Error::Unsupported`] for an element type that the format lacks; the old file
/// is then untouched.
pub fn write_safetensors_atomic(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let encoder = Encoder::new(tensors, metadata)?;
    replace(path, |file| {
        encoder.write(&mut |piece| file.write_all(piece).map_err(|e| Error::io(path, e)))
    })
}

fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let io = |e| Error::io(path, e);
    // A device or a pipe is written to; renaming a file over it would take its place.
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let mut device = File::options().write(true).open(path).map_err(io)?;
        write(&mut device)?;
        return device.flush().map_err(io);
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = temporary(folder).map_err(io)?;
    let mut buffered = BufWriter::with_capacity(1 << 16, file.as_file_mut());
    write(&mut buffered)?;
    buffered.flush().map_err(io)?;
    drop(buffered);
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    sync_folder(folder).map_err(io)
}

fn temporary(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    // Temporary files are private by default; what is kept gets what the umask allows.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

/// Makes the names in a folder durable. Windows has no such call and needs none.
pub(super) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()
    } else {
        Ok(())
    }
}
