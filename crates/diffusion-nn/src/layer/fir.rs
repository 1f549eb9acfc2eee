//! Resampling by finite impulse responses (Karras et al. 2019, StyleGAN; Song et al. 2021, NCSN++).

use crate::error::{Error, Result};
use candle_core::Tensor;
use diffusion_ops::{Padding, conv2d, fir_resample2d};
use std::sync::Arc;

/// A separable filter `f fᵀ` whose taps sum to one.
///
/// ```text
/// up:    y = f ⊛ (U x),   gain factor²          down:  y = D (f ⊛ x)
/// ```
///
/// where `U` puts zeros between the samples and `D` drops samples; constant maps keep their value
/// away from the border. The default is `[1, 3, 3, 1]/8`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fir {
    taps: Arc<[f64]>,
}

impl Default for Fir {
    fn default() -> Self {
        Self {
            taps: Arc::new([0.125, 0.375, 0.375, 0.125]),
        }
    }
}

impl Fir {
    /// The filter with these taps, divided by their sum.
    ///
    /// # Errors
    /// [`Error::Config`] if there are none or their sum is 0 or not finite.
    pub fn new(taps: &[f64]) -> Result<Self> {
        let sum: f64 = taps.iter().sum();
        if taps.is_empty() || sum == 0.0 || !sum.is_finite() {
            return Err(Error::config(
                "resampling filter",
                format!("{taps:?}"),
                "at least one tap, with a finite sum other than 0",
                "use [1, 3, 3, 1] or [1, 1]",
            ));
        }
        Ok(Self {
            taps: taps.iter().map(|tap| tap / sum).collect(),
        })
    }

    /// The filter of `factor` equal taps: averages on the way down, repetition on the way up.
    pub fn box_of(factor: usize) -> Self {
        Self {
            taps: vec![1.0 / factor.max(1) as f64; factor.max(1)].into(),
        }
    }

    /// The taps.
    pub fn taps(&self) -> &[f64] {
        &self.taps
    }

    /// The two-dimensional filter, row by row, as weights keep it.
    pub fn plane(&self) -> Vec<f64> {
        let rows = self.taps.iter();
        rows.flat_map(|a| self.taps.iter().map(move |b| a * b))
            .collect()
    }

    /// The same filter read from the other end, which makes a convolution of a cross-correlation.
    pub fn reversed(&self) -> Self {
        Self {
            taps: self.taps.iter().rev().copied().collect(),
        }
    }

    /// Multiplies height and width by `factor`; the values are multiplied by `gain`.
    ///
    /// # Shapes
    /// `[B, C, H, W] -> [B, C, factor H, factor W]`.
    ///
    /// # Errors
    /// If `x` is not such a map, or the filter has fewer taps than `factor`.
    pub fn upsample(&self, x: &Tensor, factor: usize, gain: f64) -> Result<Tensor> {
        let rest = self.reach(factor)?;
        let taps: Vec<f64> = self.taps.iter().map(|tap| tap * factor as f64).collect();
        let pad = (rest.div_ceil(2) + factor - 1, rest / 2);
        amplified(fir_resample2d(x, &taps, factor, 1, pad)?, gain)
    }

    /// Divides height and width by `factor`; the values are multiplied by `gain`.
    ///
    /// # Shapes
    /// `[B, C, H, W] -> [B, C, H/factor, W/factor]`.
    ///
    /// # Errors
    /// If `x` is not such a map, or the filter has fewer taps than `factor`.
    pub fn downsample(&self, x: &Tensor, factor: usize, gain: f64) -> Result<Tensor> {
        let rest = self.reach(factor)?;
        let pad = (rest.div_ceil(2), rest / 2);
        amplified(fir_resample2d(x, &self.taps, 1, factor, pad)?, gain)
    }

    /// The filter and a convolution of stride `factor` after it, with zeros put on once for both.
    ///
    /// # Shapes
    /// `x [B, C, H, W]`, `weight [K, C, k, k]`, `bias [K]`; the result is
    /// `[B, K, H/factor, W/factor]`.
    ///
    /// # Errors
    /// If the shapes don't fit, or the filter has fewer taps than `factor`.
    pub fn conv_downsample(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        factor: usize,
        gain: f64,
    ) -> Result<Tensor> {
        let rest = self.reach(factor)? + weight.dim(3)?.saturating_sub(1);
        let pad = (rest.div_ceil(2), rest / 2);
        let x = amplified(fir_resample2d(x, &self.taps, 1, 1, pad)?, gain)?;
        Ok(conv2d(&x, weight, bias, factor, 0, 1)?)
    }

    /// A convolution and the filter after it, with decimation by `factor` and zeros put on once for
    /// both.
    ///
    /// # Shapes
    /// As [`Fir::conv_downsample`]; the side of `weight` is odd.
    ///
    /// # Errors
    /// If the shapes don't fit, or the filter has fewer taps than `factor`.
    pub fn downsample_after(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        factor: usize,
    ) -> Result<Tensor> {
        self.reach(factor)?;
        let padding = weight.dim(3)? / 2 + (self.taps.len() - 1) / 2;
        let y = conv2d(x, weight, None, 1, padding, 1)?;
        let y = fir_resample2d(&y, &self.taps, 1, factor, (0, 0))?;
        match bias {
            Some(bias) => Ok(diffusion_ops::add_bias(&y, bias, 1)?),
            None => Ok(y),
        }
    }

    /// A convolution on the map with zeros between its samples, and the filter after it.
    ///
    /// # Shapes
    /// `x [B, C, H, W]`, `weight [K, C, k, k]`, `bias [K]`; the result is
    /// `[B, K, factor H, factor W]`.
    ///
    /// # Errors
    /// If the shapes don't fit, or the filter has fewer taps than `factor` and the convolution
    /// together.
    pub fn conv_upsample(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        factor: usize,
        gain: f64,
    ) -> Result<Tensor> {
        let side = weight.dim(3)?;
        let (taps, needed) = (self.taps.len(), factor + side.saturating_sub(1));
        let Some(rest) = taps.checked_sub(needed) else {
            return Err(too_short(taps, needed));
        };
        // All of the convolution: each sample reaches `side − 1` positions beyond the map.
        let (_, _, h, w) = x.dims4()?;
        let x = stretched(x, factor)?
            .narrow(2, 0, (h - 1) * factor + 1)?
            .narrow(3, 0, (w - 1) * factor + 1)?;
        let x = conv2d(&x, weight, None, 1, side - 1, 1)?;
        let taps: Vec<f64> = self.taps.iter().map(|tap| tap * factor as f64).collect();
        let pad = (rest.div_ceil(2) + factor - 1, rest / 2 + 1);
        let y = amplified(fir_resample2d(&x, &taps, 1, 1, pad)?, gain)?;
        match bias {
            Some(bias) => Ok(diffusion_ops::add_bias(&y, bias, 1)?),
            None => Ok(y),
        }
    }

    fn reach(&self, factor: usize) -> Result<usize> {
        match self.taps.len().checked_sub(factor) {
            Some(rest) if factor > 0 => Ok(rest),
            _ => Err(too_short(self.taps.len(), factor.max(1))),
        }
    }
}

fn too_short(taps: usize, needed: usize) -> Error {
    Error::config(
        "resampling filter",
        format!("{taps} taps"),
        format!("at least {needed}"),
        "use a longer filter, such as [1, 3, 3, 1]",
    )
}

fn amplified(x: Tensor, gain: f64) -> Result<Tensor> {
    if gain == 1.0 {
        Ok(x)
    } else {
        Ok(x.affine(gain, 0.0)?)
    }
}

/// Zero insertion, padding, convolution with any filter, decimation.
///
/// ```text
/// y = D_down (K ⊛ pad(U_up x)),   (K ⊛ u)[n] = Σ_m K[m] u[n − m]
/// ```
///
/// where `U_up` puts `up − 1` zeros after each sample, `pad = (before, after)` adds zeros on both
/// axes or, where negative, takes samples away, and the convolution keeps the positions where the
/// filter lies inside.
///
/// # Shapes
/// `x [B, C, H, W]`, `kernel [kh, kw]`; the result is `[B, C, H', W']` with
/// `H' = ⌊(up H + before + after − kh)/down⌋ + 1`, and `W'` likewise.
///
/// # Errors
/// If a shape is another, a factor is 0, or nothing is left of the map.
pub fn upfirdn2d(
    x: &Tensor,
    kernel: &Tensor,
    up: usize,
    down: usize,
    pad: (isize, isize),
) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (kh, kw) = kernel.dims2()?;
    let size = |from: usize| {
        (from * up)
            .saturating_add_signed(pad.0)
            .saturating_add_signed(pad.1)
    };
    let cut = (pad.0.min(0) + pad.1.min(0)).unsigned_abs();
    let too_small = size(h) < kh || size(w) < kw || (h.min(w) * up) <= cut;
    if up == 0 || down == 0 || kh * kw == 0 || too_small {
        return Err(Error::Input {
            name: "x",
            found: format!("a map of {h}x{w}, up {up}, down {down}, padding {pad:?}"),
            expected: format!("room for a filter of {kh}x{kw}, and factors of at least 1"),
        });
    }
    let x = stretched(x, up)?;
    let (before, after) = (cropped(pad.0), cropped(pad.1));
    let x = x
        .narrow(2, before, h * up - before - after)?
        .narrow(3, before, w * up - before - after)?
        .contiguous()?;
    let (_, _, h, w) = x.dims4()?;
    // A convolution is a cross-correlation with the filter turned round.
    let turned = |n: usize| {
        let order: Vec<u32> = (0..n as u32).rev().collect();
        Tensor::new(order, kernel.device())
    };
    let kernel = kernel
        .to_dtype(x.dtype())?
        .index_select(&turned(kh)?, 0)?
        .index_select(&turned(kw)?, 1)?
        .reshape((1, 1, kh, kw))?;
    let (before, after) = (pad.0.max(0).unsigned_abs(), pad.1.max(0).unsigned_abs());
    let padding = Padding {
        top: before,
        bottom: after,
        left: before,
        right: after,
    };
    let y = conv2d(
        &x.reshape((b * c, 1, h, w))?,
        &kernel,
        None,
        down,
        padding,
        1,
    )?;
    let (_, _, h, w) = y.dims4()?;
    Ok(y.reshape((b, c, h, w))?)
}

/// How many samples a negative padding takes away.
fn cropped(pad: isize) -> usize {
    pad.min(0).unsigned_abs()
}

/// `up − 1` zeros after each sample of both axes.
fn stretched(x: &Tensor, up: usize) -> Result<Tensor> {
    if up <= 1 {
        return Ok(x.clone());
    }
    let (b, c, h, w) = x.dims4()?;
    Ok(x.reshape((b, c, h, 1, w, 1))?
        .pad_with_zeros(3, 0, up - 1)?
        .pad_with_zeros(5, 0, up - 1)?
        .reshape((b, c, h * up, w * up))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use diffusion_ops::gradcheck::{max_abs_difference, max_relative_error, normal};

    fn plane(fir: &Fir, scale: f64) -> Tensor {
        let n = fir.taps().len();
        (Tensor::from_vec(fir.plane(), (n, n), &Device::Cpu).unwrap() * scale).unwrap()
    }

    /// The definition, term by term.
    fn by_hand(x: &[f64], kernel: &[f64], up: usize, down: usize, pad: (isize, isize)) -> Vec<f64> {
        let at = |i: isize| {
            let i = i - pad.0;
            let inside = i >= 0 && i % up as isize == 0 && i / (up as isize) < x.len() as isize;
            if inside { x[i as usize / up] } else { 0.0 }
        };
        let length = (x.len() * up) as isize + pad.0 + pad.1;
        let taps = kernel.len();
        (0..=(length - taps as isize))
            .step_by(down)
            .map(|n| {
                (0..taps)
                    .map(|m| kernel[m] * at(n + (taps - 1 - m) as isize))
                    .sum()
            })
            .collect()
    }

    #[test]
    fn the_general_form_is_its_definition_for_any_factors_and_paddings() {
        let x = normal(1, (1, 1, 1, 7)).unwrap();
        let kernel = Tensor::new(&[[1.0, -2.0, 0.5f64]], &Device::Cpu).unwrap();
        let values = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (up, down, pad) in [
            (1, 1, (0, 0)),
            (2, 1, (2, 1)),
            (3, 2, (2, 2)),
            (1, 2, (-1, 3)),
            (2, 3, (1, -2)),
        ] {
            // One row: padding touches both axes, so the row is found where the filter meets it.
            let y = upfirdn2d(&x, &kernel, up, down, pad);
            let row = if pad.0 >= 0 { pad.0 as usize } else { 0 };
            let Ok(y) = y else {
                // A negative padding leaves nothing of a single row.
                assert!(pad.0 < 0 || pad.1 < 0);
                continue;
            };
            if row % down == 0 {
                let y = y.get(0).unwrap().get(0).unwrap().get(row / down).unwrap();
                let hand = by_hand(&values, &[1.0, -2.0, 0.5], up, down, pad);
                let y = y.to_vec1::<f64>().unwrap();
                assert_eq!(y.len(), hand.len());
                for (a, b) in y.iter().zip(&hand) {
                    assert!((a - b).abs() < 1e-12, "{up} {down} {pad:?}");
                }
            }
        }
    }

    #[test]
    fn negative_padding_takes_samples_away() {
        let x = normal(2, (2, 3, 5, 6)).unwrap();
        let kernel = normal(3, (2, 3)).unwrap();
        let cropped = x.narrow(2, 1, 3).unwrap().narrow(3, 1, 4).unwrap();
        let a = upfirdn2d(&x, &kernel, 1, 1, (-1, -1)).unwrap();
        let b = upfirdn2d(&cropped, &kernel, 1, 1, (0, 0)).unwrap();
        assert_eq!(max_abs_difference(&a, &b).unwrap(), 0.0);
    }

    #[test]
    fn the_separable_forms_agree_with_the_general_one() {
        let x = normal(4, (2, 3, 6, 8)).unwrap();
        for taps in [
            &[1.0, 3.0, 3.0, 1.0][..],
            &[1.0, 1.0],
            &[1.0, 2.0, 1.0],
            &[1.0, 2.0, 4.0, 8.0],
        ] {
            let fir = Fir::new(taps).unwrap();
            let p = (taps.len() - 2) as isize;
            let up =
                upfirdn2d(&x, &plane(&fir, 4.0 * 1.5), 2, 1, ((p + 1) / 2 + 1, p / 2)).unwrap();
            let ours = fir.upsample(&x, 2, 1.5).unwrap();
            assert_eq!(ours.dims(), [2, 3, 12, 16]);
            assert!(max_abs_difference(&ours, &up).unwrap() < 1e-12);
            let down = upfirdn2d(&x, &plane(&fir, 2.0), 1, 2, ((p + 1) / 2, p / 2)).unwrap();
            let ours = fir.downsample(&x, 2, 2.0).unwrap();
            assert_eq!(ours.dims(), [2, 3, 3, 4]);
            assert!(max_abs_difference(&ours, &down).unwrap() < 1e-12);
        }
    }

    #[test]
    fn equal_taps_are_averages_and_repetition() {
        let x = normal(5, (2, 3, 6, 8)).unwrap();
        let fir = Fir::box_of(2);
        let mean = diffusion_ops::avg_pool2d(&x, 2).unwrap();
        assert!(max_abs_difference(&fir.downsample(&x, 2, 1.0).unwrap(), &mean).unwrap() < 1e-14);
        let repeated = diffusion_ops::upsample_nearest2d(&x, 12, 16).unwrap();
        assert!(max_abs_difference(&fir.upsample(&x, 2, 1.0).unwrap(), &repeated).unwrap() < 1e-14);
    }

    /// Filters and convolutions commute on an unbounded map, so that inside the border it does not
    /// matter which comes first.
    #[test]
    fn fused_convolutions_are_the_two_steps_inside_the_border() {
        let x = normal(6, (2, 3, 8, 10)).unwrap();
        let weight = normal(7, (4, 3, 3, 3)).unwrap();
        let bias = normal(8, 4).unwrap();
        let fir = Fir::new(&[1.0, 2.0, 5.0, 1.0]).unwrap();
        let inner = |t: Tensor, m: usize| {
            let (_, _, h, w) = t.dims4().unwrap();
            t.narrow(2, m, h - 2 * m)
                .unwrap()
                .narrow(3, m, w - 2 * m)
                .unwrap()
        };
        let up = fir.conv_upsample(&x, &weight, Some(&bias), 2, 1.0).unwrap();
        let steps = fir.upsample(&x, 2, 1.0).unwrap();
        let steps = conv2d(&steps, &weight, Some(&bias), 1, 1, 1).unwrap();
        assert_eq!(up.dims(), steps.dims());
        assert!(max_abs_difference(&inner(up, 3), &inner(steps, 3)).unwrap() < 1e-12);
        let down = fir
            .conv_downsample(&x, &weight, Some(&bias), 2, 1.0)
            .unwrap();
        assert_eq!(down.dims(), [2, 4, 4, 5]);
        let after = fir.downsample_after(&x, &weight, Some(&bias), 2).unwrap();
        assert_eq!(after.dims(), [2, 4, 4, 5]);
        assert!(max_abs_difference(&inner(down, 1), &inner(after, 1)).unwrap() < 1e-12);
    }

    #[test]
    fn gradients_are_right() {
        let inputs = [
            normal(1, (1, 2, 4, 6)).unwrap(),
            normal(2, (3, 2, 3, 3)).unwrap(),
            normal(3, 3).unwrap(),
        ];
        let fir = Fir::default();
        type Part<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;
        let kernel = normal(4, (2, 3)).unwrap();
        let parts: [(usize, Part<'_>); 5] = [
            (3, &|t| {
                fir.conv_downsample(&t[0], &t[1], Some(&t[2]), 2, 1.0)
            }),
            (3, &|t| fir.conv_upsample(&t[0], &t[1], Some(&t[2]), 2, 1.0)),
            (3, &|t| fir.downsample_after(&t[0], &t[1], Some(&t[2]), 2)),
            (1, &|t| upfirdn2d(&t[0], &kernel, 2, 3, (2, -1))),
            (1, &|t| fir.upsample(&t[0], 2, 0.5)),
        ];
        for (arguments, part) in parts {
            let f = |t: &[Tensor]| part(t).map_err(candle_core::Error::wrap);
            let error = max_relative_error(f, &inputs[..arguments]).unwrap();
            assert!(error < 1e-6, "{error}");
        }
    }

    #[test]
    fn impossible_filters_are_refused() {
        assert!(Fir::new(&[]).is_err());
        assert!(Fir::new(&[1.0, -1.0]).is_err());
        let x = Tensor::zeros((1, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        let said = Fir::new(&[1.0])
            .unwrap()
            .downsample(&x, 2, 1.0)
            .unwrap_err();
        assert!(said.to_string().contains("at least 2"), "{said}");
        let kernel = Tensor::ones((5, 5), DType::F32, &Device::Cpu).unwrap();
        let said = upfirdn2d(&x, &kernel, 1, 1, (0, 0)).unwrap_err();
        assert!(said.to_string().contains("5x5"), "{said}");
    }
}
