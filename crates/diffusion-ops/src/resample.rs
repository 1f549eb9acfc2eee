//! Changing the resolution of a map: nearest neighbour, linear interpolation, averages, finite
//! impulse responses.
//!
//! All of them are a sparse linear map along each axis, applied one axis after the other; the
//! backward is the transposed map.

use crate::cpu::{by_float, filled, half_on_cpu, native, slice, worth};
use crate::gradient::deliver;
use crate::tape::apply1;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail,
};
use rayon::prelude::*;

#[path = "resample_block.rs"]
mod block;

/// Nearest-neighbour resizing.
///
/// ```text
/// y[b, c, o, p] = x[b, c, ⌊o H/H'⌋, ⌊p W/W'⌋]
/// ```
///
/// # Shapes
/// `x [B, C, H, W]`; the result is `[B, C, H', W']`.
///
/// # Errors
/// If `x` is not such a map or a size is zero.
pub fn upsample_nearest2d(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if h * w * height * width == 0 {
        bail!("upsample_nearest2d: from {h}x{w} to {height}x{width}");
    }
    if height.is_multiple_of(h) && width.is_multiple_of(w) && width > w {
        return block::repeat(x, (height / h, width / w));
    }
    let axis = |from: usize, to: usize| Axis {
        taps: (0..to).map(|o| vec![(o * from / to, 1.0)]).collect(),
        from,
    };
    apply(x, axis(h, height), axis(w, width))
}

/// Linear interpolation along both axes, pixels being squares whose centres are at halves.
///
/// ```text
/// y[o] = (1 − λ) x[⌊u⌋] + λ x[⌊u⌋ + 1],   u = (o + ½) H/H' − ½ within [0, H − 1],   λ = u − ⌊u⌋
/// ```
///
/// # Shapes
/// `x [B, C, H, W]`; the result is `[B, C, H', W']`.
///
/// # Errors
/// If `x` is not such a map or a size is zero.
pub fn resize_bilinear2d(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if h * w * height * width == 0 {
        bail!("resize_bilinear2d: from {h}x{w} to {height}x{width}");
    }
    let axis = |from: usize, to: usize| {
        let between = |o: usize| {
            let u = (o as f64 + 0.5) * from as f64 / to as f64 - 0.5;
            let u = u.clamp(0.0, (from - 1) as f64);
            let (low, part) = (u as usize, u.fract());
            if part == 0.0 {
                vec![(low, 1.0)]
            } else {
                vec![(low, 1.0 - part), (low + 1, part)]
            }
        };
        Axis {
            taps: (0..to).map(between).collect(),
            from,
        }
    };
    apply(x, axis(h, height), axis(w, width))
}

/// Averages over non-overlapping squares; what does not fill a square is left out.
///
/// ```text
/// y[b, c, o, p] = k⁻² Σ_{i,j<k} x[b, c, o k + i, p k + j]
/// ```
///
/// # Shapes
/// `x [B, C, H, W]`; the result is `[B, C, ⌊H/k⌋, ⌊W/k⌋]`.
///
/// # Errors
/// If `x` is not such a map, or smaller than one square.
pub fn avg_pool2d(x: &Tensor, k: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if k == 0 || h < k || w < k {
        bail!("avg_pool2d: squares of side {k} on a map of {h}x{w}");
    }
    if h.is_multiple_of(k) && w.is_multiple_of(k) {
        return block::mean(x, (k, k));
    }
    let axis = |from: usize| Axis {
        taps: (0..from / k)
            .map(|o| (0..k).map(|i| (o * k + i, 1.0 / k as f64)).collect())
            .collect(),
        from,
    };
    apply(x, axis(h), axis(w))
}

/// Zero insertion, a separable finite impulse response, and decimation (Karras et al. 2019,
/// as used by Song et al. 2021, NCSN++).
///
/// ```text
/// y = D_down (f ⊛ (U_up x)),   (f ⊛ u)[n] = Σ_m f[m] u[n − m]
/// ```
///
/// along each of the two axes, where `U_up` puts `up − 1` zeros after each sample, the result is
/// padded with `pad.0` zeros before and `pad.1` after, the convolution keeps the positions where
/// the filter lies inside, and `D_down` keeps every `down`-th of them.
///
/// # Shapes
/// `x [B, C, H, W]`; the result is `[B, C, H', W']` with
/// `H' = ⌊(up H + pad.0 + pad.1 − K)/down⌋ + 1` for a filter of `K` taps, and `W'` likewise.
///
/// # Errors
/// If `x` is not such a map, a factor is zero, or the filter is empty or longer than the padded
/// map.
pub fn fir_resample2d(
    x: &Tensor,
    filter: &[f64],
    up: usize,
    down: usize,
    pad: (usize, usize),
) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if up == 0 || down == 0 || filter.is_empty() {
        bail!(
            "fir_resample2d: up {up}, down {down}, a filter of {} taps",
            filter.len()
        );
    }
    let taps = filter.len();
    let axis = |from: usize| -> Result<Axis> {
        let Some(room) = (from * up + pad.0 + pad.1).checked_sub(taps) else {
            bail!("fir_resample2d: a filter of {taps} taps on {from} samples");
        };
        let reach = |o: usize| {
            (0..taps).filter_map(move |m| {
                // Position in the stretched signal, before padding.
                let at = (o * down + m).checked_sub(pad.0)?;
                (at % up == 0 && at / up < from).then_some((at / up, filter[taps - 1 - m]))
            })
        };
        Ok(Axis {
            taps: (0..room / down + 1).map(|o| reach(o).collect()).collect(),
            from,
        })
    };
    apply(x, axis(h)?, axis(w)?)
}

/// A sparse matrix: for each output position, the input positions and their weights.
#[derive(Clone)]
struct Axis {
    taps: Vec<Vec<(usize, f64)>>,
    from: usize,
}

impl Axis {
    fn transposed(&self) -> Self {
        let mut taps = vec![Vec::new(); self.from];
        for (o, row) in self.taps.iter().enumerate() {
            for (i, weight) in row {
                taps[*i].push((o, *weight));
            }
        }
        Self {
            taps,
            from: self.taps.len(),
        }
    }

    fn dense(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut values = vec![0f64; self.taps.len() * self.from];
        for (o, row) in self.taps.iter().enumerate() {
            for (i, weight) in row {
                values[o * self.from + i] += weight;
            }
        }
        Tensor::from_vec(values, (self.taps.len(), self.from), &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)
    }

    fn cast<T: WithDType>(&self) -> Vec<Vec<(usize, T)>> {
        let row =
            |row: &Vec<(usize, f64)>| row.iter().map(|(i, w)| (*i, T::from_f64(*w))).collect();
        self.taps.iter().map(row).collect()
    }
}

fn apply(x: &Tensor, rows: Axis, cols: Axis) -> Result<Tensor> {
    if half_on_cpu(x) {
        return apply(&x.to_dtype(DType::F32)?, rows, cols)?.to_dtype(x.dtype());
    }
    if native(x) {
        apply1(&x.contiguous()?, Separable { rows, cols })
    } else {
        composed(x, &rows, &cols)
    }
}

/// The same function as two dense matrix products: `A_rows X A_colsᵀ`.
fn composed(x: &Tensor, rows: &Axis, cols: &Axis) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let right = cols.dense(x.dtype(), x.device())?.t()?.contiguous()?;
    let left = rows.dense(x.dtype(), x.device())?.unsqueeze(0)?;
    let x = x
        .reshape((b * c * h, w))?
        .matmul(&right)?
        .reshape((b * c, h, cols.taps.len()))?;
    left.broadcast_matmul(&x)?
        .reshape((b, c, rows.taps.len(), cols.taps.len()))
}

struct Separable {
    rows: Axis,
    cols: Axis,
}

impl CustomOp1 for Separable {
    fn name(&self) -> &'static str {
        "resample2d"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, c, _, _) = l.shape().dims4()?;
        let shape = Shape::from((b, c, self.rows.taps.len(), self.cols.taps.len()));
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            filled::<T>(shape.elem_count(), |out| self.run(x, out))
        });
        Ok((out, shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let adjoint = Separable {
            rows: self.rows.transposed(),
            cols: self.cols.transposed(),
        };
        deliver(x, grad.detach().contiguous()?.apply_op1_no_bwd(&adjoint)?)
    }
}

impl Separable {
    fn run<T: WithDType>(&self, x: &[T], out: &mut [T]) {
        let (rows, cols) = (self.rows.cast::<T>(), self.cols.cast::<T>());
        let (h, w, out_w) = (self.rows.from, self.cols.from, cols.len());
        if out.is_empty() || x.is_empty() {
            return;
        }
        let planes = out
            .par_chunks_mut(rows.len() * out_w)
            .with_min_len(worth(rows.len() * out_w))
            .zip(x.par_chunks(h * w));
        planes.for_each(|(out, x)| {
            let mut wide = vec![T::zero(); h * out_w];
            for (wide, line) in wide.chunks_exact_mut(out_w).zip(x.chunks_exact(w)) {
                for (v, taps) in wide.iter_mut().zip(&cols) {
                    for (i, weight) in taps {
                        *v += line[*i] * *weight;
                    }
                }
            }
            for (out, taps) in out.chunks_exact_mut(out_w).zip(&rows) {
                for (i, weight) in taps {
                    for (o, v) in out.iter_mut().zip(&wide[i * out_w..][..out_w]) {
                        *o += *v * *weight;
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, max_relative_error, normal};

    const FIR: [f64; 4] = [0.125, 0.375, 0.375, 0.125];

    #[test]
    fn nearest_repeats_and_average_undoes_it() -> Result<()> {
        let x = normal(1, (2, 3, 3, 5))?;
        let up = upsample_nearest2d(&x, 6, 10)?;
        assert_eq!(max_abs_difference(&avg_pool2d(&up, 2)?, &x)?, 0.0);
        let y = Tensor::new(&[[[[1f64, 2.0, 3.0]]]], x.device())?;
        let wide = upsample_nearest2d(&y, 1, 7)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        assert_eq!(wide, [1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
        Ok(())
    }

    #[test]
    fn a_normalised_filter_keeps_a_constant_inside() -> Result<()> {
        let x = Tensor::ones((1, 1, 6, 8), DType::F64, &Device::Cpu)?;
        let gained = FIR.map(|f| 2.0 * f);
        let up = fir_resample2d(&x, &gained, 2, 1, (2, 1))?;
        assert_eq!(up.dims4()?, (1, 1, 12, 16));
        let inside = up.narrow(2, 1, 10)?.narrow(3, 1, 14)?;
        assert!(max_abs_difference(&inside, &inside.ones_like()?)? < 1e-15);
        let down = fir_resample2d(&x, &FIR, 1, 2, (1, 1))?;
        assert_eq!(down.dims4()?, (1, 1, 3, 4));
        let corner = down.flatten_all()?.to_vec1::<f64>()?[0];
        assert!((corner - 0.875 * 0.875).abs() < 1e-15, "{corner}");
        Ok(())
    }

    #[test]
    fn interpolation_is_linear_and_ends_at_the_outer_pixels() -> Result<()> {
        let x = Tensor::new(&[[[[1f64, 3.0, 7.0]]]], &Device::Cpu)?;
        let y = resize_bilinear2d(&x, 2, 6)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        let row = [1.0, 1.5, 2.5, 4.0, 6.0, 7.0];
        assert_eq!(y, [row, row].concat());
        let y = resize_bilinear2d(&x, 1, 2)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        assert_eq!(y, [1.5, 6.0]);
        Ok(())
    }

    #[test]
    fn an_asymmetric_filter_is_a_convolution() -> Result<()> {
        let x = Tensor::new(&[[[[1f64, 0.0, 0.0, 0.0]]]], &Device::Cpu)?;
        // One row: the vertical pass over a single sample padded by (2, 0) picks filter[2..].
        let y = fir_resample2d(&x, &[1.0, 2.0, 3.0], 1, 1, (2, 0))?;
        assert_eq!(y.flatten_all()?.to_vec1::<f64>()?, [1.0, 2.0, 3.0, 0.0]);
        Ok(())
    }

    #[test]
    fn gradients_and_composition() -> Result<()> {
        let x = [normal(1, (2, 2, 5, 7))?];
        type Op = Box<dyn Fn(&Tensor) -> Result<Tensor>>;
        let ops: Vec<Op> = vec![
            Box::new(|x| upsample_nearest2d(x, 10, 14)),
            Box::new(|x| upsample_nearest2d(x, 15, 14)),
            Box::new(|x| upsample_nearest2d(x, 8, 3)),
            Box::new(|x| resize_bilinear2d(x, 8, 3)),
            Box::new(|x| avg_pool2d(x, 2)),
            Box::new(|x| fir_resample2d(x, &FIR, 2, 1, (2, 1))),
            Box::new(|x| fir_resample2d(x, &FIR, 1, 2, (1, 1))),
            Box::new(|x| fir_resample2d(x, &[1.0, -2.0, 0.5], 3, 2, (0, 4))),
        ];
        for (k, op) in ops.iter().enumerate() {
            let e = max_relative_error(|t| op(&t[0]), &x)?;
            assert!(e < 1e-6, "{k}: {e:e}");
        }
        let rows = Axis {
            taps: vec![vec![(4, 0.5), (0, 2.0)], vec![(1, 1.0)], vec![]],
            from: 5,
        };
        let cols = Axis {
            taps: vec![vec![(6, -1.0)], vec![(2, 3.0), (3, 1.0)]],
            from: 7,
        };
        let gap = max_abs_difference(
            &apply(&x[0], rows.clone(), cols.clone())?,
            &composed(&x[0], &rows, &cols)?,
        )?;
        assert!(gap < 1e-14, "{gap:e}");
        let e = max_relative_error(|t| composed(&t[0], &rows, &cols), &x)?;
        assert!(e < 1e-6, "{e:e}");
        Ok(())
    }

    #[test]
    fn bad_sizes_are_errors() -> Result<()> {
        let x = normal(1, (1, 1, 3, 3))?;
        assert!(avg_pool2d(&x, 4).is_err());
        assert!(upsample_nearest2d(&x, 0, 2).is_err());
        assert!(fir_resample2d(&x, &[1.0; 9], 1, 1, (0, 0)).is_err());
        Ok(())
    }
}
