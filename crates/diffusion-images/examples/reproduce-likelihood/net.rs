//! The network of all systems: residual blocks on the 64 values of an image.
//!
//! ```text
//! c = silu(W₁ silu(W₀ emb(50 (γ + 10)))),   γ = −ln SNR
//! h ← h + W_b silu(W_a norm(h) + W_c c)          `blocks` times
//! ε̂ = x + W_out norm(h)
//! ```

use candle_core::{DType, Tensor};
use diffusion_nn::layer::{Initial, LayerNorm, Linear};
use diffusion_nn::{Result, Scope};

/// Sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    pub dims: usize,
    pub width: usize,
    pub blocks: usize,
    /// A second head for the reverse variance.
    pub variance: bool,
    /// `sin` and `cos` of `2π 2ⁿ x` beside the input, for these `n`.
    pub fourier: &'static [u32],
}

struct Block {
    norm: LayerNorm,
    first: Linear,
    cond: Linear,
    second: Linear,
}

/// See the module.
pub struct Mlp {
    sizes: Sizes,
    input: Linear,
    time: [Linear; 2],
    blocks: Vec<Block>,
    norm: LayerNorm,
    out: Linear,
}

const EMBEDDING: usize = 64;
const EPS: f64 = 1e-5;

impl Mlp {
    pub fn new(sizes: Sizes, scope: &Scope) -> Result<Self> {
        let w = sizes.width;
        let linear = |name: &str, i, o| Linear::new(&scope.sub(name), i, o, true);
        let block = |i: usize| -> Result<Block> {
            let scope = scope.sub(format!("blocks.{i}"));
            Ok(Block {
                norm: LayerNorm::new(&scope.sub("norm"), w, EPS)?,
                first: Linear::new(&scope.sub("first"), w, w, true)?,
                cond: Linear::new(&scope.sub("cond"), EMBEDDING, w, false)?,
                second: Linear::begun(&scope.sub("second"), w, w, true, Initial::Zero)?,
            })
        };
        let heads = if sizes.variance { 2 } else { 1 };
        Ok(Self {
            input: linear("input", sizes.dims * (1 + 2 * sizes.fourier.len()), w)?,
            time: [
                linear("time.0", EMBEDDING, EMBEDDING)?,
                linear("time.1", EMBEDDING, EMBEDDING)?,
            ],
            blocks: (0..sizes.blocks).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::new(&scope.sub("norm"), w, EPS)?,
            out: Linear::begun(
                &scope.sub("out"),
                w,
                sizes.dims * heads,
                true,
                Initial::Zero,
            )?,
            sizes,
        })
    }

    /// `x` `[B, D]` and `γ` `[B]` to the noise `[B, D]`, with a second head `[B, 2 D]`.
    pub fn forward(&self, x: &Tensor, gamma: &Tensor) -> Result<Tensor> {
        let time = gamma.affine(50.0, 500.0)?;
        let c = diffusion_ops::timestep_embedding(&time, EMBEDDING, false, 1.0, 1.0, 10_000.0)?;
        let mut c = c.to_dtype(DType::F32)?;
        for linear in &self.time {
            c = diffusion_ops::silu(&linear.forward(&c)?)?;
        }
        let mut parts = vec![x.clone()];
        for n in self.sizes.fourier {
            let angle = x.affine(std::f64::consts::TAU * 2f64.powi(*n as i32), 0.0)?;
            parts.extend([angle.sin()?, angle.cos()?]);
        }
        let mut h = self.input.forward(&Tensor::cat(&parts, 1)?)?;
        for block in &self.blocks {
            let inner = block.first.forward(&block.norm.forward(&h)?)?;
            let inner = diffusion_ops::silu(&(inner + block.cond.forward(&c)?)?)?;
            h = (h + block.second.forward(&inner)?)?;
        }
        let out = self.out.forward(&self.norm.forward(&h)?)?;
        let noise = (out.narrow(1, 0, self.sizes.dims)? + x)?;
        if !self.sizes.variance {
            return Ok(noise);
        }
        let mix = out.narrow(1, self.sizes.dims, self.sizes.dims)?;
        Ok(Tensor::cat(&[&noise, &mix], 1)?)
    }
}
