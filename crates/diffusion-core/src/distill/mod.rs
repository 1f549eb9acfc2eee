//! Fewer steps by training: a student learns to do in few steps what a teacher does in many.
//!
//! Each method is a small value that turns a batch into the loss of every item, `[B]`, which is
//! differentiable in the student's weights and in nothing else. Networks are [`Denoiser`]s, so that
//! any objective of [`crate::train`] can drive them.
//!
//! | file | method |
//! |---|---|
//! | [`progressive`] | half as many steps, again and again (Salimans and Ho 2022) |
//! | [`teacher`] | one step of the teacher, every item at its own place |
//!
//! [`Denoiser`]: crate::denoiser::Denoiser

pub mod progressive;
pub mod teacher;

pub use progressive::{Progressive, halvings};
pub use teacher::Ode;
