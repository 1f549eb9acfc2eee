//! Elementary functions and ordered sums that the compiler vectorises inside a kernel.
//!
//! The `f32` functions are branch-free polynomials; the `f64` ones are those of the standard
//! library, because `f64` serves to check gradients. Not-a-numbers pass through all of them.
//! The polynomials are fits of least maximal relative error.

use crate::cpu::Real;
use crate::simd::{Simd, Vector};
use candle_core::DType;

/// A constant of the element type, certain to be folded at compile time.
#[inline(always)]
pub(crate) fn real<T: Real>(value: f64) -> T {
    if is_f32::<T>() {
        cast(value as f32)
    } else {
        cast(value)
    }
}

#[inline(always)]
fn is_f32<T: Real>() -> bool {
    matches!(T::DTYPE, DType::F32)
}

/// The identity between a type parameter and the concrete type that it stands for.
#[inline(always)]
fn cast<A: Copy, B: Copy>(a: A) -> B {
    assert!(size_of::<A>() == size_of::<B>());
    // SAFETY: both are floating-point types of the same size, whose bit patterns are all valid.
    unsafe { std::mem::transmute_copy(&a) }
}

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits.
const MAGIC: f32 = 12_582_912.0;
/// ln 2 = `LN_2_HIGH` + `LN_2_LOW`; the products of the first with integers below 2⁹ are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// x = n ln 2 + r with |r| ≤ ln 2/2: `r`, and n + MAGIC.
#[inline(always)]
fn reduce<S: Simd>(x: f32) -> (f32, f32) {
    let shifted = S::mul_add(x, LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = S::mul_add(n, -LN_2_HIGH, x);
    (S::mul_add(n, -LN_2_LOW, r), shifted)
}

/// 2ⁿ of n + MAGIC, for −127 ≤ n ≤ 128; the ends give 0 and ∞.
#[inline(always)]
fn power_of_two(shifted: f32) -> f32 {
    f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// eʳ − 1 for |r| ≤ ln 2/2, with an absolute error of 3e-9.
#[inline(always)]
fn expm1_reduced<S: Simd>(r: f32) -> f32 {
    let mut q = 0.001_381_446_7;
    q = S::mul_add(q, r, 0.008_368_781);
    q = S::mul_add(q, r, 0.041_668_393);
    q = S::mul_add(q, r, 0.166_665_2);
    q = S::mul_add(q, r, 0.499_999_94);
    S::mul_add(q, r * r, r)
}

/// eˣ for x ≤ 0.
///
/// `f32`: at most 2 ulp for x ≥ −87.3; results below the smallest normal number may be 0.
#[inline(always)]
pub(crate) fn exp_nonpositive<S: Simd, T: Real>(x: T) -> T {
    if !is_f32::<T>() {
        return cast(cast::<T, f64>(x).exp());
    }
    let (r, shifted) = reduce::<S>(cast::<T, f32>(x).clamp(-88.0, 1.0));
    cast((expm1_reduced::<S>(r) + 1.0) * power_of_two(shifted))
}

/// e^{−x} with x first brought into [−87, 87] (`f32`) or [−700, 700], so that it and its
/// reciprocal are finite and not 0.
///
/// `f32`: a relative error of at most 2e-7 + 2e-8 |x|.
#[allow(clippy::approx_constant)] // The coefficients of a fit; the last is not quite ln 2.
#[inline(always)]
pub(crate) fn exp_of_minus<S: Simd, T: Real>(x: T) -> T {
    if !is_f32::<T>() {
        return cast((-cast::<T, f64>(x).clamp(-700.0, 700.0)).exp());
    }
    let x = cast::<T, f32>(x).clamp(-87.0, 87.0);
    let shifted = S::mul_add(x, -LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    // The fraction f of −x log₂e = n + f.
    let f = if S::FMA {
        S::mul_add(x, -LOG2_E, -n)
    } else {
        (n * LN_2_HIGH + x + n * LN_2_LOW) * -LOG2_E
    };
    let mut q = 0.001_326_459_1;
    q = S::mul_add(q, f, 0.009_671_619);
    q = S::mul_add(q, f, 0.055_507_35);
    q = S::mul_add(q, f, 0.240_222_41);
    q = S::mul_add(q, f, 0.693_147);
    cast(S::mul_add(q, f, 1.0) * power_of_two(shifted))
}

/// 1/(1 + e^{−x}).
///
/// `f32`: a relative error of at most 1e-6 for x ≥ −40, never below 1e-38.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd, T: Real>(x: T) -> T {
    real::<T>(1.0) / (real::<T>(1.0) + exp_of_minus::<S, T>(x))
}

/// e^{−2|x|} − 1, between −1 and 0, without loss of digits for small x.
///
/// `f32`: a relative error of at most 3e-7.
#[inline(always)]
pub(crate) fn expm1_of_minus_twice_abs<S: Simd, T: Real>(x: T) -> T {
    if !is_f32::<T>() {
        return cast((-2.0 * cast::<T, f64>(x).abs()).exp_m1());
    }
    let (r, shifted) = reduce::<S>((-2.0 * cast::<T, f32>(x).abs()).clamp(-60.0, 1.0));
    let power = power_of_two(shifted);
    cast(S::mul_add(expm1_reduced::<S>(r), power, power - 1.0))
}

/// |x| with the sign of `sign`.
#[inline(always)]
pub(crate) fn with_sign<T: Real>(x: T, sign: T) -> T {
    if is_f32::<T>() {
        cast(cast::<T, f32>(x).copysign(cast(sign)))
    } else {
        cast(cast::<T, f64>(x).copysign(cast(sign)))
    }
}

/// The upper tail 1 − Φ(a) of the standard normal distribution and its density φ(a), for a ≥ 0.
///
/// `f32`: a relative error of at most 5e-7 + 6e-8 a²; beyond a = 13, where both are below 1e-37,
/// those of 13.
#[inline(always)]
pub(crate) fn normal_tail<S: Simd, T: Real>(a: T) -> (T, T) {
    const DENSITY_AT_0: f64 = 0.398_942_280_401_432_7;
    if !is_f32::<T>() {
        let a = cast::<T, f64>(a);
        let tail = 0.5 * libm::erfc(a * std::f64::consts::FRAC_1_SQRT_2);
        return (cast(tail), cast((-0.5 * a * a).exp() * DENSITY_AT_0));
    }
    let a = cast::<T, f32>(a);
    let a = if a > 13.0 { 13.0 } else { a };
    let e = cast::<T, f32>(exp_of_minus::<S, T>(cast(0.5 * a * a)));
    // The tail is e^{−a²/2} u Q(u).
    let u = 1.0 / S::mul_add(a, 0.35, 1.0);
    let mut q = -0.029_157_886;
    q = S::mul_add(q, u, 0.144_030_91);
    q = S::mul_add(q, u, -0.255_839);
    q = S::mul_add(q, u, 0.159_319_7);
    q = S::mul_add(q, u, -0.023_212_353);
    q = S::mul_add(q, u, 0.105_552_5);
    q = S::mul_add(q, u, 0.119_821_29);
    q = S::mul_add(q, u, 0.139_863_52);
    q = S::mul_add(q, u, 0.139_621_3);
    (cast(e * u * q), cast(e * DENSITY_AT_0 as f32))
}

/// |x|.
#[inline(always)]
pub(crate) fn abs<T: Real>(x: T) -> T {
    with_sign(x, real(1.0))
}

/// Σ xᵢ.
#[inline(always)]
pub(crate) fn sum<S: Simd, T: Real>(x: &[T]) -> T {
    let [sum] = sums::<S, T, 1>([x; 3], |[v, _, _]| [v]);
    sum
}

/// Σ (xᵢ − m)².
#[inline(always)]
pub(crate) fn squared_deviations<S: Simd, T: Real>(x: &[T], mean: T) -> T {
    // SAFETY: kernels run inside `dispatch` at the level of S.
    let [sum] = sums::<S, T, 1>([x; 3], |[v, _, _]| unsafe {
        let d = v.sub(<T::V<S> as Vector<T>>::splat(mean));
        [d.mul(d)]
    });
    sum
}

/// Σ xᵢ yᵢ.
#[inline(always)]
pub(crate) fn dot<S: Simd, T: Real>(x: &[T], y: &[T]) -> T {
    // SAFETY: as in `squared_deviations`.
    let [sum] = sums::<S, T, 1>([x, y, x], |[a, b, _]| unsafe { [a.mul(b)] });
    sum
}

/// Σ hᵢ and Σ hᵢ (xᵢ − m).
#[inline(always)]
pub(crate) fn sum_and_moment<S: Simd, T: Real>(h: &[T], x: &[T], mean: T) -> [T; 2] {
    // SAFETY: as in `squared_deviations`.
    sums::<S, T, 2>([h, x, x], |[h, v, _]| unsafe {
        [h, h.mul(v.sub(<T::V<S> as Vector<T>>::splat(mean)))]
    })
}

/// Σ gᵢ wᵢ and Σ gᵢ wᵢ (xᵢ − m).
#[inline(always)]
pub(crate) fn weighted_sum_and_moment<S: Simd, T: Real>(
    g: &[T],
    w: &[T],
    x: &[T],
    mean: T,
) -> [T; 2] {
    // SAFETY: as in `squared_deviations`.
    sums::<S, T, 2>([g, w, x], |[g, w, v]| unsafe {
        let h = g.mul(w);
        [h, h.mul(v.sub(<T::V<S> as Vector<T>>::splat(mean)))]
    })
}

/// Σ f(xᵢ, yᵢ, zᵢ) for K functions at once, in an order that depends on the length only: four partial
/// sums for each lane, then lane by lane.
#[inline(always)]
fn sums<S: Simd, T: Real, const K: usize>(
    slices: [&[T]; 3],
    f: impl Fn([T::V<S>; 3]) -> [T::V<S>; K],
) -> [T; K] {
    const WAYS: usize = 4;
    let lanes = <T::V<S> as Vector<T>>::LANES;
    let n = slices.map(<[T]>::len).into_iter().min().unwrap_or(0);
    let mut out = [real::<T>(0.0); K];
    // SAFETY: kernels run inside `dispatch` at the level of S; the loads stay below n, and no
    // vector has more lanes than the buffer.
    unsafe {
        let mut acc = [[<T::V<S> as Vector<T>>::zero(); WAYS]; K];
        let at = slices.map(<[T]>::as_ptr);
        let mut i = 0;
        while i + WAYS * lanes <= n {
            for way in 0..WAYS {
                let terms = f(at.map(|p| Vector::load(p.add(i + way * lanes))));
                for k in 0..K {
                    acc[k][way] = acc[k][way].add(terms[k]);
                }
            }
            i += WAYS * lanes;
        }
        while i + lanes <= n {
            let terms = f(at.map(|p| Vector::load(p.add(i))));
            for k in 0..K {
                acc[k][0] = acc[k][0].add(terms[k]);
            }
            i += lanes;
        }
        if i < n {
            let rest = n - i;
            let terms = f(at.map(|p| Vector::load_first(p.add(i), rest)));
            for k in 0..K {
                // The lanes beyond the end hold f(0, 0), which need not be 0.
                let mut kept = [real::<T>(0.0); MOST_LANES];
                terms[k].store_first(kept.as_mut_ptr(), rest);
                acc[k][0] = acc[k][0].add(Vector::load(kept.as_ptr()));
            }
        }
        for k in 0..K {
            let [a, b, c, d] = acc[k];
            let total = a.add(b).add(c.add(d));
            let mut values = [real::<T>(0.0); MOST_LANES];
            total.store(values.as_mut_ptr());
            let mut width = lanes / 2;
            while width > 0 {
                for i in 0..width {
                    let other = values[i + width];
                    values[i] += other;
                }
                width /= 2;
            }
            out[k] = values[0];
        }
    }
    out
}

/// No vector has more lanes.
const MOST_LANES: usize = 16;

/// The largest element (not-a-numbers are passed over), or −∞ of an empty slice.
#[inline(always)]
pub(crate) fn maximum<T: Real>(x: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [real::<T>(f64::NEG_INFINITY); MOST_LANES];
    let (chunks, rest) = x.as_chunks::<MOST_LANES>();
    for chunk in chunks {
        for i in 0..MOST_LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *v);
    }
    // Through memory: otherwise the compiler carries the narrow steps below into the loop above.
    let mut lanes = std::hint::black_box(lanes);
    let mut width = MOST_LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
#[path = "vmath_tests.rs"]
mod tests;
