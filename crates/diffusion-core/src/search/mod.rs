//! Which few steps of many to keep.
//!
//! | file | rule |
//! |---|---|
//! | [`dp`] | the cheapest path of any length through a table of costs (Watson et al. 2021) |
//! | [`cost`] | the table of the variational bound |
//! | [`steps`] | Analytic-DPM's rules: linear, power, quadratic, optimal trajectory |

pub mod cost;
pub mod dp;
pub mod steps;

pub use cost::bound_costs;
pub use dp::Paths;
pub use steps::StepChoice;
