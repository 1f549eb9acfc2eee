//! Image data sets: where they come from, and how a pixel becomes a number in `[-1, 1]`.
//!
//! [`open`] understands these sources, and [`splits`] divides them:
//!
//! | spec | what it is | test images |
//! |---|---|---|
//! | `digits` | 1797 handwritten digits of 8×8 pixels that are built into the program | every fifth |
//! | `mnist` | 10,000 handwritten digits of 28×28 pixels, built in | every fifth of a class |
//! | `emoji` | 459 emoji of 32×32 pixels in colour, built in | every fifth of a class |
//! | a file | IDX images (the format of MNIST and Fashion-MNIST), gzipped or not; labels are found by name | the test file beside it, else every fifth |
//! | `….bin`, `….bin.gz` | one file of CIFAR-10 in its binary version | by hash |
//! | `….npz` | NumPy arrays of images and labels | by hash |
//! | a folder with `train-images-idx3-ubyte` or its `.gz` | MNIST, Fashion-MNIST and the like | `t10k-images-…`, else every fifth |
//! | a folder with `data_batch_….bin` or `test_batch.bin` | CIFAR-10 | `test_batch`, else by hash |
//! | another folder | PNG and JPEG files; sub-folders, if any, are classes | its folder `test` beside `train`, else by hash |
//!
//! By hash means [`Dataset::split_by_hash`] with a share of [`TEST_SHARE`]: equal images fall on
//! the same side.
//!
//! A data set is held in memory as integers and converted when a batch is asked for. Of a folder of
//! images only so much is held as [`Import::memory`] allows; the rest is decoded when it is needed.
//!
//! ```text
//! x = 2 v / v_max − 1        (8 bit: k / 127.5 − 1;  digits 0..=16: v / 8 − 1)
//! ```
//!
//! Every reader checks what a header claims against what the file can hold before it allocates.

pub mod cifar;
mod config;
mod container;
mod dataset;
mod decode;
pub mod digits;
pub mod emoji;
mod files;
pub mod folder;
pub mod idx;
mod import;
mod input;
pub mod mnist;
pub mod npz;
mod split;

pub use config::{DataConfig, DataRecord};
pub use dataset::{Dataset, Labels, Pixels, flips};
pub use import::{Broken, Color, DEFAULT_MEMORY, Fit, Import, Options, Skipped};
pub use split::TEST_SHARE;

use diffusion_core::{Error, Report, Result};
use std::borrow::Cow;
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

/// All images of a source; the module's page lists the kinds.
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
    Ok(open_import(spec, &Import::from(options.clone()))?.0)
}

/// [`open_with`] with all that can be asked of a folder, and the files that were left out.
///
/// # Errors
/// Those of [`open_with`].
pub fn open_import(spec: &str, import: &Import) -> Result<(Dataset, Vec<Skipped>)> {
    let data = match Source::find(spec, import)? {
        Source::Digits => digits::load()?,
        Source::Mnist => mnist::load()?,
        Source::Emoji => emoji::load()?,
        Source::Idx(path) => idx::read(&path)?,
        Source::Npz(path) => npz::read(path)?,
        Source::Cifar(path) => cifar::read(path, [path])?,
        Source::CifarFolder(path, batches) => {
            let files = batches.train.iter().chain(&batches.test);
            cifar::read(path, files.map(|file| file.as_path()))?
        }
        Source::Folder(path) => {
            let parts = match folder::split_folders(path)? {
                Some((train, test)) => folder::open(path, &[train, test], import)?,
                None => folder::open(path, &[path.to_path_buf()], import)?,
            };
            return Ok((parts.data, parts.skipped));
        }
    };
    Ok((data, Vec::new()))
}

/// Training and test examples of a source.
///
/// Files that are split already keep their split: `train-images-…` beside `t10k-images-…` or
/// `test-images-…`, `test_batch.bin` of CIFAR-10, and a folder that holds the folders `train` and
/// `test`. The module's page says how anything else is split.
///
/// # Errors
/// Those of [`open_with`]; a source that is too small to split; splits of different shapes.
pub fn splits(spec: &str, options: &Options) -> Result<Splits> {
    Ok(splits_import(spec, &Import::from(options.clone()))?.0)
}

/// [`splits`] with all that can be asked of a folder, and the files that were left out.
///
/// # Errors
/// Those of [`splits`].
pub fn splits_import(spec: &str, import: &Import) -> Result<(Splits, Vec<Skipped>)> {
    let mut skipped = Vec::new();
    let (train, test) = match Source::find(spec, import)? {
        Source::Digits => digits::load()?.split()?,
        Source::Mnist => mnist::load()?.split_in_classes()?,
        Source::Emoji => emoji::load()?.split_in_classes()?,
        Source::Idx(path) => match idx::test_companion(&path) {
            Some(test) => (idx::read(&path)?, idx::read(&test)?),
            None => idx::read(&path)?.split()?,
        },
        Source::Npz(path) => npz::read(path)?.split_by_hash(TEST_SHARE)?,
        Source::Cifar(path) => cifar::read(path, [path])?.split_by_hash(TEST_SHARE)?,
        Source::CifarFolder(path, batches) => {
            let train = batches.train.iter().map(|file| file.as_path());
            match &batches.test {
                Some(test) if !batches.train.is_empty() => (
                    cifar::read(path, train)?,
                    cifar::read(path, [test.as_path()])?,
                ),
                Some(test) => cifar::read(path, [test.as_path()])?.split_by_hash(TEST_SHARE)?,
                None => cifar::read(path, train)?.split_by_hash(TEST_SHARE)?,
            }
        }
        Source::Folder(path) => match folder::split_folders(path)? {
            Some((train, test)) => {
                let parts = folder::open(path, &[train, test], import)?;
                let (all, first) = (parts.data, parts.counts[0]);
                skipped = parts.skipped;
                let range = |from: usize, to: usize| all.select(&(from..to).collect::<Vec<_>>());
                (range(0, first)?, range(first, all.len())?)
            }
            None => {
                let (all, fewer) = folder::import(path, import)?;
                skipped = fewer;
                all.split_by_hash(TEST_SHARE)?
            }
        },
    };
    train.must_match(&test)?;
    Ok((Splits { train, test }, skipped))
}

enum Source<'a> {
    Digits,
    Mnist,
    Emoji,
    Idx(Cow<'a, Path>),
    Npz(&'a Path),
    Cifar(&'a Path),
    CifarFolder(&'a Path, cifar::Batches),
    Folder(&'a Path),
}

impl<'a> Source<'a> {
    fn find(spec: &'a str, import: &Import) -> Result<Self> {
        let path = Path::new(spec);
        // A file or folder of such a name is given as `./digits`.
        let built_in = match spec {
            digits::NAME => Some(Source::Digits),
            mnist::NAME => Some(Source::Mnist),
            emoji::NAME => Some(Source::Emoji),
            _ => None,
        };
        let source = match std::fs::metadata(path) {
            _ if built_in.is_some() => built_in.unwrap_or(Source::Digits),
            Ok(meta) if meta.is_dir() => match (cifar::find(path)?, idx::find(path)) {
                (Some(batches), _) => Source::CifarFolder(path, batches),
                (None, Some(images)) => Source::Idx(Cow::Owned(images)),
                (None, None) => return Ok(Source::Folder(path)),
            },
            Ok(_) => {
                input::check_regular(path)?;
                if npz::is_one(path)? {
                    Source::Npz(path)
                } else if cifar::is_named_so(path) {
                    Source::Cifar(path)
                } else {
                    Source::Idx(Cow::Borrowed(path))
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(
                    Report::new(format!("data `{spec}`"), "no such file or folder")
                        .expected(
                            "`digits`, `mnist`, `emoji`, an IDX, CIFAR-10 or .npz file, or a folder of PNG or JPEG images",
                        )
                        .remedy("check the path")
                        .input(),
                );
            }
            Err(error) => return Err(Error::io(path, error)),
        };
        if import.asks_of_folder() {
            return Err(Report::new(
                format!("data `{spec}`"),
                "options such as a size or colour were given",
            )
            .expected("such options with a folder of images only")
            .remedy("leave the options out")
            .config());
        }
        Ok(source)
    }
}
