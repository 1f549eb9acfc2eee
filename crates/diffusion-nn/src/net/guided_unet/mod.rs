//! The U-Nets of improved-diffusion and guided-diffusion (Nichol and Dhariwal 2021; Dhariwal and
//! Nichol 2021), with the constructors' arguments as configuration and the names of the authors'
//! weights.
//!
//! | file | what |
//! |---|---|
//! | `config` | sizes and choices |
//! | `parts` | residual blocks, attention, changes of resolution; the way down |
//! | `unet` | the U-Net that predicts the noise, and the one for super-resolution |
//! | `classifier` | the half U-Net that names the class of a noisy picture |

mod classifier;
mod config;
mod parts;
mod unet;

pub use classifier::GuidedClassifier;
pub use config::{GuidedConfig, Pool};
pub use unet::{GuidedSuperRes, GuidedUNet};
