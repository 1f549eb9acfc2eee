//! Patches of a map as columns of a matrix, and the adjoint, for the convolutions.
//!
//! ```text
//! cols[(c, i, j), (b, o, p)] = x[b, c, o·s + i·d − top, p·s + j·d − left]   (0 outside the map)
//! ```

use crate::cpu::{by_float, filled, slice, worth};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, WithDType};
use rayon::prelude::*;

/// The sizes of one convolution, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub kernel_h: usize,
    pub kernel_w: usize,
    pub out_h: usize,
    pub out_w: usize,
    pub stride: usize,
    pub dilation: usize,
    pub top: usize,
    pub left: usize,
}

impl Geometry {
    /// The geometry whose columns are the channels themselves: `[B, C, H, W] -> [C, B·H·W]`.
    pub fn transpose(batch: usize, channels: usize, height: usize, width: usize) -> Self {
        Self {
            batch,
            channels,
            height,
            width,
            kernel_h: 1,
            kernel_w: 1,
            out_h: height,
            out_w: width,
            stride: 1,
            dilation: 1,
            top: 0,
            left: 0,
        }
    }

    pub fn rows(&self) -> usize {
        self.channels * self.kernel_h * self.kernel_w
    }

    pub fn columns(&self) -> usize {
        self.batch * self.out_h * self.out_w
    }

    /// Whether taking columns does nothing but move the batch axis.
    pub fn is_pointwise(&self) -> bool {
        (
            self.kernel_h,
            self.kernel_w,
            self.stride,
            self.top,
            self.left,
        ) == (1, 1, 1, 0, 0)
            && (self.out_h, self.out_w) == (self.height, self.width)
    }

    /// The output positions `lo..hi` along one axis whose tap lies inside the map, and the input
    /// position of the first of them.
    fn valid(&self, tap: usize, before: usize, size: usize, out: usize) -> (usize, usize, usize) {
        let offset = tap * self.dilation;
        let lo = before.saturating_sub(offset).div_ceil(self.stride);
        // Positions with o·s + offset − before < size.
        let hi = (size + before)
            .saturating_sub(offset)
            .div_ceil(self.stride)
            .min(out);
        (
            lo,
            hi.max(lo),
            (lo * self.stride + offset).saturating_sub(before),
        )
    }
}

/// `[B, C, H, W] -> [C·kh·kw, B·Ho·Wo]`.
pub(crate) struct Im2Col(pub Geometry);

impl CustomOp1 for Im2Col {
    fn name(&self) -> &'static str {
        "im2col"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let g = &self.0;
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            filled::<T>(g.rows() * g.columns(), |out| im2col(g, x, out))
        });
        Ok((out, Shape::from((g.rows(), g.columns()))))
    }
}

fn im2col<T: WithDType>(g: &Geometry, x: &[T], out: &mut [T]) {
    let (plane, out_plane) = (g.height * g.width, g.out_h * g.out_w);
    if g.columns() == 0 {
        return;
    }
    out.par_chunks_mut(g.columns())
        .with_min_len(worth(g.columns()))
        .enumerate()
        .for_each(|(row, out)| {
            let (c, tap) = (
                row / (g.kernel_h * g.kernel_w),
                row % (g.kernel_h * g.kernel_w),
            );
            let (y_lo, y_hi, y0) = g.valid(tap / g.kernel_w, g.top, g.height, g.out_h);
            let (x_lo, x_hi, x0) = g.valid(tap % g.kernel_w, g.left, g.width, g.out_w);
            if x_lo == x_hi {
                return;
            }
            for (b, out) in out.chunks_exact_mut(out_plane).enumerate() {
                let map = &x[(b * g.channels + c) * plane..][..plane];
                if g.is_pointwise() {
                    out.copy_from_slice(map);
                    continue;
                }
                for o in y_lo..y_hi {
                    let line = &map[(y0 + (o - y_lo) * g.stride) * g.width..][..g.width];
                    let out = &mut out[o * g.out_w..][x_lo..x_hi];
                    if g.stride == 1 {
                        out.copy_from_slice(&line[x0..x0 + out.len()]);
                    } else {
                        for (k, v) in out.iter_mut().enumerate() {
                            *v = line[x0 + k * g.stride];
                        }
                    }
                }
            }
        });
}

/// The adjoint of [`Im2Col`]: `[C·kh·kw, B·Ho·Wo] -> [B, C, H, W]`.
pub(crate) struct Col2Im(pub Geometry);

impl CustomOp1 for Col2Im {
    fn name(&self) -> &'static str {
        "col2im"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let g = &self.0;
        let shape = Shape::from((g.batch, g.channels, g.height, g.width));
        let out = by_float!(s, self.name(), T => {
            let cols = slice::<T>(s, l, self.name())?;
            filled::<T>(shape.elem_count(), |out| col2im(g, cols, out))
        });
        Ok((out, shape))
    }
}

fn col2im<T: WithDType>(g: &Geometry, cols: &[T], out: &mut [T]) {
    let (plane, out_plane) = (g.height * g.width, g.out_h * g.out_w);
    if plane == 0 {
        return;
    }
    out.par_chunks_mut(plane)
        .with_min_len(worth(plane))
        .enumerate()
        .for_each(|(k, map)| {
            let (b, c) = (k / g.channels, k % g.channels);
            for tap in 0..g.kernel_h * g.kernel_w {
                let (y_lo, y_hi, y0) = g.valid(tap / g.kernel_w, g.top, g.height, g.out_h);
                let (x_lo, x_hi, x0) = g.valid(tap % g.kernel_w, g.left, g.width, g.out_w);
                if x_lo == x_hi {
                    continue;
                }
                let row = c * g.kernel_h * g.kernel_w + tap;
                let cols = &cols[row * g.columns() + b * out_plane..][..out_plane];
                for o in y_lo..y_hi {
                    let line = &mut map[(y0 + (o - y_lo) * g.stride) * g.width..][..g.width];
                    let cols = &cols[o * g.out_w..][x_lo..x_hi];
                    if g.stride == 1 {
                        for (v, w) in line[x0..x0 + cols.len()].iter_mut().zip(cols) {
                            *v += *w;
                        }
                    } else {
                        for (k, w) in cols.iter().enumerate() {
                            line[x0 + k * g.stride] += *w;
                        }
                    }
                }
            }
        });
}
