//! Test images to noise and back by DDIM: what is lost on the way.

use crate::Options;
use crate::digits::{Study, Trained};
use crate::jobs::{self, Job};
use anyhow::Result;
use candle_core::{DType, Device};
use diffusion_core::grid::Grid;
use diffusion_core::report::{Better, Results, Row};
use diffusion_images::figure::{Axes, Series, line_plot};
use diffusion_images::invert::Invert;
use std::time::Instant;

/// Network calls a step on the way up.
const ITERATIONS: [usize; 3] = [1, 3, 10];
/// Steps of both ways.
const STEPS: [usize; 4] = [10, 20, 50, 100];
/// Test images.
const COUNT: usize = 60;

pub fn rows(
    options: &Options,
    results: &mut Results,
    study: &Study,
    model: &Trained,
) -> Result<()> {
    let count = COUNT.min(study.test.len());
    let (images, labels) = study
        .test
        .batch(&(0..count).collect::<Vec<_>>(), &Device::Cpu)?;
    let labels: Option<Vec<u32>> = labels
        .map(|l| l.to_dtype(DType::U32)?.to_vec1())
        .transpose()?;
    let (images, labels) = (&images, &labels);
    let mut work: Vec<Job<'_, (f64, f64)>> = Vec::new();
    for iterations in ITERATIONS {
        for steps in STEPS {
            work.push(Job {
                cost: (steps * (iterations + 1)) as f64,
                work: Box::new(move || {
                    let start = Instant::now();
                    let net = model.open()?;
                    let classes = labels.as_deref().filter(|_| !net.classes().is_empty());
                    let how = Invert {
                        grid: Grid::Trailing,
                        steps,
                        iterations,
                        batch: count,
                    };
                    let done = net.invert(images, classes, &how, &mut ())?;
                    // 127.5 grey levels are one unit.
                    let mean = done.errors.iter().sum::<f64>() / count as f64 * 127.5;
                    Ok((mean, start.elapsed().as_secs_f64()))
                }),
            });
        }
    }
    let values = jobs::run(work)?;
    let mut curves = Vec::new();
    for (k, iterations) in ITERATIONS.iter().enumerate() {
        let own = &values[k * STEPS.len()..][..STEPS.len()];
        let points = STEPS.iter().zip(own);
        curves.push(Series::new(
            format!("{iterations} a step up"),
            points
                .clone()
                .map(|(steps, v)| (*steps as f64, v.0))
                .collect(),
        ));
        for (steps, (value, seconds)) in points {
            results.rows.push(Row {
                system: format!("DDIM inversion, {iterations} calls a step"),
                dataset: study.test.name().into(),
                split: format!("{count} test images"),
                metric: format!("round trip in grey levels of 256, {steps} steps"),
                value: *value,
                better: Better::Lower,
                baseline: None,
                published: None,
                seconds: *seconds,
                note: "root mean squared difference of image and image -> noise -> image".into(),
            });
        }
    }
    line_plot(
        &options.out.join("inversion.svg"),
        &Axes::new("Image to noise and back", "steps", "grey levels of 256")
            .log_x()
            .log_y(),
        &curves,
    )?;
    results.figure(
        "inversion.svg",
        "Root mean squared difference of test images and what DDIM makes of their latents; more network \
         calls a step solve for the latent more exactly.",
    );
    Ok(())
}
