//! What the tests of the whole workspace share: the parity runner, which holds stored numbers of
//! other libraries against ours, and malformed files with the readers that must refuse them.

pub mod hostile;
pub mod outputs;
pub mod parity;
pub mod targets;
pub mod unet;

/// The library example of the project's README, compiled and run with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
