//! The three matrix products of an affine map on the CPU.
//!
//! Each output element is one chain of multiply-adds in a fixed order, so the division of the work
//! among threads, which depends on the shapes only, does not change a bit.

use super::panels::{pack_rows, pack_transposed, panels, times_panels};
use crate::cpu::{Real, Shared, buffer, for_each_task};
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::{Kernel, Simd, dispatch};

/// Rows of the result that a task handles.
const ROWS: usize = 64;
/// Tasks that there should be at least, so that a few threads are busy to the end.
const TASKS: usize = 8;
/// What a multiply-add costs, as a part of an elementwise operation.
const DENSE: usize = 32;
/// What packing an element costs, likewise.
const MOVE: usize = 8;

/// How the rows of a packed matrix lie in the original.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Right2d {
    /// `b[s, j] = w[s · n + j]`.
    Plain,
    /// `b[s, j] = w[j · k + s]`.
    Transposed,
}

/// `y[i, j] = β[j] + Σ_s x[i, s] b[s, j]` for `x [m, k]`, `b [k, n]`.
pub(super) fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    x: &[T],
    w: &[T],
    order: Right2d,
    bias: Option<&[T]>,
) -> Vec<T> {
    assert!(x.len() == m * k && w.len() == n * k && bias.is_none_or(|b| b.len() == n));
    let columns: Vec<_> = panels(n).collect();
    let pack = |packed: &mut [T]| {
        let packed = Shared::new(packed);
        let count = if k > 0 { columns.len() } else { 0 };
        for_each_task(
            count,
            48 * k / MOVE,
            || (),
            |(), i| {
                let panel = columns[i];
                // SAFETY: panel `start` has the elements `start · k .. (start + width) · k` of the
                // buffer to itself, and w has the n · k elements that the order says.
                unsafe {
                    let to = packed.at(panel.0 * k);
                    match order {
                        Right2d::Plain => pack_rows(w.as_ptr(), n, k, panel, to),
                        Right2d::Transposed => pack_transposed(w.as_ptr(), k, k, panel, to),
                    }
                }
            },
        );
    };
    // SAFETY: the panels cover the buffer.
    let packed = unsafe { buffer(n * k, pack) };
    // Longer blocks read the packed matrix less often.
    let rows = if m >= 2 * ROWS * TASKS {
        2 * ROWS
    } else {
        ROWS
    };
    let blocks = m.div_ceil(rows);
    let per_group = columns.len().div_ceil(TASKS.div_ceil(blocks.max(1))).max(1);
    let groups = columns.len().div_ceil(per_group);
    let fill = |y: &mut [T]| {
        let y = Shared::new(y);
        let work = rows.min(m) * (per_group * 48).min(n) * k / DENSE;
        for_each_task(
            blocks * groups,
            work,
            || (),
            |(), task| {
                let (block, group) = (task / groups, task % groups);
                let (first, last) = (block * rows, m.min((block + 1) * rows));
                let mine = &columns[group * per_group..columns.len().min((group + 1) * per_group)];
                let from = mine[0].0;
                let to = mine.last().map_or(from, |(start, width)| start + width);
                // SAFETY: the task writes the columns `from .. to` of its rows, all of them, before it
                // adds to them; no other task touches them.
                unsafe {
                    let at = y.at(first * n + from);
                    for i in 0..last - first {
                        let row = at.add(i * n);
                        match bias {
                            Some(bias) => {
                                std::ptr::copy_nonoverlapping(
                                    bias[from..to].as_ptr(),
                                    row,
                                    to - from,
                                );
                            }
                            None if k == 0 => {
                                (0..to - from).for_each(|j| row.add(j).write(T::zero()));
                            }
                            None => {}
                        }
                    }
                    let a = Left {
                        at: x.as_ptr().add(first * k),
                        row: k,
                        step: 1,
                    };
                    let c = Product {
                        at,
                        row: n,
                        add: bias.is_some(),
                    };
                    times_panels((last - first, n, k), (from, to), a, packed.as_ptr(), c);
                }
            },
        );
    };
    // SAFETY: the tasks cover y, and each writes its part before it reads it.
    unsafe { buffer(m * n, fill) }
}

/// Columns of the gradient that are packed side by side: the rows of a tile of the matrix kernel.
const SIDE: usize = 8;
/// Terms of the sum over the rows that are packed at once.
const STEPS: usize = 256;
/// Elements from one group of packed columns to the next: no power of two, which would crowd them
/// into a part of the cache.
const GROUP: usize = STEPS * SIDE + 16;
/// Elements of `x` that are packed at once.
const PACKED: usize = 1 << 20;

/// `dW[o, i] = Σ_r g[r, o] x[r, i]` and `dβ[o] = Σ_r g[r, o]` for `g [r, o]`, `x [r, i]`.
pub(super) fn weight_gradient<T: Real>(
    (outputs, inputs, rows): (usize, usize, usize),
    g: &[T],
    x: &[T],
) -> (Vec<T>, Vec<T>) {
    assert!(g.len() == rows * outputs && x.len() == rows * inputs);
    let mut bias = vec![T::zero(); outputs];
    if rows == 0 {
        return (vec![T::zero(); outputs * inputs], bias);
    }
    let (mut tall, mut wide) = (128, 384);
    // Without inputs there are still the sums.
    let count = |tall, wide| outputs.div_ceil(tall) * inputs.div_ceil(wide).max(1);
    while count(tall, wide) < TASKS && (tall > 32 || wide > 96) {
        if wide > 96 && wide >= 2 * tall {
            wide /= 2
        } else {
            tall /= 2
        }
    }
    let across = inputs.div_ceil(wide).max(1);
    let columns: Vec<_> = panels(inputs).collect();
    let at_once = (PACKED / inputs.max(1)).next_multiple_of(STEPS).min(rows);
    let mut packed = vec![T::zero(); at_once * inputs];
    let sums = Shared::new(&mut bias);
    let fill = |dw: &mut [T]| {
        let dw = Shared::new(dw);
        for first in (0..rows).step_by(at_once) {
            let some = at_once.min(rows - first);
            let to = Shared::new(&mut packed);
            for_each_task(
                columns.len(),
                48 * some / MOVE,
                || (),
                |(), i| {
                    let x = x[first * inputs..].as_ptr();
                    // SAFETY: the panel's part of the buffer is this task's, and x has these rows.
                    unsafe { pack_rows(x, inputs, some, columns[i], to.at(columns[i].0 * some)) };
                },
            );
            let work = tall.min(outputs) * wide.min(inputs) * some / DENSE;
            let scratch = || vec![T::zero(); tall.div_ceil(SIDE) * GROUP];
            for_each_task(count(tall, wide), work, scratch, |left, task| {
                let (o, i) = (task / across * tall, task % across * wide);
                let height = tall.min(outputs - o);
                let mine = columns
                    .iter()
                    .filter(|(start, _)| (i..i + wide).contains(start));
                for from in (0..some).step_by(STEPS) {
                    let terms = STEPS.min(some - from);
                    // SAFETY: outputs `o .. o + height` by the inputs of the panels are this
                    // task's, as are the sums of these outputs if it is the first across; g and
                    // the packed rows have these terms.
                    unsafe {
                        let g = g[(first + from) * outputs + o..].as_ptr();
                        let sums = if i == 0 {
                            sums.at(o)
                        } else {
                            std::ptr::null_mut()
                        };
                        dispatch(PackLeft {
                            g,
                            row: outputs,
                            terms,
                            height,
                            to: left,
                            sums,
                        });
                        for &(start, width) in mine.clone() {
                            let at = packed[start * some + from * width..].as_ptr();
                            let b = Right { at, step: width };
                            for p in (0..height).step_by(SIDE) {
                                let at = left[p / SIDE * GROUP..].as_ptr();
                                let a = Left {
                                    at,
                                    row: 1,
                                    step: SIDE,
                                };
                                let at = dw.at((o + p) * inputs + start);
                                let c = Product {
                                    at,
                                    row: inputs,
                                    add: first + from > 0,
                                };
                                multiply((SIDE.min(height - p), width, terms), a, b, c);
                            }
                        }
                    }
                }
            });
        }
    };
    // SAFETY: the tasks cover dW, and the first product of each writes without reading.
    let weight = unsafe { buffer(outputs * inputs, fill) };
    (weight, bias)
}

/// Packs columns in groups of [`SIDE`], `to[p · GROUP + s · SIDE + c] = g[s · row + p · SIDE
/// + c]`, and adds each column's sum to `sums` unless that is null.
struct PackLeft<'a, T> {
    g: *const T,
    row: usize,
    terms: usize,
    height: usize,
    to: &'a mut [T],
    sums: *mut T,
}

impl<T: Real> Kernel for PackLeft<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self {
            g,
            row,
            terms,
            height,
            to,
            sums,
        } = self;
        for s in 0..terms {
            // SAFETY: row s of g has `height` elements from here on, and `sums` as many.
            let line = unsafe { std::slice::from_raw_parts(g.add(s * row), height) };
            let groups = line.chunks_exact(SIDE);
            let rest = groups.remainder();
            for (p, group) in groups.enumerate() {
                let at = p * GROUP + s * SIDE;
                to[at..at + SIDE].copy_from_slice(group);
            }
            let at = height / SIDE * GROUP + s * SIDE;
            if !rest.is_empty() {
                to[at..at + rest.len()].copy_from_slice(rest);
            }
            if !sums.is_null() {
                // SAFETY: as above.
                let sums = unsafe { std::slice::from_raw_parts_mut(sums, height) };
                for (sum, v) in sums.iter_mut().zip(line) {
                    *sum += *v;
                }
            }
        }
    }
}
