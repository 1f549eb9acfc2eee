//! Checkpoints that survive a kill, a power cut and a full disk, and the hardened tensor files that
//! they are made of.
//!
//! # Protocol
//!
//! A checkpoint is a folder `step-<n>` that appears by one rename, after everything in it is on the
//! disk:
//!
//! ```text
//! checkpoints/.tmp-<step>-<pid>/   <group>.safetensors …, state.json     each fsynced
//!                                  MANIFEST.json  length and blake3 of each, last, fsynced
//!                                  fsync of the folder
//! rename → checkpoints/step-<n>    fsync of checkpoints/, then pruning of old ones
//! ```
//!
//! On start the run folder is locked, `.tmp-*` is deleted, and the folders are walked from newest to
//! oldest: the first whose manifest verifies is accepted, and the rejected ones are reported with
//! the reason. A manifest must be byte for byte what this code would write, and carries a digest of
//! itself, so that a single changed byte anywhere in the folder is noticed.
//!
//! | item | does |
//! |---|---|
//! | [`Checkpoints`] | saves, finds, verifies, prunes |
//! | [`Storage`], [`DiskStorage`] | the few operations on files that the protocol is made of |
//! | [`fault`] | storages that fail or lose power at a chosen operation, for tests |
//! | [`RunLock`] | one writer per run folder |
//! | [`read_safetensors`], [`write_safetensors_atomic`], [`write_atomic`] | single files |

mod atomic;
mod encode;
pub mod fault;
mod lock;
mod manifest;
mod storage;
mod store;
mod tensors;

pub use atomic::{write_atomic, write_safetensors_atomic};

pub use encode::{Encoder, is_finite};
pub use lock::{RunGuard, RunLock};
pub use storage::{DiskStorage, Storage};
pub use store::{Checkpoints, Keep, Loaded, Rejected, Snapshot};
pub use tensors::{decode_safetensors, read_safetensors};
