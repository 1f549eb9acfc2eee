//! Analytic-DPM: reverse chains with naive and analytic variances, and the choices of steps.

use super::super::compare::Check;
use super::super::fixture::{Fixture, values};
use super::super::unsupported;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser, from_fn};
use diffusion_core::guide::{Clip, Thresholded};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::{
    Analytic, Ancestral, Bounds, Ddim, Direction, Hop, Planned, Step, Variance, sample,
};
use diffusion_core::schedule::{Point, Table};
use diffusion_core::search::StepChoice;
use diffusion_core::tensor::At;

/// Everything that the fixture holds.
///
/// # Errors
/// Anything that goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let betas = values(fixture.input("betas")?)?[1..].to_vec();
    let moments = values(fixture.input("ms_eps")?)?[1..].to_vec();
    let table = Table::new(betas)?;
    let whole = |key: &str| fixture.config.get(key).and_then(|v| v.as_u64());
    let count = whole("sample_steps").context("config.sample_steps")? as usize;
    let choose = |name: &str| -> Result<Vec<usize>> {
        let rule = match name {
            "dp_seg" => StepChoice::OptimalTrajectory {
                moments: moments.clone(),
                alpha_bar: table.alpha_bar().to_vec(),
            },
            name => StepChoice::named(name)?,
        };
        Ok(rule.steps(moments.len(), count)?)
    };
    for name in fixture.outputs.keys() {
        if let Some(rule) = name.strip_prefix("steps_") {
            let ours: Vec<f64> = choose(rule)?.iter().map(|s| *s as f64).collect();
            check.stored(&fixture.outputs, name, &Tensor::new(ours, &Device::Cpu)?)?;
        }
    }

    let network = network(fixture)?;
    let network = Thresholded {
        inner: network,
        clip: Clip::Static { range: 1.0 },
    };
    let rule = fixture.config.get("steps_type").and_then(|v| v.as_str());
    let eta = fixture
        .config
        .get("eta")
        .and_then(|v| v.as_f64())
        .unwrap_or(0.0);
    let pixel = fixture
        .config
        .get("clip_pixel")
        .and_then(|v| v.as_f64())
        .unwrap_or(2.0);
    let chains: Vec<&str> = fixture
        .outputs
        .keys()
        .filter_map(|name| name.strip_suffix(".pairs"))
        .collect();
    for name in chains {
        // The authors' analytic DDIM knows even steps only.
        let steps = choose(match (rule, name.starts_with("ddim_analytic")) {
            (Some(rule), false) => rule,
            _ => "linear",
        })?;
        let mut points: Vec<Point> = steps
            .iter()
            .rev()
            .map(|s| table.index(*s as i64 - 1))
            .collect();
        points.push(table.index(-1));
        let mut pairs: Vec<f64> = Vec::new();
        for (i, r) in steps.iter().enumerate().rev() {
            let s = i.checked_sub(1).map_or(0, |i| steps[i]);
            pairs.extend([s as f64, *r as f64]);
        }
        let ours = Tensor::from_vec(pairs, (steps.len(), 2), &Device::Cpu)?;
        check.stored(&fixture.outputs, &format!("{name}.pairs"), &ours)?;
        let (kind, clip) = name.split_once("_clip").unwrap_or((name, "0"));
        let hops: Vec<Hop> = points
            .windows(2)
            .map(|w| Hop::between(&w[0], &w[1]))
            .collect();
        let used: Vec<f64> = steps.iter().rev().map(|s| moments[s - 1]).collect();
        let bounds = Bounds {
            last_steps: clip.parse()?,
            pixel,
            ..Bounds::default()
        };
        let analytic = |eta| Analytic::new(&points, &used, eta, bounds);
        let (ours, variances): (Tensor, Vec<f64>) = match kind {
            "ddpm_analytic" | "ddim_analytic" => {
                let ddpm = kind == "ddpm_analytic";
                let mut step = analytic(if ddpm { 1.0 } else { eta })?;
                step.direction = match ddpm {
                    true => Direction::Rederived,
                    false => Direction::Predicted,
                };
                let variances = step.variances().into_iter().rev().collect();
                (solve(fixture, &network, name, step, &points)?, variances)
            }
            "ddpm_naive_large" | "ddpm_naive_small" => {
                let (variance, of): (_, fn(&Hop) -> f64) = match kind {
                    "ddpm_naive_large" => (Variance::FixedLarge, |h| h.log_beta.exp()),
                    _ => (Variance::FixedSmall, |h| h.log_small.exp()),
                };
                let step = Ancestral {
                    variance,
                    ..Ancestral::default()
                };
                let variances = hops.iter().map(of).collect();
                (solve(fixture, &network, name, step, &points)?, variances)
            }
            "ddim_naive" => {
                let step = Ddim {
                    eta,
                    direction: Direction::Predicted,
                };
                let of = |h: &Hop| eta * eta * h.posterior().variance;
                (
                    solve(fixture, &network, name, step, &points)?,
                    hops.iter().map(of).collect(),
                )
            }
            other => return Err(unsupported(format!("the chain {other}"))),
        };
        check.stored(&fixture.outputs, name, &ours)?;
        let mut variances = variances;
        if let Some(last) = variances.last_mut() {
            *last = 0.0;
        }
        let name = format!("{name}.sigma2");
        check.stored(
            &fixture.outputs,
            &name,
            &Tensor::new(variances, &Device::Cpu)?,
        )?;
    }
    Ok(())
}

fn solve<S: Step>(
    fixture: &Fixture,
    network: &dyn Denoiser,
    name: &str,
    step: S,
    points: &[Point],
) -> Result<Tensor> {
    let draws = fixture.input(&format!("{name}.noise"))?;
    let draws = (0..draws.dim(0)?).map(|i| draws.get(i));
    let mut noise = RecordedNoise::new(draws.collect::<candle_core::Result<Vec<_>>>()?);
    let x = fixture.input("x_init")?.clone();
    let items = 0..x.dim(0)? as u64;
    Ok(sample(
        &Planned::new(step, points),
        network,
        x,
        &mut noise,
        items,
    )?)
}

/// The exact noise prediction for data `N(m, v)`.
fn network(fixture: &Fixture) -> Result<impl Denoiser + use<>> {
    let (m, v) = (fixture.input("m")?.clone(), fixture.input("v")?.clone());
    Ok(from_fn(move |x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
        let p = at.points(1)[0];
        let total = v.affine(p.alpha.powi(2), p.sigma.powi(2))?;
        let centred = x.broadcast_sub(&m.affine(p.alpha, 0.0)?)?;
        let epsilon = centred.broadcast_div(&total)?.affine(p.sigma, 0.0)?;
        Ok(Prediction::new(Kind::Epsilon, epsilon))
    }))
}
