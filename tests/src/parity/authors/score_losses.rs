//! `yang-song/score_sde_pytorch`: the losses, continuous and discrete.

use super::score_sde::{Process, model, steps};
use crate::parity::compare::Check;
use crate::parity::fixture::{Fixture, number, values};
use anyhow::{Result, bail};
use candle_core::{DType, Tensor};
use diffusion_core::denoiser::{Call, Denoiser, from_fn};
use diffusion_core::loss::{Denoising, TimeLaw, Weight};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::schedule::{Point, SharedSchedule};
use diffusion_core::tensor::{At, Coef};

/// The mean over the batch of the losses of a denoising objective.
fn loss(
    schedule: &SharedSchedule,
    weight: Weight,
    network: &dyn Denoiser,
    (x0, z): (&Tensor, &Tensor),
    points: &[Point],
) -> Result<f64> {
    let objective = Denoising {
        schedule: schedule.clone(),
        weight,
        time: TimeLaw::Uniform,
    };
    let mut noise = RecordedNoise::new([]);
    let mut call = Call {
        noise: &mut noise,
        items: 0..points.len() as u64,
        tracked: true,
    };
    let losses = objective.losses(network, x0, z, points, &mut call)?;
    Ok(losses.mean_all()?.to_dtype(DType::F64)?.to_scalar()?)
}

/// Continuous losses with both weights and reductions, and the older discrete ones.
pub(super) fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let schedule = process.schedule();
    let x0 = fixture.input_f64("batch")?;
    let half_sum = 0.5 * (x0.elem_count() / x0.dim(0)?) as f64;
    let eps = number(fixture.config.get("eps"), "eps")?.unwrap_or(1e-5);
    let points: Vec<Point> = values(fixture.input("u")?)?
        .iter()
        .map(|u| schedule.at(u * (1.0 - eps) + eps))
        .collect();
    let z = fixture.input_f64("z")?;
    let network = model(fixture, process)?;
    let mut compare = |name: &str, ours: f64| -> Result<()> {
        if let Some(stored) = fixture.outputs.get(name) {
            check.values(name, &[ours], &values(stored)?);
        }
        Ok(())
    };
    for (weighting, weight) in [("std", Weight::Simple), ("likelihood", Weight::Likelihood)] {
        let mean = loss(&schedule, weight, &network, (&x0, &z), &points)?;
        compare(&format!("loss.mean.{weighting}"), mean)?;
        compare(&format!("loss.halfsum.{weighting}"), half_sum * mean)?;
    }
    let chain = process.chain(steps(fixture)?)?;
    let levels = chain.levels();
    // The discrete losses know their levels by number; the network is m·input + v·label/N.
    let (m, v) = (fixture.input_f64("m")?, fixture.input_f64("v")?);
    let discrete = |kind: Kind| {
        let (m, v, n) = (m.clone(), v.clone(), levels.len() as f64);
        from_fn(move |x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
            let labels: Vec<f64> = at.points(x.dim(0)?).iter().map(|p| p.t / n).collect();
            let ramp = v.broadcast_as(x.shape())?.contiguous()?;
            let value = (x.broadcast_mul(&m)? + Coef::Each(labels).times(&ramp)?)?;
            Ok(Prediction::new(kind, value))
        })
    };
    let at_labels = |name: &str, descending: bool| -> Result<Vec<Point>> {
        let labels = values(fixture.input(name)?)?;
        labels
            .iter()
            .map(|label| {
                let i = *label as usize;
                let place = if descending {
                    (levels.len()).checked_sub(i + 1)
                } else {
                    Some(i)
                };
                match place.and_then(|place| levels.get(place)) {
                    Some(p) => Ok(Point { t: *label, ..*p }),
                    None => bail!("{name}: {label} lies outside the chain"),
                }
            })
            .collect()
    };
    if fixture.inputs.contains_key("ddpm_labels") {
        let z = fixture.input_f64("ddpm_noise")?;
        let points = at_labels("ddpm_labels", false)?;
        let network = discrete(Kind::Epsilon);
        let mean = loss(&schedule, Weight::Simple, &network, (&x0, &z), &points)?;
        compare("ddpm_loss", mean)?;
    }
    if fixture.inputs.contains_key("smld_labels") {
        let z = fixture.input_f64("smld_noise")?;
        let points = at_labels("smld_labels", true)?;
        let network = discrete(Kind::Score);
        let mean = loss(&schedule, Weight::Simple, &network, (&x0, &z), &points)?;
        compare("smld_loss", half_sum * mean)?;
    }
    Ok(())
}
