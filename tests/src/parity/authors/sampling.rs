//! Sampling steps and loops of improved-diffusion and guided-diffusion, and the bound of a network.

use super::super::compare::Check;
use super::super::fixture::Fixture;
use super::super::unsupported;
use super::gaussian::{Reading, clipping, configured_table, flag, indices, number, quietly, text};
use super::networks::openai_unet;
use anyhow::{Result, anyhow};
use candle_core::{DType, Tensor};
use diffusion_core::denoiser::Denoiser;
use diffusion_core::guide::{ClassifierGuided, Thresholded};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::predict::Prediction;
use diffusion_core::sample::{
    Ancestral, Chain, Ctx, Ddim, Direction, MeanGuided, Planned, Step, sample,
};
use diffusion_core::schedule::{Point, Respaced, Table};
use diffusion_core::tensor::{At, gradient};

/// One step of each sampler an example, with and without a classifier.
///
/// # Errors
/// Anything that goes wrong.
pub fn single_steps(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let table = configured_table(fixture)?;
    let chain = Chain::of_table(&table)?;
    let reading = Reading::of(fixture);
    let (t, last) = (indices(fixture.input("t")?)?, chain.len() as i64 - 1);
    let scale = number(fixture, "classifier_scale")?;
    let clip = clipping(flag(fixture, "clip_denoised", true));
    let (weight, labels) = (fixture.input("classifier_weight")?, fixture.input("y")?);
    let out = &fixture.outputs;
    let names: Vec<&String> = out.keys().collect();
    for name in names {
        let ours = t
            .iter()
            .enumerate()
            .map(|(i, t)| {
                let row = |tensor: &Tensor| tensor.narrow(0, i, 1);
                let (x, z) = (row(fixture.input("x")?)?, row(fixture.input("noise")?)?);
                let output = row(reading.output(fixture)?)?;
                let net = reading.denoiser(&chain, move |_, _| Ok(output.clone()))?;
                let net = Thresholded { inner: net, clip };
                let label = row(labels)?.to_dtype(DType::U32)?;
                let log_prob = |x: &Tensor, _: At<'_>| -> diffusion_core::Result<Tensor> {
                    let logits = x.flatten_from(1)?.matmul(&weight.t()?)?;
                    let all = logits.broadcast_sub(&logits.log_sum_exp(1)?.unsqueeze(1)?)?;
                    Ok(all.gather(&label.unsqueeze(1)?, 1)?.squeeze(1)?)
                };
                let (from, to) = (table.index(*t as i64), table.index(*t as i64 - 1));
                let up = match *t as i64 {
                    t if t == last => Point::new(t as f64 + 1.0, 0.0, 1.0),
                    t => table.index(t + 1),
                };
                let guided = ClassifierGuided {
                    inner: &net,
                    log_prob,
                    scale,
                };
                let shifted = MeanGuided {
                    chain: chain.clone(),
                    variance: reading.variance()?,
                    mean: reading.mean(),
                    log_prob,
                    scale,
                };
                let mut noise = RecordedNoise::new([z.clone()]);
                let mut plain = Ctx::new(&net, &mut noise, 0..1);
                let ddim = |eta| Ddim {
                    eta,
                    direction: Direction::Rederived,
                };
                let law_of = |said: Prediction| -> Result<_> {
                    let vlb = reading.vlb(chain.clone(), false)?;
                    Ok(vlb.law(said, &x, &chain.at(&[*t])?)?)
                };
                Ok(match name.as_str() {
                    "p_sample" => Ancestral {
                        variance: reading.variance()?,
                        mean: reading.mean(),
                        ..Ancestral::default()
                    }
                    .step(&x, &from, &to, &mut plain, &mut ())?,
                    "p_sample_pred_xstart" => plain.denoise(&x, &from)?.x0(&x, At::All(from))?,
                    "ddim_reverse" => ddim(0.0).step(&x, &from, &up, &mut plain, &mut ())?,
                    "cond_grad" => {
                        (gradient(&x, |x| Ok(log_prob(x, At::All(from))?.sum_all()?))? * scale)?
                    }
                    "condition_mean" => shifted.law(&x, &from, &to, &mut plain)?.mean,
                    "p_sample_guided" => shifted.step(&x, &from, &to, &mut plain, &mut ())?,
                    "condition_score_pred_xstart" | "condition_score_mean" => {
                        let said = quietly(1, |call| guided.predict(&x, At::All(from), call))?;
                        let law = law_of(said)?;
                        if name == "condition_score_mean" {
                            law.mean
                        } else {
                            law.x0
                        }
                    }
                    "ddim_guided" => {
                        let mut noise = RecordedNoise::new([z.clone()]);
                        let mut ctx = Ctx::new(&guided, &mut noise, 0..1);
                        let eta = fixture
                            .config
                            .get("eta")
                            .and_then(|v| v.as_f64())
                            .unwrap_or(0.0);
                        ddim(eta).step(&x, &from, &to, &mut ctx, &mut ())?
                    }
                    other => match other.strip_prefix("ddim_eta") {
                        Some(eta) => {
                            ddim(eta.parse()?).step(&x, &from, &to, &mut plain, &mut ())?
                        }
                        None => return Err(anyhow!("no output {other} is known")),
                    },
                })
            })
            .collect::<Result<Vec<Tensor>>>()?;
        check.stored(out, name, &Tensor::cat(&ours, 0)?)?;
    }
    Ok(())
}

/// The fixture's U-Net as a function of the state and the points; a point's time is its step.
fn network(
    fixture: &Fixture,
    total: usize,
) -> Result<impl Fn(&Tensor, &[Point]) -> diffusion_core::Result<Tensor>> {
    let net = openai_unet(fixture)?;
    let y = fixture.inputs.get("y").cloned();
    let scale = match flag(fixture, "rescale_timesteps", false) {
        true => 1000.0 / total as f64,
        false => 1.0,
    };
    Ok(move |x: &Tensor, points: &[Point]| {
        let t: Vec<f32> = points.iter().map(|p| (p.t * scale) as f32).collect();
        let t = Tensor::new(t, x.device())?;
        net.forward(x, &t, y.as_ref())
            .map_err(|e| diffusion_core::Report::new("U-Net", e).config())
    })
}

/// The steps of the run: those of the whole table, or those that the rule keeps.
fn kept(fixture: &Fixture, table: &Table) -> Result<Respaced> {
    let rule = match text(fixture, "timestep_respacing") {
        None | Some("") => table.betas().len().to_string(),
        Some(rule) => rule.to_string(),
    };
    Ok(Respaced::new(table, &rule)?)
}

/// `calc_bpd_loop`.
///
/// # Errors
/// Anything that goes wrong.
pub fn bound(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let table = configured_table(fixture)?;
    let chain = Chain::new(&kept(fixture, &table)?.points())?;
    let reading = Reading::of(fixture);
    let net = reading.denoiser(&chain, network(fixture, table.betas().len())?)?;
    let (x0, draws) = (fixture.input("x_start")?, fixture.input("noise")?);
    for (clip, label) in [(true, "clip"), (false, "noclip")] {
        if !fixture.outputs.contains_key(&format!("vb.{label}")) {
            continue;
        }
        let draws = (0..draws.dim(0)?).map(|i| draws.get(i));
        let mut noise = RecordedNoise::new(draws.collect::<candle_core::Result<Vec<_>>>()?);
        let vlb = reading.vlb(chain.clone(), clip)?;
        let ours = vlb.evaluate(&net, x0, &mut noise, 0..x0.dim(0)? as u64)?;
        let noisiest_first = |t: &Tensor| t.flip(&[1]);
        for (what, ours) in [
            ("total_bpd", ours.total),
            ("prior_bpd", ours.prior),
            ("vb", noisiest_first(&ours.terms)?),
            ("xstart_mse", noisiest_first(&ours.x0_mse)?),
            ("mse", noisiest_first(&ours.epsilon_mse)?),
        ] {
            check.stored(&fixture.outputs, &format!("{what}.{label}"), &ours)?;
        }
    }
    Ok(())
}

/// `p_sample_loop` and `ddim_sample_loop` over respaced steps.
///
/// # Errors
/// Anything that goes wrong.
pub fn sample_loop(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let table = configured_table(fixture)?;
    let points = kept(fixture, &table)?.points();
    let reading = Reading::of(fixture);
    let inner = reading.denoiser(
        &Chain::new(&points)?,
        network(fixture, table.betas().len())?,
    )?;
    let net = Thresholded {
        inner,
        clip: clipping(flag(fixture, "clip_denoised", true)),
    };
    let draws = fixture.input("step_noise")?;
    let draws = (0..draws.dim(0)?).map(|i| draws.get(i));
    let mut noise = RecordedNoise::new(draws.collect::<candle_core::Result<Vec<_>>>()?);
    let x = fixture.input("init_noise")?.clone();
    let items = 0..x.dim(0)? as u64;
    let ours = match fixture.text("method") {
        "p_sample_loop" => {
            let step = Ancestral {
                variance: reading.variance()?,
                mean: reading.mean(),
                ..Ancestral::default()
            };
            sample(&Planned::new(step, &points), &net, x, &mut noise, items)?
        }
        "ddim_sample_loop" => {
            let step = Ddim {
                eta: number(fixture, "eta")?,
                direction: Direction::Rederived,
            };
            sample(&Planned::new(step, &points), &net, x, &mut noise, items)?
        }
        other => return Err(unsupported(format!("the loop {other}"))),
    };
    check.stored(&fixture.outputs, "sample", &ours)
}
