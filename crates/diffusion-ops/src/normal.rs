//! Normal values from random words, several at a time.
//!
//! ```text
//! r = √(−2 ln(1 − u₁)),  (z₁, z₂) = (r cos 2πu₂, r sin 2πu₂)
//! ```
//!
//! The values are by definition those of the `libm` crate's `log` and `sincos`, to the last bit.
//! What those functions do (they are FreeBSD's) is done here operation by operation in the same
//! order, but without branches, so that the compiler turns the loops into vector instructions;
//! the few angles that take a rare branch are handed to `libm`. Sums, products, quotients and
//! square roots are rounded the same everywhere, and nothing is fused or reordered: the bits
//! depend neither on the machine nor on [`crate::level`].

use crate::simd::{Kernel, Simd, dispatch};
use rand_core::RngCore;
use std::f64::consts::{FRAC_PI_4, TAU};

/// Fills `out` with standard normal values, each of them passed through `store`; a last odd one is
/// the first of its pair.
pub(crate) fn fill<T>(rng: impl RngCore, out: &mut [T], store: impl Fn(f64) -> T) {
    dispatch(Fill { rng, out, store });
}

/// A uniform value in `[0, 1)` with 53 random bits: (word >> 11) · 2⁻⁵³.
#[inline(always)]
pub(crate) fn unit(word: u64) -> f64 {
    // Without a conversion, which few processors have for vectors: 32 bits behind the point of
    // 2²⁰ and 21 bits at the end of ½ make a sum from which both are taken exactly.
    const TWO_20: f64 = 1_048_576.0;
    let high = f64::from_bits(TWO_20.to_bits() | (word >> 32));
    let low = f64::from_bits(0.5f64.to_bits() | ((word >> 11) & 0x1f_ffff));
    (high - (TWO_20 + 0.5)) + low
}

/// Pairs computed at a time: enough for loops worth the name, few enough that one value is cheap.
const PAIRS: usize = 32;

struct Fill<'a, R, T, F> {
    rng: R,
    out: &'a mut [T],
    store: F,
}

impl<R: RngCore, T, F: Fn(f64) -> T> Kernel for Fill<'_, R, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let mut words = [[0u8; 8]; 2 * PAIRS];
        let mut values = [[0f64; 2]; PAIRS];
        for out in self.out.chunks_mut(2 * PAIRS) {
            let pairs = out.len().div_ceil(2);
            let (words, values) = (&mut words[..2 * pairs], &mut values[..pairs]);
            self.rng.fill_bytes(words.as_flattened_mut());
            box_muller(words, values);
            for (out, value) in out.iter_mut().zip(values.as_flattened()) {
                *out = (self.store)(*value);
            }
        }
    }
}

/// At most [`PAIRS`] pairs of values from as many pairs of words, whose lowest bytes come first.
///
/// One loop for each function: they are long, and shorter ones overlap better in the processor.
#[inline(always)]
fn box_muller(words: &[[u8; 8]], values: &mut [[f64; 2]]) {
    let (mut radii, mut angles) = ([0f64; PAIRS], [0f64; PAIRS]);
    let (radii, angles) = (&mut radii[..values.len()], &mut angles[..values.len()]);
    let (pairs, _) = words.as_chunks::<2>();
    for ((radius, angle), [first, second]) in radii.iter_mut().zip(&mut *angles).zip(pairs) {
        *radius = 1.0 - unit(u64::from_le_bytes(*first));
        *angle = TAU * unit(u64::from_le_bytes(*second));
    }
    for radius in &mut *radii {
        *radius = (-2.0 * log(*radius)).sqrt();
    }
    let mut any_rare = false;
    for ((value, radius), angle) in values.iter_mut().zip(&*radii).zip(&*angles) {
        let (sin, cos, rare) = sincos(*angle);
        any_rare |= rare;
        *value = [radius * cos, radius * sin];
    }
    // One block in 300 has such an angle.
    if any_rare {
        for ((value, radius), angle) in values.iter_mut().zip(radii).zip(angles) {
            if sincos(*angle).2 {
                let (sin, cos) = libm::sincos(*angle);
                *value = [*radius * cos, *radius * sin];
            }
        }
    }
}

/// 2⁵²: the low bits of 2⁵² + n are the integer n.
const TWO_52: f64 = 4_503_599_627_370_496.0;

/// `libm::log` of a normal number in `(0, 1]`.
#[inline(always)]
fn log(x: f64) -> f64 {
    // x = 2ᵏ (1 + f) with 1 + f between √½ and √2, from the bits; the bounds, as there, are those
    // of the upper halves.
    const ONE: u64 = 0x3ff0_0000 << 32;
    const SQRT_HALF: u64 = 0x3fe6_a09e << 32;
    let bits = x.to_bits().wrapping_add(ONE - SQRT_HALF);
    let k = f64::from_bits(TWO_52.to_bits() | (bits >> 52)) - (TWO_52 + 1023.0);
    let mantissa = bits & 0x000f_ffff_ffff_ffff;
    let f = f64::from_bits(mantissa.wrapping_add(SQRT_HALF)) - 1.0;

    let hfsq = 0.5 * f * f;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let t1 = w * (LG2 + w * (LG4 + w * LG6));
    let t2 = z * (LG1 + w * (LG3 + w * (LG5 + w * LG7)));
    let r = t2 + t1;
    s * (hfsq + r) + k * LN2_LO - hfsq + f + k * LN2_HI
}

/// `libm::sincos` of an angle in `[0, 2π]`, and whether it takes a branch there that is missing
/// here; then the values are not to be used.
#[inline(always)]
fn sincos(x: f64) -> (f64, f64, bool) {
    // So near to a multiple of π/2 more of its digits are needed: once the exponents of x, at most
    // 2, and of the remainder differ by more than 16.
    const NEAR: f64 = 1.0 / 16384.0;
    // Half-way between two, either may be taken: there by the upper half of x, and so within 2⁻¹⁷
    // of the middle.
    const HALF_WAY: f64 = FRAC_PI_4 - 1.0 / 65536.0;
    // The nearest multiple, n π/2: adding 1.5 · 2⁵² rounds, and leaves n in the low bits.
    const ROUND: f64 = 1.5 * TWO_52;
    let shifted = x * INV_PIO2 + ROUND;
    let n = shifted - ROUND;
    let r = x - n * PIO2_1;
    let w = n * PIO2_1T;
    let y0 = r - w;
    let y1 = (r - y0) - w;
    let (sin, cos) = (k_sin(y0, y1, n == 0.0).to_bits(), k_cos(y0, y1).to_bits());
    // An odd n swaps the two; with n the signs of the sine go + + − −, of the cosine + − − +.
    let n = shifted.to_bits();
    let swap = (sin ^ cos) & 0u64.wrapping_sub(n & 1);
    let (sin_sign, cos_sign) = ((n & 2) << 62, (n.wrapping_add(1) & 2) << 62);
    (
        f64::from_bits(sin ^ swap ^ sin_sign),
        f64::from_bits(cos ^ swap ^ cos_sign),
        (y0.abs() < NEAR) | (y0.abs() > HALF_WAY),
    )
}

/// The sine of x + y, |x| ≤ π/4, y its rounding error; when exact, y is 0, and other operations
/// give the result.
#[inline(always)]
fn k_sin(x: f64, y: f64, exact: bool) -> f64 {
    let z = x * x;
    let w = z * z;
    let r = S2 + z * (S3 + z * S4) + z * w * (S5 + z * S6);
    let v = z * x;
    if exact {
        x + v * (S1 + z * r)
    } else {
        x - ((z * (0.5 * y - v * r) - y) - v * S1)
    }
}

/// The cosine of x + y.
#[inline(always)]
fn k_cos(x: f64, y: f64) -> f64 {
    let z = x * x;
    let w = z * z;
    let r = z * (C1 + z * (C2 + z * C3)) + w * w * (C4 + z * (C5 + z * C6));
    let hz = 0.5 * z;
    let w = 1.0 - hz;
    w + (((1.0 - w) - hz) + (z * r - x * y))
}

// Constants of `libm`, under its names.

/// ln 2 in two parts.
const LN2_HI: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LO: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
/// The polynomial of the logarithm.
const LG1: f64 = f64::from_bits(0x3fe5_5555_5555_5593);
const LG2: f64 = f64::from_bits(0x3fd9_9999_9997_fa04);
const LG3: f64 = f64::from_bits(0x3fd2_4924_9422_9359);
const LG4: f64 = f64::from_bits(0x3fcc_71c5_1d8e_78af);
const LG5: f64 = f64::from_bits(0x3fc7_4664_96cb_03de);
const LG6: f64 = f64::from_bits(0x3fc3_9a09_d078_c69f);
const LG7: f64 = f64::from_bits(0x3fc2_f112_df3e_5244);
/// π/2 in two parts, and 2/π.
const PIO2_1: f64 = f64::from_bits(0x3ff9_21fb_5440_0000);
const PIO2_1T: f64 = f64::from_bits(0x3dd0_b461_1a62_6331);
const INV_PIO2: f64 = f64::from_bits(0x3fe4_5f30_6dc9_c883);
/// The polynomial of the sine.
const S1: f64 = f64::from_bits(0xbfc5_5555_5555_5549);
const S2: f64 = f64::from_bits(0x3f81_1111_1110_f8a6);
const S3: f64 = f64::from_bits(0xbf2a_01a0_19c1_61d5);
const S4: f64 = f64::from_bits(0x3ec7_1de3_57b1_fe7d);
const S5: f64 = f64::from_bits(0xbe5a_e5e6_8a2b_9ceb);
const S6: f64 = f64::from_bits(0x3de5_d93a_5acf_d57c);
/// The polynomial of the cosine.
const C1: f64 = f64::from_bits(0x3fa5_5555_5555_554c);
const C2: f64 = f64::from_bits(0xbf56_c16c_16c1_5177);
const C3: f64 = f64::from_bits(0x3efa_01a0_19cb_1590);
const C4: f64 = f64::from_bits(0xbe92_7e4f_809c_52ad);
const C5: f64 = f64::from_bits(0x3e21_ee9e_bdb4_b1c4);
const C6: f64 = f64::from_bits(0xbda8_fae9_be88_38d4);

#[cfg(test)]
#[path = "normal_tests.rs"]
mod tests;
