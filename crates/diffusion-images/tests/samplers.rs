//! Every named sampler on every named grid, with a network of a picture model.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use candle_core::{Device, Tensor};
use diffusion_core::grid::{GRIDS, Grid};
use diffusion_core::guide::Clip;
use diffusion_core::sample::{SAMPLERS, SamplerConfig};
use diffusion_images::data;
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::{preset, train};
use std::collections::BTreeMap;

/// A network that was never trained.
fn model() -> ImageModel {
    let digits = data::open("digits").unwrap().select(&[0, 1, 2, 3]).unwrap();
    let mut config = preset::preset("tiny", &digits).unwrap();
    config.conditional = false;
    preset::fit(&mut config, &digits).unwrap();
    let task = train::Task::new(&config, &Device::Cpu).unwrap();
    let weights: BTreeMap<String, Tensor> = task
        .parameters()
        .into_iter()
        .map(|(name, var)| (name, var.as_tensor().clone()))
        .collect();
    ImageModel::from_weights(&config, &[], &weights, &Device::Cpu).unwrap()
}

fn images(
    model: &ImageModel,
    sampler: SamplerConfig,
    grid: Grid,
    count: usize,
) -> diffusion_core::Result<Vec<f32>> {
    let request = SampleRequest {
        count,
        sampler,
        grid,
        steps: 5,
        labels: None,
        guidance: 1.0,
        clip: Clip::Static { range: 1.0 },
        batch: 2,
        brownian: false,
        seed: 3,
    };
    let images = model.sample(&request, &mut ())?;
    assert_eq!(images.dims(), [count, 1, 8, 8]);
    Ok(images.flatten_all()?.to_vec1()?)
}

/// Finite pictures, and image 0 the same alone as in a batch.
#[test]
fn every_sampler_runs_and_no_image_depends_on_the_others() {
    let model = model();
    let table = model.table().unwrap();
    let mut wrong = Vec::new();
    for sampler in SAMPLERS {
        if sampler.name == "ddpm-learned" {
            continue;
        }
        let config = (sampler.config)();
        let grid = config.usual_grid(&table);
        let run = |n| images(&model, config.clone(), grid.clone(), n);
        match (run(1), run(3)) {
            (Ok(one), Ok(three)) => {
                let gap = one
                    .iter()
                    .zip(&three)
                    .fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
                // Matrix products may differ in the last bits with the size of the batch.
                if gap.is_nan() || gap > 1e-3 {
                    wrong.push(format!("{}: {gap}", sampler.name));
                }
            }
            (one, three) => {
                let error = one.err().or(three.err()).unwrap();
                wrong.push(format!("{}: {error}", sampler.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_grid_serves() {
    let model = model();
    let table = model.table().unwrap();
    for (name, _) in GRIDS {
        for sampler in ["ddim", "dpmpp-3m", "unipc", "heun", "deis", "dpmpp-2m-sde"] {
            let sampler = SamplerConfig::named(sampler).unwrap();
            let grid = Grid::named(name, &table).unwrap();
            let values = images(&model, sampler, grid, 1).unwrap();
            assert!(values.iter().all(|v| v.is_finite()), "{name}");
        }
    }
}
