//! A flow that fills the bins of grey levels (Ho et al. 2019, Flow++, section 3.1), small.
//!
//! ```text
//! y₀ = ε ~ N(0, I);   y ← m ⊙ y + (1 − m) ⊙ (e^{s} ⊙ y + b),   (s, b) = net(m ⊙ y, x);   u = sigmoid(y)
//! log q(u|k) = log N(ε) − Σ (1 − m) ⊙ s − Σ log u (1 − u)
//! ```
//!
//! with `m` the two colours of a checkerboard in turn and `x` the levels on the scale `[−1, 1]`.

use crate::error::{Error, Result};
use crate::layer::{Conv2d, Conv2dConfig};
use crate::net::check::positive;
use crate::store::Scope;
use candle_core::{DType, Tensor};
use diffusion_ops::init::Init;
use serde::{Deserialize, Serialize};

/// Sizes of a [`DequantiserFlow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DequantiserConfig {
    /// Channels of the pictures.
    pub channels: usize,
    /// Grey levels.
    pub levels: usize,
    /// Coupling layers; two change every value.
    pub layers: usize,
    /// Channels inside a layer's network.
    pub hidden: usize,
}

impl Default for DequantiserConfig {
    fn default() -> Self {
        Self {
            channels: 3,
            levels: 256,
            layers: 4,
            hidden: 32,
        }
    }
}

/// One coupling: its network ends in zeros, so that it begins as the identity.
#[derive(Clone, Debug)]
struct Coupling {
    first: Conv2d,
    middle: Conv2d,
    kernel: Tensor,
    bias: Tensor,
    parity: usize,
}

/// A conditional density on `(0, 1)^D` given grey levels.
#[derive(Clone, Debug)]
pub struct DequantiserFlow {
    config: DequantiserConfig,
    layers: Vec<Coupling>,
}

impl DequantiserFlow {
    /// A flow of these sizes. It begins as `sigmoid` of normal noise.
    ///
    /// # Errors
    /// If a size is 0, there is one level, or a name is taken.
    pub fn new(config: DequantiserConfig, scope: &Scope) -> Result<Self> {
        let DequantiserConfig {
            channels,
            levels,
            layers,
            hidden,
        } = config;
        let fields = [
            ("channels", channels),
            ("layers", layers),
            ("hidden", hidden),
        ];
        positive(&fields)?;
        positive(&[("levels - 1", levels.saturating_sub(1))])?;
        let layer = |i: usize| -> Result<Coupling> {
            let scope = scope.sub(format!("layers.{i}"));
            let conv = |name: &str, inputs| {
                Conv2d::new(&scope.sub(name), Conv2dConfig::same(inputs, hidden, 3))
            };
            let last = scope.sub("out");
            let zero = Init::Const(0.0);
            Ok(Coupling {
                first: conv("first", 2 * channels)?,
                middle: conv("middle", hidden)?,
                kernel: last.param("weight", (2 * channels, hidden, 3, 3), zero)?,
                bias: last.param("bias", 2 * channels, zero)?,
                parity: i % 2,
            })
        };
        Ok(Self {
            config,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// `u` `[B, C, H, W]` in `(0, 1)` and `log q(u|k)` `[B]` in nats, from normal noise;
    /// differentiable in the parameters.
    ///
    /// # Shapes
    /// `k` and `epsilon` `[B, C, H, W]`; `k` holds whole numbers.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn draw(&self, k: &Tensor, epsilon: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = self.condition(k, epsilon)?;
        let (mut y, mut log_det) = (epsilon.clone(), per_item(&epsilon.zeros_like()?)?);
        for layer in &self.layers {
            let (scale, shift) = layer.shape(&y, &x)?;
            y = ((y * scale.exp()?)? + shift)?;
            log_det = (log_det + per_item(&scale)?)?;
        }
        let log_q = (log_normal(epsilon)? - (log_det + log_slope(&y)?)?)?;
        Ok((sigmoid(&y)?, log_q))
    }

    /// `log q(u|k)` `[B]` in nats, of given noise.
    ///
    /// # Shapes
    /// `k` and `u` `[B, C, H, W]`, `u` inside `(0, 1)`.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn log_prob(&self, k: &Tensor, u: &Tensor) -> Result<Tensor> {
        let x = self.condition(k, u)?;
        let mut y = (u.log()? - u.affine(-1.0, 1.0)?.log()?)?;
        let mut log_det = log_slope(&y)?;
        for layer in self.layers.iter().rev() {
            // Where a value changes, scale and shift depend on the other colour alone.
            let (scale, shift) = layer.shape(&y, &x)?;
            y = ((y - shift)? * scale.neg()?.exp()?)?;
            log_det = (log_det + per_item(&scale)?)?;
        }
        Ok((log_normal(&y)? - log_det)?)
    }

    fn condition(&self, k: &Tensor, like: &Tensor) -> Result<Tensor> {
        if k.dims() != like.dims() || k.rank() != 4 || k.dim(1)? != self.config.channels {
            return Err(Error::Input {
                name: "levels",
                found: format!("of shape {:?}, noise {:?}", k.dims(), like.dims()),
                expected: format!("[B, {}, H, W] both", self.config.channels),
            });
        }
        let step = 2.0 / (self.config.levels - 1) as f64;
        Ok(k.to_dtype(like.dtype())?.affine(step, -1.0)?)
    }
}

impl Coupling {
    /// Logarithm of the scale and the shift, `[B, C, H, W]`, zero where values are kept.
    fn shape(&self, y: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, channels, height, width) = y.dims4()?;
        let colour = |i: usize| ((i / width + i % width + self.parity) % 2) as f64;
        let changed: Vec<f64> = (0..height * width).map(colour).collect();
        let changed = Tensor::from_vec(changed, (1, 1, height, width), &candle_core::Device::Cpu)?
            .to_dtype(y.dtype())?
            .to_device(y.device())?;
        let kept = y.broadcast_mul(&changed.affine(-1.0, 1.0)?)?;
        let h = diffusion_ops::silu(&self.first.forward(&Tensor::cat(&[&kept, x], 1)?)?)?;
        let h = diffusion_ops::silu(&self.middle.forward(&h)?)?;
        let h = diffusion_ops::conv2d(&h, &self.kernel, Some(&self.bias), 1, 1, 1)?;
        let part = |from: usize| h.narrow(1, from, channels)?.contiguous();
        // A bounded scale keeps the flow invertible in floating point.
        let scale = (part(0)?.tanh()? * 2.0)?;
        Ok((
            scale.broadcast_mul(&changed)?,
            part(channels)?.broadcast_mul(&changed)?,
        ))
    }
}

fn per_item(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(1)?.sum(1)?)
}

fn log_normal(x: &Tensor) -> Result<Tensor> {
    let constant = -0.5 * std::f64::consts::TAU.ln();
    per_item(&x.sqr()?.affine(-0.5, constant)?)
}

/// `Σ log sigmoid'(y) = −Σ (|y| + 2 ln(1 + e^{−|y|}))`.
fn log_slope(y: &Tensor) -> Result<Tensor> {
    let size = y.abs()?;
    let soft = (size.neg()?.exp()? + 1.0)?.log()?;
    per_item(&(size + (soft * 2.0)?)?.neg()?)
}

/// `½ (1 + tanh(y/2))`, inside `(0, 1)` even after rounding.
fn sigmoid(y: &Tensor) -> Result<Tensor> {
    let edge = if y.dtype() == DType::F64 { 1e-12 } else { 1e-6 };
    let u = y.affine(0.5, 0.0)?.tanh()?.affine(0.5, 0.5)?;
    Ok(u.clamp(edge, 1.0 - edge)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use candle_core::Device;
    use diffusion_ops::rng::{Key, stream};

    fn normal(item: u64, shape: &[usize]) -> Tensor {
        let n = shape.iter().product();
        let z = Key::new(4, stream::TEST).item(item).normal(n);
        Tensor::from_vec(z, shape, &Device::Cpu).unwrap()
    }

    fn flow() -> (Store, DequantiserFlow) {
        let store = Store::new(1, DType::F64, &Device::Cpu);
        let config = DequantiserConfig {
            channels: 1,
            levels: 4,
            layers: 2,
            hidden: 3,
        };
        let flow = DequantiserFlow::new(config, &store.root()).unwrap();
        for (i, var) in store.named().values().enumerate() {
            var.set(&(normal(i as u64, var.dims()) * 0.5).unwrap())
                .unwrap();
        }
        (store, flow)
    }

    fn values(t: &Tensor) -> Vec<f64> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_density_of_a_draw_is_the_density_of_its_noise() {
        let (store, flow) = flow();
        let k = Tensor::new(&[0.0, 3.0, 1.0, 2.0f64], &Device::Cpu).unwrap();
        let k = Tensor::stack(&[&k, &k], 0)
            .unwrap()
            .reshape((2, 1, 2, 2))
            .unwrap();
        let (u, log_q) = flow.draw(&k, &normal(70, &[2, 1, 2, 2])).unwrap();
        assert!(values(&u).iter().all(|u| (0.0..1.0).contains(u)));
        let again = flow.log_prob(&k, &u).unwrap();
        for (a, b) in values(&log_q).iter().zip(values(&again)) {
            assert!((a - b).abs() < 1e-8, "{a} {b}");
        }
        let grads = diffusion_ops::backward(&log_q.sum_all().unwrap()).unwrap();
        for (name, var) in store.named() {
            assert!(grads.get(var.as_tensor()).is_some(), "{name}");
        }
        assert!(flow.draw(&k, &normal(1, &[2, 1, 2, 3])).is_err());
    }

    #[test]
    fn integrates_to_one() {
        let (_, flow) = flow();
        let n = 40_000;
        let grid: Vec<f64> = (0..n)
            .map(|i| (f64::from(i) + 0.5) / f64::from(n))
            .collect();
        let u = Tensor::from_vec(grid, (n as usize, 1, 1, 1), &Device::Cpu).unwrap();
        let k = u.affine(0.0, 2.0).unwrap();
        let total: f64 = values(&flow.log_prob(&k, &u).unwrap().exp().unwrap())
            .iter()
            .sum();
        assert!((total / f64::from(n) - 1.0).abs() < 1e-3, "{total}");
    }
}
