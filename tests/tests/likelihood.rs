//! Variational dequantisation: the flow of the networks' room under the bound of the core room.

// The exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use diffusion_core::likelihood::dequantise::{Uniform, log_prob_of_levels};
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::{Report, Result};
use diffusion_nn::Store;
use diffusion_nn::net::dequantiser::{DequantiserConfig, DequantiserFlow};

const LEVELS: usize = 4;
const BATCH: usize = 64;

/// `Σ log N(x; 0.4, 0.12²)`: steep inside a bin of width ½.
fn log_density(x: &Tensor) -> Result<Tensor> {
    let z = x.affine(1.0 / 0.12, -0.4 / 0.12)?;
    let constant = -(0.12f64 * std::f64::consts::TAU.sqrt()).ln();
    Ok(z.sqr()?.affine(-0.5, constant)?.flatten_from(1)?.sum(1)?)
}

/// `ln P(k = 2)` of one dimension: the mass of `[0, ½)`, by the midpoint rule.
fn exact() -> f64 {
    let n = 2000;
    let x = (0..n).map(|i| 0.5 * (f64::from(i) + 0.5) / f64::from(n));
    let p = x.map(|x| (-0.5 * ((x - 0.4) / 0.12f64).powi(2)).exp());
    (p.sum::<f64>() * 0.5 / f64::from(n) / (0.12 * std::f64::consts::TAU.sqrt())).ln()
}

#[test]
fn a_trained_flow_closes_the_gap_of_uniform_noise() {
    let store = Store::new(3, DType::F64, &Device::Cpu);
    let config = DequantiserConfig {
        channels: 1,
        levels: LEVELS,
        layers: 2,
        hidden: 4,
    };
    let flow = DequantiserFlow::new(config, &store.root()).unwrap();
    let learned = |k: &Tensor, noise: &mut dyn Noise| -> Result<(Tensor, Tensor)> {
        flow.draw(k, &noise.normal(k)?)
            .map_err(|e| Report::new("flow", e).config())
    };
    let k = Tensor::full(2.0, (BATCH, 1, 2, 1), &Device::Cpu).unwrap();
    let bound = |seed: u64, learns: bool| {
        let mut noise = CounterNoise::new(seed, 0..BATCH as u64);
        let how = (1, false);
        match learns {
            true => log_prob_of_levels(&k, LEVELS, &learned, &log_density, how, &mut noise),
            false => log_prob_of_levels(&k, LEVELS, &Uniform, &log_density, how, &mut noise),
        }
        .unwrap()
    };
    for step in 0..120 {
        let loss = bound(step, true).mean_all().unwrap().neg().unwrap();
        let grads = diffusion_ops::backward(&loss).unwrap();
        for var in store.named().values() {
            let grad = grads.get(var.as_tensor()).unwrap();
            let next = (var.as_tensor() - grad.affine(0.1, 0.0).unwrap()).unwrap();
            var.set(&next.detach()).unwrap();
        }
    }
    let mean = |learns: bool| {
        let all: Vec<f64> = (1000..1010)
            .flat_map(|seed| bound(seed, learns).to_vec1::<f64>().unwrap())
            .collect();
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        let var = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        (mean, 4.0 * (var / n).sqrt())
    };
    let ((flow, e1), (uniform, e2)) = (mean(true), mean(false));
    let exact = 2.0 * exact();
    assert!(flow > uniform + e1 + e2, "{flow} {uniform} {e1} {e2}");
    assert!(flow < exact + e1, "{flow} {exact} {e1}");
    assert!(
        exact - flow < 0.3 * (exact - uniform),
        "{flow} {uniform} {exact}"
    );
}
