//! A layer of a transformer's encoder.

use crate::error::{Error, Result};
use crate::layer::{Activation, LayerNorm, Linear};
use crate::mode::Mode;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::{Init, fnv1a};
use diffusion_ops::{add, attention, dropout, linear, softmax};

/// Sizes of a [`TransformerEncoderLayer`], under the names and with the defaults of
/// `torch.nn.TransformerEncoderLayer`.
#[derive(Clone, Copy, Debug)]
pub struct TransformerEncoderLayerConfig {
    /// Features of a token.
    pub d_model: usize,
    /// Number of heads.
    pub nhead: usize,
    /// Features between the two linear maps.
    pub dim_feedforward: usize,
    /// Probability of dropout: of attention weights, of both branches, and between the linear
    /// maps.
    pub dropout: f64,
    /// The nonlinearity between the linear maps.
    pub activation: Activation,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// Whether the norms come before the branches rather than after the sums.
    pub norm_first: bool,
}

impl TransformerEncoderLayerConfig {
    /// The defaults for these sizes.
    pub fn new(d_model: usize, nhead: usize) -> Self {
        Self {
            d_model,
            nhead,
            dim_feedforward: 2048,
            dropout: 0.1,
            activation: Activation::Relu,
            layer_norm_eps: 1e-5,
            norm_first: false,
        }
    }

    fn check(&self, path: &str) -> Result<()> {
        if self.nhead == 0 || self.d_model == 0 || !self.d_model.is_multiple_of(self.nhead) {
            return Err(Error::config(
                format!("nhead of `{path}`"),
                self.nhead,
                format!("a divisor of its {} features", self.d_model),
                "choose `nhead` so that it divides `d_model`",
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config(
                format!("dropout of `{path}`"),
                self.dropout,
                "at least 0 and less than 1",
                "use 0 for no dropout",
            ));
        }
        Ok(())
    }
}

/// Self-attention and a small network, each added to its input (Vaswani et al. 2017), as
/// `torch.nn.TransformerEncoderLayer`.
///
/// ```text
/// h = N₁(x + A(x)),    y = N₂(h + F(h))               norms last (the default)
/// h = x + A(N₁(x)),    y = h + F(N₂(h))               norms first
/// A(x) = W_o concat_i attention(Q_i, K_i, V_i) + b_o,   [Q, K, V] = W_in x + b_in
/// F(h) = W₂ a(W₁ h + b₁) + b₂
/// ```
///
/// where `N` are layer norms, `a` is the nonlinearity and `i` runs over the heads. Names:
/// `self_attn.in_proj_weight`, `self_attn.in_proj_bias`, `self_attn.out_proj`, `linear1`,
/// `linear2`, `norm1`, `norm2`.
#[derive(Clone, Debug)]
pub struct TransformerEncoderLayer {
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    linear1: Linear,
    linear2: Linear,
    norm1: LayerNorm,
    norm2: LayerNorm,
    config: TransformerEncoderLayerConfig,
    /// Tells this layer's dropout masks from those of other layers.
    stream: u64,
}

/// The places of dropout, which differ in their masks.
#[derive(Clone, Copy)]
enum Place {
    Weights = 1,
    Attention = 2,
    Inner = 3,
    Outer = 4,
}

impl TransformerEncoderLayer {
    /// A layer begun as PyTorch's: `in_proj_weight` uniform within `√(6/(D + 3D))`, the biases of
    /// the attention zero.
    ///
    /// # Errors
    /// If `nhead` does not divide `d_model`, the dropout is no probability, or a name is taken.
    pub fn new(scope: &Scope, config: TransformerEncoderLayerConfig) -> Result<Self> {
        config.check(scope.path())?;
        let (d, inner) = (config.d_model, config.dim_feedforward);
        let xavier = Init::Uniform {
            bound: (6.0 / (4 * d) as f64).sqrt(),
        };
        let attn = scope.sub("self_attn");
        let out = attn.sub("out_proj");
        Ok(Self {
            in_proj_weight: attn.param("in_proj_weight", (3 * d, d), xavier)?,
            in_proj_bias: attn.param("in_proj_bias", 3 * d, Init::Const(0.0))?,
            out_proj_weight: out.param("weight", (d, d), Init::fan_in(d))?,
            out_proj_bias: out.param("bias", d, Init::Const(0.0))?,
            linear1: Linear::new(&scope.sub("linear1"), d, inner, true)?,
            linear2: Linear::new(&scope.sub("linear2"), inner, d, true)?,
            norm1: LayerNorm::new(&scope.sub("norm1"), d, config.layer_norm_eps)?,
            norm2: LayerNorm::new(&scope.sub("norm2"), d, config.layer_norm_eps)?,
            config,
            stream: fnv1a(scope.path()),
        })
    }

    /// Runs the layer on sequences of tokens.
    ///
    /// # Shapes
    /// `x [B, N, D]`, `mask` anything that broadcasts to `[B, heads, N, N]` and is added to the
    /// scores; the result has the shape of `x`.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if self.config.norm_first {
            let h = add(x, &self.attend(&self.norm1.forward(x)?, mask, mode)?)?;
            return Ok(add(&h, &self.feed(&self.norm2.forward(&h)?, mode)?)?);
        }
        let h = self.norm1.forward(&add(x, &self.attend(x, mask, mode)?)?)?;
        self.norm2.forward(&add(&h, &self.feed(&h, mode)?)?)
    }

    fn attend(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (b, n, d) = x.dims3()?;
        let heads = self.config.nhead;
        let qkv = linear(x, &self.in_proj_weight, Some(&self.in_proj_bias))?;
        let part = |i: usize| -> Result<Tensor> {
            let part = qkv.narrow(2, i * d, d)?;
            Ok(part.reshape((b, n, heads, d / heads))?.transpose(1, 2)?)
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let y = match mode {
            Mode::Train { .. } if self.config.dropout > 0.0 => {
                // The weights themselves are needed here, which the fused operation never holds.
                let scale = ((d / heads) as f64).powf(-0.5);
                let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
                let scores = match mask {
                    Some(mask) => scores.broadcast_add(mask)?,
                    None => scores,
                };
                let weights = softmax(&scores, scores.rank() - 1)?;
                self.drop(weights, Place::Weights, mode)?
                    .matmul(&v.contiguous()?)?
            }
            _ => attention(&q, &k, &v, mask, None)?,
        };
        let y = y.transpose(1, 2)?.reshape((b, n, d))?;
        let y = linear(&y, &self.out_proj_weight, Some(&self.out_proj_bias))?;
        self.drop(y, Place::Attention, mode)
    }

    fn feed(&self, h: &Tensor, mode: Mode) -> Result<Tensor> {
        let inner = self.config.activation.forward(&self.linear1.forward(h)?)?;
        let inner = self.drop(inner, Place::Inner, mode)?;
        self.drop(self.linear2.forward(&inner)?, Place::Outer, mode)
    }

    fn drop(&self, x: Tensor, place: Place, mode: Mode) -> Result<Tensor> {
        match mode {
            Mode::Train { mut key } if self.config.dropout > 0.0 => {
                let own = self.stream.wrapping_add(place as u64);
                key.stream = key.stream.wrapping_add(own);
                Ok(dropout(&x, self.config.dropout, key)?)
            }
            _ => Ok(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use candle_core::{DType, Device};
    use diffusion_ops::gradcheck::{max_abs_difference, max_relative_error, normal};
    use diffusion_ops::rng::Key;

    fn config(norm_first: bool, activation: Activation) -> TransformerEncoderLayerConfig {
        TransformerEncoderLayerConfig {
            dim_feedforward: 12,
            dropout: 0.0,
            activation,
            norm_first,
            ..TransformerEncoderLayerConfig::new(8, 2)
        }
    }

    fn wave(n: usize, f: impl Fn(f64) -> f64) -> Vec<f64> {
        (0..n).map(|i| f(i as f64)).collect()
    }

    /// A layer with the values of the fixture: ½ sin(0.37 i + k) for the k-th name, plus 1 for the
    /// scales of the norms.
    fn layer(config: TransformerEncoderLayerConfig) -> Result<(Store, TransformerEncoderLayer)> {
        let store = Store::new(1, DType::F64, &Device::Cpu);
        let layer = TransformerEncoderLayer::new(&store.root(), config)?;
        for (k, (name, var)) in store.named().iter().enumerate() {
            let one = f64::from(u8::from(
                name.starts_with("norm") && name.ends_with("weight"),
            ));
            let values = wave(var.elem_count(), |i| {
                one + 0.5 * (0.37 * i + k as f64).sin()
            });
            var.set(&Tensor::from_vec(
                values,
                var.shape().clone(),
                &Device::Cpu,
            )?)?;
        }
        Ok((store, layer))
    }

    fn causal() -> Result<Tensor> {
        let i = f64::NEG_INFINITY;
        let mask = [[0.0, i, i], [0.0, 0.0, i], [0.0, 0.0, 0.0]];
        Ok(Tensor::new(&mask, &Device::Cpu)?)
    }

    struct Torch {
        norm_first: bool,
        activation: Activation,
        masked: bool,
        /// Every fifth entry of the output.
        y: [f64; 10],
        /// Every fifth entry of the gradient of the input.
        dx: [f64; 10],
        /// The gradient of each parameter, by name, summed against cos(i).
        params: [f64; 12],
    }

    /// Values of `torch.nn.TransformerEncoderLayer` in f64, torch 2.15.
    const TORCH: [Torch; 2] = [
        Torch {
            norm_first: false,
            activation: Activation::Gelu,
            masked: false,
            y: [
                -0.660409124,
                3.170444256,
                0.868780044,
                0.907683864,
                0.070911022,
                1.893591335,
                -0.326587985,
                -0.83619553,
                -1.207586923,
                2.302062089,
            ],
            dx: [
                0.310142673,
                -0.494322279,
                0.182346446,
                0.277072888,
                -1.19904533,
                -0.767643984,
                0.993216959,
                -0.237501304,
                -0.541205965,
                0.168338535,
            ],
            params: [
                -0.147067683,
                -0.500542457,
                2.617890965,
                -1.235490823,
                2.566690913,
                0.664097999,
                3.365711814,
                -1.930492725,
                -0.09782234,
                0.014737248,
                1.996424034,
                0.083355121,
            ],
        },
        Torch {
            norm_first: true,
            activation: Activation::Relu,
            masked: true,
            y: [
                -0.867988802,
                2.120159482,
                1.100136271,
                -0.64788369,
                -3.035321236,
                1.016708926,
                -0.454813414,
                0.249144541,
                -3.015652991,
                1.508755648,
            ],
            dx: [
                0.163433645,
                -1.092030349,
                0.511172938,
                0.729530411,
                -1.091772699,
                -0.447589742,
                0.939435847,
                0.174683592,
                -1.546268682,
                0.565434995,
            ],
            params: [
                0.135693332,
                -0.030269668,
                3.365711814,
                0.682612855,
                -0.053541023,
                -0.088668874,
                0.083805438,
                -0.602027049,
                -0.349433425,
                1.180114962,
                3.912525797,
                -0.57992507,
            ],
        },
    ];

    fn close(found: &Tensor, expected: &[f64], every: usize, what: &str) -> Result<()> {
        let found = found.flatten_all()?.to_vec1::<f64>()?;
        for (i, (a, b)) in found.iter().step_by(every).zip(expected).enumerate() {
            assert!((a - b).abs() < 2e-9, "{what} {i}: {a} instead of {b}");
        }
        Ok(())
    }

    #[test]
    fn values_and_gradients_are_those_of_torch() -> Result<()> {
        for torch in &TORCH {
            let (store, layer) = layer(config(torch.norm_first, torch.activation))?;
            let x = Tensor::from_vec(wave(48, |i| (1.3 * i).cos()), (2, 3, 8), &Device::Cpu)?;
            let x = candle_core::Var::from_tensor(&x)?;
            let mask = torch.masked.then(causal).transpose()?;
            let y = layer.forward(&x, mask.as_ref(), Mode::Eval)?;
            close(&y, &torch.y, 5, "y")?;
            let w = Tensor::from_vec(wave(48, |i| (0.9 * i).sin()), (2, 3, 8), &Device::Cpu)?;
            let grads = diffusion_ops::backward(&(y * w)?.sum_all()?)?;
            close(grads.get(&x).unwrap(), &torch.dx, 5, "dx")?;
            for ((name, var), expected) in store.named().iter().zip(torch.params) {
                let grad = grads.get(var).unwrap().flatten_all()?;
                let cos = Tensor::new(wave(grad.elem_count(), f64::cos), &Device::Cpu)?;
                close(&(grad * cos)?.sum_all()?, &[expected], 1, name)?;
            }
        }
        Ok(())
    }

    #[test]
    fn the_gradient_of_the_input_is_the_difference_quotient() -> Result<()> {
        let key = Key::new(5, 6);
        for (norm_first, p, mode) in [
            (false, 0.0, Mode::Eval),
            (true, 0.0, Mode::Eval),
            (false, 0.3, Mode::Train { key }),
        ] {
            let config = TransformerEncoderLayerConfig {
                dropout: p,
                ..config(norm_first, Activation::Gelu)
            };
            let (_, layer) = layer(config)?;
            let mask = causal()?;
            let f = |t: &[Tensor]| {
                let y = layer.forward(&t[0], Some(&mask), mode);
                y.map_err(candle_core::Error::wrap)
            };
            let error = max_relative_error(f, &[normal(2, (2, 3, 8))?])?;
            assert!(error < 1e-6, "{norm_first} {p}: {error}");
        }
        Ok(())
    }

    #[test]
    fn dropout_only_trains_and_each_place_has_its_mask() -> Result<()> {
        let dropping = TransformerEncoderLayerConfig {
            dropout: 0.5,
            ..config(false, Activation::Gelu)
        };
        let (_, plain) = layer(config(false, Activation::Gelu))?;
        let (_, layer) = layer(dropping)?;
        let x = normal(2, (2, 3, 8))?;
        let train = |step| Mode::Train {
            key: Key::new(5, 6).step(step),
        };
        let eval = layer.forward(&x, None, Mode::Eval)?;
        let same = plain.forward(&x, None, train(0))?;
        assert!(max_abs_difference(&eval, &same)? < 1e-12);
        let first = layer.forward(&x, None, train(0))?;
        assert!(max_abs_difference(&first, &eval)? > 1e-3);
        let again = layer.forward(&x, None, train(0))?;
        assert_eq!(max_abs_difference(&first, &again)?, 0.0);
        assert!(max_abs_difference(&first, &layer.forward(&x, None, train(1))?)? > 1e-3);
        let ones = Tensor::ones((2, 3, 8), DType::F64, &Device::Cpu)?;
        let masks = [Place::Weights, Place::Attention, Place::Inner, Place::Outer]
            .map(|place| layer.drop(ones.clone(), place, train(0)).unwrap());
        for i in 0..4 {
            for j in 0..i {
                assert!(max_abs_difference(&masks[i], &masks[j])? > 1.0, "{i} {j}");
            }
        }
        Ok(())
    }

    #[test]
    fn impossible_sizes_are_refused_by_name() {
        let store = Store::new(1, DType::F32, &Device::Cpu);
        let scope = store.root().sub("encoder");
        let refused = |config| {
            TransformerEncoderLayer::new(&scope, config)
                .unwrap_err()
                .to_string()
        };
        let message = refused(TransformerEncoderLayerConfig::new(8, 3));
        assert!(message.contains("`nhead of `encoder`` is 3"), "{message}");
        let message = refused(TransformerEncoderLayerConfig {
            dropout: 1.0,
            ..TransformerEncoderLayerConfig::new(8, 2)
        });
        assert!(message.contains("dropout of `encoder`"), "{message}");
    }
}
