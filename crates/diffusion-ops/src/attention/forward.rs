//! The forward pass: blocks of queries against blocks of keys, with a running softmax.
//!
//! ```text
//! m ← max(m, maxⱼ sⱼ),   p = exp(s − m),   a = exp(m_before − m)
//! l ← a l + Σⱼ pⱼ,       o ← a o + p V;    in the end y = o / l
//! ```

use super::shape::{Axes, Mask, MaskRow, QUERIES, Sizes, Strides, View};
use crate::cpu::{Real, Shared, buffer, for_each_task};
use crate::linear::panels::{pack_transposed, panels, times_panels};
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::{Kernel, Simd, dispatch};
use crate::vmath::{exp_nonpositive, real};

/// The result and `ln Σⱼ exp(scoreᵢⱼ)` of each query.
pub(super) fn attend<T: Real>(
    sizes: Sizes,
    axes: Axes,
    q: View<T>,
    k: View<T>,
    v: View<T>,
    mask: Option<Mask<T>>,
    scale: f64,
) -> (Vec<T>, Vec<T>) {
    let Sizes {
        batch,
        heads,
        n,
        s,
        e,
        ..
    } = sizes;
    let parts = sizes.parts(n);
    let per_part = n.div_ceil(parts).next_multiple_of(8);
    let mut normaliser = vec![T::zero(); batch * heads * n];
    let sums = Shared::new(&mut normaliser);
    let fill = |out: &mut [T]| {
        let out = Shared::new(out);
        let strides = axes.strides(&sizes, n, e);
        for_each_task(
            batch * heads * parts,
            sizes.work(parts),
            Scratch::new,
            |scratch, task| {
                let (head, part) = (task / parts, task % parts);
                let (first, last) = (n.min(part * per_part), n.min((part + 1) * per_part));
                if first < last {
                    scratch.prepare(&sizes, last - first);
                    let job = Job {
                        sizes,
                        q,
                        k,
                        v,
                        mask,
                        scale: T::from_f64(scale),
                        out,
                        strides,
                    };
                    // SAFETY: these queries' rows of the output and of the sums are this task's.
                    unsafe {
                        job.run(head, (first, last), scratch);
                        let to =
                            std::slice::from_raw_parts_mut(sums.at(head * n + first), last - first);
                        for (i, to) in to.iter_mut().enumerate() {
                            let (max, sum) = (scratch.max[i].to_f64(), scratch.sum[i].to_f64());
                            let hidden = sum == 0.0;
                            *to = T::from_f64(if hidden {
                                f64::INFINITY
                            } else {
                                max + sum.ln()
                            });
                        }
                    }
                }
            },
        );
    };
    debug_assert!(s > 0);
    // SAFETY: the tasks cover the output, and write each row before they read it.
    let out = unsafe { buffer(batch * heads * n * e, fill) };
    (out, normaliser)
}

/// Where one task keeps what it works on.
pub(super) struct Scratch<T> {
    keys: Vec<T>,
    values: Vec<T>,
    queries: Vec<T>,
    scores: Vec<T>,
    max: Vec<T>,
    sum: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Self {
            keys: vec![],
            values: vec![],
            queries: vec![],
            scores: vec![],
            max: vec![],
            sum: vec![],
        }
    }

    fn prepare(&mut self, sizes: &Sizes, queries: usize) {
        let keys = sizes.keys_at_once();
        self.keys.resize(keys * sizes.d, T::zero());
        self.values.resize(keys * sizes.e, T::zero());
        self.queries.resize(QUERIES * sizes.d, T::zero());
        self.scores.resize(QUERIES * score_row(keys), T::zero());
        for (state, value) in [(&mut self.max, f64::NEG_INFINITY), (&mut self.sum, 0.0)] {
            state.clear();
            state.resize(queries, T::from_f64(value));
        }
    }
}

/// Elements from one row of scores to the next: whole vectors, and no power of two, which would
/// crowd the rows into a part of the cache.
pub(super) fn score_row(keys: usize) -> usize {
    keys.next_multiple_of(32) + LANES
}

#[derive(Clone, Copy)]
struct Job<'a, T> {
    sizes: Sizes,
    q: View<'a, T>,
    k: View<'a, T>,
    v: View<'a, T>,
    mask: Option<Mask<'a, T>>,
    scale: T,
    out: Shared<T>,
    strides: Strides,
}

impl<T: Real> Job<'_, T> {
    /// Queries `first .. last` of a head.
    ///
    /// # Safety
    /// No other task uses these rows of the output.
    unsafe fn run(&self, head: usize, (first, last): (usize, usize), scratch: &mut Scratch<T>) {
        let Sizes { s, d, e, .. } = self.sizes;
        let (at_once, row) = (
            self.sizes.keys_at_once(),
            score_row(self.sizes.keys_at_once()),
        );
        let mut key = 0;
        while key < s {
            let keys = at_once.min(s - key);
            // SAFETY: the scratch has room for `at_once` keys and values and QUERIES rows of
            // scores; the views hold the rows from the given ones to the last of the head.
            unsafe {
                for panel in panels(keys) {
                    let to = scratch.keys.as_mut_ptr().add(panel.0 * d);
                    pack_transposed(
                        self.k.at(&self.sizes, head, key),
                        self.k.row(),
                        d,
                        panel,
                        to,
                    );
                }
                let values = self
                    .v
                    .rows(&self.sizes, head, (key, keys), &mut scratch.values);
                for query in (first..last).step_by(QUERIES) {
                    let count = QUERIES.min(last - query);
                    let block = (query, count);
                    let at = self.q.rows(&self.sizes, head, block, &mut scratch.queries);
                    let a = Left {
                        at,
                        row: d,
                        step: 1,
                    };
                    let c = Product {
                        at: scratch.scores.as_mut_ptr(),
                        row,
                        add: false,
                    };
                    times_panels((count, keys, d), (0, keys), a, scratch.keys.as_ptr(), c);
                    let out = self
                        .out
                        .at(self.strides.head(&self.sizes, head) + query * self.strides.row);
                    let state = query - first..query - first + count;
                    dispatch(Softmax {
                        job: self,
                        head,
                        query,
                        keys: (key, keys),
                        scores: &mut scratch.scores,
                        row,
                        max: &mut scratch.max[state.clone()],
                        sum: &mut scratch.sum[state.clone()],
                        out,
                    });
                    let a = Left {
                        at: scratch.scores.as_ptr(),
                        row,
                        step: 1,
                    };
                    let c = Product {
                        at: out,
                        row: self.strides.row,
                        add: key > 0,
                    };
                    multiply(
                        (count, e, keys),
                        a,
                        Right {
                            at: values,
                            step: e,
                        },
                        c,
                    );
                    if key + keys == s {
                        let (sum, row) = (&scratch.sum[state], self.strides.row);
                        dispatch(Finish { sum, out, row, e });
                    }
                }
            }
            key += keys;
        }
    }
}

const LANES: usize = 16;

/// Turns the scores of a block of queries into exp(s − m), and brings what was summed for the keys
/// before to the new m.
struct Softmax<'a, T> {
    job: &'a Job<'a, T>,
    head: usize,
    query: usize,
    /// First key, number of keys.
    keys: (usize, usize),
    scores: &'a mut [T],
    row: usize,
    max: &'a mut [T],
    sum: &'a mut [T],
    out: *mut T,
}

impl<T: Real> Kernel for Softmax<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Job {
            sizes,
            mask,
            scale,
            strides,
            ..
        } = *self.job;
        let lowest = real::<T>(f64::NEG_INFINITY);
        let (_, keys) = self.keys;
        let lines = self
            .scores
            .chunks_exact_mut(self.row)
            .zip(self.max.iter_mut().zip(self.sum));
        for (i, (line, (max, sum))) in lines.enumerate() {
            let line = &mut line[..keys.next_multiple_of(LANES)];
            let mask = mask.map(|m| m.row(&sizes, self.head, self.query + i, self.keys));
            scale_and_mask::<S, T>(&mut line[..keys], scale, mask);
            line[keys..].fill(lowest);
            let top = maximum(line);
            let (before, new) = (*max, if top > *max { top } else { *max });
            *max = new;
            // Where every key so far is hidden, all terms are 0 whatever the shift.
            let shift = if new == lowest { real::<T>(0.0) } else { new };
            let mut lanes = [real::<T>(0.0); LANES];
            for chunk in line.chunks_exact_mut(LANES) {
                for j in 0..LANES {
                    let p = exp_nonpositive::<S, T>(chunk[j] - shift);
                    chunk[j] = p;
                    lanes[j] += p;
                }
            }
            let mut width = LANES / 2;
            while width > 0 {
                for j in 0..width {
                    let other = lanes[j + width];
                    lanes[j] += other;
                }
                width /= 2;
            }
            let factor = exp_nonpositive::<S, T>(before - shift);
            *sum = S::mul_add(*sum, factor, lanes[0]);
            if self.keys.0 > 0 && before != new {
                // SAFETY: the rows of the output that the caller has to itself, written before.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(self.out.add(i * strides.row), sizes.e)
                };
                out.iter_mut().for_each(|o| *o *= factor);
            }
        }
    }
}

/// `s ← scale · s + mask`.
#[inline(always)]
pub(super) fn scale_and_mask<S: Simd, T: Real>(
    scores: &mut [T],
    scale: T,
    mask: Option<MaskRow<T>>,
) {
    match mask {
        None => scores.iter_mut().for_each(|s| *s *= scale),
        Some(MaskRow::All(m)) => {
            scores
                .iter_mut()
                .for_each(|s| *s = S::mul_add(*s, scale, m));
        }
        Some(MaskRow::Each(mask)) => {
            for (s, m) in scores.iter_mut().zip(mask) {
                *s = S::mul_add(*s, scale, *m);
            }
        }
    }
}

/// The largest element of whole chunks of [`LANES`]; not-a-numbers are passed over.
#[inline(always)]
fn maximum<T: Real>(x: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [real::<T>(f64::NEG_INFINITY); LANES];
    for chunk in x.chunks_exact(LANES) {
        for j in 0..LANES {
            lanes[j] = larger(lanes[j], chunk[j]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] = larger(lanes[j], lanes[j + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Divides the rows of a block by their sums; hidden ones stay 0.
struct Finish<'a, T> {
    sum: &'a [T],
    out: *mut T,
    row: usize,
    e: usize,
}

impl<T: Real> Kernel for Finish<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let zero = real::<T>(0.0);
        for (i, sum) in self.sum.iter().enumerate() {
            // SAFETY: the rows of the output that the caller has to itself, written before.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add(i * self.row), self.e) };
            let factor = if *sum == zero { zero } else { T::one() / *sum };
            out.iter_mut().for_each(|o| *o *= factor);
        }
    }
}
