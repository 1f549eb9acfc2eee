//! Matrices packed into panels of columns, as the matrix kernel reads them fastest.
//!
//! A panel holds up to 48 columns of a `[k, n]` matrix, with its rows one after the other: the
//! kernel then walks through memory in order, whatever the strides of the original. Panels follow
//! each other, so that the one that begins at column j begins at element `j · k`.

use crate::cpu::Real;
use crate::mm::{Left, Product, Right, multiply};
use crate::simd::{Kernel, Simd, Vector, dispatch};

/// Columns of a full panel: three vectors of the widest kind.
const WIDTH: usize = 48;
/// Terms of a sum that one call of the kernel handles, so that what it reads stays in the cache.
const TERMS: usize = 512;

/// First column and number of columns of each panel of a matrix of `n` columns.
pub(crate) fn panels(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = n - at;
        // A last panel of one vector would be slow; two of two vectors are not.
        let width = if left > WIDTH && left <= 64 {
            32
        } else {
            left.min(WIDTH)
        };
        let panel = (at, width);
        at += width;
        (width > 0).then_some(panel)
    })
}

/// Packs one panel of the transpose: `dst[s · width + j] = src[(start + j) · row + s]`, s < k.
///
/// # Safety
/// `src` is valid for these rows of `k` elements, `dst` for `k · width` elements; no overlap.
pub(crate) unsafe fn pack_transposed<T: Real>(
    src: *const T,
    row: usize,
    k: usize,
    (start, width): (usize, usize),
    dst: *mut T,
) {
    // SAFETY: row `start` is one of the rows.
    let src = unsafe { src.add(start * row) };
    dispatch(Transpose {
        src,
        row,
        k,
        width,
        dst,
    });
}

/// Packs one panel: `dst[s · width + j] = src[s · step + start + j]`, s < k.
///
/// # Safety
/// As for [`pack_transposed`], with `k` rows that reach to column `start + width`.
pub(crate) unsafe fn pack_rows<T: Real>(
    src: *const T,
    step: usize,
    k: usize,
    (start, width): (usize, usize),
    dst: *mut T,
) {
    for s in 0..k {
        // SAFETY: rows of `width` elements on both sides.
        unsafe {
            std::ptr::copy_nonoverlapping(src.add(s * step + start), dst.add(s * width), width);
        }
    }
}

/// `c[i, j] (+)= Σ_s a[i, s] b[s, j]` with `b` packed from its panel at column `columns.0` on up to
/// column `columns.1`, where another panel begins; `c` points to column `columns.0`.
///
/// # Safety
/// The pointers are valid for these sizes and strides, `b` being the whole packed matrix of
/// `k · n` elements; `c` overlaps neither.
pub(crate) unsafe fn times_panels<T: Real>(
    (m, n, k): (usize, usize, usize),
    columns: (usize, usize),
    a: Left<T>,
    b: *const T,
    c: Product<T>,
) {
    let mut from = 0;
    while from < k {
        let terms = TERMS.min(k - from);
        let mine = |(start, _): &(usize, usize)| (columns.0..columns.1).contains(start);
        for (start, width) in panels(n).filter(mine) {
            // SAFETY: the panel and the terms lie inside the sizes that the caller vouches for.
            unsafe {
                let a = Left {
                    at: a.at.add(from * a.step),
                    ..a
                };
                let b = Right {
                    at: b.add(start * k + from * width),
                    step: width,
                };
                let add = c.add || from > 0;
                let c = Product {
                    at: c.at.add(start - columns.0),
                    row: c.row,
                    add,
                };
                multiply((m, width, terms), a, b, c);
            }
        }
        from += terms;
    }
}

struct Transpose<T> {
    src: *const T,
    row: usize,
    k: usize,
    width: usize,
    dst: *mut T,
}

impl<T: Real> Kernel for Transpose<T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self {
            src,
            row,
            k,
            width,
            dst,
        } = self;
        let lanes = T::V::<S>::LANES;
        let (whole_k, whole_width) = (k - k % lanes, width - width % lanes);
        // SAFETY: `pack_transposed` has the caller vouch for both sides; s < k and j < width.
        unsafe {
            for s in (0..whole_k).step_by(lanes) {
                for j in (0..whole_width).step_by(lanes) {
                    let from = src.add(j * row + s);
                    T::V::<S>::transpose(from, row, dst.add(s * width + j), width);
                }
            }
            for j in 0..width {
                let from = if j < whole_width { whole_k } else { 0 };
                for s in from..k {
                    *dst.add(s * width + j) = *src.add(j * row + s);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_every_column_once() {
        for n in 0..200 {
            let mut next = 0;
            for (start, width) in panels(n) {
                assert!(start == next && (1..=WIDTH).contains(&width));
                next += width;
            }
            assert_eq!(next, n);
        }
        assert_eq!(panels(64).collect::<Vec<_>>(), [(0, 32), (32, 32)]);
    }
}
