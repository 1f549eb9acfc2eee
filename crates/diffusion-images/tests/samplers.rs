//! Every named sampler on every named grid, with a network of a picture model.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use candle_core::{Device, Tensor};
use diffusion_core::grid::{GRIDS, Grid};
use diffusion_core::guide::Clip;
use diffusion_core::sample::{SAMPLERS, SamplerConfig, Solver};
use diffusion_images::data;
use diffusion_images::likelihood::Moments;
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::{preset, train};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

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

fn request(sampler: SamplerConfig, grid: Grid, count: usize) -> SampleRequest {
    SampleRequest {
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
    }
}

fn images(
    model: &ImageModel,
    sampler: SamplerConfig,
    grid: Grid,
    count: usize,
) -> diffusion_core::Result<Vec<f32>> {
    let images = model.sample(&request(sampler, grid, count), &mut ())?;
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

/// The best variance is another than DDPM's own, and neither it nor an image depends on the batch.
#[test]
fn the_analytic_sampler_does_not_depend_on_batches() {
    let model = model();
    let train = data::open("digits").unwrap();
    let points = Grid::Trailing.points(&model.table().unwrap(), 5).unwrap();
    let of = |images, batch, eta| {
        let how = Moments {
            images,
            batch,
            seed: 1,
        };
        let mut told = 0;
        let mut watch = |_| {
            told += 1;
            ControlFlow::Continue(())
        };
        let found = model
            .analytic(&points, &train, &how, eta, &mut watch)
            .unwrap();
        assert_eq!(told, 5 * usize::div_ceil(images, batch));
        found
    };
    let (whole, parts) = (of(24, 24, 1.0), of(24, 7, 1.0));
    for (a, b) in whole.step.variances().iter().zip(parts.step.variances()) {
        assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
    }
    let request = request(SamplerConfig::named("ddpm").unwrap(), Grid::Trailing, 3);
    let flat = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let by = |solver: &dyn Solver, batch| {
        let request = SampleRequest {
            batch,
            ..request.clone()
        };
        flat(model.sample_by(solver, &points, &request, &mut ()).unwrap())
    };
    let gap = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    };
    let images = by(&whole, 2);
    assert!(images.iter().all(|v| v.is_finite()));
    assert!(gap(&images, &by(&whole, 1)) < 1e-3);
    let ddpm = flat(model.sample(&request, &mut ()).unwrap());
    assert!(gap(&images, &ddpm) > 1e-2);
    assert!(gap(&images, &by(&of(24, 24, 0.0), 2)) > 1e-2);

    let how = Moments {
        images: 4,
        batch: 4,
        seed: 1,
    };
    let faces = data::open("emoji").unwrap();
    let said = model.analytic(&points, &faces, &how, 1.0, &mut |_| {
        ControlFlow::Continue(())
    });
    let said = said.err().unwrap().to_string();
    assert!(said.contains("[1, 8, 8]"), "{said}");
    let stopped = model.analytic(&points, &train, &how, 1.0, &mut |_| ControlFlow::Break(()));
    assert!(matches!(
        stopped.err(),
        Some(diffusion_core::Error::Interrupted)
    ));
}
