//! CIFAR-10 in its binary version (A. Krizhevsky 2009), gzipped or not.
//!
//! ```text
//! record: label (0..=9) | 1024 red | 1024 green | 1024 blue      32×32 pixels, row by row
//! data_batch_1.bin … data_batch_5.bin   training images
//! test_batch.bin                        test images
//! batches.meta.txt                      the names of the ten classes, one a line; may be absent
//! ```
//!
//! A folder with such files is recognised; one file is read alone. There is no header: the length
//! of a file must be a multiple of a record, which is checked before memory is taken; a gzip file is
//! unpacked twice, the first time to check it. It may unpack to at most 200 times its length, unless
//! that is small anyway.

use super::dataset::check_total;
use super::{Dataset, Labels, MAX_DATASET_BYTES, MAX_IMAGE_BYTES, Pixels, input};
use diffusion_core::{Error, Report, Result};
use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

const SIDE: usize = 32;
const IMAGE: usize = 3 * SIDE * SIDE;
const RECORD: usize = 1 + IMAGE;
const CLASSES: usize = 10;
const MAX_RATIO: u64 = 200;

/// The files of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batches {
    /// Files with training images, in the order of their names.
    pub train: Vec<PathBuf>,
    /// The file with test images, if there is one.
    pub test: Option<PathBuf>,
}

/// Whether a file's name says that it holds CIFAR-10: `….bin` or `….bin.gz`.
pub fn is_named_so(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    plain_name(&name).ends_with(".bin")
}

/// The CIFAR-10 files of a folder; `None` if there are none.
///
/// # Errors
/// The folder cannot be read; one batch is there twice, gzipped and not.
pub fn find(folder: &Path) -> Result<Option<Batches>> {
    let mut batches = Batches {
        train: Vec::new(),
        test: None,
    };
    let mut names: Vec<(String, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let plain = plain_name(&name).to_string();
        let numbered = plain
            .strip_prefix("data_batch_")
            .is_some_and(|rest| rest.ends_with(".bin"));
        if numbered || plain == "test_batch.bin" {
            names.push((plain, path));
        }
    }
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(
            Report::file(&pair[1].1, "the same batch as the file beside it")
                .expected("each batch once, gzipped or not")
                .remedy(format!("remove one of it and {}", pair[0].1.display()))
                .input(),
        );
    }
    for (plain, path) in names {
        if plain == "test_batch.bin" {
            batches.test = Some(path);
        } else {
            batches.train.push(path);
        }
    }
    let none = batches.train.is_empty() && batches.test.is_none();
    Ok((!none).then_some(batches))
}

fn plain_name(name: &str) -> &str {
    name.strip_suffix(".gz").unwrap_or(name)
}

/// The images of one or several files, one after another.
///
/// # Errors
/// Names the file and what is wrong with it: a length that is no multiple of a record, a label
/// above 9, a damaged gzip stream, sizes over the limits, a list of classes that has not ten names.
pub fn read<'a>(name: &Path, files: impl IntoIterator<Item = &'a Path>) -> Result<Dataset> {
    let (mut values, mut labels) = (Vec::new(), Vec::new());
    let mut classes = None;
    for file in files {
        if classes.is_none() {
            classes = Some(read_classes(file)?);
        }
        let mut records = read_file(file, values.len() as u64)?;
        labels.extend(take_labels(file, &mut records)?);
        if values.is_empty() {
            values = records;
        } else {
            let more = records.len();
            values
                .try_reserve_exact(more)
                .map_err(|_| input::out_of_memory(file, more as u64))?;
            values.extend_from_slice(&records);
        }
    }
    let pixels = Pixels::Levels { values, max: 255 };
    let labels = Labels {
        values: labels,
        classes: classes.unwrap_or_default(),
    };
    Dataset::new(
        name.display().to_string(),
        (3, SIDE, SIDE),
        pixels,
        Some(labels),
    )
}

/// All records of a file; `before` bytes of pixels have been read already.
fn read_file(path: &Path, before: u64) -> Result<Vec<u8>> {
    let length = input::check_regular(path)?;
    let mut file = BufReader::new(File::open(path).map_err(|e| Error::io(path, e))?);
    let head = file.fill_buf().map_err(|e| Error::io(path, e))?;
    // A record begins with 0..=9, so no plain file begins so.
    let bytes = if head.starts_with(&[0x1f, 0x8b]) {
        let most = (MAX_RATIO * length).max(MAX_IMAGE_BYTES);
        let unpacked = scan(path, MultiGzDecoder::new(file), most.min(MAX_DATASET_BYTES))?;
        check_total(&path.display().to_string(), before + unpacked)?;
        let again = File::open(path).map_err(|e| Error::io(path, e))?;
        unpack(path, MultiGzDecoder::new(BufReader::new(again)), unpacked)?
    } else {
        check_records(path, length)?;
        check_total(&path.display().to_string(), before.saturating_add(length))?;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(length as usize)
            .map_err(|_| input::out_of_memory(path, length))?;
        file.take(length)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io(path, e))?;
        check_records(path, bytes.len() as u64)?;
        bytes
    };
    Ok(bytes)
}

/// The length of what a gzip stream unpacks to, found without keeping it: memory is taken only for
/// a stream that is sound from end to end.
fn scan(path: &Path, mut data: impl Read, most: u64) -> Result<u64> {
    let mut buffer = vec![0; 1 << 16];
    let mut length = 0u64;
    loop {
        let read = data.read(&mut buffer).map_err(|e| damaged(path, &e))?;
        if read == 0 {
            break;
        }
        let start = length.next_multiple_of(RECORD as u64);
        for at in (start..length + read as u64).step_by(RECORD) {
            check_label(path, buffer[(at - length) as usize], at as usize / RECORD)?;
        }
        length += read as u64;
        if length > most {
            return Err(Report::file(path, format!("it unpacks to more than {most} bytes"))
                .expected(format!(
                    "at most {MAX_RATIO} bytes for each byte of the gzip file, and {MAX_DATASET_BYTES} in all"
                ))
                .remedy("unpack the file first if it is genuine")
                .limit());
        }
    }
    check_records(path, length)?;
    Ok(length)
}

/// The `length` bytes of a gzip stream that [`scan`] found sound.
fn unpack(path: &Path, data: impl Read, length: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(length as usize)
        .map_err(|_| input::out_of_memory(path, length))?;
    let read = data.take(length).read_to_end(&mut bytes);
    read.map_err(|e| damaged(path, &e))?;
    check_records(path, bytes.len() as u64)?;
    Ok(bytes)
}

fn damaged(path: &Path, error: &std::io::Error) -> Error {
    Report::file(path, format!("a damaged gzip stream ({error})"))
        .expected("a complete gzip file")
        .remedy(AGAIN)
        .input()
}

fn check_label(path: &Path, label: u8, record: usize) -> Result<()> {
    if usize::from(label) < CLASSES {
        return Ok(());
    }
    Err(
        Report::file(path, format!("label {label} in record {record}"))
            .expected(format!("0 to {}", CLASSES - 1))
            .remedy("give a file of the binary version of CIFAR-10")
            .input(),
    )
}

fn check_records(path: &Path, length: u64) -> Result<()> {
    if length > 0 && length.is_multiple_of(RECORD as u64) {
        return Ok(());
    }
    let remedy = if length > 0 && length.is_multiple_of(RECORD as u64 + 1) {
        "this looks like CIFAR-100, whose records have two labels: give the CIFAR-10 files"
    } else {
        AGAIN
    };
    Err(Report::file(path, format!("{length} bytes"))
        .expected(format!(
            "a positive multiple of {RECORD}, the length of a record"
        ))
        .remedy(remedy)
        .input())
}

/// Takes the labels out of the records, which become images.
fn take_labels(path: &Path, records: &mut Vec<u8>) -> Result<Vec<u32>> {
    let count = records.len() / RECORD;
    let mut labels = Vec::with_capacity(count);
    for record in 0..count {
        let at = record * RECORD;
        let label = records[at];
        check_label(path, label, record)?;
        labels.push(u32::from(label));
        records.copy_within(at + 1..at + RECORD, record * IMAGE);
    }
    records.truncate(count * IMAGE);
    Ok(labels)
}

/// The names in `batches.meta.txt` beside a file, or the digits.
fn read_classes(file: &Path) -> Result<Vec<String>> {
    let path = file.with_file_name("batches.meta.txt");
    if !path.is_file() {
        return Ok((0..CLASSES).map(|class| class.to_string()).collect());
    }
    let bytes = input::read_bounded(&path, 1 << 16)?;
    let text = String::from_utf8_lossy(&bytes);
    let names = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let names: Vec<String> = names.map(String::from).collect();
    if names.len() == CLASSES {
        return Ok(names);
    }
    Err(Report::file(&path, format!("{} names", names.len()))
        .expected(format!("the names of {CLASSES} classes, one a line"))
        .remedy("correct the file or remove it")
        .input())
}

const AGAIN: &str = "download or copy the file again";

#[cfg(test)]
mod tests;
