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

use super::dataset::check_total;
use super::decode::{self, Conversion, Pixmap};
use super::{Dataset, Labels, MAX_SIDE, Pixels};
use diffusion_core::{Error, Report, Result};
use std::path::{Path, PathBuf};

/// How the images of a folder are made alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Make each image a square of this width and height, by [`Fit`]. Without it all images must
    /// have one size.
    pub resize: Option<u32>,
    /// Grey or colour.
    pub color: Color,
}

/// How many channels the images of a folder get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Color {
    /// Grey if every file is stored as grey, else colour.
    #[default]
    Auto,
    /// One channel: colour files are converted by their luma.
    Grey,
    /// Three channels: grey files are repeated.
    Rgb,
}

/// How a picture becomes a square when a size is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// The largest centred square is resized; what lies outside it is lost.
    #[default]
    Crop,
    /// The whole picture is resized; proportions are lost.
    Stretch,
}

/// What happens to a file that cannot be read as an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Broken {
    /// Reading stops with an error that names the file.
    #[default]
    Refuse,
    /// The file is left out, with a warning, and listed in [`Skipped`].
    Skip,
}

/// Everything that can be asked of a folder of images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Size and colour.
    pub options: Options,
    /// How a picture becomes a square.
    pub fit: Fit,
    /// The red, green, blue on which transparent pictures are composed; white by default.
    pub background: [u8; 3],
    /// What happens to broken files.
    pub broken: Broken,
}

impl Default for Import {
    fn default() -> Self {
        Self::from(Options::default())
    }
}

impl From<Options> for Import {
    fn from(options: Options) -> Self {
        Self {
            options,
            fit: Fit::default(),
            background: [255; 3],
            broken: Broken::default(),
        }
    }
}

impl Import {
    fn conversion(&self) -> Conversion {
        Conversion {
            side: self.options.resize,
            fit: self.fit,
            background: self.background,
        }
    }
}

/// A file that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The file.
    pub file: PathBuf,
    /// Why: the error that it would have been.
    pub reason: String,
}

/// All images of a folder.
///
/// # Errors
/// A folder without images, or that mixes images and class folders or nests deeper; a file that is
/// no image, is damaged or exceeds the limits; images of different sizes when no resizing is asked
/// for. Each error names the file.
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
    let options = &import.options;
    if let Some(side) = options.resize
        && !(1..=MAX_SIDE / 4).contains(&side)
    {
        return Err(Report::new("resize", side)
            .expected(format!("1 to {}", MAX_SIDE / 4))
            .remedy("try 32 or 64")
            .config());
    }
    let found = Listing::read(folder)?;
    let mut stack = Stack::default();
    let mut skipped = Vec::new();
    let mut labels = Vec::new();
    let mut classes = Vec::new();
    if found.folders.is_empty() {
        if found.files.is_empty() {
            return Err(empty(folder));
        }
        for file in &found.files {
            if let Some(picture) = decode_or_skip(file, import, &mut skipped)? {
                stack.push(file, picture, options)?;
            }
        }
    } else {
        if let Some(file) = found.files.first() {
            return Err(Report::file(file, "an image beside class folders")
                .expected("either images or class folders in one folder")
                .remedy("move the image into the folder of its class")
                .input());
        }
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
            for file in &inner.files {
                if let Some(picture) = decode_or_skip(file, import, &mut skipped)? {
                    stack.push(file, picture, options)?;
                    labels.push(class as u32);
                }
            }
        }
    }
    let labels = (!classes.is_empty()).then_some(Labels {
        values: labels,
        classes,
    });
    if let (0, Some(first)) = (stack.count, skipped.first()) {
        let found = format!("no image but {} broken files", skipped.len());
        return Err(Report::file(folder, found)
            .expected("at least one image that can be read")
            .remedy(format!("look at the first: {}", first.reason))
            .input());
    }
    Ok((stack.finish(folder, labels)?, skipped))
}

/// The picture of a file, or nothing if it is broken and that is allowed.
fn decode_or_skip(
    file: &Path,
    import: &Import,
    skipped: &mut Vec<Skipped>,
) -> Result<Option<Pixmap>> {
    match decode::read(file, &import.conversion()) {
        Ok(picture) => Ok(Some(picture)),
        Err(error @ (Error::Input(_) | Error::Limit(_) | Error::Unsupported(_)))
            if import.broken == Broken::Skip =>
        {
            tracing::warn!(file = %file.display(), %error, "a broken image: left out");
            skipped.push(Skipped {
                file: file.to_path_buf(),
                reason: error.to_string(),
            });
            Ok(None)
        }
        Err(error) => Err(error),
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

/// Images of one size, in planes, one after another.
#[derive(Default)]
struct Stack {
    first: Option<(PathBuf, u32, u32)>,
    channels: usize,
    count: usize,
    values: Vec<u8>,
}

impl Stack {
    fn push(&mut self, file: &Path, mut picture: Pixmap, options: &Options) -> Result<()> {
        if options.color == Color::Grey {
            picture = picture.into_grey();
        }
        let wanted = if options.color == Color::Rgb {
            3
        } else {
            picture.channels
        };
        self.check_size(file, &picture)?;
        if self.channels == 1 && wanted == 3 {
            self.repeat_planes(&picture)?;
        }
        self.channels = self.channels.max(wanted);
        let size = self.channels * picture.pixels.len() / picture.channels;
        check_total(
            &file.display().to_string(),
            (self.values.len() + size) as u64,
        )?;
        picture.append_planes(self.channels, &mut self.values);
        self.count += 1;
        Ok(())
    }

    fn check_size(&mut self, file: &Path, picture: &Pixmap) -> Result<()> {
        let (width, height) = (picture.width, picture.height);
        match &self.first {
            None => self.first = Some((file.to_path_buf(), width, height)),
            Some((_, w, h)) if (*w, *h) == (width, height) => {}
            Some((first, w, h)) => {
                return Err(Report::file(file, format!("{width}x{height} pixels"))
                    .expected(format!("{w}x{h} as {} has", first.display()))
                    .remedy("ask for a size to which all images are resized, such as 32")
                    .input());
            }
        }
        Ok(())
    }

    /// Turns the grey images so far into colour when the first colour image appears.
    fn repeat_planes(&mut self, picture: &Pixmap) -> Result<()> {
        let file = self
            .first
            .as_ref()
            .map(|(file, ..)| file.display().to_string());
        check_total(&file.unwrap_or_default(), 3 * self.values.len() as u64)?;
        let plane = picture.pixels.len() / picture.channels;
        self.values = self
            .values
            .chunks_exact(plane)
            .flat_map(|grey| grey.repeat(3))
            .collect();
        Ok(())
    }

    fn finish(self, folder: &Path, labels: Option<Labels>) -> Result<Dataset> {
        let Some((_, width, height)) = self.first else {
            return Err(empty(folder));
        };
        tracing::info!(folder = %folder.display(), images = self.count, width, height, "read");
        Dataset::new(
            folder.display().to_string(),
            (self.channels, height as usize, width as usize),
            Pixels::Levels {
                values: self.values,
                max: 255,
            },
            labels,
        )
    }
}

#[cfg(test)]
mod tests;
