//! Handwritten digits of 8×8 pixels, built into the program.
//!
//! The test half of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak 1998,
//! UCI Machine Learning Repository, CC BY 4.0) as scikit-learn ships it: 1797 rows of 64
//! intensities 0..=16 and the digit. The data set has no official split; by [`Dataset::split`]
//! the 359 rows whose index is 4 modulo 5 are for testing, the other 1438 for training.

use super::{Dataset, Labels, Pixels};
use diffusion_core::{Error, Report, Result};
use flate2::read::GzDecoder;
use std::io::Read;

/// What [`super::open`] calls this data set.
pub const NAME: &str = "digits";
/// Width and height.
pub const SIDE: usize = 8;
/// The brightest intensity.
pub const MAX: u8 = 16;

const ROWS: usize = 1797;
const CSV_GZ: &[u8] = include_bytes!("../../../../data/digits/digits.csv.gz");

/// All 1797 digits: `x = v/8 − 1`, labels 0 to 9.
///
/// # Errors
/// Only if the program itself was built from a damaged file.
pub fn load() -> Result<Dataset> {
    let mut text = String::new();
    GzDecoder::new(CSV_GZ)
        .take(1 << 20)
        .read_to_string(&mut text)
        .map_err(|e| Error::io("digits.csv.gz", e))?;
    parse(&text, ROWS)
}

fn parse(text: &str, rows: usize) -> Result<Dataset> {
    let mut values = Vec::with_capacity(rows * SIDE * SIDE);
    let mut labels = Vec::with_capacity(rows);
    for (row, line) in text.lines().enumerate() {
        let fields = line
            .split(',')
            .map(str::parse::<u8>)
            .collect::<Result<Vec<u8>, _>>();
        match fields.as_deref() {
            Ok([pixels @ .., label]) if pixels.len() == SIDE * SIDE && *label < 10 => {
                values.extend_from_slice(pixels);
                labels.push(u32::from(*label));
            }
            _ => {
                return Err(Report::new(format!("digits.csv.gz: row {}", row + 1), line)
                    .expected("64 intensities 0..=16 and a digit")
                    .remedy("build the program from unchanged sources")
                    .input());
            }
        }
    }
    if labels.len() != rows {
        return Err(
            Report::new("digits.csv.gz", format!("{} rows", labels.len()))
                .expected(format!("{rows} rows"))
                .remedy("build the program from unchanged sources")
                .input(),
        );
    }
    let classes = (0..10).map(|digit| digit.to_string()).collect();
    Dataset::new(
        NAME,
        (1, SIDE, SIDE),
        Pixels::Levels { values, max: MAX },
        Some(Labels {
            values: labels,
            classes,
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn has_the_published_size_and_class_counts() {
        let digits = load().unwrap();
        assert_eq!(digits.len(), 1797);
        assert_eq!(
            (digits.channels(), digits.height(), digits.width()),
            (1, 8, 8)
        );
        assert_eq!(digits.levels(), Some(17));
        let mut counts = [0; 10];
        for label in digits.labels().unwrap() {
            counts[*label as usize] += 1;
        }
        // The class counts of the UCI test set.
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    }

    #[test]
    fn splits_into_1438_and_359_rows_by_index() {
        let digits = load().unwrap();
        let (train, test) = digits.split().unwrap();
        assert_eq!((train.len(), test.len()), (1438, 359));
        let rows = |data: &Dataset, items: &[usize]| {
            let (x, y) = data.batch(items, &Device::Cpu).unwrap();
            let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (x, y.unwrap().to_vec1::<u32>().unwrap())
        };
        assert_eq!(rows(&test, &[0, 358]), rows(&digits, &[4, 1794]));
        assert_eq!(rows(&train, &[3, 4, 1437]), rows(&digits, &[3, 5, 1796]));
    }

    #[test]
    fn first_row_is_converted_exactly() {
        let (x, _) = load().unwrap().batch(&[0], &Device::Cpu).unwrap();
        let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(x[..6], [-1.0, -1.0, -0.375, 0.625, 0.125, -0.875]);
    }

    #[test]
    fn a_damaged_table_is_refused_by_row() {
        let row = "0,".repeat(64) + "3\n";
        assert_eq!(parse(&row, 1).unwrap().len(), 1);
        for (text, rows, clue) in [
            (row.replace("3\n", "10\n"), 1, "row 1"),
            (row.repeat(2).replacen("0,0,", "0,", 1), 2, "row 1"),
            (row.clone(), 2, "1 rows"),
            (row.replacen("0,", "17,", 1), 1, "17"),
        ] {
            let message = parse(&text, rows).unwrap_err().to_string();
            assert!(message.contains(clue), "{message}");
        }
    }
}
