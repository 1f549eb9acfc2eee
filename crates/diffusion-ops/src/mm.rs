//! The matrix kernel under convolutions and attention: a product of blocks that sit in the cache.

use crate::cpu::Real;
use crate::simd::{Kernel, Level, Simd, Vector, dispatch};

/// A matrix given by its first element and two strides, `row` and `step` along the summed axis.
#[derive(Clone, Copy)]
pub(crate) struct Left<T> {
    /// First element.
    pub at: *const T,
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one term of the sum to the next.
    pub step: usize,
}

/// A matrix with contiguous rows, one for each term of the sum.
#[derive(Clone, Copy)]
pub(crate) struct Right<T> {
    /// First element.
    pub at: *const T,
    /// Elements from one term of the sum to the next.
    pub step: usize,
}

/// A matrix with contiguous rows that is written.
#[derive(Clone, Copy)]
pub(crate) struct Product<T> {
    /// First element.
    pub at: *mut T,
    /// Elements from one row to the next.
    pub row: usize,
    /// Whether the product is added to what is there.
    pub add: bool,
}

/// The product of two blocks: `c[i, j] (+)= Σ_s a[i, s] b[s, j]`, i < m, j < n, s < k.
///
/// Each element is one chain of fused additions in the order of s, however the work is divided
/// into calls over rows and columns: the bits depend on neither.
///
/// # Safety
/// Inside [`crate::simd::dispatch`] at the level `S`; the pointers are valid for these sizes and
/// strides, and `c` overlaps neither `a` nor `b`.
#[inline(always)]
pub(crate) unsafe fn block<S: Simd, T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Left<T>,
    b: Right<T>,
    c: Product<T>,
) {
    let lanes = T::V::<S>::LANES;
    let (mut j, mut vectors) = (0, n / lanes);
    // SAFETY: strips of columns and rows inside the sizes the caller vouches for.
    unsafe {
        if S::LEVEL == Level::Avx512 {
            while vectors > 0 {
                // 3 vectors by 8 rows fill the 32 registers; 4 are better split evenly.
                let width = if vectors == 4 || vectors == 2 {
                    2
                } else if vectors == 1 {
                    1
                } else {
                    3
                };
                match width {
                    3 => strip::<S, T, 8, 3, false>(m, k, a, b, c, j, lanes),
                    2 => strip::<S, T, 8, 2, false>(m, k, a, b, c, j, lanes),
                    _ => strip::<S, T, 8, 1, false>(m, k, a, b, c, j, lanes),
                }
                vectors -= width;
                j += width * lanes;
            }
            if j < n {
                strip::<S, T, 8, 1, true>(m, k, a, b, c, j, n - j);
            }
        } else {
            while vectors > 0 {
                // 16 registers: 4 rows by 2 vectors, the portable ones being two registers each.
                if vectors > 1 && S::LEVEL == Level::Avx2 {
                    strip::<S, T, 4, 2, false>(m, k, a, b, c, j, lanes);
                    vectors -= 2;
                    j += 2 * lanes;
                } else {
                    strip::<S, T, 4, 1, false>(m, k, a, b, c, j, lanes);
                    vectors -= 1;
                    j += lanes;
                }
            }
            if j < n {
                strip::<S, T, 4, 1, true>(m, k, a, b, c, j, n - j);
            }
        }
    }
}

/// Columns `j .. j + C·LANES` (the last vector having `last` elements) of all rows.
#[inline(always)]
unsafe fn strip<S: Simd, T: Real, const R: usize, const C: usize, const PART: bool>(
    m: usize,
    k: usize,
    a: Left<T>,
    b: Right<T>,
    c: Product<T>,
    j: usize,
    last: usize,
) {
    // SAFETY: rows i .. i + R lie below m.
    unsafe {
        let b = Right {
            at: b.at.add(j),
            ..b
        };
        let at = |i: usize| {
            let a = Left {
                at: a.at.add(i * a.row),
                ..a
            };
            let c = Product {
                at: c.at.add(i * c.row + j),
                ..c
            };
            (a, c)
        };
        let mut i = 0;
        while i + R <= m {
            let (a, c) = at(i);
            tile::<S, T, R, C, PART>(k, a, b, c, last);
            i += R;
        }
        if R > 4 && i + 4 <= m {
            let (a, c) = at(i);
            tile::<S, T, 4, C, PART>(k, a, b, c, last);
            i += 4;
        }
        if i + 2 <= m {
            let (a, c) = at(i);
            tile::<S, T, 2, C, PART>(k, a, b, c, last);
            i += 2;
        }
        if i < m {
            let (a, c) = at(i);
            tile::<S, T, 1, C, PART>(k, a, b, c, last);
        }
    }
}

/// R rows by C vectors, in registers.
#[inline(always)]
unsafe fn tile<S: Simd, T: Real, const R: usize, const C: usize, const PART: bool>(
    k: usize,
    a: Left<T>,
    b: Right<T>,
    c: Product<T>,
    last: usize,
) {
    let lanes = T::V::<S>::LANES;
    // SAFETY: R rows of a and c and C vectors of b and c, the last of `last` elements if PART.
    unsafe {
        let mut acc = [[T::V::<S>::zero(); C]; R];
        if c.add {
            for r in 0..R {
                for v in 0..C {
                    let at = c.at.add(r * c.row + v * lanes);
                    acc[r][v] = if PART && v + 1 == C {
                        T::V::<S>::load_first(at, last)
                    } else {
                        T::V::<S>::load(at)
                    };
                }
            }
        }
        let (mut pa, mut pb) = (a.at, b.at);
        for _ in 0..k {
            let mut row = [T::V::<S>::zero(); C];
            for v in 0..C {
                let at = pb.add(v * lanes);
                row[v] = if PART && v + 1 == C {
                    T::V::<S>::load_first(at, last)
                } else {
                    T::V::<S>::load(at)
                };
            }
            for r in 0..R {
                let x = T::V::<S>::splat(*pa.add(r * a.row));
                for v in 0..C {
                    acc[r][v] = x.mul_add(row[v], acc[r][v]);
                }
            }
            pa = pa.wrapping_add(a.step);
            pb = pb.wrapping_add(b.step);
        }
        for r in 0..R {
            for v in 0..C {
                let at = c.at.add(r * c.row + v * lanes);
                if PART && v + 1 == C {
                    acc[r][v].store_first(at, last);
                } else {
                    acc[r][v].store(at);
                }
            }
        }
    }
}

/// [`block`] at the level of the processor, as a call: the code exists once for each level.
///
/// # Safety
/// The pointers are valid for these sizes and strides, and `c` overlaps neither `a` nor `b`.
pub(crate) unsafe fn multiply<T: Real>(
    size: (usize, usize, usize),
    a: Left<T>,
    b: Right<T>,
    c: Product<T>,
) {
    type Operands<T> = ((usize, usize, usize), Left<T>, Right<T>, Product<T>);
    struct Block<T>(Operands<T>);
    impl<T: Real> Kernel for Block<T> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            let (size, a, b, c) = self.0;
            // SAFETY: the caller of `multiply` vouches for the pointers.
            unsafe { block::<S, T>(size, a, b, c) }
        }
    }
    dispatch(Block((size, a, b, c)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::at_every_level;
    use proptest::prelude::*;

    fn check<T: Real>(size: (usize, usize, usize), columns_first: bool, add: bool) -> f64 {
        let (m, n, k) = size;
        let of = |n: usize, seed: usize| -> Vec<T> {
            (0..n)
                .map(|i| T::from_f64(((i * 37 + seed) % 101) as f64 / 50.0 - 1.0))
                .collect()
        };
        let (row, step) = if columns_first {
            (1, m + 2)
        } else {
            (k + 3, 1)
        };
        let (a, b) = (of((m + 2) * (k + 3), 1), of(k * (n + 1), 5));
        let before = of(m * (n + 4), 9);
        let mut c = before.clone();
        let (b_step, c_row) = (n + 1, n + 4);
        let left = Left {
            at: a.as_ptr(),
            row,
            step,
        };
        let right = Right {
            at: b.as_ptr(),
            step: b_step,
        };
        let product = Product {
            at: c.as_mut_ptr(),
            row: c_row,
            add,
        };
        // SAFETY: the vectors are longer than the sizes and strides reach.
        unsafe { multiply(size, left, right, product) };
        let mut worst = 0f64;
        for i in 0..m {
            for j in 0..c_row {
                let old = before[i * c_row + j].to_f64();
                let mut expected = if add && j < n { old } else { 0.0 };
                if j < n {
                    for s in 0..k {
                        expected += a[i * row + s * step].to_f64() * b[s * b_step + j].to_f64();
                    }
                } else {
                    expected = old;
                }
                worst = worst.max((c[i * c_row + j].to_f64() - expected).abs());
            }
        }
        worst
    }

    #[test]
    fn equals_the_sum_and_writes_nothing_else() -> candle_core::Result<()> {
        at_every_level(|level| {
            let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(48));
            let shapes = (
                1usize..20,
                1usize..70,
                1usize..30,
                any::<bool>(),
                any::<bool>(),
            );
            runner
                .run(&shapes, |(m, n, k, columns_first, add)| {
                    let narrow = check::<f32>((m, n, k), columns_first, add);
                    prop_assert!(narrow < 3e-5, "{level:?} f32 {narrow:e}");
                    let wide = check::<f64>((m, n, k), columns_first, add);
                    prop_assert!(wide < 1e-13, "{level:?} f64 {wide:e}");
                    Ok(())
                })
                .map_err(candle_core::Error::wrap)
        })
    }
}
