//! The elementary functions against those of the standard library in `f64`.

use super::*;
use crate::gradcheck::at_every_level;
use crate::simd::{Kernel, dispatch};
use candle_core::Result;

/// One function over many arguments, as the kernels use it.
struct Sweep<'a, F>(&'a [f32], &'a mut [f32], F);

trait Unary: Copy {
    fn at<S: Simd>(self, x: f32) -> f32;
}

impl<F: Unary> Kernel for Sweep<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (o, x) in self.1.iter_mut().zip(self.0) {
            *o = self.2.at::<S>(*x);
        }
    }
}

macro_rules! unary {
    ($name:ident, $x:ident => $body:expr) => {
        #[derive(Clone, Copy)]
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn at<S: Simd>(self, $x: f32) -> f32 {
                $body
            }
        }
    };
}
unary!(ExpNonpositive, x => exp_nonpositive::<S, f32>(x));
unary!(Sigmoid, x => sigmoid::<S, f32>(x));
unary!(Expm1, x => expm1_of_minus_twice_abs::<S, f32>(x));
unary!(Tail, x => normal_tail::<S, f32>(x).0);
unary!(Density, x => normal_tail::<S, f32>(x).1);

/// The largest relative error over an interval, in units of 2⁻²⁴ (half an ulp of numbers just
/// above a power of two, a whole one of those just below).
fn worst(f: impl Unary, lo: f32, hi: f32, exact: impl Fn(f64) -> f64) -> f64 {
    const N: usize = 200_001;
    let x: Vec<f32> = (0..N)
        .map(|i| lo + (hi - lo) * (i as f32 / (N - 1) as f32))
        .collect();
    let mut y = vec![0f32; N];
    dispatch(Sweep(&x, &mut y, f));
    let error = |(x, y): (&f32, &f32)| {
        let e = exact(f64::from(*x));
        (f64::from(*y) - e).abs() / e.abs().max(f64::from(f32::MIN_POSITIVE))
    };
    x.iter().zip(&y).map(error).fold(0.0, f64::max) * 2f64.powi(24)
}

fn one(f: impl Unary, x: f32) -> f32 {
    let mut y = [0f32; 40];
    dispatch(Sweep(&[x; 40], &mut y, f));
    assert!(y.iter().all(|v| v.to_bits() == y[0].to_bits()), "{y:?}");
    y[0]
}

#[test]
fn errors_stay_within_what_is_stated() -> Result<()> {
    at_every_level(|level| {
        let check = |name: &str, error: f64, limit: f64| {
            assert!(
                error <= limit,
                "{name} at {level:?}: {error:.2}, limit {limit}"
            );
        };
        check(
            "exp, nonpositive",
            worst(ExpNonpositive, -87.3, 0.0, f64::exp),
            2.0,
        );
        let exact = |x: f64| 1.0 / (1.0 + (-x).exp());
        check("sigmoid", worst(Sigmoid, -40.0, 40.0, exact), 16.0);
        check("sigmoid, middle", worst(Sigmoid, -6.0, 6.0, exact), 8.0);
        let exact = |x: f64| (-2.0 * x).exp_m1();
        check("expm1", worst(Expm1, 0.0, 10.0, exact), 5.0);
        check("expm1, small", worst(Expm1, 0.0, 1e-3, exact), 5.0);
        check("expm1, tiny", worst(Expm1, 1e-30, 1e-20, exact), 5.0);
        let exact = |x: f64| 0.5 * libm::erfc(x / 2f64.sqrt());
        check("normal tail", worst(Tail, 0.0, 4.0, exact), 8.0 + 16.0);
        check(
            "normal tail, far",
            worst(Tail, 4.0, 12.0, exact),
            8.0 + 144.0,
        );
        let exact = |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
        check("density", worst(Density, 0.0, 4.0, exact), 24.0);
        Ok(())
    })
}

#[test]
fn ends_of_the_range() -> Result<()> {
    at_every_level(|_| {
        assert_eq!(one(ExpNonpositive, f32::NEG_INFINITY), 0.0);
        assert_eq!(one(ExpNonpositive, 0.0), 1.0);
        assert_eq!(one(Sigmoid, f32::INFINITY), 1.0);
        assert!(one(Sigmoid, f32::NEG_INFINITY) < 1e-37);
        assert_eq!(
            [one(Expm1, 1e30), one(Expm1, f32::NEG_INFINITY)],
            [-1.0, -1.0]
        );
        assert_eq!(one(Expm1, -0.0), 0.0);
        assert!((one(Tail, 0.0) - 0.5).abs() < 1e-7);
        assert!(one(Tail, 1e30) < 1e-37);
        for bits in [0x7fc0_0000, 0x7fc0_0001, 0xffff_ffff] {
            let nan = f32::from_bits(bits);
            assert!(one(ExpNonpositive, nan).is_nan());
            assert!(one(Sigmoid, nan).is_nan() && one(Expm1, nan).is_nan());
            assert!(one(Tail, nan).is_nan());
        }
        Ok(())
    })
}

struct Sums<'a>(&'a [f32]);

impl Kernel for Sums<'_> {
    type Out = [f32; 8];
    #[inline(always)]
    fn run<S: Simd>(self) -> Self::Out {
        let x = self.0;
        let [total, moment] = sum_and_moment::<S, f32>(x, x, 2.0);
        let weighted = weighted_sum_and_moment::<S, f32>(x, x, x, 1.0);
        [
            sum::<S, f32>(x),
            squared_deviations::<S, f32>(x, 3.0),
            dot::<S, f32>(x, x),
            total,
            moment,
            weighted[0],
            weighted[1],
            maximum(x),
        ]
    }
}

#[test]
fn sums_and_maxima_of_every_length() -> Result<()> {
    at_every_level(|_| {
        for n in (0..70).chain([127, 128, 129, 1000]) {
            // Small integers, so that every order gives the same sum.
            let x: Vec<f32> = (0..n).map(|i| ((i * 37) % 23) as f32 - 11.0).collect();
            let sum_of = |f: fn(f32) -> f32| x.iter().map(|v| f(*v)).sum::<f32>();
            let expected = [
                sum_of(|v| v),
                sum_of(|v| (v - 3.0) * (v - 3.0)),
                sum_of(|v| v * v),
                sum_of(|v| v),
                sum_of(|v| v * (v - 2.0)),
                sum_of(|v| v * v),
                sum_of(|v| v * v * (v - 1.0)),
                x.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            ];
            assert_eq!(dispatch(Sums(&x)), expected, "{n}");
        }
        Ok(())
    })
}
