//! Arithmetic between scalars of a schedule and batches of tensors.
//!
//! Scalars are f64 and stay so until they meet a tensor; tensors keep their dtype.

use crate::error::Result;
use crate::schedule::Point;
use candle_core::{Tensor, Var};

/// Where the elements of a batch stand: all at one point (sampling), or each at its own
/// (training, adaptive steps).
#[derive(Clone, Copy, Debug)]
pub enum At<'a> {
    /// The whole batch at one point.
    All(Point),
    /// Element `i` at point `i`.
    Each(&'a [Point]),
}

impl At<'_> {
    /// A scalar of the point, for the whole batch or element by element.
    pub fn coef(&self, f: impl Fn(&Point) -> f64) -> Coef {
        match self {
            At::All(point) => Coef::All(f(point)),
            At::Each(points) => Coef::Each(points.iter().map(f).collect()),
        }
    }

    /// The points of a batch of `n`.
    pub fn points(&self, n: usize) -> Vec<Point> {
        match self {
            At::All(point) => vec![*point; n],
            At::Each(points) => points.to_vec(),
        }
    }

    /// Whether some point satisfies a condition.
    pub fn any(&self, f: impl Fn(&Point) -> bool) -> bool {
        match self {
            At::All(point) => f(point),
            At::Each(points) => points.iter().any(f),
        }
    }
}

/// A scalar for the whole batch, or one an element.
#[derive(Clone, Debug, PartialEq)]
pub enum Coef {
    /// One scalar.
    All(f64),
    /// One scalar an element.
    Each(Vec<f64>),
}

impl Coef {
    /// `c x`, the scalar of element `i` times row `i` of `x`.
    ///
    /// # Errors
    /// When the number of scalars is not the batch size.
    pub fn times(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Coef::All(c) => diffusion_ops::combine(&[(*c, x)])?,
            Coef::Each(c) => diffusion_ops::combine_each(&[(c, x)])?,
        })
    }

    /// One scalar for each element of a batch.
    fn each(&self, batch: usize) -> Vec<f64> {
        match self {
            Coef::All(c) => vec![*c; batch],
            Coef::Each(c) => c.clone(),
        }
    }
}

/// One scalar an element as a tensor `[B, 1, …]` that broadcasts against `like`.
///
/// # Errors
/// When the number of scalars is not the batch size of `like`.
pub fn per_item(values: &[f64], like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.rank()];
    if let Some(batch) = shape.first_mut() {
        *batch = values.len();
    }
    Ok(Tensor::new(values, &candle_core::Device::Cpu)?
        .reshape(shape)?
        .to_dtype(like.dtype())?
        .to_device(like.device())?)
}

/// `a x + b y`.
///
/// # Errors
/// When shapes differ.
pub fn combine(a: &Coef, x: &Tensor, b: &Coef, y: &Tensor) -> Result<Tensor> {
    if let (Coef::All(a), Coef::All(b)) = (a, b) {
        return lincomb(*a, x, *b, y);
    }
    let batch = x.dims().first().copied().unwrap_or(1);
    Ok(diffusion_ops::combine_each(&[
        (&a.each(batch), x),
        (&b.each(batch), y),
    ])?)
}

/// `a x + b y` with scalars for the whole batch.
///
/// # Errors
/// When shapes differ.
pub fn lincomb(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok(diffusion_ops::combine(&[(a, x), (b, y)])?)
}

/// Mean over every dimension but the first: `[B, …] → [B]`.
///
/// # Errors
/// Those of the tensor library.
pub fn mean_per_item(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(1)?.mean(1)?)
}

/// Whether every entry is finite.
///
/// # Errors
/// Those of the tensor library.
pub fn all_finite(x: &Tensor) -> Result<bool> {
    Ok(diffusion_ops::first_not_finite(&[x])?.is_none())
}

/// The gradient of a scalar function with respect to its input, cut off from any graph.
///
/// # Errors
/// When the function does not depend on `x` or a tensor operation fails.
pub fn gradient(x: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let var = Var::from_tensor(&x.detach())?;
    let grads = diffusion_ops::backward(&f(var.as_tensor())?)?;
    match grads.get(var.as_tensor()) {
        Some(gradient) => Ok(gradient.detach()),
        None => Err(crate::error::Report::new(
            "gradient",
            "the function does not depend on its input",
        )
        .expected("a scalar computed from the tensor that was passed in")
        .config()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn each_element_gets_its_own_scalar() {
        let x = Tensor::ones((2, 3), DType::F64, &Device::Cpu).unwrap();
        let y = Coef::Each(vec![2.0, -1.0]).times(&x).unwrap();
        assert_eq!(y.to_vec2::<f64>().unwrap(), [[2.0; 3], [-1.0; 3]]);
        assert!(Coef::Each(vec![1.0; 3]).times(&x).is_err());
    }

    #[test]
    fn finds_what_is_not_finite() {
        let t = |v: f32| Tensor::new(&[1.0, v], &Device::Cpu).unwrap();
        assert!(all_finite(&t(-3.0)).unwrap());
        assert!(!all_finite(&t(f32::NAN)).unwrap());
        assert!(!all_finite(&t(f32::NEG_INFINITY)).unwrap());
    }

    #[test]
    fn gradient_of_a_cube() {
        let x = Tensor::new(&[2.0, 3.0], &Device::Cpu).unwrap();
        let g = gradient(&x, |x| Ok(x.powf(3.0)?.sum_all()?)).unwrap();
        assert_eq!(g.to_vec1::<f64>().unwrap(), [12.0, 27.0]);
        assert!(gradient(&x, |_| Ok(Tensor::new(1.0, &Device::Cpu)?)).is_err());
    }
}
