//! Image data sets: where they come from, and how a pixel becomes a number in `[-1, 1]`.
//!
//! [`open`] understands three kinds of source:
//!
//! | spec | what it is |
//! |---|---|
//! | `digits` | 1797 handwritten digits of 8×8 pixels that are built into the program |
//! | a file | IDX images (the format of MNIST and Fashion-MNIST), gzipped or not; labels are found by name |
//! | a folder | PNG and JPEG files; sub-folders, if any, are classes |
//!
//! A data set is held in memory as integers and converted when a batch is asked for:
//!
//! ```text
//! x = 2 v / v_max − 1        (8 bit: k / 127.5 − 1;  digits 0..=16: v / 8 − 1)
//! ```
//!
//! Every reader checks what a header claims against what the file can hold before it allocates.

mod container;
mod dataset;
mod decode;
pub mod digits;
pub mod folder;
pub mod idx;
mod input;

pub use dataset::{Dataset, Labels, Pixels};
pub use folder::{Color, Options};

use diffusion_core::{Error, Report, Result};
use std::path::Path;

/// The largest width or height of an image.
pub const MAX_SIDE: u32 = 16_384;
/// The most bytes that one decoded image may have.
pub const MAX_IMAGE_BYTES: u64 = 64 << 20;
/// The most bytes that a data set may take in memory.
pub const MAX_DATASET_BYTES: u64 = 4 << 30;

/// Training and test examples.
#[derive(Clone, Debug)]
pub struct Splits {
    /// What a model may learn from.
    pub train: Dataset,
    /// What it is judged on.
    pub test: Dataset,
}

/// All images of a source: `digits`, an IDX file or a folder.
///
/// # Errors
/// Input errors name the file, what was found, what was expected and what to do.
pub fn open(spec: &str) -> Result<Dataset> {
    open_with(spec, &Options::default())
}

/// [`open`] with options for folders.
///
/// # Errors
/// Those of [`open`]; options that the source cannot honour are refused.
pub fn open_with(spec: &str, options: &Options) -> Result<Dataset> {
    match Source::find(spec, options)? {
        Source::Digits => digits::load(),
        Source::Idx(path) => idx::read(path),
        Source::Folder(path) => match folder::split_folders(path)? {
            Some((train, test)) => {
                folder::read(&train, options)?.concat(folder::read(&test, options)?)
            }
            None => folder::read(path, options),
        },
    }
}

/// Training and test examples of a source.
///
/// Files that are split already keep their split: `train-images-…` beside `t10k-images-…` or
/// `test-images-…`, and a folder that holds the folders `train` and `test`. Anything else is
/// split by [`Dataset::split`].
///
/// # Errors
/// Those of [`open_with`]; a source that is too small to split; splits of different shapes.
pub fn splits(spec: &str, options: &Options) -> Result<Splits> {
    let (train, test) = match Source::find(spec, options)? {
        Source::Digits => digits::load()?.split()?,
        Source::Idx(path) => match idx::test_companion(path) {
            Some(test) => (idx::read(path)?, idx::read(&test)?),
            None => idx::read(path)?.split()?,
        },
        Source::Folder(path) => match folder::split_folders(path)? {
            Some((train, test)) => (
                folder::read(&train, options)?,
                folder::read(&test, options)?,
            ),
            None => folder::read(path, options)?.split()?,
        },
    };
    train.must_match(&test)?;
    Ok(Splits { train, test })
}

enum Source<'a> {
    Digits,
    Idx(&'a Path),
    Folder(&'a Path),
}

impl<'a> Source<'a> {
    fn find(spec: &'a str, options: &Options) -> Result<Self> {
        let path = Path::new(spec);
        let source = match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => return Ok(Source::Folder(path)),
            // A file or folder of that name would have to be given as `./digits`.
            _ if spec == digits::NAME => Source::Digits,
            Ok(_) => {
                input::check_regular(path)?;
                Source::Idx(path)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(
                    Report::new(format!("data `{spec}`"), "no such file or folder")
                        .expected("`digits`, an IDX file or a folder of PNG or JPEG images")
                        .remedy("check the path")
                        .input(),
                );
            }
            Err(error) => return Err(Error::io(path, error)),
        };
        if *options != Options::default() {
            return Err(
                Report::new(format!("data `{spec}`"), "a size or colour was asked for")
                    .expected("such options with a folder of images only")
                    .remedy("leave the options out")
                    .config(),
            );
        }
        Ok(source)
    }
}
