//! A small autoregressive model: every pixel a softmax of the pixels before it.
//!
//! ```text
//! p(k_d | k_{<d}) = softmax( b_d + W_d [x_{<d}, 1{k_{<d} > 0}] ),   x = 2 k/(K − 1) − 1
//! ```

use crate::data::{DIMS, LEVELS, Levels, on_scale};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use diffusion_core::likelihood::bits_per_dim;
use diffusion_core::train::{
    Cancel, EmaRule, Loss, LrSchedule, Objective, Quiet, StepCtx, TrainConfig, Trainer,
};
use diffusion_nn::Store;
use diffusion_ops::init::Init;

struct Logistic {
    weight: Tensor,
    bias: Tensor,
    mask: Tensor,
}

impl Logistic {
    fn new(store: &Store) -> diffusion_nn::Result<Self> {
        let shape = (DIMS * LEVELS, 2 * DIMS);
        // Input columns of the pixels before the one that a row belongs to.
        let mask: Vec<f32> = (0..shape.0 * shape.1)
            .map(|i| {
                let (row, column) = (i / shape.1 / LEVELS, i % shape.1 % DIMS);
                if column < row { 1.0 } else { 0.0 }
            })
            .collect();
        Ok(Self {
            weight: store.root().param("weight", shape, Init::Const(0.0))?,
            bias: store.root().param("bias", shape.0, Init::Const(0.0))?,
            mask: Tensor::from_vec(mask, shape, &Device::Cpu)?,
        })
    }

    /// `−ln p(k)` of every image, `[B]`.
    fn nats(&self, k: &Tensor) -> diffusion_core::Result<Tensor> {
        let ink = k.gt(0.0)?.to_dtype(DType::F32)?;
        let input = Tensor::cat(&[&on_scale(k)?, &ink], 1)?;
        let weight = (&self.weight * &self.mask)?;
        let logits = diffusion_ops::linear(&input, &weight, Some(&self.bias))?;
        let logits = logits.reshape((k.dim(0)?, DIMS, LEVELS))?;
        let logits = logits.broadcast_sub(&logits.max_keepdim(2)?.detach())?;
        let total = logits.exp()?.sum(2)?.log()?;
        let said = logits.gather(&k.to_dtype(DType::U32)?.unsqueeze(2)?, 2)?;
        Ok((total - said.squeeze(2)?)?.sum(1)?)
    }
}

impl Objective for Logistic {
    type Batch = Tensor;

    fn losses(&mut self, _: usize, k: &Tensor, _: &StepCtx) -> diffusion_core::Result<Vec<Loss>> {
        let bits = bits_per_dim(1.0, DIMS);
        let loss = self.nats(k)?.mean_all()?.affine(bits, 0.0)?;
        Ok(vec![Loss::new("bits", loss)])
    }

    fn writes_parameters(&self) -> bool {
        false
    }
}

/// Bits per dimension of each of `tests` after `steps` of training.
pub fn bits(train: &Tensor, tests: &[&Tensor], steps: u64, seed: u64) -> Result<Vec<f64>> {
    let store = Store::new(seed, DType::F32, &Device::Cpu);
    let mut model = Logistic::new(&store)?;
    let config = TrainConfig {
        steps,
        batch_size: 128,
        lr: 3e-3,
        schedule: LrSchedule::Cosine {
            warmup: 0,
            cycles: 0.5,
        },
        ema: EmaRule::Off {},
        seed,
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(store.named(), config.check()?)?;
    trainer.run(&mut model, &Levels(train), &mut Quiet, &Cancel::new())?;
    let measure = |test: &&Tensor| {
        let nats = model.nats(test)?.detach().mean_all()?.to_scalar::<f32>()?;
        Ok(bits_per_dim(f64::from(nats), DIMS))
    };
    tests.iter().map(measure).collect()
}
