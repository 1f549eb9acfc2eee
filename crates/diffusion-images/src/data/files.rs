//! The images of a folder, of which only so many are kept decoded as fit a budget of memory.
//!
//! Opening a folder decodes every file once: damage is found then, and each image is hashed. Pixels
//! are kept until the budget is spent and never replaced: where every image is visited once an
//! epoch, no other rule hits more often. What is not kept is decoded again, in parallel, whenever it
//! is asked for, and must hash to the same number, so that an image is the same at every visit.

use super::decode::{self, Conversion, Pixmap};
use super::split::hash_levels;
use super::{Color, Skipped};
use diffusion_core::{Error, Report, Result};
use rayon::prelude::*;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pictures of one size in files.
#[derive(Debug)]
pub(super) struct Files {
    pictures: Vec<Picture>,
    /// Channels, height, width of the data set.
    shape: (usize, usize, usize),
    how: How,
    /// Bytes of the budget that are left.
    room: AtomicU64,
}

/// What is done to every picture.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    pub conversion: Conversion,
    pub color: Color,
}

#[derive(Debug)]
struct Picture {
    path: PathBuf,
    /// Of its pixels, with as many channels as the data set has.
    hash: u64,
    /// Planes; one if the picture is grey, also in a data set of colour.
    kept: OnceLock<Box<[u8]>>,
}

/// A decoded picture.
struct Decoded {
    width: u32,
    height: u32,
    channels: usize,
    planes: Vec<u8>,
}

impl How {
    fn decode(&self, path: &Path) -> Result<Decoded> {
        let mut picture: Pixmap = decode::read(path, &self.conversion)?;
        if self.color == Color::Grey {
            picture = picture.into_grey();
        }
        let mut planes = Vec::with_capacity(picture.pixels.len());
        picture.append_planes(picture.channels, &mut planes);
        Ok(Decoded {
            width: picture.width,
            height: picture.height,
            channels: picture.channels,
            planes,
        })
    }
}

impl Files {
    /// Channels, height and width.
    pub fn shape(&self) -> (usize, usize, usize) {
        self.shape
    }

    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// The hash of an image, as [`super::split`] defines it.
    pub fn hash(&self, place: usize) -> u64 {
        self.pictures[place].hash
    }

    /// Bytes of pixels that are in memory.
    #[cfg(test)]
    pub fn kept_bytes(&self) -> u64 {
        let kept = |picture: &Picture| picture.kept.get().map_or(0, |planes| planes.len());
        self.pictures.iter().map(kept).sum::<usize>() as u64
    }

    /// The planes of some images, decoded in parallel where they are not at hand. An image of one
    /// plane stands for as many equal planes as the data set has channels.
    ///
    /// # Errors
    /// A file that vanished or does not hold the same image any more, by name.
    pub fn read(&self, places: &[usize]) -> Result<Vec<Cow<'_, [u8]>>> {
        let read: Vec<Result<Cow<[u8]>>> =
            places.par_iter().map(|&place| self.one(place)).collect();
        read.into_iter().collect()
    }

    fn one(&self, place: usize) -> Result<Cow<'_, [u8]>> {
        let picture = &self.pictures[place];
        if let Some(planes) = picture.kept.get() {
            return Ok(Cow::Borrowed(planes));
        }
        let path = &picture.path;
        let decoded = self
            .how
            .decode(path)
            .map_err(|error| changed(path, &error.to_string()))?;
        let (channels, height, width) = self.shape;
        let size = format!("{}x{} pixels", decoded.width, decoded.height);
        if (decoded.height as usize, decoded.width as usize) != (height, width) {
            return Err(changed(path, &size));
        }
        if decoded.hash(channels) != picture.hash {
            return Err(changed(path, "another picture"));
        }
        Ok(picture.keep(decoded.planes, &self.room))
    }
}

impl Decoded {
    fn hash(&self, channels: usize) -> u64 {
        if self.channels < channels {
            hash_levels(&self.planes.repeat(channels))
        } else {
            hash_levels(&self.planes)
        }
    }
}

impl Picture {
    /// Keeps the planes if there is room.
    fn keep(&self, planes: Vec<u8>, room: &AtomicU64) -> Cow<'_, [u8]> {
        let bytes = planes.len() as u64;
        let take = |left: u64| left.checked_sub(bytes);
        if room
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_err()
        {
            return Cow::Owned(planes);
        }
        if self.kept.set(planes.into_boxed_slice()).is_err() {
            // The same picture twice in a batch: the other was faster.
            room.fetch_add(bytes, Ordering::Relaxed);
        }
        Cow::Borrowed(self.kept.get().map_or(&[], |planes| planes))
    }
}

fn changed(path: &Path, now: &str) -> Error {
    // The system's message and the decoder's name the file themselves.
    let now = now
        .strip_prefix(&format!("{}: ", path.display()))
        .unwrap_or(now);
    Report::file(path, format!("changed since the data were opened: {now}"))
        .expected("the picture that was there")
        .remedy("put it back and go on with --resume, or start again with the data as they are")
        .input()
}

/// What opening found out.
pub(super) struct Opened {
    pub files: Files,
    /// For each picture, the place of its file in the list that was opened.
    pub places: Vec<usize>,
    /// Files that are no pictures.
    pub broken: Vec<(Skipped, Error)>,
}

/// What an error says of a file that is no picture; `None` if the error is not the file's fault.
pub(super) fn fault(error: &Error) -> Option<&Report> {
    match error {
        Error::Input(report) | Error::Limit(report) | Error::Unsupported(report) => Some(report),
        _ => None,
    }
}

/// Decodes every file once. Files that are no picture, are damaged or exceed the limits are listed.
///
/// # Errors
/// Pictures of different sizes; a file that the system cannot read.
pub(super) fn open(paths: &[&Path], how: How, memory: u64) -> Result<Opened> {
    // What a thread holds at a time is bounded by the limits of one image; small results may wait.
    let threads = rayon::current_num_threads();
    let at_once = threads * if how.conversion.side.is_some() { 8 } else { 1 };
    let mut size: Option<(&Path, u32, u32)> = None;
    let mut channels = if how.color == Color::Rgb { 3 } else { 1 };
    // A second hash for grey pictures: the one that they have beside colour.
    let (mut pictures, mut as_color) = (Vec::new(), Vec::new());
    let (mut places, mut broken) = (Vec::new(), Vec::new());
    let room = AtomicU64::new(memory);
    for (chunk, first) in paths.chunks(at_once).zip((0..).step_by(at_once)) {
        let decoded: Vec<Result<(Decoded, u64, u64)>> = chunk
            .par_iter()
            .map(|path| {
                let decoded = how.decode(path)?;
                let plain = decoded.hash(decoded.channels);
                let color = match (how.color, decoded.channels) {
                    (Color::Auto | Color::Rgb, 1) => decoded.hash(3),
                    _ => plain,
                };
                Ok((decoded, plain, color))
            })
            .collect();
        for ((&path, decoded), place) in chunk.iter().zip(decoded).zip(first..) {
            let (decoded, plain, color) = match decoded {
                Ok(decoded) => decoded,
                Err(error) if fault(&error).is_some() => {
                    let skipped = Skipped {
                        file: path.to_path_buf(),
                        reason: error.to_string(),
                    };
                    broken.push((skipped, error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let (_, width, height) = *size.get_or_insert((path, decoded.width, decoded.height));
            if (width, height) != (decoded.width, decoded.height) {
                return Err(mixed(path, &decoded, size));
            }
            channels = channels.max(decoded.channels);
            let picture = Picture {
                path: path.to_path_buf(),
                hash: plain,
                kept: OnceLock::new(),
            };
            picture.keep(decoded.planes, &room);
            pictures.push(picture);
            as_color.push(color);
            places.push(place);
        }
    }
    if channels == 3 {
        for (picture, hash) in pictures.iter_mut().zip(as_color) {
            picture.hash = hash;
        }
    }
    let (width, height) = size.map_or((0, 0), |(_, width, height)| (width, height));
    Ok(Opened {
        files: Files {
            pictures,
            shape: (channels, height as usize, width as usize),
            how,
            room,
        },
        places,
        broken,
    })
}

fn mixed(path: &Path, found: &Decoded, first: Option<(&Path, u32, u32)>) -> Error {
    let report = Report::file(path, format!("{}x{} pixels", found.width, found.height));
    let expected = first.map_or(String::new(), |(path, width, height)| {
        format!("{width}x{height} as {} has", path.display())
    });
    report
        .expected(expected)
        .remedy("make all pictures squares of one size, such as --size 32; --fit says how")
        .input()
}
