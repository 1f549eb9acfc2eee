//! A set of images, and batches of them as tensors.

use super::MAX_DATASET_BYTES;
use super::files::Files;
use super::split::{hash_levels, hash_reals};
use candle_core::{Device, Tensor};
use diffusion_core::{Report, Result};
use diffusion_ops::rng::Key;
use std::sync::Arc;

/// Pixel values of all images, in the order image, channel, row, column.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// Integers `0..=max`, given to models as `x = 2 v / max − 1`.
    Levels {
        /// The integers.
        values: Vec<u8>,
        /// The largest possible one: 255 for 8-bit pictures.
        max: u8,
    },
    /// Values that are in `[-1, 1]` already.
    Real(Vec<f32>),
}

impl Pixels {
    fn len(&self) -> usize {
        match self {
            Pixels::Levels { values, .. } => values.len(),
            Pixels::Real(values) => values.len(),
        }
    }
}

/// One class number an image, and what the numbers mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// The class of each image.
    pub values: Vec<u32>,
    /// The name of each class.
    pub classes: Vec<String>,
}

/// Where pixels come from.
#[derive(Debug)]
enum Store {
    Memory(Pixels),
    Files(Files),
}

/// Images of one size, with or without labels: in memory, or in files of which a bounded part is.
///
/// A copy or a selection shares the pixels with what it was made from.
#[derive(Clone, Debug)]
pub struct Dataset {
    name: String,
    channels: usize,
    height: usize,
    width: usize,
    store: Arc<Store>,
    /// Where each image is in the store.
    places: Vec<usize>,
    labels: Option<Labels>,
}

impl Dataset {
    /// A data set of images of `shape` = (channels, height, width).
    ///
    /// # Errors
    /// No image; a length that is no multiple of an image; a value above `max`, outside `[-1, 1]`
    /// or not finite; labels of another number or without a name.
    pub fn new(
        name: impl Into<String>,
        shape: (usize, usize, usize),
        pixels: Pixels,
        labels: Option<Labels>,
    ) -> Result<Self> {
        let name = name.into();
        let (channels, height, width) = shape;
        let size = channels
            .checked_mul(height)
            .and_then(|n| n.checked_mul(width))
            .unwrap_or(0);
        let found = pixels.len();
        if size == 0 || found == 0 || !found.is_multiple_of(size) {
            return Err(Report::new(name, format!("{found} values"))
                .expected(format!(
                    "a positive multiple of {channels}x{height}x{width}"
                ))
                .remedy("check the shape of the images")
                .input());
        }
        let count = found / size;
        check_values(&name, &pixels, size)?;
        if let Some(labels) = &labels {
            check_labels(&name, labels, count)?;
        }
        Ok(Self {
            name,
            channels,
            height,
            width,
            store: Arc::new(Store::Memory(pixels)),
            places: (0..count).collect(),
            labels,
        })
    }

    /// A data set of pictures in files.
    pub(super) fn of_files(
        name: impl Into<String>,
        files: Files,
        labels: Option<Labels>,
    ) -> Result<Self> {
        let (name, count) = (name.into(), files.len());
        if let Some(labels) = &labels {
            check_labels(&name, labels, count)?;
        }
        let (channels, height, width) = files.shape();
        Ok(Self {
            name,
            channels,
            height,
            width,
            store: Arc::new(Store::Files(files)),
            places: (0..count).collect(),
            labels,
        })
    }

    /// What errors and reports call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of images, at least 1.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Always false: a data set has at least one image.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// 1 for grey, 3 for red, green, blue.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Rows of an image.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns of an image.
    pub fn width(&self) -> usize {
        self.width
    }

    /// How many values a pixel can take (256 for 8 bit, 17 for the digits), which likelihoods in
    /// bits refer to; `None` for real values.
    pub fn levels(&self) -> Option<u32> {
        match &*self.store {
            Store::Memory(Pixels::Levels { max, .. }) => Some(u32::from(*max) + 1),
            Store::Memory(Pixels::Real(_)) => None,
            Store::Files(_) => Some(256),
        }
    }

    /// The class of each image.
    pub fn labels(&self) -> Option<&[u32]> {
        self.labels.as_ref().map(|labels| labels.values.as_slice())
    }

    /// The names of the classes; empty without labels.
    pub fn classes(&self) -> &[String] {
        self.labels.as_ref().map_or(&[], |labels| &labels.classes)
    }

    /// The same images without their classes.
    pub fn without_labels(mut self) -> Self {
        self.labels = None;
        self
    }

    /// Some of the images as a tensor.
    ///
    /// ```text
    /// x = 2 v / v_max − 1
    /// ```
    ///
    /// # Shapes
    /// Images `[B, C, H, W]` in f32 in `[-1, 1]`; labels `[B]` in u32.
    ///
    /// # Errors
    /// No item, or one that is not below [`Dataset::len`]; those of tensor creation.
    pub fn batch(&self, items: &[usize], device: &Device) -> Result<(Tensor, Option<Tensor>)> {
        self.gather_batch(items, None, device)
    }

    /// [`Dataset::batch`] with some of the images mirrored left to right.
    ///
    /// ```text
    /// x'[b, c, h, w] = x[b, c, h, W − 1 − w]   where flips[b],   else x[b, c, h, w]
    /// ```
    ///
    /// A pure function of its arguments; [`flips`] draws the second one.
    ///
    /// # Errors
    /// Those of [`Dataset::batch`]; another number of flips than of items.
    pub fn batch_flipped(
        &self,
        items: &[usize],
        flips: &[bool],
        device: &Device,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if flips.len() != items.len() {
            return Err(Report::new(&self.name, format!("{} flips", flips.len()))
                .expected(format!("{}, one for each item", items.len()))
                .config());
        }
        self.gather_batch(items, Some(flips), device)
    }

    fn gather_batch(
        &self,
        items: &[usize],
        flips: Option<&[bool]>,
        device: &Device,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.check_items(items)?;
        let (size, width) = (self.image_size(), self.width);
        let mut values = Vec::with_capacity(items.len() * size);
        let flipped = |i: usize| flips.is_some_and(|flips| flips[i]);
        let places: Vec<usize> = items.iter().map(|&item| self.places[item]).collect();
        match &*self.store {
            Store::Memory(Pixels::Levels {
                values: levels,
                max,
            }) => {
                let table = level_table(*max);
                let convert = |v: u8| table[usize::from(v)];
                for (i, &place) in places.iter().enumerate() {
                    let image = &levels[place * size..][..size];
                    push_image(image, width, flipped(i), convert, &mut values);
                }
            }
            Store::Memory(Pixels::Real(reals)) => {
                for (i, &place) in places.iter().enumerate() {
                    let image = &reals[place * size..][..size];
                    push_image(image, width, flipped(i), |v| v, &mut values);
                }
            }
            Store::Files(files) => {
                let table = level_table(255);
                let convert = |v: u8| table[usize::from(v)];
                for (i, planes) in files.read(&places)?.iter().enumerate() {
                    // A grey picture in a data set of colour has one plane for all channels.
                    for _ in 0..size / planes.len() {
                        push_image(planes, width, flipped(i), convert, &mut values);
                    }
                }
            }
        }
        let shape = (items.len(), self.channels, self.height, self.width);
        let images = Tensor::from_vec(values, shape, device)?;
        let labels = match &self.labels {
            Some(labels) => {
                let picked: Vec<u32> = items.iter().map(|&item| labels.values[item]).collect();
                Some(Tensor::from_vec(picked, items.len(), device)?)
            }
            None => None,
        };
        Ok((images, labels))
    }

    /// [`Dataset::batch`] of everything, in order.
    ///
    /// # Errors
    /// Those of tensor creation.
    pub fn all(&self, device: &Device) -> Result<(Tensor, Option<Tensor>)> {
        self.batch(&(0..self.len()).collect::<Vec<_>>(), device)
    }

    /// A data set of some of the images, in the given order.
    ///
    /// # Errors
    /// Those of [`Dataset::batch`].
    pub fn select(&self, items: &[usize]) -> Result<Dataset> {
        self.check_items(items)?;
        let labels = self.labels.as_ref().map(|labels| Labels {
            values: items.iter().map(|&item| labels.values[item]).collect(),
            classes: labels.classes.clone(),
        });
        Ok(Dataset {
            name: self.name.clone(),
            store: self.store.clone(),
            places: items.iter().map(|&item| self.places[item]).collect(),
            labels,
            ..*self
        })
    }

    /// A number that two data sets share if and only if (in practice) they have the same images in
    /// the same order with the same classes, wherever they come from: 32 bytes of BLAKE3 in
    /// hexadecimal.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut number = |n: u64| {
            hasher.update(&n.to_le_bytes());
        };
        for n in [self.channels, self.height, self.width, self.len()] {
            number(n as u64);
        }
        number(self.levels().unwrap_or(0).into());
        self.hashes().into_iter().for_each(&mut number);
        self.labels()
            .unwrap_or_default()
            .iter()
            .for_each(|&label| number(label.into()));
        for class in self.classes() {
            number(class.len() as u64);
        }
        for class in self.classes() {
            hasher.update(class.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The hash of the pixels of each image, as [`super::split`] defines it.
    pub(super) fn hashes(&self) -> Vec<u64> {
        let size = self.image_size();
        let hash = |&place: &usize| match &*self.store {
            Store::Memory(Pixels::Levels { values, .. }) => {
                hash_levels(&values[place * size..][..size])
            }
            Store::Memory(Pixels::Real(values)) => hash_reals(&values[place * size..][..size]),
            Store::Files(files) => files.hash(place),
        };
        self.places.iter().map(hash).collect()
    }

    /// Refuses another data set whose images have another shape or other classes.
    pub(super) fn must_match(&self, other: &Dataset) -> Result<()> {
        let describe = |d: &Dataset| {
            let classes = d.classes().join(", ");
            let levels = d.levels().unwrap_or(0);
            format!(
                "{}x{}x{}, {levels} levels, classes [{classes}]",
                d.channels, d.height, d.width
            )
        };
        let (found, expected) = (describe(other), describe(self));
        if found == expected {
            return Ok(());
        }
        Err(Report::new(&other.name, found)
            .expected(format!("{expected} as in {}", self.name))
            .remedy("give training and test images of one kind")
            .input())
    }

    pub(super) fn image_size(&self) -> usize {
        self.channels * self.height * self.width
    }

    fn check_items(&self, items: &[usize]) -> Result<()> {
        let bad = match items.iter().find(|&&item| item >= self.len()) {
            Some(item) => format!("item {item}"),
            None if items.is_empty() => "an empty list of items".to_string(),
            None => return Ok(()),
        };
        Err(Report::new(&self.name, bad)
            .expected(format!("items 0 to {}", self.len() - 1))
            .config())
    }
}

/// Refuses a data set that would not fit the limit.
pub(super) fn check_total(name: &str, bytes: u64) -> Result<()> {
    if bytes <= MAX_DATASET_BYTES {
        return Ok(());
    }
    Err(Report::new(name, format!("{bytes} bytes of pixels"))
        .expected(format!("at most {MAX_DATASET_BYTES} bytes"))
        .remedy("use fewer or smaller images")
        .limit())
}

/// `v ↦ 2 v / max − 1` for all v, rounded once.
fn level_table(max: u8) -> Vec<f32> {
    (0..=max)
        .map(|v| (2.0 * f64::from(v) / f64::from(max) - 1.0) as f32)
        .collect()
}

/// Appends an image, its rows backwards if it is to be flipped.
fn push_image<T: Copy>(
    image: &[T],
    width: usize,
    flip: bool,
    convert: impl Fn(T) -> f32,
    out: &mut Vec<f32>,
) {
    if flip {
        for row in image.chunks_exact(width) {
            out.extend(row.iter().rev().map(|&v| convert(v)));
        }
    } else {
        out.extend(image.iter().map(|&v| convert(v)));
    }
}

/// Which of the items are to be mirrored: a fair coin for each, by key and item alone.
///
/// ```text
/// flip(item) = below(2) at (key.seed, key.stream, item, key.step)
/// ```
///
/// With the epoch as the key's step every image gets a new coin in every epoch, whatever the size
/// of a batch.
pub fn flips(key: Key, items: &[usize]) -> Vec<bool> {
    let coin = |&item: &usize| key.item(item as u64).below(2) == 1;
    items.iter().map(coin).collect()
}

fn check_values(name: &str, pixels: &Pixels, size: usize) -> Result<()> {
    let bad = match pixels {
        Pixels::Levels { max: 0, .. } => {
            return Err(Report::new(name, "a largest level of 0")
                .expected("at least 1")
                .input());
        }
        Pixels::Levels { values, max } => values
            .iter()
            .position(|v| v > max)
            .map(|i| (i, values[i].to_string(), format!("0 to {max}"))),
        Pixels::Real(values) => values
            .iter()
            .position(|v| !(-1.0..=1.0).contains(v))
            .map(|i| (i, values[i].to_string(), "-1 to 1".to_string())),
    };
    match bad {
        None => Ok(()),
        Some((i, found, range)) => {
            let at = format!("{name}: image {}, value {}", i / size, i % size);
            Err(Report::new(at, found)
                .expected(range)
                .remedy("rescale the pixels")
                .input())
        }
    }
}

fn check_labels(name: &str, labels: &Labels, count: usize) -> Result<()> {
    if labels.values.len() != count {
        return Err(Report::new(name, format!("{} labels", labels.values.len()))
            .expected(format!("{count}, one an image"))
            .remedy("give the labels that belong to these images")
            .input());
    }
    let classes = labels.classes.len();
    match labels
        .values
        .iter()
        .position(|&label| label as usize >= classes)
    {
        None => Ok(()),
        Some(i) => Err(Report::new(format!("{name}: label {i}"), labels.values[i])
            .expected(format!("a class number below {classes}"))
            .remedy("name every class")
            .input()),
    }
}

#[cfg(test)]
mod tests;
