//! Many samples in one picture.

use crate::picture::{Picture, to_bytes};
use candle_core::Tensor;
use diffusion_core::{Report, Result};

/// How a grid of samples is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GridOptions {
    /// Images in a row; by default `⌈√n⌉`.
    pub columns: Option<usize>,
    /// Pixels between images and around them.
    pub padding: usize,
    /// Small images are magnified by a whole number until their longer side has this many pixels.
    pub min_tile: usize,
    /// Brightness of the padding.
    pub background: u8,
}

impl Default for GridOptions {
    fn default() -> Self {
        Self {
            columns: None,
            padding: 2,
            min_tile: 32,
            background: 255,
        }
    }
}

/// A picture of n images, row by row.
///
/// ```text
/// scale  = ⌈min_tile / max(H, W)⌉, at least 1
/// width  = columns (scale W + padding) + padding
/// height = ⌈n / columns⌉ (scale H + padding) + padding
/// ```
///
/// # Shapes
/// `images`: `[n, C, H, W]` with C = 1 or 3, values in `[-1, 1]`.
///
/// # Errors
/// Another shape; no columns; values that are not finite; a picture over the limits.
pub fn sample_grid(images: &Tensor, options: &GridOptions) -> Result<Picture> {
    let (count, channels, height, width) = images.dims4()?;
    let root = (count as f64).sqrt().ceil() as usize;
    let columns = options.columns.unwrap_or(root).min(count);
    if columns == 0 {
        return Err(Report::new("grid", format!("{count} images in 0 columns"))
            .expected("at least one image and one column")
            .config());
    }
    let bytes = to_bytes(images)?;
    let scale = options.min_tile.div_ceil(height.max(width).max(1)).max(1);
    let rows = count.div_ceil(columns);
    let (step_y, step_x) = (
        scale * height + options.padding,
        scale * width + options.padding,
    );
    let mut grid = Picture::filled(
        columns * step_x + options.padding,
        rows * step_y + options.padding,
        channels,
        options.background,
    )?;
    for (i, image) in bytes
        .chunks_exact((channels * height * width).max(1))
        .enumerate()
    {
        let top = options.padding + i / columns * step_y;
        let left = options.padding + i % columns * step_x;
        grid.paste(image, (height, width), (top, left), scale);
    }
    Ok(grid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn digits_are_magnified_to_the_least_tile() {
        let images = Tensor::zeros((5, 1, 8, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        let grid = sample_grid(&images, &GridOptions::default()).unwrap();
        // 3 columns and 2 rows of 32 pixels with 2 between and around.
        assert_eq!((grid.width(), grid.height()), (104, 70));
        let white = grid.pixels().iter().filter(|&&v| v == 255).count();
        assert_eq!(white, 104 * 70 - 5 * 32 * 32);
    }

    #[test]
    fn tiles_stand_in_reading_order() {
        let values: Vec<f32> = (0..12).map(|v| v as f32 / 127.5 - 1.0).collect();
        let images = Tensor::from_vec(values, (2, 3, 1, 2), &Device::Cpu).unwrap();
        let options = GridOptions {
            columns: Some(1),
            padding: 0,
            min_tile: 4,
            background: 9,
        };
        let grid = sample_grid(&images, &options).unwrap();
        assert_eq!((grid.width(), grid.height(), grid.channels()), (4, 4, 3));
        let row = |y: usize| &grid.pixels()[y * 12..][..12];
        assert_eq!(row(0), [0, 2, 4, 0, 2, 4, 1, 3, 5, 1, 3, 5]);
        assert_eq!(row(1), row(0));
        assert_eq!(row(3), [6, 8, 10, 6, 8, 10, 7, 9, 11, 7, 9, 11]);
    }

    #[test]
    fn absurd_grids_are_refused() {
        let images = Tensor::zeros((3, 1, 2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let with = |columns, padding| GridOptions {
            columns,
            padding,
            ..GridOptions::default()
        };
        assert!(sample_grid(&images, &with(Some(0), 2)).is_err());
        assert!(sample_grid(&images, &with(None, 100_000)).is_err());
        assert!(sample_grid(&images.narrow(0, 0, 0).unwrap(), &with(None, 2)).is_err());
    }
}
