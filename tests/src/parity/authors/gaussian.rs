//! The Gaussian diffusion of improved-diffusion and guided-diffusion: tables, bounds, losses, steps.

use super::super::compare::Check;
use super::super::fixture::{Fixture, values};
use super::super::unsupported;
use super::networks::openai_unet;
use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser, LearnedVariance, PreviousX, from_fn};
use diffusion_core::guide::{ClassifierGuided, Clip, Thresholded};
use diffusion_core::likelihood::{Decoder, Vlb, decoder::tanh_cdf, gaussian::kl};
use diffusion_core::loss::{Hybrid, HybridLoss, SecondMoment};
use diffusion_core::noise::{CounterNoise, RecordedNoise};
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::{
    Ancestral, Chain, Ctx, Ddim, Direction, Mean, MeanGuided, Planned, Step, Variance, sample,
};
use diffusion_core::schedule::{BetaSchedule, Point, Respaced, Table};
use diffusion_core::tensor::{At, gradient};

/// The table of a named schedule.
fn table(name: &str, steps: usize) -> Result<Table> {
    Ok(match name {
        "linear" => BetaSchedule::ddpm(steps).table(steps)?,
        "cosine" => BetaSchedule::Cosine.table(steps)?,
        other => return Err(unsupported(format!("the schedule {other}"))),
    })
}

fn configured_table(fixture: &Fixture) -> Result<Table> {
    let steps = number(fixture, "num_diffusion_timesteps")? as usize;
    table(text(fixture, "schedule_name").unwrap_or("linear"), steps)
}

fn text<'a>(fixture: &'a Fixture, key: &str) -> Option<&'a str> {
    fixture.config.get(key)?.as_str()
}

fn number(fixture: &Fixture, key: &str) -> Result<f64> {
    let value = fixture.config.get(key).and_then(|v| v.as_f64());
    value.with_context(|| format!("config.{key} is missing"))
}

fn flag(fixture: &Fixture, key: &str, default: bool) -> bool {
    fixture
        .config
        .get(key)
        .and_then(|v| v.as_bool())
        .unwrap_or(default)
}

fn indices(tensor: &Tensor) -> Result<Vec<usize>> {
    Ok(values(tensor)?.into_iter().map(|v| v as usize).collect())
}

fn vector(values: &[f64]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}

/// Every table of `GaussianDiffusion`.
///
/// # Errors
/// Anything that goes wrong.
pub fn schedule(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let table = configured_table(fixture)?;
    let chain = Chain::of_table(&table)?;
    let mut bar_next = table.alpha_bar()[1..].to_vec();
    bar_next.push(0.0);
    let hops = chain.hops();
    let column = |f: &dyn Fn(&diffusion_core::sample::Hop) -> f64| hops.iter().map(f).collect();
    let columns: [(&str, Vec<f64>); 13] = [
        ("betas", table.betas().to_vec()),
        ("alphas_cumprod", table.alpha_bar().to_vec()),
        ("alphas_cumprod_prev", column(&|h| h.to.alpha.powi(2))),
        ("alphas_cumprod_next", bar_next),
        ("sqrt_alphas_cumprod", column(&|h| h.from.alpha)),
        ("sqrt_one_minus_alphas_cumprod", column(&|h| h.from.sigma)),
        (
            "log_one_minus_alphas_cumprod",
            column(&|h| 2.0 * h.from.sigma.ln()),
        ),
        ("sqrt_recip_alphas_cumprod", column(&|h| 1.0 / h.from.alpha)),
        (
            "sqrt_recipm1_alphas_cumprod",
            column(&|h| h.from.sigma_hat()),
        ),
        ("posterior_variance", column(&|h| h.posterior().variance)),
        ("posterior_log_variance_clipped", column(&|h| h.log_small)),
        ("posterior_mean_coef1", column(&|h| h.posterior().x0)),
        ("posterior_mean_coef2", column(&|h| h.posterior().x)),
    ];
    for (name, ours) in columns {
        check.stored(&fixture.outputs, name, &vector(&ours)?)?;
    }
    Ok(())
}

/// `normal_kl`, the decoder and the time embedding.
///
/// # Errors
/// Anything that goes wrong.
pub fn helpers(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let get = |name: &str| fixture.input(name);
    let out = &fixture.outputs;
    let ours = kl(
        get("mean1")?,
        get("logvar1")?,
        get("mean2")?,
        get("logvar2")?,
    )?;
    check.stored(out, "normal_kl", &ours)?;
    check.stored(out, "cdf", &tanh_cdf(get("mean1")?)?)?;
    let decoder = Decoder::DiscretisedTanh { levels: 256 };
    let log_var = (get("log_scales")? * 2.0)?;
    let ours = decoder.log_prob(get("x")?, get("means")?, &log_var)?;
    check.stored(out, "disc_ll", &ours)?;
    for name in out.keys().filter(|name| name.starts_with("emb_")) {
        let dim: usize = name[4..].parse()?;
        let t = get("timesteps")?.to_dtype(DType::F32)?;
        let ours = diffusion_ops::timestep_embedding(&t, dim, true, 0.0, 1.0, 10_000.0)?;
        check.stored(out, name, &ours)?;
    }
    Ok(())
}

/// `LossSecondMomentResampler`.
///
/// # Errors
/// Anything that goes wrong.
pub fn resampler(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let steps = number(fixture, "num_timesteps")? as usize;
    let history = number(fixture, "history_per_term")? as usize;
    let mut ours = SecondMoment::new(steps, history, number(fixture, "uniform_prob")?)?;
    let (ts, losses) = (
        indices(fixture.input("ts")?)?,
        values(fixture.input("losses")?)?,
    );
    for (i, (t, loss)) in ts.iter().zip(&losses).enumerate() {
        ours.update(&[*t], &[*loss])?;
        let name = format!("weights_after_{}", i + 1);
        check.stored(&fixture.outputs, &name, &vector(&ours.weights())?)?;
    }
    let out = &fixture.outputs;
    check.stored(out, "weights_after_all", &vector(&ours.weights())?)?;
    check.stored(out, "importance_after_all", &vector(&ours.importance())?)
}

/// `space_timesteps` and the tables of `SpacedDiffusion`.
///
/// # Errors
/// Anything that goes wrong.
pub fn respacing(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let name = text(fixture, "schedule_name").unwrap_or("linear");
    let cases = fixture.config.get("cases").and_then(|c| c.as_object());
    for (label, case) in cases.context("config.cases is missing")? {
        let steps = case["num_timesteps"].as_u64().context("num_timesteps")? as usize;
        let rule = match &case["section_counts"] {
            serde_json::Value::String(rule) => rule.clone(),
            other => other.to_string().replace(['[', ']'], ""),
        };
        let ours = Respaced::new(&table(name, steps)?, &rule)?;
        let kept: Vec<f64> = ours.original.iter().map(|s| *s as f64).collect();
        let clipped: Vec<f64> = Chain::of_table(&ours.table)?
            .hops()
            .iter()
            .map(|h| h.log_small)
            .collect();
        for (what, ours) in [
            ("steps", kept.as_slice()),
            ("timestep_map", &kept),
            ("betas", ours.table.betas()),
            ("alphas_cumprod", ours.table.alpha_bar()),
            ("posterior_log_variance_clipped", &clipped),
        ] {
            check.stored(&fixture.outputs, &format!("{what}_{label}"), &vector(ours)?)?;
        }
    }
    Ok(())
}

/// How a fixture's network is to be read.
#[derive(Clone, Copy)]
struct Reading<'a> {
    mean: &'a str,
    variance: &'a str,
}

impl<'a> Reading<'a> {
    fn of(fixture: &'a Fixture) -> Self {
        Self {
            mean: text(fixture, "model_mean_type").unwrap_or("EPSILON"),
            variance: text(fixture, "model_var_type").unwrap_or("LEARNED_RANGE"),
        }
    }

    fn variance(&self) -> Result<Variance> {
        Ok(match self.variance {
            "LEARNED" => Variance::Learned,
            "LEARNED_RANGE" => Variance::LearnedRange,
            "FIXED_SMALL" => Variance::FixedSmall,
            "FIXED_LARGE" => Variance::FixedLarge,
            other => return Err(unsupported(format!("the variance {other}"))),
        })
    }

    fn vlb(&self, chain: Chain, clip: bool) -> Result<Vlb> {
        let decoder = Decoder::DiscretisedTanh { levels: 256 };
        Ok(Vlb {
            mean: if self.mean == "PREVIOUS_X" {
                Mean::Network
            } else {
                Mean::Posterior
            },
            clip: clipping(clip),
            ..Vlb::new(chain, self.variance()?, decoder)
        })
    }

    /// The denoiser of a network `f(x, points) -> output`.
    fn denoiser<'f>(
        &self,
        chain: &Chain,
        f: impl Fn(&Tensor, &[Point]) -> diffusion_core::Result<Tensor> + 'f,
    ) -> Result<Box<dyn Denoiser + 'f>> {
        let kind = match self.mean {
            "EPSILON" => Kind::Epsilon,
            "START_X" | "PREVIOUS_X" => Kind::X0,
            other => return Err(unsupported(format!("the mean {other}"))),
        };
        let net = from_fn(move |x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
            Ok(Prediction::new(kind, f(x, &at.points(x.dim(0)?))?))
        });
        let net: Box<dyn Denoiser + 'f> = if self.variance.starts_with("LEARNED") {
            Box::new(LearnedVariance(net))
        } else {
            Box::new(net)
        };
        let steps = chain.hops().iter().map(|h| (h.from, h.to)).collect();
        Ok(match self.mean {
            "PREVIOUS_X" => Box::new(PreviousX { inner: net, steps }),
            _ => net,
        })
    }

    /// The stored output that this reading reads.
    fn output<'t>(&self, fixture: &'t Fixture) -> Result<&'t Tensor> {
        match self.variance.starts_with("LEARNED") {
            true => fixture.input("model_output_learned"),
            false => fixture.input("model_output"),
        }
    }
}

fn clipping(clip: bool) -> Clip {
    match clip {
        true => Clip::Static { range: 1.0 },
        false => Clip::None,
    }
}

/// A call that draws nothing.
fn quietly<T>(
    batch: usize,
    f: impl FnOnce(&mut Call<'_>) -> diffusion_core::Result<T>,
) -> Result<T> {
    let mut noise = CounterNoise::new(0, 0..batch as u64);
    Ok(f(&mut Call {
        noise: &mut noise,
        items: 0..batch as u64,
        tracked: true,
    })?)
}

const MEANS: [&str; 3] = ["PREVIOUS_X", "START_X", "EPSILON"];
const VARIANCES: [&str; 4] = ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"];

/// `p_mean_variance` and `_vb_terms_bpd` in every combination.
///
/// # Errors
/// Anything that goes wrong.
pub fn p_mean_variance(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let chain = Chain::of_table(&configured_table(fixture)?)?;
    let hops = chain.at(&indices(fixture.input("t")?)?)?;
    let at: Vec<Point> = hops.iter().map(|h| h.from).collect();
    let (x0, x_t) = (fixture.input("x_start")?, fixture.input("x_t")?);
    for mean in MEANS {
        for variance in VARIANCES {
            let reading = Reading { mean, variance };
            let output = reading.output(fixture)?;
            let net = reading.denoiser(&chain, |_, _| Ok(output.clone()))?;
            let said = quietly(hops.len(), |call| net.predict(x_t, At::Each(&at), call))?;
            for (clip, label) in [(true, "clip"), (false, "noclip")] {
                let vlb = reading.vlb(chain.clone(), clip)?;
                let law = vlb.law(said.clone(), x_t, &hops)?;
                let vb = vlb.terms(&law, x0, x_t, &hops)?;
                for (what, ours) in [
                    ("vb", &vb),
                    ("mean", &law.mean),
                    ("log_variance", &law.log_variance),
                    ("pred_xstart", &law.x0),
                ] {
                    let name = format!("{mean}.{variance}.{label}.{what}");
                    check.stored(&fixture.outputs, &name, ours)?;
                }
            }
        }
    }
    Ok(())
}

/// `training_losses` in every combination, with gradients.
///
/// # Errors
/// Anything that goes wrong.
pub fn training_losses(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let chain = Chain::of_table(&configured_table(fixture)?)?;
    let t = indices(fixture.input("t")?)?;
    let (x0, noise) = (fixture.input("x_start")?, fixture.input("noise")?);
    let losses = [
        ("MSE", HybridLoss::Mse),
        ("RESCALED_MSE", HybridLoss::RescaledMse),
        ("KL", HybridLoss::Kl),
        ("RESCALED_KL", HybridLoss::RescaledKl),
    ];
    for mean in MEANS {
        for variance in VARIANCES {
            let reading = Reading { mean, variance };
            for (label, loss) in losses {
                let hybrid = Hybrid {
                    vlb: reading.vlb(chain.clone(), false)?,
                    loss,
                };
                let run = |output: &Tensor| -> Result<_> {
                    let net = reading.denoiser(&chain, |_, _| Ok(output.clone()))?;
                    quietly(t.len(), |call| hybrid.losses(&net, x0, noise, &t, call))
                };
                let output = reading.output(fixture)?;
                let ours = run(output)?;
                let name = |what: &str| format!("{mean}.{variance}.{label}.{what}");
                let out = &fixture.outputs;
                check.stored(out, &name("loss"), &ours.loss)?;
                if let Some(mse) = &ours.mse {
                    check.stored(out, &name("mse"), mse)?;
                }
                if let (Some(vb), Some(_)) = (&ours.vb, &ours.mse) {
                    check.stored(out, &name("vb"), vb)?;
                }
                if out.contains_key(&name("grad_model_output")) {
                    let slope = gradient(output, |output| {
                        let losses = run(output).map_err(|e| {
                            diffusion_core::Report::new("training loss", e).config()
                        })?;
                        Ok(losses.loss.mean_all()?)
                    })?;
                    check.stored(out, &name("grad_model_output"), &slope)?;
                }
            }
        }
    }
    let at: Vec<Point> = chain.at(&t)?.iter().map(|h| h.from).collect();
    let x_t = diffusion_core::forward::marginal(x0, noise, At::Each(&at))?;
    check.stored(&fixture.outputs, "x_t", &x_t)
}

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

/// `calc_bpd_loop`.
///
/// # Errors
/// Anything that goes wrong.
pub fn bound(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let table = configured_table(fixture)?;
    let chain = Chain::of_table(&table)?;
    let reading = Reading::of(fixture);
    let net = reading.denoiser(&chain, network(fixture, chain.len())?)?;
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
    let rule = match text(fixture, "timestep_respacing") {
        None | Some("") => table.betas().len().to_string(),
        Some(rule) => rule.to_string(),
    };
    let points = Respaced::new(&table, &rule)?.points();
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
