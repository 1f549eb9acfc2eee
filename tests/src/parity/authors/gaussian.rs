//! The Gaussian diffusion of improved-diffusion and guided-diffusion: tables, bounds, losses.

use super::super::compare::Check;
use super::super::fixture::{Fixture, values};
use super::super::unsupported;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser, LearnedVariance, PreviousX, from_fn};
use diffusion_core::guide::Clip;
use diffusion_core::likelihood::{Decoder, Vlb, decoder::tanh_cdf, gaussian::kl};
use diffusion_core::loss::{Hybrid, HybridLoss, SecondMoment};
use diffusion_core::noise::CounterNoise;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::{Chain, Mean, Variance};
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

pub(super) fn configured_table(fixture: &Fixture) -> Result<Table> {
    let steps = number(fixture, "num_diffusion_timesteps")? as usize;
    table(text(fixture, "schedule_name").unwrap_or("linear"), steps)
}

pub(super) fn text<'a>(fixture: &'a Fixture, key: &str) -> Option<&'a str> {
    fixture.config.get(key)?.as_str()
}

pub(super) fn number(fixture: &Fixture, key: &str) -> Result<f64> {
    let value = fixture.config.get(key).and_then(|v| v.as_f64());
    value.with_context(|| format!("config.{key} is missing"))
}

pub(super) fn flag(fixture: &Fixture, key: &str, default: bool) -> bool {
    fixture
        .config
        .get(key)
        .and_then(|v| v.as_bool())
        .unwrap_or(default)
}

pub(super) fn indices(tensor: &Tensor) -> Result<Vec<usize>> {
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
pub(super) struct Reading<'a> {
    mean: &'a str,
    variance: &'a str,
}

impl<'a> Reading<'a> {
    pub(super) fn of(fixture: &'a Fixture) -> Self {
        Self {
            mean: text(fixture, "model_mean_type").unwrap_or("EPSILON"),
            variance: text(fixture, "model_var_type").unwrap_or("LEARNED_RANGE"),
        }
    }

    pub(super) fn variance(&self) -> Result<Variance> {
        Ok(match self.variance {
            "LEARNED" => Variance::Learned,
            "LEARNED_RANGE" => Variance::LearnedRange,
            "FIXED_SMALL" => Variance::FixedSmall,
            "FIXED_LARGE" => Variance::FixedLarge,
            other => return Err(unsupported(format!("the variance {other}"))),
        })
    }

    pub(super) fn mean(&self) -> Mean {
        match self.mean {
            "PREVIOUS_X" => Mean::Network,
            _ => Mean::Posterior,
        }
    }

    pub(super) fn vlb(&self, chain: Chain, clip: bool) -> Result<Vlb> {
        let decoder = Decoder::DiscretisedTanh { levels: 256 };
        Ok(Vlb {
            mean: self.mean(),
            clip: clipping(clip),
            ..Vlb::new(chain, self.variance()?, decoder)
        })
    }

    /// The denoiser of a network `f(x, points) -> output`.
    pub(super) fn denoiser<'f>(
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
    pub(super) fn output<'t>(&self, fixture: &'t Fixture) -> Result<&'t Tensor> {
        match self.variance.starts_with("LEARNED") {
            true => fixture.input("model_output_learned"),
            false => fixture.input("model_output"),
        }
    }
}

pub(super) fn clipping(clip: bool) -> Clip {
    match clip {
        true => Clip::Static { range: 1.0 },
        false => Clip::None,
    }
}

/// A call that draws nothing.
pub(super) fn quietly<T>(
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
