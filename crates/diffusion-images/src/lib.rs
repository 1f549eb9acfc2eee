//! Placeholder.

pub mod data;
#[cfg(feature = "figures")]
pub mod figure;
pub mod grid;
pub mod metric;
pub mod picture;
