//! Diffusion models without a domain and without a network: processes, grids, predictions,
//! denoisers, samplers, objectives, training and checkpoints, on candle.
//!
//! # The one idea
//!
//! Every Gaussian diffusion system is a free product of four nouns.
//!
//! | noun | says | module |
//! |---|---|---|
//! | [`Schedule`](schedule::Schedule) | how signal fades and noise grows | [`schedule`] |
//! | [`Grid`](grid::Grid) | at which points we stop on the way back | [`grid`] |
//! | [`Denoiser`](denoiser::Denoiser) | what the network believes at a point | [`denoiser`], [`guide`] |
//! | [`Step`](sample::Step) | one update rule from point to point | [`sample`] |
//!
//! Any schedule works with any grid, any sampler and any denoiser; none knows another by name.
//!
//! # Example
//!
//! Sampling Gaussian data whose denoiser is known exactly, in ten steps:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use diffusion_core::{grid::Grid, noise::{CounterNoise, Noise}, oracle::Gaussian};
//! use diffusion_core::sample::{DpmMultistep, Planned, prior, sample};
//! use diffusion_core::schedule::Vp;
//!
//! # fn main() -> diffusion_core::Result<()> {
//! let data = Gaussian::new(vec![2.0], vec![0.1]);
//! let points = Grid::UniformLogSnr.points(&Vp::default(), 10)?;
//! let like = Tensor::zeros((4, 1), DType::F64, &Device::Cpu)?;
//! let mut noise = CounterNoise::new(0, 0..4);
//! let x = prior(&like, &points[0], &mut noise)?;
//! let x = sample(&Planned::new(DpmMultistep::default(), &points), &data, x, &mut noise, 0..4)?;
//! for value in x.flatten_all()?.to_vec1::<f64>()? {
//!     assert!((value - 2.0).abs() < 0.5);
//! }
//! # Ok(())
//! # }
//! ```

pub mod checkpoint;
pub mod denoiser;
pub mod distill;
pub mod error;
pub mod forward;
pub mod grid;
pub mod guide;
pub mod interop;
pub mod likelihood;
pub mod limits;
pub mod loss;
pub mod noise;
pub mod ode;
pub mod oracle;
pub mod predict;
pub mod quadrature;
pub mod report;
pub mod sample;
pub mod schedule;
pub mod sde;
pub mod search;
pub mod tensor;
pub mod train;

pub use error::{Error, Report, Result};

/// The example of the crate's README, compiled and run with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
