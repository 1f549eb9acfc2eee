//! What the tests of the whole workspace share: above all the parity runner, which holds stored
//! numbers of other libraries against ours.

pub mod outputs;
pub mod parity;
pub mod unet;

/// The library example of the project's README, compiled and run with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
