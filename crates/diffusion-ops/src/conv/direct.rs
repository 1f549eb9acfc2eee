//! Convolutions as products with a matrix of patches, of which only a panel that fits the cache
//! exists at a time.
//!
//! ```text
//! patches[(c, i, j), n] = x[b, c, o·s + i·d − top, p·s + j·d − left],   n = (b, o, p)
//! y = w · patches,   ∂L/∂w = ∂L/∂y · patchesᵀ,   ∂L/∂patches = wᵀ · ∂L/∂y
//! ```

use super::{Bias, Geometry};
use crate::cpu::{Real, Shared};
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::{Kernel, Simd, Vector, dispatch};
use rayon::prelude::*;

/// Rows of weights of one task are a multiple of this.
const ROWS: usize = 8;
/// Columns of one panel are a multiple of this, which all widths of the kernel divide.
const COLUMNS: usize = 48;
/// Elements of a panel.
const PANEL: usize = 64 << 10;

/// `y = w ⋆ x + β`; `weight [K, C·kh·kw]`.
pub(super) fn forward<T: Real>(
    g: &Geometry,
    outputs: usize,
    x: &[T],
    weight: &[T],
    bias: Bias<'_, T>,
    out: &mut [T],
) {
    let (terms, plane, out_plane) = (g.rows(), g.plane(), g.out_plane());
    let total = g.batch * out_plane;
    let threads = rayon::current_num_threads();
    let depth = terms.min(1024);
    let fitting = (PANEL / depth / COLUMNS).max(1) * COLUMNS;
    let fair = total.div_ceil(2 * threads).div_ceil(COLUMNS).max(1) * COLUMNS;
    let width = fitting.min(fair).min(8 * COLUMNS);
    let tasks = total.div_ceil(width);
    let splits = (2 * threads).div_ceil(tasks).min(outputs.div_ceil(ROWS));
    let splits = if tasks >= threads { 1 } else { splits };
    let span = outputs.div_ceil(ROWS).div_ceil(splits) * ROWS;
    let out = Shared::new(out);
    (0..tasks * splits).into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(panel, product), task| {
            let (n0, k0) = (task / splits * width, task % splits * span);
            if k0 >= outputs {
                return;
            }
            let n1 = (n0 + width).min(total);
            let (count, span) = (n1 - n0, span.min(outputs - k0));
            resize(product, span * count);
            for c0 in (0..terms).step_by(depth) {
                let depth = depth.min(terms - c0);
                let (map, at) = (n0 / out_plane, n0 % out_plane);
                let b = if g.is_pointwise() && at + count <= out_plane {
                    let at = (map * g.channels + c0) * plane + at;
                    Right {
                        at: &raw const x[at],
                        step: plane,
                    }
                } else {
                    resize(panel, depth * count);
                    patches(g, x, (c0, depth), (n0, n1), panel);
                    Right {
                        at: panel.as_ptr(),
                        step: count,
                    }
                };
                let a = Left {
                    at: &raw const weight[k0 * terms + c0],
                    row: terms,
                    step: 1,
                };
                let c = Product {
                    at: product.as_mut_ptr(),
                    row: count,
                    add: c0 > 0,
                };
                // SAFETY: `span` rows of weights from k0, `depth` rows of patches of `count`
                // columns, and as many products.
                unsafe { multiply((span, count, depth), a, b, c) };
            }
            for k in 0..span {
                let mut n = n0;
                while n < n1 {
                    let (map, at) = (n / out_plane, n % out_plane);
                    let end = n1.min((map + 1) * out_plane);
                    let from = &product[k * count + n - n0..][..end - n];
                    let shift = bias.of(map, k0 + k, 1).map_or(T::zero(), |b| b[0]);
                    let at = (map * outputs + k0 + k) * out_plane + at;
                    // SAFETY: each task writes its own outputs.
                    let to = unsafe { std::slice::from_raw_parts_mut(out.at(at), end - n) };
                    for (o, v) in to.iter_mut().zip(from) {
                        *o = *v + shift;
                    }
                    n = end;
                }
            }
        },
    );
}

/// Rows `c0 .. c0 + depth` and columns `n0 .. n1` of the patches, contiguous.
fn patches<T: Real>(
    g: &Geometry,
    x: &[T],
    (c0, depth): (usize, usize),
    (n0, n1): (usize, usize),
    panel: &mut [T],
) {
    let (plane, out_plane, count) = (g.plane(), g.out_plane(), n1 - n0);
    for (row, line) in panel.chunks_exact_mut(count).enumerate().take(depth) {
        let (c, tap) = ((c0 + row) / g.taps(), (c0 + row) % g.taps());
        let mut n = n0;
        while n < n1 {
            let map = n / out_plane;
            let first = map * out_plane;
            let end = n1.min(first + out_plane);
            let source = &x[(map * g.channels + c) * plane..][..plane];
            let line = &mut line[n - n0..end - n0];
            if g.is_pointwise() {
                line.copy_from_slice(&source[n - first..end - first]);
                n = end;
                continue;
            }
            let mut filled = 0;
            g.visit(tap, n - first, end - first, |output, input, count| {
                let at = output - (n - first);
                line[filled..at].fill(T::zero());
                filled = at + count;
                let line = &mut line[at..filled];
                if g.stride == 1 {
                    line.copy_from_slice(&source[input..input + count]);
                } else if g.stride == 2 {
                    for (v, s) in line.iter_mut().zip(source[input..].chunks(2)) {
                        *v = s[0];
                    }
                } else {
                    for (v, s) in line
                        .iter_mut()
                        .zip(source[input..].iter().step_by(g.stride))
                    {
                        *v = *s;
                    }
                }
            });
            line[filled..].fill(T::zero());
            n = end;
        }
    }
}

/// Columns of patches that are summed at a time for the weights.
const SUMMED: usize = 240;

/// `∂L/∂w [K, C·kh·kw]`.
pub(super) fn weight_gradient<T: Real>(
    g: &Geometry,
    outputs: usize,
    x: &[T],
    grad: &[T],
    out: &mut [T],
) {
    let (terms, plane, out_plane) = (g.rows(), g.plane(), g.out_plane());
    let total = g.batch * out_plane;
    let kp = outputs.div_ceil(16) * 16;
    // Rows of patches of one task, and how many tasks share the columns: by the sizes alone, so
    // that the sums have one order for any number of threads.
    let rows = terms.min(512);
    let blocks = terms.div_ceil(rows);
    let parts = ((4 << 20) / (terms * kp))
        .clamp(1, 8)
        .min(total.div_ceil(2 * SUMMED))
        .max(1);
    let share = total.div_ceil(parts).div_ceil(SUMMED) * SUMMED;
    let mut sums = vec![T::zero(); parts * terms * kp];
    let shared = Shared::new(&mut sums);
    (0..blocks * parts).into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(panel, turned), task| {
            let (c0, part) = (task / parts * rows, task % parts);
            let rows = rows.min(terms - c0);
            let (begin, end) = (part * share, ((part + 1) * share).min(total));
            // SAFETY: each task has its own rows of its own part.
            let c = unsafe { shared.at((part * terms + c0) * kp) };
            resize(turned, SUMMED * kp);
            for n0 in (begin..end).step_by(SUMMED) {
                let n1 = (n0 + SUMMED).min(end);
                turn(grad, outputs, out_plane, (n0, n1), kp, turned);
                let at = n0 % out_plane;
                let a = if g.is_pointwise() && at + (n1 - n0) <= out_plane {
                    let at = (n0 / out_plane * g.channels + c0) * plane + at;
                    Left {
                        at: &raw const x[at],
                        row: plane,
                        step: 1,
                    }
                } else {
                    resize(panel, rows * (n1 - n0));
                    patches(g, x, (c0, rows), (n0, n1), panel);
                    Left {
                        at: panel.as_ptr(),
                        row: n1 - n0,
                        step: 1,
                    }
                };
                let b = Right {
                    at: turned.as_ptr(),
                    step: kp,
                };
                // SAFETY: `rows` rows of patches and n1 − n0 rows of the turned gradient.
                unsafe {
                    multiply(
                        (rows, kp, n1 - n0),
                        a,
                        b,
                        Product {
                            at: c,
                            row: kp,
                            add: true,
                        },
                    )
                };
            }
        },
    );
    let out = Shared::new(out);
    (0..kp / 16).into_par_iter().for_each(|block| {
        let k0 = block * 16;
        let mut lines = Vec::new();
        resize(&mut lines, 16 * terms);
        dispatch(Reduce {
            sums: &sums,
            parts,
            terms,
            kp,
            k0,
            out: &mut lines,
        });
        for (k, line) in lines.chunks_exact(terms).enumerate().take(outputs - k0) {
            // SAFETY: each task has its own outputs.
            unsafe { std::slice::from_raw_parts_mut(out.at((k0 + k) * terms), terms) }
                .copy_from_slice(line);
        }
    });
}

/// Sixteen columns of the sum of all parts, as rows.
struct Reduce<'a, T> {
    sums: &'a [T],
    parts: usize,
    terms: usize,
    kp: usize,
    k0: usize,
    /// `[16, terms]`
    out: &'a mut [T],
}

impl<T: Real> Kernel for Reduce<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let lanes = T::V::<S>::LANES;
        assert!(self.out.len() >= 16 * self.terms && self.k0 + 16 <= self.kp);
        assert!(self.sums.len() >= self.parts * self.terms * self.kp);
        let mut block = [T::zero(); 256];
        for k in (0..16).step_by(lanes) {
            for row in (0..self.terms).step_by(lanes) {
                let count = (self.terms - row).min(lanes);
                // SAFETY: rows and columns inside the sizes asserted above.
                unsafe {
                    for i in 0..count {
                        let from = self.sums.as_ptr().add((row + i) * self.kp + self.k0 + k);
                        let mut sum = T::V::<S>::load(from);
                        for part in 1..self.parts {
                            sum = sum.add(T::V::<S>::load(from.add(part * self.terms * self.kp)));
                        }
                        sum.store(block.as_mut_ptr().add(i * lanes));
                    }
                    let to = self.out.as_mut_ptr().add(k * self.terms + row);
                    if count == lanes {
                        T::V::<S>::transpose(block.as_ptr(), lanes, to, self.terms);
                    } else {
                        for i in 0..count {
                            for j in 0..lanes {
                                *to.add(j * self.terms + i) = block[i * lanes + j];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `turned[n − n0, k] = grad[b, k, position]` for the columns `n0 .. n1`.
fn turn<T: Real>(
    grad: &[T],
    outputs: usize,
    plane: usize,
    (n0, n1): (usize, usize),
    kp: usize,
    turned: &mut [T],
) {
    assert!(turned.len() >= (n1 - n0) * kp);
    let mut n = n0;
    while n < n1 {
        let (map, at) = (n / plane, n % plane);
        let end = n1.min((map + 1) * plane);
        let source = &grad[map * outputs * plane..][..outputs * plane];
        dispatch(Turn {
            source,
            at,
            plane,
            count: end - n,
            outputs,
            kp,
            out: &mut turned[(n - n0) * kp..(end - n0) * kp],
        });
        n = end;
    }
}

struct Turn<'a, T> {
    source: &'a [T],
    at: usize,
    plane: usize,
    count: usize,
    outputs: usize,
    kp: usize,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Turn<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let lanes = T::V::<S>::LANES;
        for k0 in (0..self.kp).step_by(lanes) {
            for n in (0..self.count).step_by(lanes) {
                if k0 + lanes <= self.outputs && n + lanes <= self.count {
                    // SAFETY: whole blocks inside both matrices.
                    unsafe {
                        let from = self.source.as_ptr().add(k0 * self.plane + self.at + n);
                        let to = self.out.as_mut_ptr().add(n * self.kp + k0);
                        T::V::<S>::transpose(from, self.plane, to, self.kp);
                    }
                    continue;
                }
                for n in n..(n + lanes).min(self.count) {
                    for k in k0..k0 + lanes {
                        let inside = k < self.outputs;
                        self.out[n * self.kp + k] = if inside {
                            self.source[k * self.plane + self.at + n]
                        } else {
                            T::zero()
                        };
                    }
                }
            }
        }
    }
}

/// `∂L/∂x + β`, by adding up the gradients of the patches: for any stride and padding.
pub(super) fn input_gradient<T: Real>(
    g: &Geometry,
    outputs: usize,
    weight: &[T],
    grad: &[T],
    bias: Bias<'_, T>,
    out: &mut [T],
) {
    let (terms, plane, out_plane, taps) = (g.rows(), g.plane(), g.out_plane(), g.taps());
    // Channels of one task: by the sizes alone does no harm, and keeps the products tall.
    let channels = (64 / taps).clamp(1, g.channels);
    let width = (PANEL / (channels * taps) / COLUMNS).max(1) * COLUMNS;
    let blocks = g.channels.div_ceil(channels);
    let out = Shared::new(out);
    (0..g.batch * blocks)
        .into_par_iter()
        .for_each_init(Vec::new, |product, task| {
            let (map, c0) = (task / blocks, task % blocks * channels);
            let channels = channels.min(g.channels - c0);
            // SAFETY: each task has its own channels of its own map.
            let planes = unsafe {
                let at = out.at((map * g.channels + c0) * plane);
                std::slice::from_raw_parts_mut(at, channels * plane)
            };
            for (c, plane) in planes.chunks_exact_mut(plane.max(1)).enumerate() {
                plane.fill(bias.of(map, c0 + c, 1).map_or(T::zero(), |b| b[0]));
            }
            for n0 in (0..out_plane).step_by(width) {
                let n1 = (n0 + width).min(out_plane);
                let count = n1 - n0;
                resize(product, channels * taps * count);
                let a = Left {
                    at: &raw const weight[c0 * taps],
                    row: 1,
                    step: terms,
                };
                let b = Right {
                    at: &raw const grad[map * outputs * out_plane + n0],
                    step: out_plane,
                };
                let c = Product {
                    at: product.as_mut_ptr(),
                    row: count,
                    add: false,
                };
                // SAFETY: columns c0·taps .. of all K rows of weights; `count` columns of all K
                // rows of the gradient.
                unsafe { multiply((channels * taps, count, outputs), a, b, c) };
                for (row, line) in product
                    .chunks_exact(count)
                    .enumerate()
                    .take(channels * taps)
                {
                    let target = &mut planes[row / taps * plane..][..plane];
                    g.visit(row % taps, n0, n1, |output, input, count| {
                        let line = &line[output - n0..][..count];
                        if g.stride == 1 {
                            for (t, v) in target[input..input + count].iter_mut().zip(line) {
                                *t += *v;
                            }
                        } else {
                            let targets = target[input..].iter_mut().step_by(g.stride);
                            for (t, v) in targets.zip(line) {
                                *t += *v;
                            }
                        }
                    });
                }
            }
        });
}

/// Makes a scratch vector at least `n` long.
fn resize<T: Real>(buffer: &mut Vec<T>, n: usize) {
    if buffer.len() < n {
        *buffer = vec![T::zero(); n];
    }
}
