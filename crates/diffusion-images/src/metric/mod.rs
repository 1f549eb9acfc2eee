//! Measures of sample quality.

pub mod classifier;

pub use classifier::{Classifier, ClassifierConfig};
