//! Layers and networks for diffusion models.
//!
//! Parameters live in a [`Store`], under the dotted names that published checkpoints use; a
//! network is built from a [`Scope`] of it, either with fresh trainable values or with given
//! frozen ones. Initialisation and dropout are functions of a seed, and results have the same
//! bits for any number of threads.

mod error;
mod mode;
mod store;

pub mod layer;
pub mod net;

pub use diffusion_ops::init::Init;
pub use error::{Error, Mismatch, Result, WeightReport};
pub use mode::Mode;
pub use store::{Scope, Store, Strictness};

/// The examples of the README, compiled and run with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
