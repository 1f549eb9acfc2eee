//! The networks of EDM (Karras et al. 2022): DDPM++ and NCSN++ in one, and ADM, with the
//! constructors' arguments as configuration and the names of the authors' weights.
//!
//! | file | what |
//! |---|---|
//! | `config` | sizes and choices of both |
//! | `block` | the residual block with attention |
//! | `ladder` | the way down and up, with the auxiliary paths |
//! | `song` | `SongUNet`: DDPM++ and NCSN++ (Song et al. 2021) |
//! | `dhariwal` | `DhariwalUNet`: ADM (Dhariwal and Nichol 2021) |
//!
//! Both are the raw `F(x; c_noise)`; what stands between it and a denoiser is a preconditioner.

mod block;
mod config;
mod dhariwal;
mod ladder;
mod song;

pub use config::{DecoderType, DhariwalConfig, EmbeddingType, EncoderType, SongConfig};
pub use dhariwal::DhariwalUNet;
pub use song::SongUNet;
