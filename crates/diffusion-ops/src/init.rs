//! Seeded initialisers: a parameter's first value is a function of the seed and of its name.
//!
//! The name enters through a 64-bit FNV-1a hash, so that adding a layer does not change the
//! initial values of the others.

use crate::rng::{Key, stream};
use candle_core::{DType, Device, Result, Shape, Tensor};

/// How a parameter begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All entries equal.
    Const(f64),
    /// Uniform on `[-bound, bound]`.
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
}

impl Init {
    /// PyTorch's default for linear and convolution weights and biases: uniform with bound
    /// `1/√fan_in`.
    pub fn fan_in(fan_in: usize) -> Self {
        Init::Uniform {
            bound: 1.0 / (fan_in.max(1) as f64).sqrt(),
        }
    }

    /// The values for the parameter `name`.
    ///
    /// # Errors
    /// Those of tensor creation (out of memory on the device).
    pub fn tensor(
        self,
        seed: u64,
        name: &str,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        let key = Key::new(seed, stream::INIT).item(fnv1a(name));
        let values: Vec<f64> = match self {
            Init::Const(value) => vec![value; shape.elem_count()],
            Init::Uniform { bound } => key
                .uniform(shape.elem_count())
                .into_iter()
                .map(|u| (2.0 * u - 1.0) * bound)
                .collect(),
            Init::Normal { std } => key
                .normal(shape.elem_count())
                .into_iter()
                .map(|z| z * std)
                .collect(),
        };
        Tensor::from_vec(values, shape, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)
    }
}

/// The 64-bit FNV-1a hash of a name.
pub fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_on_name_and_seed_only() -> Result<()> {
        let make = |seed, name| {
            Init::fan_in(9)
                .tensor(seed, name, (4, 9), DType::F32, &Device::Cpu)?
                .to_vec2::<f32>()
        };
        assert_eq!(make(1, "conv.weight")?, make(1, "conv.weight")?);
        assert_ne!(make(1, "conv.weight")?, make(1, "conv.bias")?);
        assert_ne!(make(1, "conv.weight")?, make(2, "conv.weight")?);
        assert!(make(1, "a")?.iter().flatten().all(|v| v.abs() <= 1.0 / 3.0));
        Ok(())
    }

    #[test]
    fn fnv_reference_value() {
        // Published test vector of FNV-1a 64 for the string "a".
        assert_eq!(fnv1a("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
