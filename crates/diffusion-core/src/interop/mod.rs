//! Other libraries' files: what diffusers writes, read and written.

pub mod folder;
pub mod scheduler;
pub mod weights;
