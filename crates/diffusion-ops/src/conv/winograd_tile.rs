//! The transforms of Winograd's minimal filtering in one dimension (Winograd 1980; Lavin and Gray
//! 2016, equation 8), on vectors whose lanes are channels.
//!
//! ```text
//! y = Aᵀ[(G g) ⊙ (Bᵀ d)]        in two dimensions: Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A
//! ```
//!
//! F(4, 3) interpolates at 0, ±1/√2, ±√2, ∞ instead of the usual 0, ±1, ±2, ∞: since the points
//! and their reciprocals are equally far from 1, its rounding error is about twice that of the
//! direct sum, where the usual points make it about eight times larger.

use crate::cpu::Real;
use crate::simd::{Simd, Vector};
use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};

/// Room for the widest transform; a narrower one uses the first entries.
pub(super) const MAX: usize = 6;

/// One minimal filtering algorithm F(M, 3). Every function needs to run at the level `S`.
pub(super) trait Tile: Copy + Send + Sync + 'static {
    /// Rows of outputs of a tile.
    const M: usize;
    /// Rows of inputs of a tile, and of products: M + 2.
    const A: usize;
    /// Columns of outputs: M, or 1 for a kernel of one column.
    const MW: usize = Self::M;
    /// Columns of inputs: A, or 1.
    const AW: usize = Self::A;
    /// Taps of the kernel: 9, or 3.
    const TAPS: usize = if Self::AW == 1 { 3 } else { 9 };
    /// `Bᵀ d`.
    unsafe fn input<S: Simd, T: Real>(d: [T::V<S>; MAX]) -> [T::V<S>; MAX];
    /// `G g`.
    unsafe fn filter<S: Simd, T: Real>(g: [T::V<S>; 3]) -> [T::V<S>; MAX];
    /// `Aᵀ m`.
    unsafe fn output<S: Simd, T: Real>(m: [T::V<S>; MAX]) -> [T::V<S>; MAX];
    /// `A y`, the adjoint of [`Tile::output`].
    unsafe fn output_adjoint<S: Simd, T: Real>(y: [T::V<S>; MAX]) -> [T::V<S>; MAX];
    /// `Gᵀ u`, the adjoint of [`Tile::filter`].
    unsafe fn filter_adjoint<S: Simd, T: Real>(u: [T::V<S>; MAX]) -> [T::V<S>; 3];
}

/// `c` in every lane.
#[inline(always)]
unsafe fn all<S: Simd, T: Real>(c: f64) -> T::V<S> {
    // SAFETY: the caller runs at this level.
    unsafe { T::V::<S>::splat(T::from_f64(c)) }
}

/// F(4, 3): four outputs with six products instead of twelve.
#[derive(Clone, Copy)]
pub(super) struct F4;

const A: f64 = FRAC_1_SQRT_2;
const B: f64 = SQRT_2;

impl Tile for F4 {
    const M: usize = 4;
    const A: usize = 6;

    #[inline(always)]
    unsafe fn input<S: Simd, T: Real>(d: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let c = |c| all::<S, T>(c);
            let even_a = c(-2.0).mul_add(d[2], d[4]);
            let odd_a = c(-2.0).mul_add(d[1], d[3]).mul(c(A));
            let even_b = c(-0.5).mul_add(d[2], d[4]);
            let odd_b = c(-0.5).mul_add(d[1], d[3]).mul(c(B));
            [
                c(-2.5).mul_add(d[2], d[0].add(d[4])),
                even_a.add(odd_a),
                even_a.sub(odd_a),
                even_b.add(odd_b),
                even_b.sub(odd_b),
                c(-2.5).mul_add(d[3], d[1].add(d[5])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn filter<S: Simd, T: Real>(g: [T::V<S>; 3]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let c = |c| all::<S, T>(c);
            let even_a = c(0.5).mul_add(g[2], g[0]).mul(c(-1.0 / 1.5));
            let odd_a = g[1].mul(c(-A / 1.5));
            let even_b = c(2.0).mul_add(g[2], g[0]).mul(c(1.0 / 6.0));
            let odd_b = g[1].mul(c(B / 6.0));
            [
                g[0],
                even_a.add(odd_a),
                even_a.sub(odd_a),
                even_b.add(odd_b),
                even_b.sub(odd_b),
                g[2],
            ]
        }
    }

    #[inline(always)]
    unsafe fn output<S: Simd, T: Real>(m: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let c = |c| all::<S, T>(c);
            let (sum_a, diff_a) = (m[1].add(m[2]), m[1].sub(m[2]).mul(c(A)));
            let (sum_b, diff_b) = (m[3].add(m[4]), m[3].sub(m[4]).mul(c(B)));
            [
                m[0].add(sum_a).add(sum_b),
                diff_a.add(diff_b),
                c(2.0).mul_add(sum_b, sum_a.mul(c(0.5))),
                c(0.5).mul_add(diff_a, c(2.0).mul_add(diff_b, m[5])),
                T::V::<S>::zero(),
                T::V::<S>::zero(),
            ]
        }
    }

    #[inline(always)]
    unsafe fn output_adjoint<S: Simd, T: Real>(y: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let c = |c| all::<S, T>(c);
            let even_a = c(0.5).mul_add(y[2], y[0]);
            let odd_a = c(0.5).mul_add(y[3], y[1]).mul(c(A));
            let even_b = c(2.0).mul_add(y[2], y[0]);
            let odd_b = c(2.0).mul_add(y[3], y[1]).mul(c(B));
            [
                y[0],
                even_a.add(odd_a),
                even_a.sub(odd_a),
                even_b.add(odd_b),
                even_b.sub(odd_b),
                y[3],
            ]
        }
    }

    #[inline(always)]
    unsafe fn filter_adjoint<S: Simd, T: Real>(u: [T::V<S>; MAX]) -> [T::V<S>; 3] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let c = |c| all::<S, T>(c);
            let sum_a = u[1].add(u[2]).mul(c(-1.0 / 1.5));
            let sum_b = u[3].add(u[4]).mul(c(1.0 / 6.0));
            let diff_a = u[1].sub(u[2]).mul(c(-A / 1.5));
            let diff_b = u[3].sub(u[4]).mul(c(B / 6.0));
            [
                u[0].add(sum_a).add(sum_b),
                diff_a.add(diff_b),
                c(0.5).mul_add(sum_a, c(2.0).mul_add(sum_b, u[5])),
            ]
        }
    }
}

/// F(2, 3): two outputs with four products instead of six, and the error of the direct sum.
#[derive(Clone, Copy)]
pub(super) struct F2;

impl Tile for F2 {
    const M: usize = 2;
    const A: usize = 4;

    #[inline(always)]
    unsafe fn input<S: Simd, T: Real>(d: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let zero = T::V::<S>::zero();
            let (low, high) = (d[0].sub(d[2]), d[3].sub(d[1]));
            [low, d[2].add(d[1]), d[2].sub(d[1]), high, zero, zero]
        }
    }

    #[inline(always)]
    unsafe fn filter<S: Simd, T: Real>(g: [T::V<S>; 3]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let half = all::<S, T>(0.5);
            let (even, odd) = (g[0].add(g[2]).mul(half), g[1].mul(half));
            let zero = T::V::<S>::zero();
            [g[0], even.add(odd), even.sub(odd), g[2], zero, zero]
        }
    }

    #[inline(always)]
    unsafe fn output<S: Simd, T: Real>(m: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let zero = T::V::<S>::zero();
            let first = m[0].add(m[1]).add(m[2]);
            let second = m[1].sub(m[2]).add(m[3]);
            [first, second, zero, zero, zero, zero]
        }
    }

    #[inline(always)]
    unsafe fn output_adjoint<S: Simd, T: Real>(y: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let zero = T::V::<S>::zero();
            [y[0], y[0].add(y[1]), y[0].sub(y[1]), y[1], zero, zero]
        }
    }

    #[inline(always)]
    unsafe fn filter_adjoint<S: Simd, T: Real>(u: [T::V<S>; MAX]) -> [T::V<S>; 3] {
        // SAFETY: the caller runs at this level.
        unsafe {
            let half = all::<S, T>(0.5);
            let sum = u[1].add(u[2]).mul(half);
            [u[0].add(sum), u[1].sub(u[2]).mul(half), sum.add(u[3])]
        }
    }
}

/// A filter that runs down the columns alone, for kernels of 3×1.
#[derive(Clone, Copy)]
pub(super) struct Column<W>(W);

impl<W: Tile> Tile for Column<W> {
    const M: usize = W::M;
    const A: usize = W::A;
    const MW: usize = 1;
    const AW: usize = 1;

    #[inline(always)]
    unsafe fn input<S: Simd, T: Real>(d: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: passed on to the caller, here and below.
        unsafe { W::input::<S, T>(d) }
    }
    #[inline(always)]
    unsafe fn filter<S: Simd, T: Real>(g: [T::V<S>; 3]) -> [T::V<S>; MAX] {
        // SAFETY: as above.
        unsafe { W::filter::<S, T>(g) }
    }
    #[inline(always)]
    unsafe fn output<S: Simd, T: Real>(m: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: as above.
        unsafe { W::output::<S, T>(m) }
    }
    #[inline(always)]
    unsafe fn output_adjoint<S: Simd, T: Real>(y: [T::V<S>; MAX]) -> [T::V<S>; MAX] {
        // SAFETY: as above.
        unsafe { W::output_adjoint::<S, T>(y) }
    }
    #[inline(always)]
    unsafe fn filter_adjoint<S: Simd, T: Real>(u: [T::V<S>; MAX]) -> [T::V<S>; 3] {
        // SAFETY: as above.
        unsafe { W::filter_adjoint::<S, T>(u) }
    }
}
