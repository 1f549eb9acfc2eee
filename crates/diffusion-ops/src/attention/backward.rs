//! The backward pass: the probabilities are computed again, a block at a time.
//!
//! ```text
//! pᵢⱼ = exp(sᵢⱼ − Lᵢ),   δᵢ = Σ_c gᵢc yᵢc,   tᵢⱼ = scale · pᵢⱼ (Σ_c gᵢc vⱼc − δᵢ)
//! ∂V = pᵀ g,   ∂K = tᵀ Q,   ∂Q = t K
//! ```

use super::forward::{scale_and_mask, score_row};
use super::shape::{Axes, Mask, QUERIES, Sizes, Strides, View};
use crate::cpu::{Real, Shared, buffer, for_each_task, sum2};
use crate::linear::panels::{pack_transposed, panels, times_panels};
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::{Kernel, Simd, dispatch};
use crate::vmath::exp_nonpositive;
use rayon::prelude::*;

/// What the backward pass starts from.
pub(super) struct Inputs<'a, T> {
    pub(super) q: View<'a, T>,
    pub(super) k: View<'a, T>,
    pub(super) v: View<'a, T>,
    pub(super) y: View<'a, T>,
    pub(super) grad: View<'a, T>,
    /// L of every query.
    pub(super) normaliser: &'a [T],
    pub(super) scale: T,
    /// Which of the gradients of q, k and v are needed.
    pub(super) wanted: [bool; 3],
}

/// The gradients of q, k and v that are wanted, contiguous.
pub(super) fn gradients<T: Real>(
    sizes: Sizes,
    axes: Axes,
    inputs: &Inputs<T>,
    mask: Option<Mask<T>>,
) -> [Option<Vec<T>>; 3] {
    let Sizes {
        batch,
        heads,
        n,
        s,
        d,
        e,
    } = sizes;
    let at_once = sizes.keys_at_once();
    // Parts of the keys, each with its own share of ∂Q to be added up in the end.
    let parts = sizes.parts(s);
    let per_part = s.div_ceil(parts).next_multiple_of(16);
    let parts = s.div_ceil(per_part);
    let [want_q, want_k, want_v] = inputs.wanted;
    let len = |wanted: bool, n: usize| if wanted { batch * heads * n } else { 0 };
    let (len_q, len_k, len_v) = (len(want_q, n * d), len(want_k, s * d), len(want_v, s * e));
    let mut dk = vec![];
    let mut dv = vec![];
    let run = |dq: &mut [T]| {
        let shared_q = Shared::new(dq);
        let fill_k = |dk: &mut [T]| {
            let shared_k = Shared::new(dk);
            let fill_v = |dv: &mut [T]| {
                let job = Job {
                    sizes,
                    inputs,
                    mask,
                    at_once: at_once.min(per_part),
                    grads: [shared_q, shared_k, Shared::new(dv)],
                    strides: [
                        axes.strides(&sizes, n, d),
                        axes.strides(&sizes, s, d),
                        axes.strides(&sizes, s, e),
                    ],
                };
                let work = 2 * sizes.work(parts);
                for_each_task(
                    batch * heads * parts,
                    work,
                    Scratch::new,
                    |scratch, task| {
                        let (head, part) = (task / parts, task % parts);
                        let keys = (part * per_part, s.min((part + 1) * per_part));
                        scratch.prepare(&job);
                        // SAFETY: these keys' rows of ∂K and ∂V are this task's, and so is this head's
                        // place in this part's share of ∂Q.
                        unsafe { job.run(head, keys, part * len_q, scratch) };
                    },
                );
            };
            // SAFETY: the parts cover the keys of all heads; see `Job::run` for the order.
            dv = unsafe { buffer(len_v, fill_v) };
        };
        // SAFETY: as above.
        dk = unsafe { buffer(len_k, fill_k) };
    };
    // SAFETY: each task covers its head's place in its part's share of ∂Q.
    let mut dq = unsafe { buffer(len_q * parts, run) };
    if parts > 1 && want_q {
        let (sum, shares) = dq.split_at_mut(len_q);
        let chunk = 8192;
        sum.par_chunks_mut(chunk).enumerate().for_each(|(i, sum)| {
            for share in shares.chunks_exact(len_q) {
                let share = &share[i * chunk..][..sum.len()];
                sum.iter_mut().zip(share).for_each(|(a, b)| *a += *b);
            }
        });
        dq.truncate(len_q);
    }
    [
        want_q.then_some(dq),
        want_k.then_some(dk),
        want_v.then_some(dv),
    ]
}

struct Scratch<T> {
    /// Packed keys and values, transposed.
    keys: Vec<T>,
    values: Vec<T>,
    /// Keys, queries and gradients, row after row.
    key_rows: Vec<T>,
    query_rows: Vec<T>,
    grad_rows: Vec<T>,
    p: Vec<T>,
    t: Vec<T>,
    delta: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Self {
            keys: vec![],
            values: vec![],
            key_rows: vec![],
            query_rows: vec![],
            grad_rows: vec![],
            p: vec![],
            t: vec![],
            delta: vec![],
        }
    }

    fn prepare(&mut self, job: &Job<T>) {
        let Sizes { n, d, e, .. } = job.sizes;
        let keys = job.at_once;
        self.keys.resize(keys * d, T::zero());
        self.values.resize(keys * e, T::zero());
        self.key_rows.resize(keys * d, T::zero());
        self.query_rows.resize(QUERIES * d, T::zero());
        self.grad_rows.resize(QUERIES * e, T::zero());
        self.p.resize(QUERIES * score_row(keys), T::zero());
        self.t.resize(QUERIES * score_row(keys), T::zero());
        self.delta.resize(n, T::zero());
    }
}

struct Job<'a, T> {
    sizes: Sizes,
    inputs: &'a Inputs<'a, T>,
    mask: Option<Mask<'a, T>>,
    /// Keys handled at once.
    at_once: usize,
    grads: [Shared<T>; 3],
    strides: [Strides; 3],
}

impl<T: Real> Job<'_, T> {
    /// All queries of a head against the keys `first .. last`; the share of ∂Q begins at `share`.
    /// What is written is written for the first keys (∂Q) or queries (∂K, ∂V) and added to for the
    /// others.
    ///
    /// # Safety
    /// No other task uses these rows of the gradients.
    unsafe fn run(
        &self,
        head: usize,
        (first, last): (usize, usize),
        share: usize,
        scratch: &mut Scratch<T>,
    ) {
        let Sizes { n, d, e, .. } = self.sizes;
        let inputs = self.inputs;
        let [want_q, want_k, want_v] = inputs.wanted;
        let row = score_row(self.at_once);
        let [rows_q, rows_k, rows_v] = self.strides.map(|s| s.row);
        let [head_q, head_k, head_v] = self.strides.map(|s| s.head(&self.sizes, head));
        let view = |view: &View<T>, row: usize| view.at(&self.sizes, head, row);
        let rows = |view: &View<T>, block: (usize, usize), copy: &mut [T]| {
            view.rows(&self.sizes, head, block, copy)
        };
        // SAFETY: the views hold the rows of this head; the scratch was made for QUERIES queries
        // and `at_once` keys; the rest as the caller vouches.
        unsafe {
            if want_q || want_k {
                let (y, g) = (view(&inputs.y, 0), view(&inputs.grad, 0));
                let (y_row, g_row) = (inputs.y.row(), inputs.grad.row());
                dispatch(Delta {
                    y,
                    y_row,
                    g,
                    g_row,
                    e,
                    delta: &mut scratch.delta,
                });
            }
            for key in (first..last).step_by(self.at_once) {
                let keys = self.at_once.min(last - key);
                let (k, v) = (view(&inputs.k, key), view(&inputs.v, key));
                for panel in panels(keys) {
                    let to = scratch.keys.as_mut_ptr().add(panel.0 * d);
                    pack_transposed(k, inputs.k.row(), d, panel, to);
                    if want_q || want_k {
                        let to = scratch.values.as_mut_ptr().add(panel.0 * e);
                        pack_transposed(v, inputs.v.row(), e, panel, to);
                    }
                }
                let key_rows = rows(&inputs.k, (key, keys), &mut scratch.key_rows);
                for query in (0..n).step_by(QUERIES) {
                    let count = QUERIES.min(n - query);
                    let q = rows(&inputs.q, (query, count), &mut scratch.query_rows);
                    let g = rows(&inputs.grad, (query, count), &mut scratch.grad_rows);
                    let (p, t) = (scratch.p.as_mut_ptr(), scratch.t.as_mut_ptr());
                    let a = Left {
                        at: q,
                        row: d,
                        step: 1,
                    };
                    let c = Product {
                        at: p,
                        row,
                        add: false,
                    };
                    times_panels((count, keys, d), (0, keys), a, scratch.keys.as_ptr(), c);
                    if want_q || want_k {
                        let a = Left {
                            at: g,
                            row: e,
                            step: 1,
                        };
                        let c = Product {
                            at: t,
                            row,
                            add: false,
                        };
                        times_panels((count, keys, e), (0, keys), a, scratch.values.as_ptr(), c);
                    }
                    dispatch(Scores {
                        job: self,
                        head,
                        queries: (query, count),
                        keys: (key, keys),
                        row,
                        p: &mut scratch.p,
                        t: &mut scratch.t,
                        delta: &scratch.delta,
                    });
                    if want_v {
                        let a = Left {
                            at: p,
                            row: 1,
                            step: row,
                        };
                        let at = self.grads[2].at(head_v + key * rows_v);
                        let c = Product {
                            at,
                            row: rows_v,
                            add: query > 0,
                        };
                        multiply((keys, e, count), a, Right { at: g, step: e }, c);
                    }
                    if want_k {
                        let a = Left {
                            at: t,
                            row: 1,
                            step: row,
                        };
                        let at = self.grads[1].at(head_k + key * rows_k);
                        let c = Product {
                            at,
                            row: rows_k,
                            add: query > 0,
                        };
                        multiply((keys, d, count), a, Right { at: q, step: d }, c);
                    }
                    if want_q {
                        let a = Left {
                            at: t,
                            row,
                            step: 1,
                        };
                        let at = self.grads[0].at(share + head_q + query * rows_q);
                        let c = Product {
                            at,
                            row: rows_q,
                            add: key > first,
                        };
                        multiply(
                            (count, d, keys),
                            a,
                            Right {
                                at: key_rows,
                                step: d,
                            },
                            c,
                        );
                    }
                }
            }
        }
    }
}

/// δᵢ = Σ_c gᵢc yᵢc.
struct Delta<'a, T> {
    y: *const T,
    y_row: usize,
    g: *const T,
    g_row: usize,
    e: usize,
    delta: &'a mut [T],
}

impl<T: Real> Kernel for Delta<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (i, delta) in self.delta.iter_mut().enumerate() {
            // SAFETY: the caller's views hold this many rows of `e` elements.
            let (y, g) = unsafe {
                (
                    std::slice::from_raw_parts(self.y.add(i * self.y_row), self.e),
                    std::slice::from_raw_parts(self.g.add(i * self.g_row), self.e),
                )
            };
            *delta = sum2(y, g, |y, g| y * g);
        }
    }
}

/// `p` from the scores and `t` from the products of gradients and values, both in place.
struct Scores<'a, T> {
    job: &'a Job<'a, T>,
    head: usize,
    /// First query, number of queries.
    queries: (usize, usize),
    /// First key, number of keys.
    keys: (usize, usize),
    row: usize,
    p: &'a mut [T],
    t: &'a mut [T],
    delta: &'a [T],
}

impl<T: Real> Kernel for Scores<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Job {
            sizes,
            inputs,
            mask,
            ..
        } = self.job;
        let (scale, (query, count)) = (inputs.scale, self.queries);
        let only_p = !(inputs.wanted[0] || inputs.wanted[1]);
        let lines = self
            .p
            .chunks_exact_mut(self.row)
            .zip(self.t.chunks_exact_mut(self.row));
        for (i, (p, t)) in lines.take(count).enumerate() {
            let (p, t) = (&mut p[..self.keys.1], &mut t[..self.keys.1]);
            let mask = mask.map(|m| m.row(sizes, self.head, query + i, self.keys));
            scale_and_mask::<S, T>(p, scale, mask);
            let normaliser = inputs.normaliser[self.head * sizes.n + query + i];
            if only_p {
                p.iter_mut()
                    .for_each(|p| *p = exp_nonpositive::<S, T>(*p - normaliser));
                continue;
            }
            let delta = self.delta[query + i];
            for (p, t) in p.iter_mut().zip(t) {
                *p = exp_nonpositive::<S, T>(*p - normaliser);
                *t = *p * scale * (*t - delta);
            }
        }
    }
}
