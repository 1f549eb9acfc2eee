//! VDM: the bound's terms, the schedule, the score network, a step of the sampler, the decoder.

use super::super::compare::Check;
use super::super::fixture::{Fixture, values};
use super::super::unsupported;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, from_fn};
use diffusion_core::likelihood::decoder::most_probable;
use diffusion_core::loss::vdm::{Vdm, VdmDraw, even_times};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::{Ancestral, Ctx, Step};
use diffusion_core::schedule::{
    LearnedSchedule, LinearGamma, MonotoneGamma, ScalarGamma, Schedule,
};
use diffusion_core::tensor::At;
use diffusion_nn::net::vdm::{VdmConfig, VdmNet};
use diffusion_nn::{Mode, Store};

/// Everything that the fixture holds.
///
/// # Errors
/// Anything that goes wrong.
pub fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let schedule = schedule(fixture)?;
    let net = network(fixture)?;
    let conditioning = fixture.input("conditioning")?;
    let out = &fixture.outputs;
    let said = |z: &Tensor, gamma: &Tensor| -> diffusion_core::Result<Tensor> {
        net.forward(z, gamma, conditioning, Mode::Eval)
            .map_err(|e| diffusion_core::Report::new("VDM network", e).config())
    };

    let (images, batch) = (fixture.input("images")?, conditioning.dim(0)?);
    let u = values(fixture.input("u")?)?;
    let times = match u.as_slice() {
        [u] if flag(fixture, "antithetic_time_sampling") => even_times(*u, batch),
        all => all.to_vec(),
    };
    let steps = number(fixture, "sm_n_timesteps")? as usize;
    let levels = number(fixture, "vocab_size")? as usize;
    let vdm = Vdm {
        schedule: schedule.as_ref(),
        levels,
        steps: (steps > 0).then_some(steps),
    };
    let draw = VdmDraw {
        epsilon0: fixture.input("eps_0")?.clone(),
        epsilon: fixture.input("eps")?.clone(),
        times,
    };
    let losses = vdm.losses(&said, images, &draw)?;
    check.stored(out, "loss_recon", &losses.reconstruction)?;
    check.stored(out, "loss_klz", &losses.prior)?;
    check.stored(out, "loss_diff", &losses.diffusion)?;
    check.stored(out, "bpd", &losses.bits()?.reshape(1)?)?;

    let (gamma, _) = schedule.gamma(fixture.input("gamma_t")?)?;
    check.stored(out, "gamma", &gamma)?;
    let frozen = schedule.freeze()?;
    for (name, t) in [("var_0", 0.0), ("var_1", 1.0)] {
        let variance = frozen.at(t).sigma.powi(2);
        check.stored(out, name, &Tensor::new(&[variance], &Device::Cpu)?)?;
    }

    let z = fixture.input("z_t")?;
    check.stored(out, "eps_hat", &said(z, fixture.input("score_gamma")?)?)?;
    let (i, total) = (named(fixture, "i=", 2.0), named(fixture, "T=", 6.0));
    let denoiser = from_fn(|x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
        let points = at.points(batch);
        let gamma: Vec<f64> = points.iter().map(|p| -p.log_snr()).collect();
        let gamma = Tensor::new(gamma, x.device())?.to_dtype(x.dtype())?;
        Ok(Prediction::new(Kind::Epsilon, said(x, &gamma)?))
    });
    let mut noise = RecordedNoise::new([fixture.input("sample_noise")?.clone()]);
    let mut ctx = Ctx::new(&denoiser, &mut noise, 0..batch as u64);
    let (from, to) = (
        frozen.at((total - i) / total),
        frozen.at((total - i - 1.0) / total),
    );
    let z_s = Ancestral::default().step(z, &from, &to, &mut ctx, &mut ())?;
    check.stored(out, "z_s", &z_s)?;

    // The latent of the cleanest point, decoded to its most probable level.
    let first = frozen.at(0.0);
    let gamma0 = Tensor::new(&[-first.log_snr()], &Device::Cpu)?.to_dtype(DType::F32)?;
    let clean = (z / first.alpha)?;
    let generated = most_probable(&clean, &gamma0, levels)?;
    check.stored(out, "generated", &generated.to_dtype(DType::F32)?)
}

/// The number after a word in the description of the call.
fn named(fixture: &Fixture, word: &str, default: f64) -> f64 {
    let text = fixture.text("methods");
    let after = text.split_once(word).map(|(_, after)| after);
    after
        .map(|a| {
            a.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        })
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(default)
}

fn number(fixture: &Fixture, key: &str) -> Result<f64> {
    let value = fixture.config.get(key).and_then(|v| v.as_f64());
    value.with_context(|| format!("config.{key} is missing"))
}

fn flag(fixture: &Fixture, key: &str) -> bool {
    fixture.config.get(key).and_then(|v| v.as_bool()) == Some(true)
}

fn schedule(fixture: &Fixture) -> Result<Box<dyn LearnedSchedule>> {
    let weights = fixture.tensors("weights")?;
    let weight = |name: &str| {
        let tensor = weights.get(&format!("gamma.{name}")).cloned();
        tensor.with_context(|| format!("no weight gamma.{name}"))
    };
    let kind = fixture.config.get("gamma_type").and_then(|v| v.as_str());
    Ok(match kind {
        Some("fixed") => Box::new(LinearGamma {
            min: number(fixture, "gamma_min")?,
            max: number(fixture, "gamma_max")?,
        }),
        Some("learnable_scalar") => Box::new(ScalarGamma {
            w: weight("w")?,
            b: weight("b")?,
        }),
        Some("learnable_nnet") => Box::new(MonotoneGamma {
            l1_kernel: weight("l1.kernel")?,
            l1_bias: weight("l1.bias")?,
            l2_kernel: weight("l2.kernel")?,
            l2_bias: weight("l2.bias")?,
            l3_kernel: weight("l3.kernel")?,
            ends: None,
        }),
        other => return Err(unsupported(format!("the schedule {other:?}"))),
    })
}

fn network(fixture: &Fixture) -> Result<VdmNet> {
    let mut weights = fixture.tensors("weights")?;
    weights.retain(|name, _| name.starts_with("score_model."));
    let config = VdmConfig {
        channels: fixture.input("images")?.dim(3)?,
        n_embd: number(fixture, "sm_n_embd")? as usize,
        n_layer: number(fixture, "sm_n_layer")? as usize,
        gamma_min: number(fixture, "gamma_min")?,
        gamma_max: number(fixture, "gamma_max")?,
        fourier: match flag(fixture, "with_fourier_features") {
            true => vec![6, 7],
            false => Vec::new(),
        },
        attention: flag(fixture, "with_attention"),
        ..VdmConfig::default()
    };
    Ok(Store::serve(&weights, DType::F32, &Device::Cpu, |scope| {
        VdmNet::new(&config, &scope.sub("score_model"))
    })?)
}
