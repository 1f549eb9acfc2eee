//! Wrappers that change what a denoiser says: guidance and thresholding.

mod classifier;
mod classifier_free;
mod threshold;

pub use classifier::ClassifierGuided;
pub use classifier_free::{ClassifierFree, guide, rescale};
pub use threshold::{Clip, Thresholded};
