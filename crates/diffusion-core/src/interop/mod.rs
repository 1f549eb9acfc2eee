//! Other libraries' files: what diffusers writes, read and written.

mod archive;
mod code;
pub mod folder;
mod legacy;
pub mod pickle;
pub mod scheduler;
mod unpickle;
pub mod weights;
