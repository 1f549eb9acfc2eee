//! Keeping the predicted data inside its range.

use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::predict::Prediction;
use crate::tensor::{At, per_item};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// How a predicted `x₀` is brought into range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Clip {
    /// Leave it alone.
    #[default]
    None,
    /// Clamp to `[−range, range]` (Ho et al. 2020).
    Static {
        /// Largest magnitude of the data.
        range: f64,
    },
    /// Clamp to each item's own quantile `s` of `|x₀|`, then divide by it (Saharia et al. 2022,
    /// Imagen, section 2.3).
    ///
    /// ```text
    /// s = clamp(quantile(|x₀|, ratio), 1, max),   x₀ ← clamp(x₀, −s, s)/s
    /// ```
    Dynamic {
        /// The quantile, 0.995 in the paper.
        ratio: f64,
        /// Largest `s`.
        max: f64,
    },
}

impl Clip {
    /// The parameters, if they make sense.
    ///
    /// # Errors
    /// `Config` naming the field.
    pub fn check(self) -> Result<Self> {
        let wrong = |field: &str, value: f64, expected: &str| {
            Err(Report::new(format!("clip.{field}"), value)
                .expected(expected)
                .config())
        };
        match self {
            Clip::Static { range } if range.is_nan() || range <= 0.0 => {
                wrong("range", range, "a positive number")
            }
            Clip::Dynamic { ratio, .. } if !(0.0..=1.0).contains(&ratio) => {
                wrong("ratio", ratio, "a quantile in [0, 1]")
            }
            Clip::Dynamic { max, .. } if max.is_nan() || max < 1.0 => {
                wrong("max", max, "at least 1")
            }
            _ => Ok(self),
        }
    }

    /// `x₀` brought into range, `[B, …]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn apply(self, x0: &Tensor) -> Result<Tensor> {
        match self {
            Clip::None => Ok(x0.clone()),
            Clip::Static { range } => Ok(x0.clamp(-range, range)?),
            Clip::Dynamic { ratio, max } => {
                let rows = x0
                    .abs()?
                    .flatten_from(1)?
                    .to_dtype(DType::F64)?
                    .to_vec2::<f64>()?;
                let s: Vec<f64> = rows
                    .into_iter()
                    .map(|row| quantile(row, ratio).clamp(1.0, max))
                    .collect();
                let s = per_item(&s, x0)?;
                Ok(x0
                    .broadcast_minimum(&s)?
                    .broadcast_maximum(&s.neg()?)?
                    .broadcast_div(&s)?)
            }
        }
    }
}

/// The linearly interpolated quantile.
fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let place = q * (values.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    values[low] + (place - place.floor()) * (values[high] - values[low])
}

/// A denoiser whose `x₀` is clipped.
pub struct Thresholded<D> {
    /// The unclipped denoiser.
    pub inner: D,
    /// The rule.
    pub clip: Clip,
}

impl<D: Denoiser> Denoiser for Thresholded<D> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let said = self.inner.predict(x, at, call)?;
        if self.clip == Clip::None {
            return Ok(said);
        }
        let x0 = self.clip.apply(&said.x0(x, at)?)?;
        Ok(Prediction {
            x0: Some(x0),
            ..said
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn dynamic_thresholds_are_per_item() {
        let x0 = Tensor::new(&[[0.1, -0.5, 0.9], [4.0, -2.0, 1.0f64]], &Device::Cpu).unwrap();
        let y = Clip::Dynamic {
            ratio: 0.5,
            max: 10.0,
        }
        .apply(&x0)
        .unwrap()
        .to_vec2::<f64>()
        .unwrap();
        // First item: median magnitude 0.5 < 1, so nothing happens; second: s = 2.
        assert_eq!(y, [[0.1, -0.5, 0.9], [1.0, -1.0, 0.5]]);
        let capped = Clip::Dynamic {
            ratio: 1.0,
            max: 1.6,
        }
        .apply(&x0)
        .unwrap()
        .to_vec2::<f64>()
        .unwrap();
        assert_eq!(capped[1], [1.0, -1.0, 0.625]);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(vec![3.0, 1.0, 2.0], 0.25), 1.5);
        assert_eq!(quantile(vec![7.0], 0.9), 7.0);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(
            Clip::Static { range: -1.0 }
                .check()
                .unwrap_err()
                .to_string()
                .contains("clip.range")
        );
        assert!(
            Clip::Dynamic {
                ratio: 1.1,
                max: 2.0
            }
            .check()
            .is_err()
        );
        assert!(
            Clip::Dynamic {
                ratio: 0.9,
                max: f64::NAN
            }
            .check()
            .is_err()
        );
    }
}
