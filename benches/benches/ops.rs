//! The cases of `ops`, under the names that the comparison with other libraries uses, and the
//! noise of a batch.

#![allow(missing_docs, clippy::expect_used)] // A bench that cannot run has nobody to report to.

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use diffusion_benches::{Case, specs};
use diffusion_core::noise::{CounterNoise, Noise};
use std::time::Duration;

fn ops(c: &mut Criterion) {
    let mut group = c.benchmark_group("ops");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    for spec in specs() {
        if spec.domain() != "ops" {
            continue;
        }
        let name = spec.name.trim_start_matches("ops/").to_owned();
        // Built when criterion runs it, so that a filter skips the rest.
        let mut case: Option<Box<dyn Case>> = None;
        group.bench_function(name, |b| {
            let case = case.get_or_insert_with(|| spec.build().expect("a case builds"));
            b.iter(|| case.call().expect("a call"));
        });
    }
    // Random numbers have no counterpart elsewhere that draws the same.
    group.bench_function("normal-64x3x32x32", |b| {
        let like = Tensor::zeros((64, 3, 32, 32), DType::F32, &Device::Cpu).expect("a tensor");
        let mut noise = CounterNoise::new(1, 0..64);
        b.iter(|| noise.normal(&like).expect("noise"));
    });
    group.finish();
}

criterion_group!(benches, ops);
criterion_main!(benches);
