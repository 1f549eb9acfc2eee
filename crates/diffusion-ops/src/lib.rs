//! The ground floor of the diffusion workspace: reproducible random streams, seeded initialisers
//! and the numerical operations that every network is built from.
//!
//! Nothing here knows what a diffusion model is. Each operation is one file and one public
//! function; every one of them has a correct backward on every device, which is not true of the
//! operations of the same name in the tensor library underneath (see `clippy.toml` for the list
//! of those that are banned and why).
//!
//! On the CPU, in `f32` and `f64`, the operations run as multithreaded kernels whose results have
//! the same bits for any number of threads; half-precision inputs are computed in `f32` and
//! rounded once. On other devices they are compositions of the tensor library's own operations,
//! and the tests hold the two against each other.

#![allow(unsafe_code)] // The one crate that may; every block states its invariant.

mod activation;
mod add;
mod attention;
mod bias;
mod combine;
mod concat;
mod conv;
mod cpu;
mod dropout;
mod embedding;
mod gate;
mod gradient;
mod group_norm;
mod layer_norm;
mod linear;
mod mm;
mod normal;
mod optimiser;
mod recompute;
mod resample;
mod rms_norm;
mod simd;
mod softmax;
mod tape;
mod vmath;

pub mod gradcheck;
pub mod init;
pub mod rng;

// Matrix products come from here by way of candle; naming the crate turns its AVX-512 kernels on.
use gemm as _;

pub use activation::{Activation, gelu, gelu_tanh, mish, relu, silu};
pub use add::add;
pub use attention::{attention, attention_heads};
pub use bias::add_bias;
pub use combine::{combine, combine_each};
pub use concat::concat;
pub use conv::{
    Padding, WINOGRAD_VARIABLE, Winograd, conv_transpose1d, conv_transpose2d, conv1d, conv2d,
    set_winograd, winograd,
};
pub use dropout::dropout;
pub use embedding::timestep_embedding;
pub use gate::gated_tanh;
pub use gradient::backward;
pub use group_norm::{group_norm, group_norm_act, group_norm_scale_shift};
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use optimiser::{
    AdamWParameter, AdamWRates, adamw_step, ema_step, first_not_finite, sum_of_squares,
    updates_in_place,
};
pub use recompute::{Part, checkpointed};
pub use resample::{avg_pool2d, fir_resample2d, resize_bilinear2d, upsample_nearest2d};
pub use rms_norm::rms_norm;
pub use simd::{LEVEL_VARIABLE, Level, level, set_level};
pub use softmax::softmax;

/// The examples of the README, compiled and run with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
