//! How the weights of a layer begin.

use diffusion_ops::init::Init;

/// The law of a layer's first weights, from the numbers of values that a unit takes and gives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Initial {
    /// Weight and bias uniform within `1/√fan_in`, PyTorch's default.
    #[default]
    FanIn,
    /// Weights uniform within `gain √(6/(fan_in + fan_out))` (Glorot and Bengio 2010), biases 0.
    Xavier {
        /// The gain.
        gain: f64,
    },
    /// Weights normal with the standard deviation `gain/√fan_in`, biases 0.
    Normal {
        /// The gain.
        gain: f64,
    },
    /// Weight and bias 0: a branch that does nothing until it has learned.
    Zero,
}

impl Initial {
    /// The law of a weight.
    pub(crate) fn weight(self, fan_in: usize, fan_out: usize) -> Init {
        match self {
            Self::FanIn => Init::fan_in(fan_in),
            Self::Xavier { gain } => Init::Uniform {
                bound: gain * (6.0 / (fan_in + fan_out).max(1) as f64).sqrt(),
            },
            Self::Normal { gain } => Init::Normal {
                std: gain / (fan_in.max(1) as f64).sqrt(),
            },
            Self::Zero => Init::Const(0.0),
        }
    }

    /// The law of a bias.
    pub(crate) fn bias(self, fan_in: usize) -> Init {
        match self {
            Self::FanIn => Init::fan_in(fan_in),
            Self::Xavier { .. } | Self::Normal { .. } | Self::Zero => Init::Const(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variance_is_the_named_one() {
        // A uniform law within b has the variance b²/3.
        let Init::Uniform { bound } = Initial::Xavier { gain: 1.0 }.weight(20, 40) else {
            unreachable!()
        };
        assert!((bound * bound / 3.0 - 2.0 / 60.0).abs() < 1e-15);
        let Init::Uniform { bound } = Initial::FanIn.weight(20, 40) else {
            unreachable!()
        };
        assert!((bound * bound / 3.0 - 1.0 / 60.0).abs() < 1e-15);
        assert_eq!(
            Initial::Normal { gain: 3.0 }.weight(9, 1),
            Init::Normal { std: 1.0 }
        );
        assert_eq!(Initial::Zero.weight(3, 3), Init::Const(0.0));
        assert_eq!(Initial::Xavier { gain: 1.0 }.bias(3), Init::Const(0.0));
    }
}
