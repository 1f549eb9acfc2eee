//! Which few steps of many to keep, and what to do in them.
//!
//! | file | rule |
//! |---|---|
//! | [`dp`] | the cheapest path of any length through a table of costs (Watson et al. 2021) |
//! | [`cost`] | the table of the variational bound |
//! | [`steps`] | Analytic-DPM's rules: linear, power, quadratic, optimal trajectory |
//! | [`beta_grid`] | betas of one digit and a power of ten, by any score (WaveGrad) |
//! | [`bddm`] | betas from a network that looks at the noisy sample (BDDM) |
//! | [`ggdm`] | the sampler's coefficients, learnt through its steps (DDSS and GGDM) |

pub mod bddm;
pub mod beta_grid;
pub mod cost;
pub mod dp;
pub mod ggdm;
pub mod steps;

pub use bddm::{LogTerm, LongSchedule, NoiseScheduler};
pub use beta_grid::{BetaGrid, Found};
pub use cost::bound_costs;
pub use dp::Paths;
pub use ggdm::{Extras, Ggdm, kernel_loss};
pub use steps::StepChoice;
