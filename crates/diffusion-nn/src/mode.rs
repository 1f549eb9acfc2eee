//! Training or evaluation.

use diffusion_ops::rng::Key;

/// How a network is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout off.
    Eval,
    /// Dropout on.
    Train {
        /// Where the masks are drawn: the step of training belongs in `key.step`. Each layer
        /// draws from its own stream.
        key: Key,
    },
}
