//! Data whose every diffusion quantity is known exactly, and harnesses that test against them.
//!
//! [`Gaussian`] and [`Mixture`] have closed-form denoisers, scores, densities and (the Gaussian)
//! probability flows. A sampler that is right gets them right; a declared order of convergence is
//! measured on them by [`order`]; gradients are checked by [`gradcheck`]. [`BlockMixture`] is data under
//! a diffusion of position and velocity.

mod block;
mod gaussian;
pub mod gradcheck;
mod mixture;
pub mod order;

pub use block::BlockMixture;
pub use gaussian::Gaussian;
pub use mixture::Mixture;
