//! The fixed two-dimensional position table of vision transformers.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Sines and cosines of the column, then of the row: `[height · width, dim]`, rows of the picture one
/// after another (Dosovitskiy et al. 2021 as DiT has it).
///
/// ```text
/// ω_k = 10000^{−k/(dim/4)},   [sin(x ω), cos(x ω), sin(y ω), cos(y ω)]
/// x = column · base/width/scale,   y = row · base/height/scale
/// ```
///
/// # Errors
/// `Input` when `dim` is no multiple of 4 or the grid is empty.
pub fn sincos_position_2d(
    dim: usize,
    (height, width): (usize, usize),
    base: usize,
    scale: f64,
    device: &Device,
) -> Result<Tensor> {
    if dim == 0 || !dim.is_multiple_of(4) || height == 0 || width == 0 {
        return Err(Error::Input {
            name: "position table",
            found: format!("{dim} channels on {height} x {width}"),
            expected: "a multiple of 4 channels on a grid that is not empty".into(),
        });
    }
    let quarter = dim / 4;
    let place = |i: usize, n: usize| i as f64 / (n as f64 / base as f64) / scale;
    let mut table = Vec::with_capacity(height * width * dim);
    for row in 0..height {
        for column in 0..width {
            for position in [place(column, width), place(row, height)] {
                let angle = |k: usize| position / 10_000f64.powf(k as f64 / quarter as f64);
                table.extend((0..quarter).map(|k| angle(k).sin()));
                table.extend((0..quarter).map(|k| angle(k).cos()));
            }
        }
    }
    Ok(
        Tensor::from_vec(table, (height * width, dim), &Device::Cpu)?
            .to_dtype(DType::F32)?
            .to_device(device)?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_of_the_base_is_plain_and_bad_sizes_are_refused() {
        let table = sincos_position_2d(8, (2, 3), 3, 1.0, &Device::Cpu).unwrap();
        assert_eq!(table.dims(), [6, 8]);
        let row = table.to_vec2::<f32>().unwrap()[5].clone();
        // Column 2, row 1 at 1.5: two frequencies each, 1 and 0.01.
        let exact = [
            2f64.sin(),
            0.02f64.sin(),
            2f64.cos(),
            0.02f64.cos(),
            1.5f64.sin(),
            0.015f64.sin(),
            1.5f64.cos(),
            0.015f64.cos(),
        ];
        for (a, b) in row.iter().zip(exact) {
            assert!((f64::from(*a) - b).abs() < 1e-6, "{a} {b}");
        }
        assert!(sincos_position_2d(6, (2, 2), 2, 1.0, &Device::Cpu).is_err());
        assert!(sincos_position_2d(8, (0, 2), 2, 1.0, &Device::Cpu).is_err());
    }
}
