//! The score network of VDM (Kingma et al. 2021, appendix B), on pictures with channels last.
//!
//! A U-Net that never changes the resolution, so that nothing of the grey levels is lost; Fourier
//! features of its input resolve them. Names and layouts are those of the authors' flax arrays:
//! convolution kernels `[kh, kw, in, out]`, dense kernels `[in, out]`.

use crate::error::{Error, Result};
use crate::mode::Mode;
use crate::net::check::{positive, probability};
use crate::store::Scope;
use candle_core::{D, Tensor};
use diffusion_ops::init::Init;
use diffusion_ops::{Activation, add};
use serde::{Deserialize, Serialize};

/// ε of flax's group normalisation.
const EPS: f64 = 1e-6;

/// Sizes of a [`VdmNet`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VdmConfig {
    /// Channels of the pictures.
    pub channels: usize,
    /// Width of every layer, `sm_n_embd`.
    pub n_embd: usize,
    /// Residual blocks on the way down; one more on the way up, `sm_n_layer`.
    pub n_layer: usize,
    /// `γ` that the network is told as time 0.
    pub gamma_min: f64,
    /// `γ` that the network is told as time 1.
    pub gamma_max: f64,
    /// Fourier features `sin, cos(2π 2ⁿ z)` of the input for these n; none when empty. At K grey
    /// levels `n = log₂ K − 2` and `log₂ K − 1` have periods of two levels and of one.
    pub fourier: Vec<u32>,
    /// Attention after every block, not only in the middle.
    pub attention: bool,
    /// Probability of dropout in a block.
    pub dropout: f64,
    /// Groups of the normalisations.
    pub groups: usize,
}

impl Default for VdmConfig {
    /// The authors' network for CIFAR-10.
    fn default() -> Self {
        Self {
            channels: 3,
            n_embd: 128,
            n_layer: 32,
            gamma_min: -13.3,
            gamma_max: 5.0,
            fourier: vec![6, 7],
            attention: false,
            dropout: 0.1,
            groups: 32,
        }
    }
}

/// An affine map of channels; kernel `[in, out]`.
#[derive(Clone, Debug)]
struct Dense {
    kernel: Tensor,
    bias: Option<Tensor>,
}

impl Dense {
    fn new(
        scope: &Scope,
        (inputs, outputs): (usize, usize),
        init: Init,
        bias: bool,
    ) -> Result<Self> {
        Ok(Self {
            kernel: scope.param("kernel", (inputs, outputs), init)?,
            bias: bias
                .then(|| scope.param("bias", outputs, Init::Const(0.0)))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.kernel.t()?.contiguous()?;
        Ok(diffusion_ops::linear(x, &weight, self.bias.as_ref())?)
    }
}

/// A convolution of 3 × 3; kernel `[3, 3, in, out]`.
#[derive(Clone, Debug)]
struct Conv {
    kernel: Tensor,
    bias: Tensor,
}

impl Conv {
    fn new(scope: &Scope, inputs: usize, outputs: usize, init: Init) -> Result<Self> {
        Ok(Self {
            kernel: scope.param("kernel", (3, 3, inputs, outputs), init)?,
            bias: scope.param("bias", outputs, Init::Const(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.kernel.permute((3, 2, 0, 1))?.contiguous()?;
        Ok(diffusion_ops::conv2d(
            x,
            &weight,
            Some(&self.bias),
            1,
            1,
            1,
        )?)
    }
}

/// Group normalisation; `scale` and `bias`.
#[derive(Clone, Debug)]
struct Norm {
    scale: Tensor,
    bias: Tensor,
    groups: usize,
}

impl Norm {
    fn new(scope: &Scope, channels: usize, groups: usize) -> Result<Self> {
        if !channels.is_multiple_of(groups) {
            return Err(Error::config(
                "groups",
                groups,
                format!("a divisor of {channels} channels"),
                "choose n_embd as a multiple of the groups",
            ));
        }
        Ok(Self {
            scale: scope.param("scale", channels, Init::Const(1.0))?,
            bias: scope.param("bias", channels, Init::Const(0.0))?,
            groups,
        })
    }

    fn forward(&self, x: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
        Ok(diffusion_ops::group_norm_act(
            x,
            &self.scale,
            &self.bias,
            self.groups,
            EPS,
            activation,
        )?)
    }
}

/// flax's default: normal with deviation `1/√fan_in`.
fn lecun(fan_in: usize) -> Init {
    Init::Normal {
        std: 1.0 / (fan_in as f64).sqrt(),
    }
}

/// `x + conv₂(a(norm₂(conv₁(a(norm₁(x))) + W c)))`, with a dense shortcut where widths differ.
#[derive(Clone, Debug)]
struct Block {
    norm1: Norm,
    conv1: Conv,
    cond: Dense,
    norm2: Norm,
    conv2: Conv,
    shortcut: Option<Dense>,
    dropout: f64,
    stream: u64,
}

impl Block {
    fn new(scope: &Scope, inputs: usize, config: &VdmConfig, stream: u64) -> Result<Self> {
        let n = config.n_embd;
        let zero = Init::Const(0.0);
        Ok(Self {
            norm1: Norm::new(&scope.sub("GroupNorm_0"), inputs, config.groups)?,
            conv1: Conv::new(&scope.sub("conv1"), inputs, n, lecun(9 * inputs))?,
            cond: Dense::new(&scope.sub("cond_proj"), (4 * n, n), zero, false)?,
            norm2: Norm::new(&scope.sub("GroupNorm_1"), n, config.groups)?,
            conv2: Conv::new(&scope.sub("conv2"), n, n, zero)?,
            shortcut: (inputs != n)
                .then(|| Dense::new(&scope.sub("nin_shortcut"), (inputs, n), lecun(inputs), true))
                .transpose()?,
            dropout: config.dropout,
            stream,
        })
    }

    fn forward(&self, x: &Tensor, cond: &Tensor, mode: Mode) -> Result<Tensor> {
        let h = self
            .conv1
            .forward(&self.norm1.forward(x, Some(Activation::Silu))?)?;
        let shift = self.cond.forward(cond)?.unsqueeze(2)?.unsqueeze(3)?;
        let h = self
            .norm2
            .forward(&h.broadcast_add(&shift)?, Some(Activation::Silu))?;
        let h = self
            .conv2
            .forward(&mode.dropout(h, self.dropout, self.stream)?)?;
        let x = match &self.shortcut {
            Some(dense) => on_pixels(x, |tokens| dense.forward(tokens))?,
            None => x.clone(),
        };
        Ok(add(&x, &h)?)
    }
}

/// Applies a map of tokens `[B, H W, C]` to pixels `[B, C, H, W]`.
fn on_pixels(x: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (b, _, h, w) = x.dims4()?;
    let y = f(&x.flatten_from(2)?.transpose(1, 2)?.contiguous()?)?;
    Ok(y.transpose(1, 2)?.reshape((b, (), h, w))?.contiguous()?)
}

/// `x + W_o attention(W_q n, W_k n, W_v n)` over all pixels, one head, `n = norm(x)`.
#[derive(Clone, Debug)]
struct Attend {
    norm: Norm,
    q: Dense,
    k: Dense,
    v: Dense,
    out: Dense,
}

impl Attend {
    fn new(scope: &Scope, config: &VdmConfig) -> Result<Self> {
        let n = config.n_embd;
        let dense = |name: &str, init| Dense::new(&scope.sub(name), (n, n), init, true);
        Ok(Self {
            norm: Norm::new(&scope.sub("GroupNorm_0"), n, config.groups)?,
            q: dense("q", lecun(n))?,
            k: dense("k", lecun(n))?,
            v: dense("v", lecun(n))?,
            out: dense("proj_out", Init::Const(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = on_pixels(&self.norm.forward(x, None)?, |n| {
            let (q, k, v) = (self.q.forward(n)?, self.k.forward(n)?, self.v.forward(n)?);
            let h = diffusion_ops::attention_heads(&q, &k, &v, 1, None, None)?;
            self.out.forward(&h)
        })?;
        Ok(add(x, &h)?)
    }
}

/// A block and the attention after it.
#[derive(Clone, Debug)]
struct Stage {
    block: Block,
    attend: Option<Attend>,
}

impl Stage {
    fn forward(&self, x: &Tensor, cond: &Tensor, mode: Mode) -> Result<Tensor> {
        let h = self.block.forward(x, cond, mode)?;
        match &self.attend {
            Some(attend) => attend.forward(&h),
            None => Ok(h),
        }
    }
}

/// VDM's noise prediction `ε̂(z_t; γ_t)`.
///
/// ```text
/// t = (γ_t − γ_min)/(γ_max − γ_min),   c = swish(W₁ swish(W₀ [emb(1000 t), condition]))
/// ε̂ = z + conv_out(a(norm(U-Net([z, sin 2π2ⁿz, cos 2π2ⁿz], c))))
/// ```
#[derive(Clone, Debug)]
pub struct VdmNet {
    config: VdmConfig,
    dense: [Dense; 2],
    conv_in: Conv,
    down: Vec<Stage>,
    middle: (Block, Attend, Block),
    up: Vec<Stage>,
    norm: Norm,
    conv_out: Conv,
}

impl VdmNet {
    /// A network of these sizes.
    ///
    /// # Errors
    /// If a size is 0, groups don't divide the width, the ends of `γ` are equal, or a name is
    /// taken.
    pub fn new(config: &VdmConfig, scope: &Scope) -> Result<Self> {
        let c = config;
        positive(&[
            ("channels", c.channels),
            ("n_embd", c.n_embd),
            ("groups", c.groups),
        ])?;
        probability("dropout", c.dropout)?;
        if !(c.gamma_max - c.gamma_min > 0.0 && c.n_embd > 3) {
            return Err(Error::config(
                "gamma_min, gamma_max, n_embd",
                format!("{}, {}, {}", c.gamma_min, c.gamma_max, c.n_embd),
                "rising ends and at least four features",
                "gamma_min = -13.3 and gamma_max = 5 for 256 grey levels",
            ));
        }
        let n = c.n_embd;
        let inputs = c.channels * (1 + 2 * c.fourier.len());
        let dense = |name: &str, inputs: usize| {
            Dense::new(&scope.sub(name), (inputs, 4 * n), lecun(inputs), true)
        };
        let attend = |name: String| -> Result<Option<Attend>> {
            c.attention
                .then(|| Attend::new(&scope.sub(name), c))
                .transpose()
        };
        let stage = |side: &str, i: usize, inputs: usize, stream: usize| -> Result<Stage> {
            let block = scope.sub(format!("{side}.block_{i}"));
            Ok(Stage {
                block: Block::new(&block, inputs, c, stream as u64)?,
                attend: attend(format!("{side}.attn_{i}"))?,
            })
        };
        let middle = |i: usize| {
            let stream = (2 * c.n_layer + i) as u64;
            Block::new(&scope.sub(format!("mid.block_{i}")), n, c, stream)
        };
        Ok(Self {
            dense: [dense("dense0", n + 1)?, dense("dense1", 4 * n)?],
            conv_in: Conv::new(&scope.sub("conv_in"), inputs, n, lecun(9 * inputs))?,
            down: (0..c.n_layer)
                .map(|i| stage("down", i, n, i))
                .collect::<Result<_>>()?,
            middle: (
                middle(1)?,
                Attend::new(&scope.sub("mid.attn_1"), c)?,
                middle(2)?,
            ),
            up: (0..=c.n_layer)
                .map(|i| stage("up", i, 2 * n, 2 * c.n_layer + 3 + i))
                .collect::<Result<_>>()?,
            norm: Norm::new(&scope.sub("GroupNorm_0"), n, c.groups)?,
            conv_out: Conv::new(&scope.sub("conv_out"), n, c.channels, Init::Const(0.0))?,
            config: config.clone(),
        })
    }

    /// The predicted noise, differentiable in `z` and `gamma` as well.
    ///
    /// # Shapes
    /// `z [B, H, W, C]`, `gamma [B]`, `condition [B]` (a class number, or zeros); the result has
    /// the shape of `z`.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn forward(
        &self,
        z: &Tensor,
        gamma: &Tensor,
        condition: &Tensor,
        mode: Mode,
    ) -> Result<Tensor> {
        let (b, _, _, channels) = z.dims4()?;
        if channels != self.config.channels || gamma.dims() != [b] || condition.dims() != [b] {
            return Err(Error::Input {
                name: "z, gamma, condition",
                found: format!("{:?}, {:?}, {:?}", z.dims(), gamma.dims(), condition.dims()),
                expected: format!("[B, H, W, {}], [B], [B]", self.config.channels),
            });
        }
        let span = self.config.gamma_max - self.config.gamma_min;
        let t = gamma.affine(1.0 / span, -self.config.gamma_min / span)?;
        let n = self.config.n_embd;
        let embedded = diffusion_ops::timestep_embedding(&t, n, false, 1.0, 1000.0, 10_000.0)?;
        let condition = condition.to_dtype(z.dtype())?.unsqueeze(1)?;
        let mut cond = Tensor::cat(&[&embedded.to_dtype(z.dtype())?, &condition], 1)?;
        for dense in &self.dense {
            cond = diffusion_ops::silu(&dense.forward(&cond)?)?;
        }

        let pixels = self.features(z)?.permute((0, 3, 1, 2))?.contiguous()?;
        let mut skips = vec![self.conv_in.forward(&pixels)?];
        let mut h = skips[0].clone();
        for stage in &self.down {
            h = stage.forward(&h, &cond, mode)?;
            skips.push(h.clone());
        }
        let (first, attend, second) = &self.middle;
        h = attend.forward(&first.forward(&h, &cond, mode)?)?;
        h = second.forward(&h, &cond, mode)?;
        for (stage, skip) in self.up.iter().zip(skips.iter().rev()) {
            h = stage.forward(&diffusion_ops::concat(&h, skip, 1)?, &cond, mode)?;
        }
        let h = self.norm.forward(&h, Some(Activation::Silu))?;
        let said = self
            .conv_out
            .forward(&h)?
            .permute((0, 2, 3, 1))?
            .contiguous()?;
        Ok(add(&said, z)?)
    }

    /// `[z, sin 2π2ⁿz, cos 2π2ⁿz]` along the channels; within a part the frequencies of a channel
    /// stand together.
    fn features(&self, z: &Tensor) -> Result<Tensor> {
        if self.config.fourier.is_empty() {
            return Ok(z.clone());
        }
        let angles: Vec<Tensor> = self
            .config
            .fourier
            .iter()
            .map(|n| z.affine(std::f64::consts::TAU * 2f64.powi(*n as i32), 0.0))
            .collect::<candle_core::Result<_>>()?;
        let angles = Tensor::stack(&angles, 4)?.flatten_from(3)?;
        Ok(Tensor::cat(
            &[z, &angles.sin()?, &angles.cos()?],
            D::Minus1,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use candle_core::{DType, Device};
    use diffusion_ops::rng::{Key, stream};

    fn config() -> VdmConfig {
        VdmConfig {
            channels: 1,
            n_embd: 4,
            n_layer: 1,
            fourier: vec![1, 2],
            attention: true,
            dropout: 0.0,
            groups: 2,
            ..VdmConfig::default()
        }
    }

    fn input() -> (Tensor, Tensor, Tensor) {
        let z = Key::new(1, stream::TEST).normal(8);
        let z = Tensor::from_vec(z, (2, 2, 2, 1), &Device::Cpu).unwrap();
        let gamma = Tensor::new(&[-3.0, 1.0f64], &Device::Cpu).unwrap();
        (z, gamma, Tensor::new(&[0.0, 1.0f64], &Device::Cpu).unwrap())
    }

    #[test]
    fn begins_as_the_identity_and_every_parameter_gets_a_gradient() {
        let store = Store::new(3, DType::F64, &Device::Cpu);
        let net = VdmNet::new(&config(), &store.root()).unwrap();
        let (z, gamma, condition) = input();
        let run = || net.forward(&z, &gamma, &condition, Mode::Eval).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(values(&run()), values(&z));
        for (i, var) in store.named().values().enumerate() {
            let key = Key::new(9, stream::TEST).item(i as u64);
            let fresh = key.normal(var.elem_count());
            var.set(&Tensor::from_vec(fresh, var.shape(), &Device::Cpu).unwrap())
                .unwrap();
        }
        let grads = diffusion_ops::backward(&run().sqr().unwrap().sum_all().unwrap()).unwrap();
        for (name, var) in store.named() {
            let grad = grads.get(var.as_tensor());
            let size = grad.map(|g| {
                g.sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap()
            });
            // What is added to all keys alike does not change a softmax.
            assert!(
                size.is_some_and(|s| s > 0.0) || name.ends_with("k.bias"),
                "{name}: {size:?}"
            );
        }
    }

    #[test]
    fn features_of_a_channel_stand_together() {
        let store = Store::new(3, DType::F64, &Device::Cpu);
        let two = VdmConfig {
            channels: 2,
            ..config()
        };
        let net = VdmNet::new(&two, &store.root()).unwrap();
        let z = Tensor::new(&[0.1, -0.2f64], &Device::Cpu).unwrap();
        let f = net.features(&z.reshape((1, 1, 1, 2)).unwrap()).unwrap();
        let f = f.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let tau = std::f64::consts::TAU;
        let exact = [
            0.1,
            -0.2,
            (tau * 0.2).sin(),
            (tau * 0.4).sin(),
            (-tau * 0.4).sin(),
            (-tau * 0.8).sin(),
            (tau * 0.2).cos(),
        ];
        assert!(
            f.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-12),
            "{f:?}"
        );
    }

    #[test]
    fn refuses_what_cannot_be() {
        let store = Store::new(3, DType::F64, &Device::Cpu);
        let fresh = || Store::new(3, DType::F64, &Device::Cpu).root();
        let wrong = |c: VdmConfig| VdmNet::new(&c, &fresh()).is_err();
        assert!(wrong(VdmConfig {
            groups: 3,
            ..config()
        }));
        let equal = VdmConfig {
            gamma_max: -13.3,
            ..config()
        };
        assert!(wrong(equal));
        let net = VdmNet::new(&config(), &store.root().sub("y")).unwrap();
        let (z, gamma, condition) = input();
        let short = gamma.narrow(0, 0, 1).unwrap();
        assert!(net.forward(&z, &short, &condition, Mode::Eval).is_err());
    }
}
