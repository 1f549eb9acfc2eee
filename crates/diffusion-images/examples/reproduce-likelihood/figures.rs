//! The figures of the page.

use crate::rows::Table;
use crate::study::*;
use crate::train::{GAMMA, STEPS};
use anyhow::Result;
use diffusion_core::report::Results;
use diffusion_images::figure::{Axes, Series, line_plot};
use std::path::Path;

/// Draws everything.
pub fn draw(
    table: &Table,
    outcomes: &[Outcome],
    folder: &Path,
    results: &mut Results,
) -> Result<()> {
    for (file, system, rules, title) in [
        (
            "variances.svg",
            SIMPLE,
            &[SMALL, LARGE, ANALYTIC, RESIDUAL, OPTIMAL][..],
            "Bound of K steps, L_simple, linear table",
        ),
        (
            "variances-hybrid.svg",
            HYBRID,
            &[SMALL, LARGE, LEARNED, ANALYTIC, RESIDUAL, OPTIMAL],
            "Bound of K steps, L_hybrid, cosine table",
        ),
    ] {
        let curve = |rule: &&str| {
            let point = |count: &usize| {
                let bits = table.mean(system, &bound_metric(*count, rule));
                bits.map(|bits| (*count as f64, bits))
            };
            Series::new(*rule, COUNTS.iter().filter_map(point).collect())
        };
        let mut series: Vec<Series> = rules.iter().map(curve).collect();
        let ends = (COUNTS[0] as f64, STEPS as f64);
        series.push(line("histogram of each pixel", table.same.histogram, ends));
        let axes = Axes::new(title, "steps K", "bits/dim").log_x().log_y();
        line_plot(&folder.join(file), &axes, &series)?;
        results.figure(
            file,
            "The reverse variance decides few-step likelihoods; means over the seeds.",
        );
    }
    terms(outcomes, folder, results)?;
    limits(table, folder, results)?;
    gammas(outcomes, folder, results)
}

/// Nothing to see: it makes room for the legend above the curves.
fn room(x: f64, top: f64) -> Series {
    Series::new("", vec![(x, top), (x, top)])
}

fn line(name: &str, value: f64, (low, high): (f64, f64)) -> Series {
    Series::new(name, vec![(low, value), (high, value)])
}

/// The terms of the bound: where the bits are.
fn terms(outcomes: &[Outcome], folder: &Path, results: &mut Results) -> Result<()> {
    let mut series: Vec<Series> = Vec::new();
    for outcome in outcomes {
        let Some((name, terms)) = &outcome.terms else {
            continue;
        };
        if series.iter().any(|s| s.name == *name) {
            continue;
        }
        // Means over a third of an octave: a term of a batch is noisy. The decoder's term is next to
        // nothing.
        let mut points = Vec::new();
        let mut low = 2usize;
        while low <= terms.len() {
            let high = ((low as f64 * 1.3).ceil() as usize)
                .min(terms.len() + 1)
                .max(low + 1);
            let part = &terms[low - 1..high - 1];
            let middle = ((low * (high - 1)) as f64).sqrt();
            points.push((middle, part.iter().sum::<f64>() / part.len() as f64));
            low = high;
        }
        series.push(Series::new(*name, points));
    }
    let axes = Axes::new(
        "Terms of the bound, 1000 steps",
        "step t",
        "bits/dim of a step",
    );
    line_plot(&folder.join("terms.svg"), &axes.log_x().log_y(), &series)?;
    results.figure(
        "terms.svg",
        "Most bits are in the first few steps, where the grey levels are told apart.",
    );
    Ok(())
}

/// The systems side by side, baselines as lines.
fn limits(table: &Table, folder: &Path, results: &mut Results) -> Result<()> {
    let mut series = Vec::new();
    let ends = (10.0, 3000.0);
    for (name, system) in [
        ("VDM, learned ends, Fourier", VDM),
        ("VDM, learned ends", VDM_PLAIN),
        ("VDM, fixed ends, Fourier", VDM_FIXED),
    ] {
        let mut points: Vec<(f64, f64)> = [10usize, 100, 1000]
            .iter()
            .filter_map(|t| Some((*t as f64, table.mean(system, &vdm_metric(*t))?)))
            .collect();
        points.extend(table.mean(system, CONTINUOUS).map(|bits| (ends.1, bits)));
        series.push(Series::new(name, points));
    }
    let mut levels = vec![
        (
            "L_hybrid, cosine, 1000 steps",
            table.mean(HYBRID, &bound_metric(STEPS, LEARNED)),
        ),
        (
            "L_simple, cosine, 1000 steps",
            table.mean(COSINE, &bound_metric(STEPS, LARGE)),
        ),
        ("logistic autoregression", Some(table.autoregressive)),
        ("histogram of each pixel", Some(table.same.histogram)),
    ];
    levels.retain(|(_, bits)| bits.is_some());
    for (name, bits) in levels {
        series.push(line(name, bits.unwrap_or(f64::NAN), ends));
    }
    series.push(room(ends.1, 40.0));
    let axes = Axes::new(
        "VDM's bound of T steps (right end: continuous time)",
        "steps T",
        "bits/dim",
    );
    line_plot(&folder.join("systems.svg"), &axes.log_x().log_y(), &series)?;
    results.figure(
        "systems.svg",
        "More steps tighten the bound; other systems and baselines as lines.",
    );
    Ok(())
}

fn gammas(outcomes: &[Outcome], folder: &Path, results: &mut Results) -> Result<()> {
    let mut series: Vec<Series> = Vec::new();
    let (low, high) = GAMMA;
    for (name, curve) in outcomes.iter().filter_map(|o| o.gamma.as_ref()) {
        if series.iter().all(|s| s.name != *name) {
            let fixed = |t: f64| low + (high - low) * t;
            let points = curve.iter().map(|(t, gamma)| (*t, gamma - fixed(*t)));
            series.push(Series::new(*name, points.collect()));
        }
    }
    let all = series.iter().flat_map(|s| &s.points).map(|p| p.1);
    let (low, high) = all.fold((0.0f64, 0.0f64), |(a, b), v| (a.min(v), b.max(v)));
    series.push(room(1.0, high + 0.5 * (high - low)));
    let axes = Axes::new(
        "VDM's schedules after training, less the fixed one",
        "t",
        "γ(t) − (−7.75 + 12.75 t)",
    );
    line_plot(&folder.join("gamma.svg"), &axes, &series)?;
    results.figure(
        "gamma.svg",
        "The ends are learned by the bound, the shape between them by the variance of its estimate.",
    );
    Ok(())
}
