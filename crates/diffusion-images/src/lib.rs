//! Images from noise: data, training, sampling and metrics.
//!
//! ```no_run
//! use diffusion_images::candle_core::Device;
//! use diffusion_images::diffusion_core::{self, train::{Cancel, Quiet}};
//! use diffusion_images::{data, model::ImageModel, preset, run};
//!
//! # fn main() -> diffusion_core::Result<()> {
//! let digits = data::splits("digits", &data::Options::default())?.train;
//! let config = preset::preset("small", &digits)?;
//! let out = std::path::Path::new("digits-model");
//! run::train(&config, &digits, out, false, &Device::Cpu, &mut Quiet, &Cancel::new())?;
//! let model = ImageModel::open(out, &Device::Cpu)?;
//! # Ok(())
//! # }
//! ```

pub mod card;
pub mod classes;
pub mod config;
pub mod data;
pub mod distill;
pub mod distilled;
#[cfg(feature = "figures")]
pub mod figure;
pub mod grid;
pub mod invert;
pub mod likelihood;
pub mod metric;
pub mod model;
pub mod picture;
pub mod preset;
pub mod run;
pub mod saved;
pub mod train;
pub mod validate;

// What stands in the signatures, so that one dependency is enough.
pub use candle_core;
pub use diffusion_core;

/// An error of the network crate as one of the core's.
pub fn from_nn(error: diffusion_nn::Error) -> diffusion_core::Error {
    use diffusion_core::{Error, Report};
    match error {
        diffusion_nn::Error::Candle(error) => Error::Tensor(error),
        diffusion_nn::Error::Config {
            field,
            found,
            expected,
            remedy,
        } => Report::new(format_args!("network.{field}"), found)
            .expected(expected)
            .remedy(remedy)
            .config(),
        other => Report::new("network", other)
            .remedy("give what belongs to one model")
            .input(),
    }
}
