//! Convolutions of stride 1 with kernels of 3×3 and 3×1 by Winograd's minimal filtering (Lavin and
//! Gray 2016).
//!
//! ```text
//! U[p] = (G w Gᵀ)[p]   [C, K]        V[p] = (Bᵀ d B)[p]   [tiles, C]
//! Y = Aᵀ (V U) A                     ∂L/∂U[p] = V[p]ᵀ (A ∂L/∂Y Aᵀ)[p]
//! ```
//!
//! for each of the A² positions p of a tile: A² products of matrices with M²·9/A² times fewer
//! multiplications than the sum itself, that is 4 times for F(4, 3); A positions and twice fewer
//! for 3×1. Transforms run on vectors of channels, so that any size of map keeps them full.
//!
//! A line convolved with three taps of dilation d is a map of width d, its last row perhaps cut
//! short, convolved with 3×1: see [`Geometry::folded`].

use super::winograd_tile::{MAX, Tile};
use super::{Bias, Geometry, Weight};
use crate::cpu::{Real, Shared, buffer};
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::{Kernel, Simd, Vector, dispatch};
use rayon::prelude::*;
use std::marker::PhantomData;

/// Channels are padded to a multiple of the widest vector of any level.
const LANES: usize = 16;

fn padded(channels: usize) -> usize {
    channels.div_ceil(LANES) * LANES
}

/// Elements of a transformed tensor from one position p to the next: not a multiple of a page, or
/// the stores of one tile would all fall into the same set of the cache.
fn stride(elements: usize) -> usize {
    elements + LANES
}

/// How the outputs are cut into tiles.
#[derive(Clone, Copy)]
struct Tiling {
    /// Tiles of a row of tiles.
    across: usize,
    /// Rows of tiles of one map.
    down: usize,
}

impl Tiling {
    fn new<W: Tile>(g: &Geometry) -> Self {
        Self {
            across: g.out_w.div_ceil(W::MW),
            down: g.out_h.div_ceil(W::M),
        }
    }

    /// Splits rows of tiles `from .. to`, counted through the batch, where a new map begins:
    /// (map, first row, rows, tiles before).
    fn runs(self, from: usize, to: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let mut at = from;
        std::iter::from_fn(move || {
            if at >= to {
                return None;
            }
            let (map, row) = (at / self.down, at % self.down);
            let rows = (self.down - row).min(to - at);
            let run = (map, row, rows, (at - from) * self.across);
            at += rows;
            Some(run)
        })
    }
}

/// `y = w ⋆ x + β` for a 3×3 kernel of stride and dilation 1.
pub(super) fn forward<W: Tile, T: Real>(
    g: &Geometry,
    x: &[T],
    weight: &Weight<'_, T>,
    bias: Bias<'_, T>,
    out: &mut [T],
) {
    let (kp, cp) = (padded(weight.outputs), padded(weight.inputs));
    let positions = W::A * W::AW;
    let tiling = Tiling::new::<W>(g);
    let tile_rows = g.batch * tiling.down;
    let u_stride = stride(weight.inputs * kp);
    // SAFETY: `filters` writes everything that is read below.
    let u = unsafe {
        buffer(positions * u_stride, |u| {
            filters::<W, T>(weight, kp, u_stride, u)
        })
    };

    let threads = rayon::current_num_threads();
    let bytes = positions * (cp + kp) * size_of::<T>();
    let tiles = ((512 << 10) / bytes).clamp(16, 64);
    // Enough tasks for all threads, but no smaller than what fills the rows of the kernel.
    let fair = (tile_rows * tiling.across).div_ceil(2 * threads).max(8);
    let rows = tiles.min(fair).div_ceil(tiling.across).min(tile_rows);
    let tasks = tile_rows.div_ceil(rows);
    // With fewer tasks than threads the output channels are divided too.
    let splits = threads.div_ceil(tasks).min(kp / LANES);
    let span = (kp / LANES).div_ceil(splits) * LANES;
    let (plane, out_plane) = (g.plane(), g.out_plane());
    let out = Shared::new(out);
    (0..tasks * splits)
        .into_par_iter()
        .for_each_init(Scratch::default, |scratch, task| {
            let (from, k0) = (task / splits * rows, task % splits * span);
            if k0 >= kp {
                return;
            }
            let to = (from + rows).min(tile_rows);
            let (tiles, span) = ((to - from) * tiling.across, span.min(kp - k0));
            let (v_stride, m_stride) = (stride(tiles * cp), stride(tiles * span));
            let v = Scratch::at_least(&mut scratch.v, positions * v_stride);
            let m = Scratch::at_least(&mut scratch.m, positions * m_stride);
            for (map, row, rows, before) in tiling.runs(from, to) {
                let view = View::input::<W>(g, tiling, row, rows);
                transform::<W, T, false>(
                    &view,
                    &x[map * weight.inputs * plane..][..weight.inputs * plane],
                    Scratch::at_least(&mut scratch.map, view.room()),
                    Shared::new(v).shifted(before * cp),
                    (cp, v_stride),
                );
            }
            for p in 0..positions {
                let a = Left {
                    at: &raw const v[p * v_stride],
                    row: cp,
                    step: 1,
                };
                let b = Right {
                    at: &raw const u[p * u_stride + k0],
                    step: kp,
                };
                let c = Product {
                    at: &raw mut m[p * m_stride],
                    row: span,
                    add: false,
                };
                // SAFETY: v holds `tiles` rows of cp ≥ C elements at each position, u C rows of
                // kp ≥ k0 + span, m `tiles` rows of span.
                unsafe { multiply((tiles, span, weight.inputs), a, b, c) };
            }
            for (map, row, rows, before) in tiling.runs(from, to) {
                let channels = span.min(weight.outputs.saturating_sub(k0));
                let height = (rows * W::M).min(g.out_h - row * W::M);
                let pixels = (height * g.out_w).min(out_plane - row * W::M * g.out_w);
                let at = (map * weight.outputs + k0) * out_plane + row * W::M * g.out_w;
                let room = rows * W::M * g.out_w * LANES;
                dispatch(OutputTransform::<W, T> {
                    m: &raw const m[before * span],
                    m_row: span,
                    m_stride,
                    bias: bias.of(map, k0, channels),
                    channels,
                    rows,
                    across: tiling.across,
                    size: (height, g.out_w),
                    pixels,
                    flat: Scratch::at_least(&mut scratch.map, room).as_mut_ptr(),
                    // SAFETY: each task writes its own rows of its own channels.
                    out: unsafe { out.at(at) },
                    plane: out_plane,
                    tile: PhantomData,
                });
            }
        });
}

/// `∂L/∂w [K, C, 3, 3]` from the map and the gradient of the output.
pub(super) fn weight_gradient<W: Tile, T: Real>(
    g: &Geometry,
    outputs: usize,
    x: &[T],
    grad: &[T],
    out: &mut [T],
) {
    let (kp, cp) = (padded(outputs), padded(g.channels));
    let positions = W::A * W::AW;
    let tiling = Tiling::new::<W>(g);
    let tile_rows = g.batch * tiling.down;
    // As many tiles at a time as keep both transformed tensors in the outer cache.
    let bytes = positions * (cp + kp) * size_of::<T>();
    let tiles = ((8 << 20) / bytes).max(64);
    let rows = tiles.div_ceil(tiling.across).min(tile_rows);
    let tiles = rows * tiling.across;
    let (v_stride, m_stride) = (stride(tiles * cp), stride(tiles * kp));
    let u_stride = stride(g.channels * kp);
    let mut v = vec![T::zero(); positions * v_stride];
    let mut m = vec![T::zero(); positions * m_stride];
    let mut u = vec![T::zero(); positions * u_stride];
    let (plane, out_plane) = (g.plane(), g.out_plane());
    let part = 16usize.div_ceil(tiling.across);
    for from in (0..tile_rows).step_by(rows) {
        let to = (from + rows).min(tile_rows);
        let count = (to - from) * tiling.across;
        let (vs, ms) = (Shared::new(&mut v), Shared::new(&mut m));
        let parts = (to - from).div_ceil(part);
        // Even tasks transform the map, odd ones the gradient.
        (0..2 * parts)
            .into_par_iter()
            .for_each_init(Vec::new, |scratch, task| {
                let begin = from + task / 2 * part;
                let end = (begin + part).min(to);
                let before_task = (begin - from) * tiling.across;
                for (map, row, rows, before) in tiling.runs(begin, end) {
                    let before = before_task + before;
                    if task % 2 == 0 {
                        let view = View::input::<W>(g, tiling, row, rows);
                        transform::<W, T, false>(
                            &view,
                            &x[map * g.channels * plane..][..g.channels * plane],
                            Scratch::at_least(scratch, view.room()),
                            vs.shifted(before * cp),
                            (cp, v_stride),
                        );
                    } else {
                        let view = View::gradient::<W>(g, outputs, tiling, row, rows);
                        transform::<W, T, true>(
                            &view,
                            &grad[map * outputs * out_plane..][..outputs * out_plane],
                            Scratch::at_least(scratch, view.room()),
                            ms.shifted(before * kp),
                            (kp, m_stride),
                        );
                    }
                }
            });
        let us = Shared::new(&mut u);
        // Where there are few channels one position is little work.
        let shares = if g.channels * kp >= 64 * 64 { 2 } else { 1 };
        let share = g.channels.div_ceil(shares);
        (0..positions * shares).into_par_iter().for_each(|task| {
            let (p, c0) = (task / shares, task % shares * share);
            let size = (share.min(g.channels - c0), kp, count);
            let a = Left {
                at: &raw const v[p * v_stride + c0],
                row: 1,
                step: cp,
            };
            let b = Right {
                at: &raw const m[p * m_stride],
                step: kp,
            };
            // SAFETY: each task has its own rows of u; v and m hold `count` rows at p.
            unsafe {
                let at = us.at(p * u_stride + c0 * kp);
                multiply(
                    size,
                    a,
                    b,
                    Product {
                        at,
                        row: kp,
                        add: from > 0,
                    },
                );
            }
        });
    }
    let out = Shared::new(out);
    (0..g.channels)
        .into_par_iter()
        .with_min_len(8)
        .for_each(|c| {
            dispatch(FilterAdjoint::<W, T> {
                u: &raw const u[c * kp],
                u_stride,
                outputs,
                // SAFETY: each task writes its own input channel.
                out: unsafe { out.at(c * W::TAPS) },
                out_row: g.channels * W::TAPS,
                tile: PhantomData,
            });
        });
}

/// Buffers of one thread.
struct Scratch<T> {
    v: Vec<T>,
    m: Vec<T>,
    map: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            v: Vec::new(),
            m: Vec::new(),
            map: Vec::new(),
        }
    }
}

impl<T: Real> Scratch<T> {
    fn at_least(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
        if buffer.len() < n {
            *buffer = vec![T::zero(); n];
        }
        &mut buffer[..n]
    }
}

/// The rows of a map that some rows of tiles read.
struct View {
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
    fn input<W: Tile>(g: &Geometry, tiling: Tiling, row: usize, rows: usize) -> Self {
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

    fn gradient<W: Tile>(
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
    fn room(&self) -> usize {
        self.rows * self.cols * LANES
    }
}

/// Transforms the tiles of a view: `Bᵀ d B` of the map, or `A y Aᵀ` of the gradient.
fn transform<W: Tile, T: Real, const GRADIENT: bool>(
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

struct OutputTransform<'a, W, T> {
    /// Tile t, channel k, position p at `p · m_stride + t · m_row + k`.
    m: *const T,
    m_row: usize,
    m_stride: usize,
    bias: Option<&'a [T]>,
    channels: usize,
    /// Rows of tiles, and tiles of a row.
    rows: usize,
    across: usize,
    /// Height and width of what is written.
    size: (usize, usize),
    /// Pixels of it that exist.
    pixels: usize,
    /// Scratch: pixels of `LANES`.
    flat: *mut T,
    out: *mut T,
    plane: usize,
    tile: PhantomData<W>,
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
fn filters<W: Tile, T: Real>(weight: &Weight<'_, T>, kp: usize, stride: usize, u: &mut [T]) {
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
struct FilterAdjoint<W, T> {
    u: *const T,
    u_stride: usize,
    outputs: usize,
    out: *mut T,
    out_row: usize,
    tile: PhantomData<W>,
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
