//! Objectives: which noise levels are trained, and how much each counts.
//!
//! [`Hybrid`] adds the variational bound for a learned variance, and [`SecondMoment`] draws the
//! steps that need it most; [`Vdm`] is the bound with a learned schedule. Every other loss here is a weighted mean squared error,
//!
//! ```text
//! L = E_{t, x₀, ε} [ w(t) ‖ŷ(x_t, t) − y‖² / D ],   x_t = α_t x₀ + σ_t ε
//! ```
//!
//! where `y` is whatever the network predicts. [`Weight`] says what the weight means, [`TimeLaw`]
//! how `t` is drawn, and [`Denoising`] puts the two together. [`high_order`] also matches the
//! derivatives of the score, which the likelihood of the probability flow depends on.
//! [`block_losses`] is the loss where position and velocity are noised together.

mod block;
mod denoising;
pub mod high_order;
mod hybrid;
mod resample;
mod time;
pub mod vdm;
mod weight;

pub use block::{block_losses, perturb_blocks};
pub use denoising::{Denoising, weighted_error};
pub use high_order::{HighOrder, Orders};
pub use hybrid::{Hybrid, HybridLoss, HybridLosses};
pub use resample::SecondMoment;
pub use time::TimeLaw;
pub use vdm::{Vdm, VdmDraw, VdmLosses};
pub use weight::Weight;
