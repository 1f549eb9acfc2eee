//! Pointwise nonlinearities.

use crate::cpu::{CHUNK, Real, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::deliver;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply1;
use crate::vmath::{abs, exp_of_minus, normal_tail, real, sigmoid};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::marker::PhantomData;

/// The sigmoid-weighted linear unit, also called swish (Ramachandran et al. 2017).
///
/// ```text
/// y = x / (1 + e^{−x})
/// ```
///
/// # Shapes
/// Any; the result has the shape of `x`.
///
/// # Errors
/// Those of the tensor library.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Activation::Silu.apply(x)
}

/// Mish (Misra 2019).
///
/// ```text
/// y = x tanh(ln(1 + e^x))
/// ```
///
/// # Shapes
/// Any; the result has the shape of `x`.
///
/// # Errors
/// Those of the tensor library.
pub fn mish(x: &Tensor) -> Result<Tensor> {
    Activation::Mish.apply(x)
}

/// The Gaussian error linear unit, in its exact form (Hendrycks and Gimpel 2016).
///
/// ```text
/// y = x Φ(x) = x (1 + erf(x/√2)) / 2
/// ```
///
/// # Shapes
/// Any; the result has the shape of `x`.
///
/// # Errors
/// Those of the tensor library.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Activation::Gelu.apply(x)
}

/// The Gaussian error linear unit, in its approximate form (Hendrycks and Gimpel 2016, section 2).
///
/// ```text
/// y = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2
/// ```
///
/// # Shapes
/// Any; the result has the shape of `x`.
///
/// # Errors
/// Those of the tensor library.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    Activation::GeluTanh.apply(x)
}

/// The rectified linear unit.
///
/// ```text
/// y = max(x, 0),   with derivative 0 at x = 0
/// ```
///
/// # Shapes
/// Any; the result has the shape of `x`.
///
/// # Errors
/// Those of the tensor library.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    Activation::Relu.apply(x)
}

/// A pointwise nonlinearity by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// [`silu`].
    Silu,
    /// [`mish`].
    Mish,
    /// [`gelu`].
    Gelu,
    /// [`gelu_tanh`].
    GeluTanh,
    /// [`relu`].
    Relu,
}

impl Activation {
    /// The function of this name.
    ///
    /// # Shapes
    /// Any; the result has the shape of `x`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        if native(x) {
            return apply1(&x.contiguous()?, Pointwise(self));
        }
        if half_on_cpu(x) {
            return self.apply(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype());
        }
        self.composed(x)
    }

    /// The same function from the tensor library's differentiable operations.
    pub(crate) fn composed(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Mish => {
                // ln(1 + e^x) = max(x, 0) + ln(1 + e^{−|x|}) does not overflow.
                let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
                x * softplus.tanh()?
            }
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => {
                let inner = ((x.sqr()? * GELU_CUBIC)? + 1.0)?;
                let inner = ((x * inner)? * (2.0 / std::f64::consts::PI).sqrt())?;
                (x * (inner.tanh()? + 1.0)?)? * 0.5
            }
            Self::Relu => x.relu(),
        }
    }
}

const GELU_CUBIC: f64 = 0.044715;

/// A pointwise function and its derivative, for use inside kernels.
pub(crate) trait Function: Send + Sync + 'static {
    fn value<S: Simd, T: Real>(x: T) -> T;
    fn slope<S: Simd, T: Real>(x: T) -> T;
}

/// Runs the body with the type alias bound to the function of an activation (or of none).
macro_rules! by_activation {
    ($activation:expr, $f:ident => $body:expr) => {{
        macro_rules! with {
            ($function:ident) => {{
                type $f = $crate::activation::$function;
                $body
            }};
        }
        match $activation {
            None => with!(Identity),
            Some($crate::activation::Activation::Silu) => with!(Silu),
            Some($crate::activation::Activation::Mish) => with!(Mish),
            Some($crate::activation::Activation::Gelu) => with!(Gelu),
            Some($crate::activation::Activation::GeluTanh) => with!(GeluTanh),
            Some($crate::activation::Activation::Relu) => with!(Relu),
        }
    }};
}
pub(crate) use by_activation;

pub(crate) struct Identity;

impl Function for Identity {
    #[inline(always)]
    fn value<S: Simd, T: Real>(x: T) -> T {
        x
    }
    #[inline(always)]
    fn slope<S: Simd, T: Real>(_: T) -> T {
        real(1.0)
    }
}

pub(crate) struct Silu;

impl Silu {
    /// Where both factors of the function are still finite numbers: below, it is 0 within 1e-35.
    #[inline(always)]
    fn bounded<T: Real>(x: T) -> T {
        if x < real(-87.0) { real(-87.0) } else { x }
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value<S: Simd, T: Real>(x: T) -> T {
        let x = Self::bounded(x);
        x / (real::<T>(1.0) + exp_of_minus::<S, T>(x))
    }
    #[inline(always)]
    fn slope<S: Simd, T: Real>(x: T) -> T {
        // s + x s (1 − s)
        let x = Self::bounded(x);
        let s = sigmoid::<S, T>(x);
        s * S::mul_add(x, real::<T>(1.0) - s, real(1.0))
    }
}

pub(crate) struct Mish;

impl Mish {
    /// e = e^x and w = (1 + e)² − 1 = e (e + 2), with which tanh(ln(1 + e)) = w/(w + 2). Beyond
    /// x = 20 the quotient is 1 to the last bit.
    #[inline(always)]
    fn parts<S: Simd, T: Real>(x: T) -> (T, T) {
        let x = if x > real(20.0) { real(20.0) } else { x };
        let e = exp_of_minus::<S, T>(-x);
        (e, e * (e + real(2.0)))
    }
}

impl Function for Mish {
    #[inline(always)]
    fn value<S: Simd, T: Real>(x: T) -> T {
        let x = Silu::bounded(x);
        let (_, w) = Self::parts::<S, T>(x);
        x * (w / (w + real(2.0)))
    }
    #[inline(always)]
    fn slope<S: Simd, T: Real>(x: T) -> T {
        // With t = w d and d = 1/(w + 2): t + x (1 − t²) e/(1 + e), where 1 − t² = 4 (1 + e)² d².
        let x = Silu::bounded(x);
        let (e, w) = Self::parts::<S, T>(x);
        let d = real::<T>(1.0) / (w + real(2.0));
        let s = e * d * ((e + real(1.0)) * d) * real(4.0);
        S::mul_add(x, s, w * d)
    }
}

pub(crate) struct Gelu;

impl Function for Gelu {
    #[inline(always)]
    fn value<S: Simd, T: Real>(x: T) -> T {
        // x Φ(x) = max(x, 0) − |x| (1 − Φ(|x|)); below −87 it is 0 within 1e-35.
        let a = abs(Silu::bounded(x));
        Relu::value::<S, T>(x) - a * normal_tail::<S, T>(a).0
    }
    #[inline(always)]
    fn slope<S: Simd, T: Real>(x: T) -> T {
        let x = Silu::bounded(x);
        let (tail, density) = normal_tail::<S, T>(abs(x));
        let cdf = if x < real(0.0) {
            tail
        } else {
            real::<T>(1.0) - tail
        };
        S::mul_add(x, density, cdf)
    }
}

pub(crate) struct GeluTanh;

impl GeluTanh {
    /// √(8/π): (1 + tanh u)/2 is the sigmoid of 2u.
    const TWICE: f64 = 1.595_769_121_605_730_8;

    /// Beyond 20 on both sides the sigmoid has reached its limits.
    #[inline(always)]
    fn parts<S: Simd, T: Real>(x: T) -> (T, T) {
        let x = if x > real(20.0) { real(20.0) } else { x };
        let x = if x < real(-20.0) { real(-20.0) } else { x };
        let (a, square) = (real::<T>(Self::TWICE), x * x);
        let u = x * S::mul_add(square, a * real(GELU_CUBIC), a);
        let slope = x * S::mul_add(square, a * real(3.0 * GELU_CUBIC), a);
        (sigmoid::<S, T>(u), slope)
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn value<S: Simd, T: Real>(x: T) -> T {
        let x = Silu::bounded(x);
        x * Self::parts::<S, T>(x).0
    }
    #[inline(always)]
    fn slope<S: Simd, T: Real>(x: T) -> T {
        // s + x s (1 − s) (2u)′
        let (s, slope) = Self::parts::<S, T>(x);
        s * S::mul_add(slope, real::<T>(1.0) - s, real(1.0))
    }
}

pub(crate) struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn value<S: Simd, T: Real>(x: T) -> T {
        // Written so that a not-a-number stays one.
        if x < real(0.0) { real(0.0) } else { x }
    }
    #[inline(always)]
    fn slope<S: Simd, T: Real>(x: T) -> T {
        if x > real(0.0) { real(1.0) } else { real(0.0) }
    }
}

struct Forward<'a, F, T> {
    x: &'a [T],
    out: &'a mut [T],
    function: PhantomData<F>,
}

impl<F: Function, T: Real> Kernel for Forward<'_, F, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (o, x) in self.out.iter_mut().zip(self.x) {
            *o = F::value::<S, T>(*x);
        }
    }
}

struct Backward<'a, F, T> {
    x: &'a [T],
    grad: &'a [T],
    out: &'a mut [T],
    function: PhantomData<F>,
}

impl<F: Function, T: Real> Kernel for Backward<'_, F, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        for ((o, x), g) in self.out.iter_mut().zip(self.x).zip(self.grad) {
            *o = *g * F::slope::<S, T>(*x);
        }
    }
}

struct Pointwise(Activation);

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            by_activation!(Some(self.0), F => map::<F, T>(x))
        });
        Ok((out, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        deliver(x, x.detach().apply_op2_no_bwd(&grad, &Slope(self.0))?)
    }
}

/// g f′(x).
struct Slope(Activation);

impl CustomOp2 for Slope {
    fn name(&self) -> &'static str {
        "activation_backward"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s1, self.name(), T => {
            let x = slice::<T>(s1, l1, self.name())?;
            let grad = slice::<T>(s2, l2, self.name())?;
            by_activation!(Some(self.0), F => map_slope::<F, T>(x, grad))
        });
        Ok((out, l1.shape().clone()))
    }
}

fn map<F: Function, T: Real>(x: &[T]) -> CpuStorage {
    let fill = |out: &mut [T]| {
        let chunks = out.par_chunks_mut(CHUNK).with_min_len(worth(CHUNK));
        chunks.zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
            let function = PhantomData::<F>;
            dispatch(Forward { x, out, function });
        });
    };
    // SAFETY: the chunks cover the output, of which every element is written and none read.
    unsafe { written(x.len(), fill) }
}

fn map_slope<F: Function, T: Real>(x: &[T], grad: &[T]) -> CpuStorage {
    let fill = |out: &mut [T]| {
        let inputs = x.par_chunks(CHUNK).zip(grad.par_chunks(CHUNK));
        let chunks = out.par_chunks_mut(CHUNK).with_min_len(worth(CHUNK));
        chunks.zip(inputs).for_each(|(out, (x, grad))| {
            let function = PhantomData::<F>;
            dispatch(Backward {
                x,
                grad,
                out,
                function,
            });
        });
    };
    // A gradient of another length would leave elements unwritten.
    assert_eq!(x.len(), grad.len());
    // SAFETY: as in `map`.
    unsafe { written(x.len(), fill) }
}

#[cfg(test)]
#[path = "activation_tests.rs"]
mod tests;
