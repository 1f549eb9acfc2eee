//! Class and augmentation labels as rows of numbers.

use crate::error::{Error, Result};
use crate::mode::Mode;
use candle_core::{Device, Tensor};

/// Labels `[B, length]` for the maps `x [B, …]`: those given (one row may stand for all), or zeros.
/// A label that the network has no use for is refused.
pub(crate) fn rows(
    name: &'static str,
    given: Option<&Tensor>,
    length: usize,
    x: &Tensor,
) -> Result<Tensor> {
    let batch = x.dim(0)?;
    let Some(label) = given else {
        return Ok(Tensor::zeros((batch, length), x.dtype(), x.device())?);
    };
    match label.dims() {
        [1, n] | [_, n] if *n == length && length > 0 && [1, batch].contains(&label.dim(0)?) => {
            let label = label.to_dtype(x.dtype())?.to_device(x.device())?;
            Ok(label.broadcast_as((batch, length))?.contiguous()?)
        }
        found => Err(Error::Input {
            name,
            found: format!("of shape {found:?}"),
            expected: match length {
                0 => "absent: the network has no such label".into(),
                _ => format!("[{batch}, {length}] or [1, {length}]"),
            },
        }),
    }
}

/// In training, each row is replaced by zeros with probability `p` (classifier-free guidance, Ho
/// and Salimans 2021).
pub(crate) fn dropped(label: Tensor, p: f64, stream: u64, mode: Mode) -> Result<Tensor> {
    let Mode::Train { key } = mode else {
        return Ok(label);
    };
    if p == 0.0 {
        return Ok(label);
    }
    let mut key = key;
    key.stream = key.stream.wrapping_add(stream);
    let batch = label.dim(0)?;
    let kept: Vec<f64> = (0..batch as u64)
        .map(|item| key.item(item).uniform(1))
        .map(|u| f64::from(u.first().is_some_and(|u| *u >= p)))
        .collect();
    let kept = Tensor::from_vec(kept, (batch, 1), &Device::Cpu)?
        .to_dtype(label.dtype())?
        .to_device(label.device())?;
    Ok(label.broadcast_mul(&kept)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use diffusion_ops::rng::{Key, stream};

    #[test]
    fn about_the_given_part_is_dropped_and_only_in_training() {
        let n = 4000;
        let ones = Tensor::ones((n, 2), DType::F64, &Device::Cpu).unwrap();
        let key = Key::new(1, stream::DROPOUT);
        let kept = dropped(ones.clone(), 0.3, 7, Mode::Train { key }).unwrap();
        let rows = kept.to_vec2::<f64>().unwrap();
        assert!(rows.iter().all(|r| r[0] == r[1]));
        let share = rows.iter().map(|r| r[0]).sum::<f64>() / n as f64;
        assert!(
            (share - 0.7).abs() < 4.0 * (0.21 / n as f64).sqrt(),
            "{share}"
        );
        let all = dropped(ones, 0.3, 7, Mode::Eval).unwrap();
        assert_eq!(
            all.sum_all().unwrap().to_scalar::<f64>().unwrap(),
            2.0 * n as f64
        );
    }

    #[test]
    fn one_row_stands_for_all_and_none_for_zeros() {
        let x = Tensor::zeros((3, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let row = Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap();
        let all = rows("class_labels", Some(&row), 2, &x).unwrap();
        assert_eq!(all.to_vec2::<f32>().unwrap(), [[1.0, 2.0]; 3]);
        let none = rows("class_labels", None, 2, &x).unwrap();
        assert_eq!(none.to_vec2::<f32>().unwrap(), [[0.0; 2]; 3]);
        assert!(rows("class_labels", Some(&row), 3, &x).is_err());
        let said = rows("class_labels", Some(&row), 0, &x).unwrap_err();
        assert!(said.to_string().contains("absent"), "{said}");
    }
}
