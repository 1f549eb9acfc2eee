//! Other libraries' files: what diffusers writes, read and written.

mod archive;
pub mod folder;
pub mod pickle;
pub mod scheduler;
mod unpickle;
pub mod weights;
