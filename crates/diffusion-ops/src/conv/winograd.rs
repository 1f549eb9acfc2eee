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

use super::winograd_tile::Tile;
use super::winograd_transform::{FilterAdjoint, OutputTransform, View, filters, transform};
use super::{Bias, Geometry, Weight};
use crate::cpu::{Real, Shared, buffer};
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::dispatch;
use rayon::prelude::*;
use std::marker::PhantomData;

/// Channels are padded to a multiple of the widest vector of any level.
pub(super) const LANES: usize = 16;

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
pub(super) struct Tiling {
    /// Tiles of a row of tiles.
    pub across: usize,
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
