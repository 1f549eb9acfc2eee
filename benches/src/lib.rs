//! The work that the benches time: single operations, whole training steps and sampling calls.
//!
//! A [`Case`] is one piece of work under a stable name such as `images/unet-1m/train`. The
//! criterion benches run the cases in this process; the `case` program serves them one at a time
//! to `cargo xtask bench --against python`, which compares the results with another library's and
//! then times both in turns.

mod case;
mod clock;
mod csdi;
mod diffwave;
mod network;
mod ops;
mod optimiser;
mod training;
mod unet;

pub mod sampling;
pub mod serve;

pub use case::{Case, Reference, Spec, Work, find, specs};
pub use clock::Memory;
pub use training::{Training, blank};

#[cfg(test)]
mod tests;
