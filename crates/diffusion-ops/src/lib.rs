//! The ground floor of the diffusion workspace: reproducible random streams, seeded initialisers
//! and the numerical operations that every network is built from.
//!
//! Nothing here knows what a diffusion model is. Each operation is one file and one public
//! function; every one of them has a correct backward on every device, which is not true of the
//! operations of the same name in the tensor library underneath (see `clippy.toml` for the list
//! of those that are banned and why).

pub mod init;
pub mod rng;
