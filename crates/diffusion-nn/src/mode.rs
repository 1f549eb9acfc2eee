//! Training or evaluation.

use crate::error::Result;
use candle_core::Tensor;
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

impl Mode {
    /// Dropout with probability `p` in training, from the layer's own `stream`.
    pub(crate) fn dropout(self, x: Tensor, p: f64, stream: u64) -> Result<Tensor> {
        match self {
            Self::Train { key } if p > 0.0 => {
                let stream = key.stream.wrapping_add(stream);
                Ok(diffusion_ops::dropout(&x, p, Key { stream, ..key })?)
            }
            _ => Ok(x),
        }
    }
}
