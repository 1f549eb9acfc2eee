//! What the tests of the whole workspace share: above all the parity runner, which holds stored
//! numbers of other libraries against ours.

pub mod outputs;
pub mod parity;
pub mod unet;
