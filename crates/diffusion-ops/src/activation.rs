//! Pointwise nonlinearities.

use crate::cpu::{CHUNK, Real, by_float, filled, native, slice, worth};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

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
    if native(x) {
        pointwise(x, Kind::Silu)
    } else {
        x.silu()
    }
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
    if native(x) {
        return pointwise(x, Kind::Mish);
    }
    // ln(1 + e^x) = max(x, 0) + ln(1 + e^{−|x|}) does not overflow.
    let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    x * softplus.tanh()?
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
    if native(x) {
        pointwise(x, Kind::Gelu)
    } else {
        x.gelu_erf()
    }
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
    if native(x) {
        pointwise(x, Kind::Relu)
    } else {
        x.relu()
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Silu,
    Mish,
    Gelu,
    Relu,
}

fn pointwise(x: &Tensor, kind: Kind) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Pointwise(kind))
}

fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).exp())
}

/// tanh(ln(1 + e^x)); beyond 20 it is 1 to the last bit of `f32` and within 1e-17 of it.
fn tanh_softplus<T: Real>(x: T) -> T {
    if x > T::from_f64(20.0) {
        T::one()
    } else {
        x.exp().ln_1p().tanh()
    }
}

fn normal_cdf<T: Real>(x: T) -> T {
    (T::one() + (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf()) * T::from_f64(0.5)
}

struct Pointwise(Kind);

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            match self.0 {
                Kind::Silu => map(x, |x| x * sigmoid(x)),
                Kind::Mish => map(x, |x| x * tanh_softplus(x)),
                Kind::Gelu => map(x, |x| x * normal_cdf(x)),
                Kind::Relu => map(x, |x: T| if x > 0.0 { x } else { 0.0 }),
            }
        });
        Ok((out, l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        Ok(Some(x.detach().apply_op2_no_bwd(&grad, &Backward(self.0))?))
    }
}

struct Backward(Kind);

impl CustomOp2 for Backward {
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
            let g = slice::<T>(s2, l2, self.name())?;
            let one = 1.0 as T;
            match self.0 {
                Kind::Silu => map2(x, g, move |x, g| {
                    let s = sigmoid(x);
                    g * s * (one + x * (one - s))
                }),
                Kind::Mish => map2(x, g, move |x, g| {
                    let t = tanh_softplus(x);
                    g * (t + x * (one - t * t) * sigmoid(x))
                }),
                Kind::Gelu => map2(x, g, move |x, g| {
                    // Φ' is the standard normal density.
                    let density = (-x * x * 0.5).exp() * (1.0 / std::f64::consts::TAU.sqrt()) as T;
                    g * (normal_cdf(x) + x * density)
                }),
                Kind::Relu => map2(x, g, |x: T, g| if x > 0.0 { g } else { 0.0 }),
            }
        });
        Ok((out, l1.shape().clone()))
    }
}

fn map<T: Real>(x: &[T], f: impl Fn(T) -> T + Sync) -> CpuStorage {
    filled(x.len(), |out: &mut [T]| {
        out.par_chunks_mut(CHUNK)
            .with_min_len(worth(CHUNK))
            .zip(x.par_chunks(CHUNK))
            .for_each(|(o, x)| o.iter_mut().zip(x).for_each(|(o, x)| *o = f(*x)));
    })
}

fn map2<T: Real>(x: &[T], y: &[T], f: impl Fn(T, T) -> T + Sync) -> CpuStorage {
    filled(x.len(), |out: &mut [T]| {
        out.par_chunks_mut(CHUNK)
            .with_min_len(worth(CHUNK))
            .zip(x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK)))
            .for_each(|(o, (x, y))| {
                o.iter_mut()
                    .zip(x.iter().zip(y))
                    .for_each(|(o, (x, y))| *o = f(*x, *y));
            });
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_relative_error, normal};
    use candle_core::{DType, Device};

    #[test]
    fn known_values() -> Result<()> {
        // Values at 1 and −2 from the definitions, computed with 30 digits.
        let x = Tensor::new(&[1f64, -2.0, 0.0], &Device::Cpu)?;
        let check = |y: Tensor, expected: [f64; 2]| -> Result<()> {
            let y = y.to_vec1::<f64>()?;
            assert!((y[0] - expected[0]).abs() < 1e-15, "{y:?}");
            assert!((y[1] - expected[1]).abs() < 1e-15, "{y:?}");
            assert_eq!(y[2], 0.0);
            Ok(())
        };
        check(silu(&x)?, [0.731_058_578_630_004_9, -0.238_405_844_044_235])?;
        check(
            mish(&x)?,
            [0.865_098_388_267_310_3, -0.252_501_482_695_708_9],
        )?;
        check(
            gelu(&x)?,
            [0.841_344_746_068_543, -0.045_500_263_896_358_41],
        )?;
        check(relu(&x)?, [1.0, 0.0])
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let x = [(normal(1, (7, 13))? * 3.0)?];
        for (name, f) in [
            ("silu", silu as fn(&Tensor) -> _),
            ("mish", mish),
            ("gelu", gelu),
            ("relu", relu),
        ] {
            let e = max_relative_error(|t| f(&t[0]), &x)?;
            assert!(e < 1e-6, "{name}: {e:e}");
        }
        Ok(())
    }

    #[test]
    fn extremes_stay_finite() -> Result<()> {
        let x = candle_core::Var::new(&[-1e4f32, -100.0, 100.0, 1e4], &Device::Cpu)?;
        for f in [silu, mish, gelu, relu] {
            let y = f(&x)?;
            assert_eq!(y.to_vec1::<f32>()?[2..], [100.0, 1e4]);
            let grads = y.sum_all()?.backward()?;
            let g = grads.get(&x).unwrap().to_vec1::<f32>()?;
            assert_eq!([g[0].abs(), g[3]], [0.0, 1.0]);
        }
        let half = silu(&x.to_dtype(DType::F16)?)?;
        assert_eq!(half.dtype(), DType::F16);
        Ok(())
    }
}
