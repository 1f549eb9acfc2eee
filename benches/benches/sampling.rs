//! What samplers cost without their network: every named one a step, beside one fused pass over the
//! data, and the cases of `sampling` under the names that the comparison with other libraries uses.

#![allow(missing_docs, clippy::expect_used)] // A bench that cannot run has nobody to report to.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use diffusion_benches::sampling::{SHAPE, STEPS, batch, still};
use diffusion_benches::{Case, specs};
use diffusion_core::grid::Grid;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::sample::{SAMPLERS, sample};
use diffusion_core::schedule::BetaSchedule;
use diffusion_ops::combine;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

fn sampling(c: &mut Criterion) {
    let mut group = c.benchmark_group("sampling");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    let (x, y) = (batch(1).expect("a batch"), batch(2).expect("a batch"));
    group.throughput(Throughput::Elements(1));
    group.bench_function("one-fused-pass", |b| {
        b.iter(|| black_box(combine(&[(0.9, &x), (0.1, &y)]).expect("a combination")));
    });
    group.bench_function("one-draw-of-noise", |b| {
        let mut noise = CounterNoise::new(0, 0..SHAPE[0] as u64);
        b.iter(|| black_box(noise.normal(&x).expect("noise")));
    });
    // Time a step: criterion reports it as the inverse of the throughput too.
    group.throughput(Throughput::Elements(STEPS as u64));
    let table = Arc::new(BetaSchedule::ddpm(1000).table(1000).expect("a table"));
    let points = Grid::Trailing.points(&*table, STEPS).expect("a grid");
    for sampler in SAMPLERS {
        // These need a variance from the network, or take steps of their own number.
        if ["ddpm-learned", "dpm-12", "dpm-23"].contains(&sampler.name) {
            continue;
        }
        let solver = (sampler.config)().solver(&points, Some(table.clone()));
        group.bench_function(format!("{}/{STEPS}-steps", sampler.name), |b| {
            b.iter(|| {
                let mut noise = CounterNoise::new(0, 0..SHAPE[0] as u64);
                let items = 0..SHAPE[0] as u64;
                black_box(
                    sample(&*solver, &still(&y), x.clone(), &mut noise, items).expect("a run"),
                )
            });
        });
    }
    for spec in specs() {
        if spec.domain() != "sampling" {
            continue;
        }
        let name = spec.name.trim_start_matches("sampling/").to_owned();
        let mut case: Option<Box<dyn Case>> = None;
        group.bench_function(name, |b| {
            let case = case.get_or_insert_with(|| spec.build().expect("a case builds"));
            b.iter(|| case.call().expect("a call"));
        });
    }
    group.finish();
}

criterion_group!(benches, sampling);
criterion_main!(benches);
