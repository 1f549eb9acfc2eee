//! Folders of PNG and JPEG files.
//!
//! ```text
//! pictures/a.png pictures/b.jpg            no labels
//! pictures/cat/a.png pictures/dog/b.png    labels 0 = cat, 1 = dog (sorted by name)
//! pictures/train/… pictures/test/…         a fixed split of either kind
//! ```
//!
//! Files are read in the order of their names. Hidden files are passed over; text and system
//! files (`README.md`, `Thumbs.db`) too, with a warning; any other file must be an image, whatever
//! its name ends in.

use super::files::{self, How};
use super::{Broken, Dataset, Import, Labels, Options, Skipped};
use diffusion_core::{Error, Report, Result};
use std::path::{Path, PathBuf};

/// How many broken files an error or the warnings name one by one.
const NAMED: usize = 20;

/// All images of a folder.
///
/// # Errors
/// A folder without images, or that mixes images and class folders or nests deeper; files that are
/// no image, are damaged or exceed the limits; images of different sizes when no resizing is asked
/// for. Each error names the files.
pub fn read(folder: &Path, options: &Options) -> Result<Dataset> {
    Ok(import(folder, &Import::from(options.clone()))?.0)
}

/// [`read`] with all that can be asked, and the files that were left out.
///
/// With [`Broken::Skip`] files that are no image, are damaged or exceed the limits are left out.
/// At least one image must remain. A file that the system cannot read and one of another size than
/// the others still stop the reading: neither is the file's own fault.
///
/// # Errors
/// Those of [`read`]; no image remains.
pub fn import(folder: &Path, import: &Import) -> Result<(Dataset, Vec<Skipped>)> {
    let parts = open(folder, &[folder.to_path_buf()], import)?;
    Ok((parts.data, parts.skipped))
}

/// The images of one or several folders, one after another.
pub(super) struct Parts {
    pub data: Dataset,
    pub skipped: Vec<Skipped>,
    /// How many images each folder gave.
    pub counts: Vec<usize>,
}

/// The images of `folders`, which must have the same classes, as a data set named after `name`.
///
/// # Errors
/// Those of [`import`].
pub(super) fn open(name: &Path, folders: &[PathBuf], import: &Import) -> Result<Parts> {
    let how = How {
        conversion: import.conversion()?,
        color: import.options.color,
    };
    let trees = trees(folders)?;
    let found: Vec<(usize, &Entry)> = trees
        .iter()
        .enumerate()
        .flat_map(|(folder, tree)| tree.entries.iter().map(move |entry| (folder, entry)))
        .collect();
    let paths: Vec<&Path> = found
        .iter()
        .map(|(_, entry)| entry.file.as_path())
        .collect();
    let opened = files::open(&paths, how, import.memory)?;
    let broken = opened.broken.len();
    if broken > 0 && import.broken == Broken::Refuse {
        return Err(refuse(name, opened.broken, paths.len()));
    }
    let skipped: Vec<Skipped> = opened.broken.into_iter().map(|(file, _)| file).collect();
    warn(&skipped);
    let mut counts = vec![0; folders.len()];
    let mut values = Vec::new();
    for &place in &opened.places {
        let (folder, entry) = found[place];
        counts[folder] += 1;
        values.push(entry.class);
    }
    if let (Some(bare), Some(first)) = (counts.iter().position(|&n| n == 0), skipped.first()) {
        let found = format!("no image but {broken} broken files");
        return Err(Report::file(&folders[bare], found)
            .expected("at least one image that can be read")
            .remedy(format!("look at the first: {}", first.reason))
            .input());
    }
    let classes = trees
        .into_iter()
        .next()
        .map_or(Vec::new(), |tree| tree.classes);
    let labels = (!classes.is_empty()).then_some(Labels { values, classes });
    let (_, height, width) = opened.files.shape();
    tracing::info!(folder = %name.display(), images = opened.files.len(), width, height, "read");
    Ok(Parts {
        data: Dataset::of_files(name.display().to_string(), opened.files, labels)?,
        skipped,
        counts,
    })
}

/// One error for all broken files.
fn refuse(folder: &Path, mut broken: Vec<(Skipped, Error)>, count: usize) -> Error {
    const LEAVE_OUT: &str = "--broken skip leaves such files out";
    if broken.len() == 1
        && let Some((_, error)) = broken.pop()
    {
        let also = |report: Report| {
            let remedy = format!("{}; {LEAVE_OUT}", report.remedy);
            report.remedy(remedy)
        };
        return match error {
            Error::Input(report) => also(report).input(),
            Error::Limit(report) => also(report).limit(),
            Error::Unsupported(report) => also(report).unsupported(),
            other => other,
        };
    }
    let mut names: Vec<String> = broken
        .iter()
        .take(NAMED)
        .map(|(Skipped { file, .. }, error)| {
            let found = files::fault(error).map_or("", |report| report.found.as_str());
            let file = file.strip_prefix(folder).unwrap_or(file);
            format!("{} ({found})", file.display())
        })
        .collect();
    if broken.len() > NAMED {
        names.push(format!("{} more", broken.len() - NAMED));
    }
    let found = format!(
        "{} of {count} files are damaged or no images: {}",
        broken.len(),
        names.join(", ")
    );
    Report::file(folder, found)
        .expected("whole PNG or JPEG images")
        .remedy(format!("replace or remove them; {LEAVE_OUT}"))
        .input()
}

fn warn(skipped: &[Skipped]) {
    for file in skipped.iter().take(NAMED) {
        tracing::warn!("left out: {}", file.reason);
    }
    if skipped.len() > NAMED {
        tracing::warn!("left out: {} more broken files", skipped.len() - NAMED);
    }
}

/// The folders `train` and `test`, if these two are all that a folder holds.
///
/// # Errors
/// The folder cannot be read.
pub fn split_folders(folder: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let (train, test) = (folder.join("train"), folder.join("test"));
    if !train.is_dir() || !test.is_dir() {
        return Ok(None);
    }
    let found = Listing::read(folder)?;
    let alone = found.files.is_empty() && found.folders == [test.clone(), train.clone()];
    Ok(alone.then_some((train, test)))
}

/// A file with the number of its class; 0 where there are none.
struct Entry {
    file: PathBuf,
    class: u32,
}

/// The images of a folder and the names of its classes, none where the images lie in it directly.
struct Tree {
    entries: Vec<Entry>,
    classes: Vec<String>,
}

/// The trees of folders that have the same classes.
fn trees(folders: &[PathBuf]) -> Result<Vec<Tree>> {
    let mut trees: Vec<Tree> = Vec::new();
    for folder in folders {
        let tree = Tree::read(folder)?;
        if let Some(first) = trees.first().filter(|first| first.classes != tree.classes) {
            let list = |tree: &Tree| format!("classes [{}]", tree.classes.join(", "));
            let expected = format!("{} as in {}", list(first), folders[0].display());
            return Err(Report::file(folder, list(&tree))
                .expected(expected)
                .remedy("give training and test images of one kind")
                .input());
        }
        trees.push(tree);
    }
    Ok(trees)
}

impl Tree {
    fn read(folder: &Path) -> Result<Self> {
        let found = Listing::read(folder)?;
        let of_class = |class: usize| {
            move |file: PathBuf| Entry {
                file,
                class: class as u32,
            }
        };
        if found.folders.is_empty() {
            if found.files.is_empty() {
                return Err(empty(folder));
            }
            return Ok(Self {
                entries: found.files.into_iter().map(of_class(0)).collect(),
                classes: Vec::new(),
            });
        }
        if let Some(file) = found.files.first() {
            return Err(Report::file(file, "an image beside class folders")
                .expected("either images or class folders in one folder")
                .remedy("move the image into the folder of its class")
                .input());
        }
        let (mut entries, mut classes) = (Vec::new(), Vec::new());
        for (class, sub) in found.folders.iter().enumerate() {
            classes.push(class_name(sub)?);
            let inner = Listing::read(sub)?;
            if let Some(deeper) = inner.folders.first() {
                return Err(Report::file(deeper, "a folder inside a class folder")
                    .expected("images only")
                    .remedy("move its images up or remove it")
                    .input());
            }
            if inner.files.is_empty() {
                return Err(empty(sub));
            }
            entries.extend(inner.files.into_iter().map(of_class(class)));
        }
        Ok(Self { entries, classes })
    }
}

fn empty(folder: &Path) -> Error {
    Report::file(folder, "a folder without images")
        .expected("PNG or JPEG files, or one folder of them for each class")
        .remedy("add images or remove the folder")
        .input()
}

fn class_name(folder: &Path) -> Result<String> {
    match folder.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(name.to_string()),
        None => Err(Report::file(folder, "a folder name that is not UTF-8")
            .expected("a class name")
            .remedy("rename the folder")
            .input()),
    }
}

/// What lies in a folder, sorted by name.
struct Listing {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Listing {
    fn read(folder: &Path) -> Result<Self> {
        let mut listing = Self {
            files: Vec::new(),
            folders: Vec::new(),
        };
        for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
            let path = entry.map_err(|e| Error::io(folder, e))?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name.starts_with('.') {
                continue;
            }
            // Follows links, so that a linked data set works.
            let meta = std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            if meta.is_dir() {
                listing.folders.push(path);
            } else if is_clutter(&name) {
                tracing::warn!(file = %path.display(), "not an image: passed over");
            } else {
                listing.files.push(path);
            }
        }
        listing.files.sort();
        listing.folders.sort();
        Ok(listing)
    }
}

/// Files that commonly lie beside images.
fn is_clutter(name: &str) -> bool {
    let name = name.to_lowercase();
    let (stem, extension) = name.rsplit_once('.').unwrap_or((&name, ""));
    matches!(name.as_str(), "thumbs.db" | "desktop.ini")
        || matches!(extension, "txt" | "md" | "csv" | "json" | "html")
        || extension.is_empty() && matches!(stem, "license" | "readme" | "copying")
}

#[cfg(test)]
mod tests;
