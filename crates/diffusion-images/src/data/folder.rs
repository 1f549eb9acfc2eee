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
use super::decode::{self, Pixmap};
use super::{Dataset, Labels, MAX_SIDE, Pixels};
use diffusion_core::{Error, Report, Result};
use std::path::{Path, PathBuf};

/// How the images of a folder are made alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Crop the centre square and resize it to this width and height. Without it all images must
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

/// All images of a folder.
///
/// # Errors
/// A folder without images, or that mixes images and class folders or nests deeper; a file that is
/// no image, is damaged or exceeds the limits; images of different sizes when no resizing is asked
/// for. Each error names the file.
pub fn read(folder: &Path, options: &Options) -> Result<Dataset> {
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
    let mut labels = Vec::new();
    let mut classes = Vec::new();
    if found.folders.is_empty() {
        if found.files.is_empty() {
            return Err(empty(folder));
        }
        for file in &found.files {
            stack.push(file, options)?;
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
                stack.push(file, options)?;
                labels.push(class as u32);
            }
        }
    }
    let labels = (!classes.is_empty()).then_some(Labels {
        values: labels,
        classes,
    });
    stack.finish(folder, labels)
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
    fn push(&mut self, file: &Path, options: &Options) -> Result<()> {
        let mut picture = decode::read(file, options.resize)?;
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
