//! The transforms of Winograd's filters over maps, gradients and weights; the lanes of a vector are
//! channels.

use super::winograd::{LANES, Tiling};
use super::winograd_tile::{MAX, Tile};
use super::{Geometry, Weight};
use crate::cpu::{Real, Shared};
use crate::simd::{Kernel, Simd, Vector, dispatch};
use rayon::prelude::*;
use std::marker::PhantomData;

/// The rows of a map that some rows of tiles read.
pub(super) struct View {
    channels: usize,
    height: usize,
    width: usize,
    /// Pixels of a plane; the last row may be shorter than the others.
    plane: usize,
    /// Row of the map at row 0 of the view (negative in the padding).
    y0: isize,
    /// Columns of padding on the left.
    left: usize,
    /// Size of the view, padding included.
    rows: usize,
    cols: usize,
    /// Tiles.
    down: usize,
    across: usize,
}

impl View {
    pub fn input<W: Tile>(g: &Geometry, tiling: Tiling, row: usize, rows: usize) -> Self {
        Self {
            channels: g.channels,
            height: g.height,
            width: g.width,
            plane: g.plane(),
            y0: (row * W::M) as isize - g.top as isize,
            left: g.left,
            rows: rows * W::M + 2,
            cols: tiling.across * W::MW + W::AW - W::MW,
            down: rows,
            across: tiling.across,
        }
    }

    pub fn gradient<W: Tile>(
        g: &Geometry,
        outputs: usize,
        tiling: Tiling,
        row: usize,
        rows: usize,
    ) -> Self {
        Self {
            channels: outputs,
            height: g.out_h,
            width: g.out_w,
            plane: g.out_plane(),
            y0: (row * W::M) as isize,
            left: 0,
            rows: rows * W::M,
            cols: tiling.across * W::MW,
            down: rows,
            across: tiling.across,
        }
    }

    /// Elements of scratch space.
    pub fn room(&self) -> usize {
        self.rows * self.cols * LANES
    }
}

/// Transforms the tiles of a view: `Bᵀ d B` of the map, or `A y Aᵀ` of the gradient.
pub(super) fn transform<W: Tile, T: Real, const GRADIENT: bool>(
    view: &View,
    map: &[T],
    scratch: &mut [T],
    out: Shared<T>,
    (out_row, out_stride): (usize, usize),
) {
    assert!(map.len() == view.channels * view.plane && scratch.len() >= view.room());
    scratch.fill(T::zero());
    dispatch(TileTransform::<W, T, GRADIENT> {
        view,
        map: map.as_ptr(),
        scratch: scratch.as_mut_ptr(),
        // SAFETY: each caller owns its tiles of the transformed tensor.
        out: unsafe { out.at(0) },
        out_row,
        out_stride,
        tile: PhantomData,
    });
}

struct TileTransform<'a, W, T, const GRADIENT: bool> {
    view: &'a View,
    map: *const T,
    /// Zeros: `rows × cols × LANES`.
    scratch: *mut T,
    /// Tile t, channel c, position p at `p · out_stride + t · out_row + c`.
    out: *mut T,
    out_row: usize,
    out_stride: usize,
    tile: PhantomData<W>,
}

impl<W: Tile, T: Real, const GRADIENT: bool> Kernel for TileTransform<'_, W, T, GRADIENT> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let lanes = T::V::<S>::LANES;
        let view = self.view;
        let plane = view.plane;
        let first = view.y0.max(0) as usize;
        let last = ((view.y0 + view.rows as isize).max(0) as usize).min(view.height);
        let (side, side_w) = if GRADIENT {
            (W::M, W::MW)
        } else {
            (W::A, W::AW)
        };
        let mut block = [T::zero(); LANES * LANES];
        for c0 in (0..self.out_row).step_by(lanes) {
            let channels = view.channels.saturating_sub(c0).min(lanes);
            // Pixels of the rows that exist, in reading order, moved from planes to vectors of
            // channels.
            let pixels = (last.saturating_sub(first) * view.width)
                .min(plane.saturating_sub(first * view.width));
            let mut at = 0;
            while at < pixels {
                let begin = if pixels >= lanes {
                    at.min(pixels - lanes)
                } else {
                    at
                };
                let count = (pixels - begin).min(lanes);
                // SAFETY: channels c0 .. c0 + channels and `count` pixels from `begin` lie inside
                // the map; the rows `first .. last` and all columns lie inside the view.
                unsafe {
                    let src = self.map.add(c0 * plane + first * view.width + begin);
                    if channels == lanes && count == lanes {
                        T::V::<S>::transpose(src, plane, block.as_mut_ptr(), lanes);
                    } else {
                        for pixel in 0..count {
                            for c in 0..lanes {
                                block[pixel * lanes + c] = if c < channels {
                                    *src.add(c * plane + pixel)
                                } else {
                                    T::zero()
                                };
                            }
                        }
                    }
                    let (mut y, mut x) = (begin / view.width, begin % view.width);
                    for pixel in 0..count {
                        let row = (first as isize - view.y0) as usize + y;
                        let to = (row * view.cols + view.left + x) * lanes;
                        let v = T::V::<S>::load(block.as_ptr().add(pixel * lanes));
                        v.store(self.scratch.add(to));
                        x += 1;
                        if x == view.width {
                            (x, y) = (0, y + 1);
                        }
                    }
                }
                at = begin + count;
            }
            for down in 0..view.down {
                for across in 0..view.across {
                    // SAFETY: a tile reads `side` rows and columns of the view, which has
                    // `down·M + A − M` (for the gradient `down·M`) of them; it writes its own row.
                    unsafe {
                        let at = (down * W::M * view.cols + across * W::MW) * lanes;
                        let from = self.scratch.add(at);
                        let zero = T::V::<S>::zero();
                        let mut half = [[zero; MAX]; MAX];
                        for j in 0..side_w {
                            let mut line = [zero; MAX];
                            for i in 0..side {
                                line[i] = T::V::<S>::load(from.add((i * view.cols + j) * lanes));
                            }
                            half[j] = if GRADIENT {
                                W::output_adjoint::<S, T>(line)
                            } else {
                                W::input::<S, T>(line)
                            };
                        }
                        let tile = down * view.across + across;
                        let to = self.out.add(tile * self.out_row + c0);
                        for i in 0..W::A {
                            let mut line = [zero; MAX];
                            for j in 0..side_w {
                                line[j] = half[j][i];
                            }
                            let line = if W::AW == 1 {
                                line
                            } else if GRADIENT {
                                W::output_adjoint::<S, T>(line)
                            } else {
                                W::input::<S, T>(line)
                            };
                            for j in 0..W::AW {
                                line[j].store(to.add((i * W::AW + j) * self.out_stride));
                            }
                        }
                    }
                }
            }
        }
    }
}

pub(super) struct OutputTransform<'a, W, T> {
    /// Tile t, channel k, position p at `p · m_stride + t · m_row + k`.
    pub m: *const T,
    pub m_row: usize,
    pub m_stride: usize,
    pub bias: Option<&'a [T]>,
    pub channels: usize,
    /// Rows of tiles, and tiles of a row.
    pub rows: usize,
    pub across: usize,
    /// Height and width of what is written.
    pub size: (usize, usize),
    /// Pixels of it that exist.
    pub pixels: usize,
    /// Scratch: pixels of `LANES`.
    pub flat: *mut T,
    pub out: *mut T,
    pub plane: usize,
    pub tile: PhantomData<W>,
}

impl<W: Tile, T: Real> Kernel for OutputTransform<'_, W, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let lanes = T::V::<S>::LANES;
        let (height, width) = self.size;
        for k0 in (0..self.channels).step_by(lanes) {
            let channels = (self.channels - k0).min(lanes);
            // SAFETY: `bias` holds `channels` values in all; positions, tiles and channels lie
            // inside m, whose rows are padded to whole vectors.
            unsafe {
                let shift = match self.bias {
                    Some(bias) => T::V::<S>::load_first(bias.as_ptr().add(k0), channels),
                    None => T::V::<S>::zero(),
                };
                for tile in 0..self.rows * self.across {
                    let (down, across) = (tile / self.across, tile % self.across);
                    let from = self.m.add(tile * self.m_row + k0);
                    let zero = T::V::<S>::zero();
                    let mut half = [[zero; MAX]; MAX];
                    for j in 0..W::AW {
                        let mut line = [zero; MAX];
                        for i in 0..W::A {
                            line[i] = T::V::<S>::load(from.add((i * W::AW + j) * self.m_stride));
                        }
                        half[j] = W::output::<S, T>(line);
                    }
                    let (y0, x0) = (down * W::M, across * W::MW);
                    for i in 0..W::M.min(height.saturating_sub(y0)) {
                        let mut line = [zero; MAX];
                        for j in 0..W::AW {
                            line[j] = half[j][i];
                        }
                        if W::AW > 1 {
                            line = W::output::<S, T>(line);
                        }
                        for j in 0..W::MW.min(width - x0) {
                            let at = ((y0 + i) * width + x0 + j) * lanes;
                            line[j].add(shift).store(self.flat.add(at));
                        }
                    }
                }
            }
            let pixels = self.pixels;
            let mut at = 0;
            while at < pixels {
                let begin = if pixels >= lanes {
                    at.min(pixels - lanes)
                } else {
                    at
                };
                let count = (pixels - begin).min(lanes);
                // SAFETY: `flat` holds all pixels; `channels` planes from `out` hold as many.
                unsafe {
                    let from = self.flat.add(begin * lanes);
                    let to = self.out.add(k0 * self.plane + begin);
                    if channels == lanes && count == lanes {
                        T::V::<S>::transpose(from, lanes, to, self.plane);
                    } else {
                        for k in 0..channels {
                            for pixel in 0..count {
                                *to.add(k * self.plane + pixel) = *from.add(pixel * lanes + k);
                            }
                        }
                    }
                }
                at = begin + count;
            }
        }
    }
}

/// `U[p, c, k] = (G w Gᵀ)[p]`; rows of k are padded with zeros.
pub(super) fn filters<W: Tile, T: Real>(
    weight: &Weight<'_, T>,
    kp: usize,
    stride: usize,
    u: &mut [T],
) {
    let u = Shared::new(u);
    let work = crate::cpu::worth(weight.outputs * 50);
    (0..weight.inputs)
        .into_par_iter()
        .with_min_len(work)
        .for_each(|c| {
            dispatch(FilterTransform::<W, T> {
                weight,
                c,
                kp,
                // SAFETY: each task writes its own input channel.
                u: unsafe { u.at(c * kp) },
                stride,
                tile: PhantomData,
            });
        });
}

struct FilterTransform<'a, W, T> {
    weight: &'a Weight<'a, T>,
    c: usize,
    kp: usize,
    u: *mut T,
    stride: usize,
    tile: PhantomData<W>,
}

impl<W: Tile, T: Real> Kernel for FilterTransform<'_, W, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let lanes = T::V::<S>::LANES;
        for k0 in (0..self.kp).step_by(lanes) {
            let mut taps = [[T::zero(); LANES]; 9];
            for k in 0..self.weight.outputs.saturating_sub(k0).min(lanes) {
                let taken = self.weight.taps(k0 + k, self.c);
                for (tap, line) in taps.iter_mut().enumerate().take(W::TAPS) {
                    line[k] = taken[self.weight.tap(tap, W::TAPS)];
                }
            }
            // SAFETY: a row of u has kp elements, a whole number of vectors.
            unsafe {
                let zero = T::V::<S>::zero();
                let mut half = [[zero; MAX]; 3];
                let across = W::TAPS / 3;
                for j in 0..across {
                    let mut g = [zero; 3];
                    for (i, g) in g.iter_mut().enumerate() {
                        *g = T::V::<S>::load(taps[across * i + j].as_ptr());
                    }
                    half[j] = W::filter::<S, T>(g);
                }
                for i in 0..W::A {
                    let line = if W::AW == 1 {
                        half[0]
                    } else {
                        W::filter::<S, T>([half[0][i], half[1][i], half[2][i]])
                    };
                    for j in 0..W::AW {
                        let v = if W::AW == 1 { line[i] } else { line[j] };
                        v.store(self.u.add((i * W::AW + j) * self.stride + k0));
                    }
                }
            }
        }
    }
}

/// One input channel of `∂L/∂w = Gᵀ ∂L/∂U G`.
pub(super) struct FilterAdjoint<W, T> {
    pub u: *const T,
    pub u_stride: usize,
    pub outputs: usize,
    pub out: *mut T,
    pub out_row: usize,
    pub tile: PhantomData<W>,
}

impl<W: Tile, T: Real> Kernel for FilterAdjoint<W, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let lanes = T::V::<S>::LANES;
        for k0 in (0..self.outputs).step_by(lanes) {
            let mut taps = [[T::zero(); LANES]; 9];
            // SAFETY: rows of u are padded to whole vectors; row k of `out` has nine elements.
            unsafe {
                let zero = T::V::<S>::zero();
                let mut half = [[zero; 3]; MAX];
                let across = W::TAPS / 3;
                for j in 0..W::AW {
                    let mut line = [zero; MAX];
                    for i in 0..W::A {
                        let at = (i * W::AW + j) * self.u_stride + k0;
                        line[i] = T::V::<S>::load(self.u.add(at));
                    }
                    half[j] = W::filter_adjoint::<S, T>(line);
                }
                for i in 0..3 {
                    let mut line = [zero; MAX];
                    for j in 0..W::AW {
                        line[j] = half[j][i];
                    }
                    let line = if W::AW == 1 {
                        [line[0]; 3]
                    } else {
                        W::filter_adjoint::<S, T>(line)
                    };
                    for j in 0..across {
                        line[j].store(taps[across * i + j].as_mut_ptr());
                    }
                }
                for k in 0..(self.outputs - k0).min(lanes) {
                    let to = self.out.add((k0 + k) * self.out_row);
                    for (tap, line) in taps.iter().enumerate().take(W::TAPS) {
                        *to.add(tap) = line[k];
                    }
                }
            }
        }
    }
}
