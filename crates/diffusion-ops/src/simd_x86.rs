//! AVX2 and AVX-512.

use super::{Kernel, Level, Simd, Vector};
use core::arch::x86_64::*;

/// Runs a kernel compiled for AVX-512.
///
/// # Safety
/// The processor must have the features of [`Level::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma")]
pub(crate) unsafe fn avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx512>()
}

/// Runs a kernel compiled for AVX2 and FMA.
///
/// # Safety
/// The processor must have the features of [`Level::Avx2`].
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx2>()
}

/// Level [`Level::Avx512`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    const LEVEL: Level = Level::Avx512;
    const FMA: bool = true;
    type F32 = __m512;
    type F64 = __m512d;
}

/// Level [`Level::Avx2`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    const LEVEL: Level = Level::Avx2;
    const FMA: bool = true;
    type F32 = __m256;
    type F64 = __m256d;
}

/// The methods that differ between the four registers only in the name of the instruction.
macro_rules! common {
    ($t:ty, $lanes:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $fma:ident,
     $add:ident, $sub:ident, $mul:ident) => {
        const LANES: usize = $lanes;
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller runs at this level.
            unsafe { $zero() }
        }
        #[inline(always)]
        unsafe fn splat(x: $t) -> Self {
            // SAFETY: the caller runs at this level.
            unsafe { $splat(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const $t) -> Self {
            // SAFETY: the caller vouches for the level and for LANES elements.
            unsafe { $load(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut $t) {
            // SAFETY: the caller vouches for the level and for LANES elements.
            unsafe { $store(p, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: the caller runs at this level.
            unsafe { $fma(self, b, c) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: the caller runs at this level.
            unsafe { $add(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: the caller runs at this level.
            unsafe { $sub(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: the caller runs at this level.
            unsafe { $mul(self, b) }
        }
    };
}

/// A transpose by single elements, for the types where it is not worth more.
macro_rules! plain_transpose {
    ($t:ty) => {
        #[inline(always)]
        unsafe fn transpose(src: *const $t, src_row: usize, dst: *mut $t, dst_row: usize) {
            for i in 0..Self::LANES {
                for j in 0..Self::LANES {
                    // SAFETY: the caller vouches for LANES rows of LANES elements on both sides.
                    unsafe { *dst.add(j * dst_row + i) = *src.add(i * src_row + j) };
                }
            }
        }
    };
}

impl Vector<f32> for __m512 {
    common!(
        f32,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps
    );
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: lanes beyond n are masked out and not read.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: lanes beyond n are masked out and not written.
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, self) }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize) {
        // SAFETY: the caller vouches for 16 rows of 16 elements on both sides and for the level.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                *r = _mm512_loadu_ps(src.add(i * src_row));
            }
            // Pairs, then quadruples within each 128-bit lane.
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                let at = 4 * i;
                let d = |v| _mm512_castps_pd(v);
                r[at] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(t[at]), d(t[at + 2])));
                r[at + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(t[at]), d(t[at + 2])));
                r[at + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(t[at + 1]), d(t[at + 3])));
                r[at + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(t[at + 1]), d(t[at + 3])));
            }
            // The lanes themselves: r[4g + c] holds column 4l + c of rows 4g.. in lane l.
            for c in 0..4 {
                let ab = _mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]);
                let cd = _mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
                let ef = _mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]);
                let gh = _mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
                t[c] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
                t[8 + c] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
                t[4 + c] = _mm512_shuffle_f32x4::<0x88>(ef, gh);
                t[12 + c] = _mm512_shuffle_f32x4::<0xdd>(ef, gh);
            }
            for (j, t) in t.iter().enumerate() {
                _mm512_storeu_ps(dst.add(j * dst_row), *t);
            }
        }
    }
}

impl Vector<f64> for __m512d {
    common!(
        f64,
        8,
        _mm512_setzero_pd,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_fmadd_pd,
        _mm512_add_pd,
        _mm512_sub_pd,
        _mm512_mul_pd
    );
    #[inline(always)]
    unsafe fn load_first(p: *const f64, n: usize) -> Self {
        // SAFETY: lanes beyond n are masked out and not read.
        unsafe { _mm512_maskz_loadu_pd(((1u32 << n) - 1) as u8, p) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f64, n: usize) {
        // SAFETY: lanes beyond n are masked out and not written.
        unsafe { _mm512_mask_storeu_pd(p, ((1u32 << n) - 1) as u8, self) }
    }
    plain_transpose!(f64);
}

/// The first `n` of eight 32-bit lanes: all bits set.
static FIRST: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

impl Vector<f32> for __m256 {
    common!(
        f32,
        8,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps
    );
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: n ≤ 8 keeps the mask inside `FIRST`; lanes beyond n are not read.
        unsafe { _mm256_maskload_ps(p, _mm256_loadu_si256(FIRST.as_ptr().add(8 - n).cast())) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: n ≤ 8 keeps the mask inside `FIRST`; lanes beyond n are not written.
        unsafe {
            let mask = _mm256_loadu_si256(FIRST.as_ptr().add(8 - n).cast());
            _mm256_maskstore_ps(p, mask, self);
        }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize) {
        // SAFETY: the caller vouches for 8 rows of 8 elements on both sides and for the level.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for (i, r) in r.iter_mut().enumerate() {
                *r = _mm256_loadu_ps(src.add(i * src_row));
            }
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                let at = 4 * i;
                r[at] = _mm256_shuffle_ps::<0x44>(t[at], t[at + 2]);
                r[at + 1] = _mm256_shuffle_ps::<0xee>(t[at], t[at + 2]);
                r[at + 2] = _mm256_shuffle_ps::<0x44>(t[at + 1], t[at + 3]);
                r[at + 3] = _mm256_shuffle_ps::<0xee>(t[at + 1], t[at + 3]);
            }
            for c in 0..4 {
                t[c] = _mm256_permute2f128_ps::<0x20>(r[c], r[4 + c]);
                t[4 + c] = _mm256_permute2f128_ps::<0x31>(r[c], r[4 + c]);
            }
            for (j, t) in t.iter().enumerate() {
                _mm256_storeu_ps(dst.add(j * dst_row), *t);
            }
        }
    }
}

impl Vector<f64> for __m256d {
    common!(
        f64,
        4,
        _mm256_setzero_pd,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_fmadd_pd,
        _mm256_add_pd,
        _mm256_sub_pd,
        _mm256_mul_pd
    );
    #[inline(always)]
    unsafe fn load_first(p: *const f64, n: usize) -> Self {
        // SAFETY: n ≤ 4 keeps the mask inside `FIRST`; lanes beyond n are not read.
        unsafe { _mm256_maskload_pd(p, _mm256_loadu_si256(FIRST.as_ptr().add(8 - 2 * n).cast())) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f64, n: usize) {
        // SAFETY: n ≤ 4 keeps the mask inside `FIRST`; lanes beyond n are not written.
        unsafe {
            let mask = _mm256_loadu_si256(FIRST.as_ptr().add(8 - 2 * n).cast());
            _mm256_maskstore_pd(p, mask, self);
        }
    }
    plain_transpose!(f64);
}
