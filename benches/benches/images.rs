//! Training steps and sampling calls of image networks: those of the presets, and the cases of
//! `images` under the names that the comparison with other libraries uses.

#![allow(missing_docs, clippy::expect_used)] // A bench that cannot run has nobody to report to.

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use diffusion_benches::{Case, Training, specs};
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::noise::CounterNoise;
use diffusion_core::tensor::At;
use std::hint::black_box;
use std::time::Duration;

/// Preset, side of the images, batch of a training step.
const CASES: [(&str, usize, usize); 2] = [("small", 8, 64), ("medium", 28, 16)];

fn presets(c: &mut Criterion) {
    let mut group = c.benchmark_group("images");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_secs(2))
        .measurement_time(Duration::from_secs(8));
    for (preset, side, batch) in CASES {
        let mut training = Training::new(preset, side, batch).expect("a preset fits its own size");
        let name = format!("unet-{preset}-{side}px");
        group.bench_function(format!("train-step/{name}-b{batch}"), |b| {
            b.iter(|| training.step().expect("a training step"));
        });
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = training.model(folder.path()).expect("a saved model opens");
        let table = model.table().expect("a table of steps");
        for n in [16u64, 1] {
            let x = Tensor::zeros((n as usize, 1, side, side), DType::F32, &Device::Cpu)
                .expect("a batch");
            let denoiser = model.denoiser(None).expect("a denoiser");
            group.bench_function(format!("sampling-call/{name}-b{n}"), |b| {
                b.iter(|| {
                    let mut noise = CounterNoise::new(0, 0..n);
                    let mut call = Call {
                        noise: &mut noise,
                        items: 0..n,
                        tracked: false,
                    };
                    black_box(
                        denoiser
                            .predict(&x, At::All(table.index(500)), &mut call)
                            .expect("a prediction"),
                    );
                });
            });
        }
    }
    group.finish();
}

fn images(c: &mut Criterion) {
    let mut group = c.benchmark_group("images");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_secs(2))
        .measurement_time(Duration::from_secs(8));
    for spec in specs() {
        if spec.domain() != "images" {
            continue;
        }
        let name = spec.name.trim_start_matches("images/").to_owned();
        // Built when criterion runs it, so that a filter skips the rest.
        let mut case: Option<Box<dyn Case>> = None;
        group.bench_function(name, |b| {
            let case = case.get_or_insert_with(|| spec.build().expect("a case builds"));
            b.iter(|| case.call().expect("a call"));
        });
    }
    group.finish();
}

criterion_group!(benches, presets, images);
criterion_main!(benches);
