//! Measures of sample quality. Features come from a classifier that is trained on the training
//! images alone; samples are compared with images that nobody has trained on.

pub mod classifier;
pub mod evaluate;
pub mod features;
pub mod frechet;
pub mod inception;
pub mod interval;
pub mod kernel;
pub mod manifold;
pub mod memorise;
mod symmetric;

pub use classifier::{Architecture, Classifier, ClassifierConfig};
pub use evaluate::{Evaluation, Judge, View};
