//! The model in closed form that scheduler fixtures were run with.
//!
//! Data that are normal, element by element, `x₀ ~ N(μ, s²)`, have the exact predictions
//!
//! ```text
//! x = a x₀ + b ε,   ε̂(x) = b (x − a μ)/(a² s² + b²),   x̂₀(x) = μ + a s² (x − a μ)/(a² s² + b²)
//! ```

use anyhow::Result;
use candle_core::Tensor;
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::predict::{Kind, Prediction, edm_out, edm_skip};
use diffusion_core::schedule::{Point, Table};
use diffusion_core::tensor::{At, lincomb};
use std::cell::{Cell, RefCell};

/// Where `a` and `b` come from.
#[derive(Clone, Debug)]
pub enum Coefficients {
    /// From the table, at the integer timestep that the model is told.
    AlphaBar(Table),
    /// From the noise level of the step.
    Point,
    /// As they were recorded, call by call: of DPM2's ancestral class the recorded model took the
    /// middle of the next pair for the middle of this one.
    Recorded(Vec<(f64, f64)>),
}

/// Normal data, seen as what a scheduler expects of its model.
#[derive(Clone, Debug)]
pub struct ClosedForm {
    /// `μ`, `[1, C, …]`.
    pub mu: Tensor,
    /// `s²`, `[1, C, …]`.
    pub variance: Tensor,
    /// What is said.
    pub kind: Kind,
    /// Where `a` and `b` come from.
    pub coefficients: Coefficients,
    /// The learned mixing weight of the variance, `[1, C, …]`.
    pub var_mix: Option<Tensor>,
    /// Calls so far.
    pub calls: Cell<usize>,
}

impl ClosedForm {
    fn coefficients(&self, at: &Point) -> (f64, f64) {
        match &self.coefficients {
            Coefficients::AlphaBar(table) => {
                let p = table.index(at.t.max(0.0) as i64);
                (p.alpha, p.sigma)
            }
            Coefficients::Point => (at.alpha, at.sigma),
            Coefficients::Recorded(list) => {
                let known = list.get(self.calls.get()).copied();
                self.calls.set(self.calls.get() + 1);
                known.unwrap_or((at.alpha, at.sigma))
            }
        }
    }
}

impl Denoiser for ClosedForm {
    fn predict(
        &self,
        x: &Tensor,
        at: At<'_>,
        _: &mut Call<'_>,
    ) -> diffusion_core::Result<Prediction> {
        let At::All(at) = at else {
            return Err(
                diffusion_core::Report::new("closed form", "one point an item")
                    .expected("one point for the batch")
                    .unsupported(),
            );
        };
        let (a, b) = self.coefficients(&at);
        let den = self.variance.affine(a * a, b * b)?;
        let slope = x
            .broadcast_sub(&self.mu.affine(a, 0.0)?)?
            .broadcast_div(&den)?;
        let epsilon = slope.affine(b, 0.0)?;
        let x0 = slope
            .broadcast_mul(&self.variance.affine(a, 0.0)?)?
            .broadcast_add(&self.mu)?;
        let value = match self.kind {
            Kind::Epsilon => epsilon,
            Kind::X0 => x0,
            Kind::Velocity => lincomb(a, &epsilon, -b, &x0)?,
            Kind::Flow => (epsilon - x0)?,
            Kind::Score => epsilon.affine(-1.0 / b, 0.0)?,
            Kind::Edm {
                sigma_data,
                negative,
            } => {
                let sign = if negative { -1.0 } else { 1.0 };
                let out = sign * edm_out(b, sigma_data);
                lincomb(1.0 / out, &x0, -edm_skip(b, sigma_data) / out, x)?
            }
        };
        let mut said = Prediction::new(self.kind, value);
        said.var_mix = match &self.var_mix {
            Some(mix) => Some(mix.broadcast_as(x.shape())?),
            None => None,
        };
        Ok(said)
    }
}

/// What a denoiser was asked, and the data that its answer means.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The sample.
    pub x: Tensor,
    /// Where it stood.
    pub at: Point,
    /// `x₀` after clipping.
    pub x0: Tensor,
    /// The whole answer.
    pub said: Prediction,
}

/// Writes down every call.
pub struct Recorder<D> {
    inner: D,
    calls: RefCell<Vec<Asked>>,
}

impl<D> Recorder<D> {
    /// Around a denoiser.
    pub fn new(inner: D) -> Self {
        Self {
            inner,
            calls: RefCell::default(),
        }
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<Asked> {
        self.calls.borrow().clone()
    }
}

impl<D: Denoiser> Denoiser for Recorder<D> {
    fn predict(
        &self,
        x: &Tensor,
        at: At<'_>,
        call: &mut Call<'_>,
    ) -> diffusion_core::Result<Prediction> {
        let said = self.inner.predict(x, at, call)?;
        if let At::All(point) = at {
            let x0 = said.x0(x, at)?;
            self.calls.borrow_mut().push(Asked {
                x: x.clone(),
                at: point,
                x0,
                said: said.clone(),
            });
        }
        Ok(said)
    }
}

/// A tensor `[C, …]` as `[1, C, …]`.
///
/// # Errors
/// Those of the tensor library.
pub fn of_one_item(x: &Tensor) -> Result<Tensor> {
    Ok(x.unsqueeze(0)?)
}
