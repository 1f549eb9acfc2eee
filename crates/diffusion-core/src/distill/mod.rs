//! Fewer steps by training: a student learns to do in few steps what a teacher does in many.
//!
//! Each method is a small value that turns a batch into the loss of every item, `[B]`, which is
//! differentiable in the student's weights and in nothing else. Networks are [`Denoiser`]s, so that
//! any objective of [`crate::train`] can drive them.
//!
//! | file | method |
//! |---|---|
//! | [`progressive`] | half as many steps, again and again (Salimans and Ho 2022) |
//! | [`knowledge`] | one step, from pairs of noise and the teacher's sample (Luhman and Luhman 2021) |
//! | [`consistency`] | consistency distillation and training (Song et al. 2023; Song and Dhariwal 2023) |
//! | [`adversarial`] | the implicit start of a truncated chain (Zheng et al. 2022) |
//! | [`teacher`] | one step of the teacher, every item at its own place |
//!
//! [`Denoiser`]: crate::denoiser::Denoiser

pub mod adversarial;
pub mod consistency;
pub mod knowledge;
pub mod progressive;
pub mod teacher;

pub use adversarial::{LazyR1, discriminator_loss, generator_loss, gradient_penalty};
pub use consistency::{Consistency, Curriculum, Distance, Levels};
pub use knowledge::{Knowledge, Pairs};
pub use progressive::{Progressive, halvings};
pub use teacher::Ode;
