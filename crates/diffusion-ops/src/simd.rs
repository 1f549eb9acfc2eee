//! Vector instructions, chosen at run time.
//!
//! A kernel is written once, over a [`Simd`] type, and compiled for each [`Level`]; [`dispatch`]
//! runs the version for the processor at hand. Elementwise loops need no intrinsics: inside
//! [`dispatch`] the compiler vectorises plain loops for the level. Matrix kernels use [`Vector`].
//!
//! On AArch64 the portable version is the NEON version: its vectors are arrays that the compiler
//! maps to NEON registers, which every such processor has.

use crate::cpu::Real;
use std::sync::atomic::{AtomicU8, Ordering};

/// What the vector kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// What every processor of the architecture has (SSE2 on x86-64, NEON on AArch64).
    Portable = 1,
    /// AVX2 and FMA.
    Avx2 = 2,
    /// AVX-512 (F, BW, CD, DQ, VL).
    Avx512 = 3,
}

/// The environment variable that lowers the level: `portable`, `avx2` or `avx512`.
pub const LEVEL_VARIABLE: &str = "DIFFUSION_SIMD";

static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The level that the kernels run at: the best that the processor has, or a lower one if
/// [`LEVEL_VARIABLE`] or [`set_level`] say so.
///
/// Results differ between levels by rounding, since only some of them have a fused multiply-add.
pub fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        1 => Level::Portable,
        2 => Level::Avx2,
        3 => Level::Avx512,
        _ => {
            let wanted = std::env::var(LEVEL_VARIABLE).unwrap_or_default();
            let limit = match wanted.to_ascii_lowercase().as_str() {
                "portable" => Level::Portable,
                "avx2" => Level::Avx2,
                _ => Level::Avx512,
            };
            set_level(limit)
        }
    }
}

/// Lowers (or raises again) the level of all kernels of this process, up to what the processor
/// has; returns the level set. For tests and for comparing machines.
pub fn set_level(limit: Level) -> Level {
    let level = detected().min(limit);
    LEVEL.store(level as u8, Ordering::Relaxed);
    level
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        _ => Level::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detected() -> Level {
    Level::Portable
}

/// The instructions of one level.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// The level.
    const LEVEL: Level;
    /// Whether a fused multiply-add is one instruction (otherwise it would be a slow call).
    const FMA: bool;
    /// Vectors of `f32`.
    type F32: Vector<f32>;
    /// Vectors of `f64`.
    type F64: Vector<f64>;

    /// `a · b + c`, fused where that is one instruction.
    #[inline(always)]
    fn mul_add<T: Real>(a: T, b: T, c: T) -> T {
        if Self::FMA { a.fused(b, c) } else { a * b + c }
    }
}

/// A vector register of elements `T`.
///
/// # Safety
/// The methods compile to instructions of the vector's level: whoever calls them must run inside
/// [`dispatch`] at that level. Pointers must be valid for the elements named; they need no
/// alignment beyond that of `T`.
pub(crate) trait Vector<T>: Copy {
    /// Elements of a vector.
    const LANES: usize;
    /// All lanes 0.
    unsafe fn zero() -> Self;
    /// All lanes `x`.
    unsafe fn splat(x: T) -> Self;
    /// Lane i = `p[i]`.
    unsafe fn load(p: *const T) -> Self;
    /// Lane i = `p[i]` for i < n, the others 0; reads n elements only.
    unsafe fn load_first(p: *const T, n: usize) -> Self;
    /// `p[i]` = lane i.
    unsafe fn store(self, p: *mut T);
    /// `p[i]` = lane i for i < n; writes n elements only.
    unsafe fn store_first(self, p: *mut T, n: usize);
    /// `a · b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Sum.
    unsafe fn add(self, b: Self) -> Self;
    /// Difference.
    unsafe fn sub(self, b: Self) -> Self;
    /// Product.
    unsafe fn mul(self, b: Self) -> Self;
    /// `dst[j · dst_row + i] = src[i · src_row + j]` for i, j < LANES.
    unsafe fn transpose(src: *const T, src_row: usize, dst: *mut T, dst_row: usize);
}

/// Code that runs at the level of the processor.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// The code. Mark it `#[inline(always)]`, and everything that it calls: a function that is not
    /// inlined is compiled for the portable level. The same holds for closures handed to another
    /// thread, so threads come first and [`dispatch`] inside their tasks.
    fn run<S: Simd>(self) -> Self::Out;
}

/// Runs a kernel at the level of the processor.
#[inline]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Out {
    match level() {
        // SAFETY: `level` is never above what the processor was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::avx2(kernel) },
        _ => kernel.run::<Portable>(),
    }
}

/// What every processor of the architecture has.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    const LEVEL: Level = Level::Portable;
    const FMA: bool = cfg!(target_arch = "aarch64");
    type F32 = Array<f32, 8>;
    type F64 = Array<f64, 4>;
}

/// A vector that the compiler maps to whatever registers there are.
#[derive(Clone, Copy)]
pub(crate) struct Array<T, const N: usize>([T; N]);

impl<T: Real, const N: usize> Array<T, N> {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(T, T) -> T) -> Self {
        let mut out = self;
        for i in 0..N {
            out.0[i] = f(self.0[i], b.0[i]);
        }
        out
    }
}

impl<T: Real, const N: usize> Vector<T> for Array<T, N> {
    const LANES: usize = N;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([T::zero(); N])
    }
    #[inline(always)]
    unsafe fn splat(x: T) -> Self {
        Self([x; N])
    }
    #[inline(always)]
    unsafe fn load(p: *const T) -> Self {
        // SAFETY: the caller vouches for N elements.
        Self(unsafe { p.cast::<[T; N]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_first(p: *const T, n: usize) -> Self {
        let mut out = [T::zero(); N];
        for (i, o) in out.iter_mut().enumerate().take(n) {
            // SAFETY: the caller vouches for n elements.
            *o = unsafe { *p.add(i) };
        }
        Self(out)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut T) {
        // SAFETY: the caller vouches for N elements.
        unsafe { p.cast::<[T; N]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut T, n: usize) {
        for (i, v) in self.0.iter().enumerate().take(n) {
            // SAFETY: the caller vouches for n elements.
            unsafe { *p.add(i) = *v };
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        let mut out = self;
        for i in 0..N {
            out.0[i] = Portable::mul_add(self.0[i], b.0[i], c.0[i]);
        }
        out
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn transpose(src: *const T, src_row: usize, dst: *mut T, dst_row: usize) {
        for i in 0..N {
            for j in 0..N {
                // SAFETY: the caller vouches for N rows of N elements on both sides.
                unsafe { *dst.add(j * dst_row + i) = *src.add(i * src_row + j) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[path = "simd_x86.rs"]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    /// Every method of the vector of each level against plain arithmetic.
    struct Check;

    impl Kernel for Check {
        type Out = Level;
        #[inline(always)]
        fn run<S: Simd>(self) -> Level {
            // SAFETY: inside `dispatch`; the arrays are longer than any vector.
            unsafe {
                check::<f32, S::F32>();
                check::<f64, S::F64>();
            }
            S::LEVEL
        }
    }

    #[inline(always)]
    unsafe fn check<T: Real, V: Vector<T>>() {
        let n = V::LANES;
        let of = |f: fn(f64) -> f64| {
            (0..32)
                .map(|i| T::from_f64(f(i as f64)))
                .collect::<Vec<T>>()
        };
        let (a, b) = (of(|i| i * 0.5 - 3.0), of(|i| 7.0 - i));
        // SAFETY: as in the caller.
        unsafe {
            let (x, y) = (V::load(a.as_ptr()), V::load(b.as_ptr()));
            let two = V::splat(T::from_f64(2.0));
            let results = [
                (x.add(y), 0),
                (x.sub(y), 1),
                (x.mul(y), 2),
                (x.mul_add(y, two), 3),
                (V::zero(), 4),
                (V::load_first(a.as_ptr(), n / 2 + 1), 5),
            ];
            for (v, k) in results {
                let mut out = vec![T::from_f64(99.0); 32];
                v.store(out.as_mut_ptr());
                for i in 0..n {
                    let (a, b) = (a[i].to_f64(), b[i].to_f64());
                    let inside = if i <= n / 2 { a } else { 0.0 };
                    let expected = [a + b, a - b, a * b, a * b + 2.0, 0.0, inside][k];
                    assert_eq!(out[i].to_f64(), expected, "operation {k}, lane {i}");
                }
                assert_eq!(out[n].to_f64(), 99.0);
            }
            let mut out = vec![T::zero(); 32];
            x.store_first(out.as_mut_ptr(), n - 1);
            assert_eq!(out[n - 2].to_f64(), a[n - 2].to_f64());
            assert_eq!(out[n - 1].to_f64(), 0.0);
            let (src_row, dst_row) = (n + 3, n + 1);
            let src: Vec<T> = (0..n * src_row).map(|i| T::from_f64(i as f64)).collect();
            let mut dst = vec![T::zero(); n * dst_row];
            V::transpose(src.as_ptr(), src_row, dst.as_mut_ptr(), dst_row);
            for i in 0..n {
                for j in 0..n {
                    let (moved, from) = (dst[j * dst_row + i], src[i * src_row + j]);
                    assert_eq!(moved.to_f64(), from.to_f64(), "{i} {j}");
                }
            }
        }
    }

    #[test]
    fn vectors_compute_what_they_say_at_every_level() {
        assert_eq!(Check.run::<Portable>(), Level::Portable);
        #[cfg(target_arch = "x86_64")]
        {
            if detected() >= Level::Avx2 {
                // SAFETY: detected.
                assert_eq!(unsafe { x86::avx2(Check) }, Level::Avx2);
            }
            if detected() >= Level::Avx512 {
                // SAFETY: detected.
                assert_eq!(unsafe { x86::avx512(Check) }, Level::Avx512);
            }
        }
    }
}
