//! Emoji of 32×32 pixels in colour, with names, built into the program.
//!
//! The pictures of three groups of Noto emoji (Google, Apache-2.0) as the npm package
//! `emoji-datasource-google` 16.0.0 carries them (names MIT): 169 smileys and hearts, 159 animals
//! and plants, 131 kinds of food and drink. They are composed on white. By
//! [`Dataset::split_in_classes`] every fifth picture of each class is for testing: 90 pictures;
//! the other 369 are for training.

use super::decode::{self, Conversion};
use super::{Dataset, Labels, Pixels};
use diffusion_core::{Report, Result};
use serde::Deserialize;
use std::path::Path;

/// What [`super::open`] calls this data set.
pub const NAME: &str = "emoji";
/// Width and height.
pub const SIDE: usize = 32;

const SHEET: &[u8] = include_bytes!("../../../../data/emoji/sheet.png");
const NAMES: &str = include_str!("../../../../data/emoji/names.json");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Names {
    classes: Vec<String>,
    images: Vec<Name>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
    class: u32,
}

/// All 459 pictures: `x = k / 127.5 − 1` in red, green, blue; labels are the groups.
///
/// # Errors
/// Only if the program itself was built from a damaged file.
pub fn load() -> Result<Dataset> {
    let path = Path::new("sheet.png");
    let sheet = decode::from_bytes(path, SHEET, &Conversion::default())?;
    let names = read_names(NAMES)?;
    let (columns, rows) = (sheet.width as usize / SIDE, sheet.height as usize / SIDE);
    if sheet.channels != 3 || columns * rows < names.images.len() {
        return Err(damaged("sheet.png", format!("{columns}x{rows} tiles")));
    }
    let mut values = Vec::with_capacity(names.images.len() * 3 * SIDE * SIDE);
    for tile in 0..names.images.len() {
        let (left, top) = (tile % columns * SIDE, tile / columns * SIDE);
        for channel in 0..3 {
            for y in top..top + SIDE {
                let row = &sheet.pixels[3 * y * sheet.width as usize..][3 * left..][..3 * SIDE];
                values.extend(row.iter().skip(channel).step_by(3));
            }
        }
    }
    let labels = Labels {
        values: names.images.iter().map(|image| image.class).collect(),
        classes: names.classes,
    };
    let pixels = Pixels::Levels { values, max: 255 };
    Dataset::new(NAME, (3, SIDE, SIDE), pixels, Some(labels))
}

/// The Unicode name of each picture in lower case, such as `hot beverage`, in the order of
/// [`load`].
///
/// # Errors
/// Those of [`load`].
pub fn names() -> Result<Vec<String>> {
    let names = read_names(NAMES)?;
    Ok(names.images.into_iter().map(|image| image.name).collect())
}

fn read_names(text: &str) -> Result<Names> {
    serde_json::from_str(text).map_err(|error| damaged("names.json", error.to_string()))
}

fn damaged(file: &str, found: String) -> diffusion_core::Error {
    Report::new(file, found)
        .expected("the table of names and a sheet with a tile for each")
        .remedy("build the program from unchanged sources")
        .input()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn images(data: &Dataset) -> Vec<Vec<u8>> {
        match data.pixels() {
            Pixels::Levels { values, .. } => {
                values.chunks(3 * SIDE * SIDE).map(<[u8]>::to_vec).collect()
            }
            Pixels::Real(_) => Vec::new(),
        }
    }

    #[test]
    fn has_the_pictures_of_the_source() {
        let data = load().unwrap();
        assert_eq!((data.len(), data.channels()), (459, 3));
        assert_eq!((data.height(), data.width()), (SIDE, SIDE));
        let expected = ["Smileys & Emotion", "Animals & Nature", "Food & Drink"];
        assert_eq!(data.classes(), expected);
        let count = |class| {
            data.labels()
                .unwrap()
                .iter()
                .filter(|&&l| l == class)
                .count()
        };
        assert_eq!([count(0), count(1), count(2)], [169, 159, 131]);
        // Composed in integers from the source's first tile.
        let images = images(&data);
        let sum: u64 = images[0].iter().map(|&v| u64::from(v)).sum();
        assert_eq!(sum, 592_058);
        // The corners of a picture are transparent.
        assert_eq!((images[0][0], images[458][SIDE - 1]), (255, 255));
        let names = names().unwrap();
        let different: HashSet<&String> = names.iter().collect();
        assert_eq!((names.len(), different.len()), (459, 459));
        assert_eq!(
            (names[0].as_str(), names[458].as_str()),
            ("eye in speech bubble", "hot beverage")
        );
    }

    #[test]
    fn the_split_shares_no_picture() {
        let (train, test) = load().unwrap().split_in_classes().unwrap();
        assert_eq!((train.len(), test.len()), (369, 90));
        let train: HashSet<Vec<u8>> = images(&train).into_iter().collect();
        assert_eq!(train.len(), 369);
        assert!(images(&test).iter().all(|image| !train.contains(image)));
    }

    #[test]
    fn a_damaged_table_is_refused() {
        for text in ["", "{}", r#"{"classes":[],"images":[{"name":"x"}]}"#] {
            let message = read_names(text).err().unwrap().to_string();
            assert!(message.contains("names.json"), "{message}");
        }
    }
}
