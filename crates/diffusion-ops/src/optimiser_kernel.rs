//! The loops of the optimiser's passes.

use crate::cpu::Real;
use crate::simd::{Kernel, Simd};

/// What the kernels here need beside [`Real`].
pub(super) trait Number: Real {
    fn root(self) -> Self;
    fn wide(self) -> f64;
    fn finite(self) -> bool;
    /// The bits without the sign, which are in the order of the sizes; NaN and infinity are last.
    type Bits: Copy + Ord;
    const ZERO_BITS: Self::Bits;
    fn magnitude(self) -> Self::Bits;
    fn magnitude_is_finite(bits: Self::Bits) -> bool;
}

impl Number for f32 {
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.is_finite()
    }
    type Bits = u32;
    const ZERO_BITS: u32 = 0;
    #[inline(always)]
    fn magnitude(self) -> u32 {
        self.to_bits() & !(1 << (u32::BITS - 1))
    }
    #[inline(always)]
    fn magnitude_is_finite(bits: u32) -> bool {
        bits < f32::INFINITY.to_bits()
    }
}

impl Number for f64 {
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.is_finite()
    }
    type Bits = u64;
    const ZERO_BITS: u64 = 0;
    #[inline(always)]
    fn magnitude(self) -> u64 {
        self.to_bits() & !(1 << (u64::BITS - 1))
    }
    #[inline(always)]
    fn magnitude_is_finite(bits: u64) -> bool {
        bits < f64::INFINITY.to_bits()
    }
}

const LANES: usize = 32;

/// Σ x² in partial sums enough to keep a vector unit busy.
pub(super) struct Squares<'a, T>(pub &'a [T]);

impl<T: Number> Kernel for Squares<'_, T> {
    type Out = f64;
    #[inline(always)]
    fn run<S: Simd>(self) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        for chunk in chunks {
            for k in 0..LANES {
                let x = chunk[k].wide();
                lanes[k] = S::mul_add(x, x, lanes[k]);
            }
        }
        for (k, x) in rest.iter().enumerate() {
            let x = x.wide();
            lanes[k] = S::mul_add(x, x, lanes[k]);
        }
        lanes.iter().sum()
    }
}

pub(super) struct Finite<'a, T>(pub &'a [T]);

impl<T: Number> Kernel for Finite<'_, T> {
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self) -> bool {
        // Lane by lane, as wide as the numbers are: an `or` of booleans is packed and slow.
        let mut worst = [T::ZERO_BITS; LANES];
        let (whole, rest) = self.0.as_chunks::<LANES>();
        for x in whole {
            for (worst, x) in worst.iter_mut().zip(x) {
                *worst = (*worst).max(x.magnitude());
            }
        }
        let whole = worst.into_iter().all(T::magnitude_is_finite);
        whole && rest.iter().all(|x| x.finite())
    }
}

/// The moving average.
pub(super) struct Follow<'a, T> {
    pub s: &'a mut [T],
    pub p: &'a [T],
    pub pull: T,
}

impl<T: Number> Kernel for Follow<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (s, &p) in self.s.iter_mut().zip(self.p) {
            *s -= self.pull * (*s - p);
        }
    }
}

/// AdamW, and the moving average after it.
pub(super) struct Adam<'a, T> {
    pub p: &'a mut [T],
    pub m: &'a mut [T],
    pub v: &'a mut [T],
    pub g: &'a [T],
    pub s: Option<&'a mut [T]>,
    pub c: Numbers<T>,
}

#[derive(Clone, Copy)]
pub(super) struct Numbers<T> {
    pub scale: T,
    pub keep: [T; 2],
    pub add: [T; 2],
    pub decay: T,
    pub rate: T,
    pub root: T,
    pub eps: T,
    pub pull: T,
}

impl<T: Number> Adam<'_, T> {
    /// The new parameter. Products and sums are rounded one by one, so that the bits are those of
    /// the formula at every level.
    #[inline(always)]
    fn descend(c: &Numbers<T>, p: T, m: &mut T, v: &mut T, g: T) -> T {
        let g = g * c.scale;
        *m = c.keep[0] * *m + c.add[0] * g;
        *v = c.keep[1] * *v + c.add[1] * g * g;
        c.decay * p - c.rate * *m / (v.root() * c.root + c.eps)
    }
}

impl<T: Number> Kernel for Adam<'_, T> {
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self) -> bool {
        let Self { p, m, v, g, s, c } = self;
        let n = p.len();
        let (m, v, g) = (&mut m[..n], &mut v[..n], &g[..n]);
        let mut bad = false;
        match s {
            Some(s) => {
                let s = &mut s[..n];
                for i in 0..n {
                    let new = Self::descend(&c, p[i], &mut m[i], &mut v[i], g[i]);
                    let finite = new.finite();
                    bad |= !finite;
                    p[i] = new;
                    // A number that is not finite must not reach the average.
                    let follow = s[i] - c.pull * (s[i] - new);
                    s[i] = if finite { follow } else { s[i] };
                }
            }
            None => {
                for i in 0..n {
                    let new = Self::descend(&c, p[i], &mut m[i], &mut v[i], g[i]);
                    bad |= !new.finite();
                    p[i] = new;
                }
            }
        }
        !bad
    }
}
