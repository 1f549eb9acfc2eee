//! Two U-Nets: a small one on grey images, and that of DDPM on CIFAR-10.

use crate::case::{Spec, normal};
use crate::network::{self, Forward, Plan};
use anyhow::Result;
use candle_core::{Device, Tensor};
use diffusion_nn::Mode;
use diffusion_nn::Scope;
use diffusion_nn::net::unet2d::{DownBlockType, UNet2D, UNet2DConfig, UpBlockType};
use serde_json::Value;

struct UNet {
    config: UNet2DConfig,
    side: usize,
}

pub(crate) fn specs() -> Vec<Spec> {
    let mut specs = network::specs("images/unet-1m", small(), 64, &[64, 16, 1]);
    specs.extend(network::specs("images/unet-35m", cifar10(), 8, &[16, 8, 1]));
    specs
}

/// 1.11 million parameters on 28×28 grey images, attention at 7×7.
fn small() -> UNet {
    use DownBlockType::{AttnDownBlock2D, DownBlock2D};
    use UpBlockType::{AttnUpBlock2D, UpBlock2D};
    UNet {
        side: 28,
        config: UNet2DConfig {
            in_channels: 1,
            out_channels: 1,
            block_out_channels: vec![32, 64, 64],
            down_block_types: vec![DownBlock2D, DownBlock2D, AttnDownBlock2D],
            up_block_types: vec![AttnUpBlock2D, UpBlock2D, UpBlock2D],
            layers_per_block: 1,
            norm_num_groups: Some(8),
            ..UNet2DConfig::default()
        },
    }
}

/// The published network of Ho et al. 2020 for CIFAR-10 (`google/ddpm-cifar10-32`), 35.7 million
/// parameters, attention at 16×16 with one head.
fn cifar10() -> UNet {
    use DownBlockType::{AttnDownBlock2D, DownBlock2D};
    use UpBlockType::{AttnUpBlock2D, UpBlock2D};
    UNet {
        side: 32,
        config: UNet2DConfig {
            block_out_channels: vec![128, 256, 256, 256],
            down_block_types: vec![DownBlock2D, AttnDownBlock2D, DownBlock2D, DownBlock2D],
            up_block_types: vec![UpBlock2D, UpBlock2D, AttnUpBlock2D, UpBlock2D],
            downsample_padding: 0,
            flip_sin_to_cos: false,
            freq_shift: 1.0,
            norm_eps: 1e-6,
            attention_head_dim: None,
            ..UNet2DConfig::default()
        },
    }
}

impl Plan for UNet {
    fn network(&self) -> &'static str {
        "unet"
    }

    fn config(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn build(&self, scope: &Scope) -> diffusion_nn::Result<Forward> {
        let net = UNet2D::new(&self.config, scope)?;
        Ok(Box::new(move |inputs| {
            net.forward(&inputs[0], &inputs[1], None, Mode::Eval)
        }))
    }

    fn inputs(&self, batch: usize) -> Result<Vec<(&'static str, Tensor)>> {
        let shape = [batch, self.config.in_channels, self.side, self.side];
        let times: Vec<f32> = (0..batch).map(|i| ((i * 37 + 5) % 1000) as f32).collect();
        Ok(vec![
            ("sample", normal(1, &shape)?),
            ("timestep", Tensor::new(times, &Device::Cpu)?),
        ])
    }

    fn shape(&self, batch: usize) -> Vec<usize> {
        vec![batch, self.config.out_channels, self.side, self.side]
    }
}
