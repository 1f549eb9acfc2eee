//! How probable a model finds the data: bounds in nats and in bits a dimension.
//!
//! | file | quantity |
//! |---|---|
//! | [`gaussian`] | divergences and densities of diagonal Gaussians |
//! | [`decoder`] | `p(x₀ | x₁)` over grey levels, or as a density |
//! | [`vlb`] | the variational bound, term by term |
//! | [`importance`] | the importance-weighted bound |
//! | [`dequantise`] | from densities to probabilities of grey levels |

pub mod decoder;
pub mod dequantise;
pub mod gaussian;
pub mod importance;
pub mod vlb;

pub use decoder::Decoder;
pub use vlb::{Bound, Vlb};

/// Nats of a whole item as bits a dimension: `nats/(D ln 2)`.
pub fn bits_per_dim(nats: f64, dims: usize) -> f64 {
    nats / (dims as f64 * std::f64::consts::LN_2)
}
