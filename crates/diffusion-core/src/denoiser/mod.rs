//! What the network believes at a point: the third of the four nouns.
//!
//! A [`Denoiser`] takes a noisy batch and where it stands, and says what it thinks
//! ([`Prediction`]). Guidance and thresholding ([`crate::guide`]) are denoisers that wrap a denoiser;
//! a conditional model is one that holds its condition.
//!
//! | file | what |
//! |---|---|
//! | [`network`] | a network that is told the time in its own code |
//! | [`edm`] | EDM's preconditioning |
//! | [`precondition`] | networks behind other scalings |
//! | `vp_precond`, `ve_precond`, `iddpm_precond` | the scalings of the families that EDM compares |
//! | [`frame`] | a VP network inside a VE sampler |

pub mod edm;
pub mod frame;
mod iddpm_precond;
pub mod learned_variance;
pub mod network;
pub mod precondition;
pub mod previous;
mod ve_precond;
mod vp_precond;

pub use edm::EdmNetwork;
pub use frame::VpInVe;
pub use iddpm_precond::IddpmPrecond;
pub use learned_variance::LearnedVariance;
pub use network::{Network, TimeCode};
pub use precondition::{Preconditioned, Preconditioner, Scalings};
pub use previous::PreviousX;
pub use ve_precond::VePrecond;
pub use vp_precond::VpPrecond;

use crate::error::Result;
use crate::noise::Noise;
use crate::predict::Prediction;
use crate::tensor::At;
use candle_core::Tensor;
use std::ops::Range;

/// What a denoiser may need to know about a call.
pub struct Call<'a> {
    /// Noise for stochastic networks.
    pub noise: &'a mut dyn Noise,
    /// Which items of the run the batch holds.
    pub items: Range<u64>,
    /// Whether gradients flow through the call (training); sampling cuts them off.
    pub tracked: bool,
}

/// A belief about noisy data.
pub trait Denoiser {
    /// What the noisy batch `x`, `[B, …]`, standing `at` these points, came from.
    ///
    /// # Errors
    /// Whatever the network and its wrappers refuse.
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction>;
}

impl<D: Denoiser + ?Sized> Denoiser for &D {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        (**self).predict(x, at, call)
    }
}

impl<D: Denoiser + ?Sized> Denoiser for Box<D> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        (**self).predict(x, at, call)
    }
}

/// A denoiser made of a function.
pub struct FromFn<F>(F);

/// The denoiser that calls `f(x, at, call)`.
pub fn from_fn<F>(f: F) -> FromFn<F>
where
    F: Fn(&Tensor, At<'_>, &mut Call<'_>) -> Result<Prediction>,
{
    FromFn(f)
}

impl<F> Denoiser for FromFn<F>
where
    F: Fn(&Tensor, At<'_>, &mut Call<'_>) -> Result<Prediction>,
{
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        (self.0)(x, at, call)
    }
}
