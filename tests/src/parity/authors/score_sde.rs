//! `yang-song/score_sde_pytorch`: SDEs, and single steps of predictors and correctors, on a score in
//! closed form. Whole runs and likelihoods are in `score_samplers`, losses in `score_losses`.

use crate::parity::compare::Check;
use crate::parity::fixture::{Fixture, number, values};
use crate::parity::unsupported;
use anyhow::{Result, bail};
use candle_core::Tensor;
use diffusion_core::denoiser::{Call, Denoiser, from_fn};
use diffusion_core::likelihood::normal_log_density;
use diffusion_core::noise::RecordedNoise;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::langevin::langevin_step;
use diffusion_core::sample::{
    AncestralScore, Ctx, EulerMaruyama, Langevin, Norms, ReverseDiffusion, Step, StepSize,
};
use diffusion_core::schedule::{Point, SharedSchedule, SubVp, Ve, Vp};
use diffusion_core::sde::{Discretisation, flow_velocity, forward_drift, reverse_drift};
use diffusion_core::tensor::{At, Coef};
use std::sync::Arc;

/// Which of the three processes a fixture is about.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Process {
    Vp(Vp),
    SubVp(SubVp),
    Ve(Ve),
}

impl Process {
    /// The process that the name of a fixture says, with the parameters of its configuration.
    pub(super) fn of(fixture: &Fixture) -> Result<Self> {
        let get = |name: &str, default: f64| -> Result<f64> {
            Ok(number(fixture.config.get(name), name)?.unwrap_or(default))
        };
        let vp = Vp {
            beta_min: get("beta_min", 0.1)?,
            beta_max: get("beta_max", 20.0)?,
            t_min: get("eps", 1e-3)?,
        };
        let words: Vec<&str> = fixture.name.split('_').collect();
        if words.contains(&"subvp") {
            Ok(Self::SubVp(SubVp(vp)))
        } else if words.contains(&"vp") {
            Ok(Self::Vp(vp))
        } else if words.contains(&"ve") {
            Ok(Self::Ve(Ve {
                sigma_min: get("sigma_min", 0.01)?,
                sigma_max: get("sigma_max", 50.0)?,
            }))
        } else {
            Err(unsupported(format!("the process of {}", fixture.name)))
        }
    }

    pub(super) fn schedule(self) -> SharedSchedule {
        match self {
            Self::Vp(s) => Arc::new(s),
            Self::SubVp(s) => Arc::new(s),
            Self::Ve(s) => Arc::new(s),
        }
    }

    /// The authors' chain of `N` steps.
    pub(super) fn chain(self, steps: usize) -> Result<Discretisation> {
        Ok(match self {
            Self::Vp(vp) => Discretisation::ddpm(&vp, steps)?,
            Self::SubVp(_) => Discretisation::euler(self.schedule(), steps),
            Self::Ve(ve) => Discretisation::smld(&ve, steps),
        })
    }

    pub(super) fn prior_std(self) -> f64 {
        match self {
            Self::Ve(ve) => ve.sigma_max,
            _ => 1.0,
        }
    }
}

/// The score of Gaussian data `N(m, v)` per pixel, as the network of the process says it.
pub(super) fn model(fixture: &Fixture, process: Process) -> Result<impl Denoiser + use<>> {
    let (m, v) = (fixture.input_f64("m")?, fixture.input_f64("v")?);
    Ok(from_fn(move |x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
        let rows: Vec<Tensor> = at
            .points(x.dim(0)?)
            .iter()
            .enumerate()
            .map(|(i, p)| {
                let total = (&v * p.alpha.powi(2))?.affine(1.0, p.sigma.powi(2))?;
                let gap = (x.narrow(0, i, 1)?.broadcast_sub(&m.affine(p.alpha, 0.0)?))?;
                Ok(gap.broadcast_div(&total)?)
            })
            .collect::<diffusion_core::Result<_>>()?;
        let value = Tensor::cat(&rows, 0)?;
        Ok(match process {
            Process::Ve(_) => Prediction::new(Kind::Score, value.neg()?),
            _ => Prediction::new(Kind::Epsilon, at.coef(|p| p.sigma).times(&value)?),
        })
    }))
}

pub(super) fn steps(fixture: &Fixture) -> Result<usize> {
    match number(fixture.config.get("N"), "N")? {
        Some(n) if n >= 1.0 => Ok(n as usize),
        other => bail!("config.N: {other:?}; expected a whole number above 0"),
    }
}

pub(super) fn setting(fixture: &Fixture, name: &str, default: f64) -> Result<f64> {
    Ok(number(fixture.config.get(name), name)?.unwrap_or(default))
}

pub(super) fn word<'a>(fixture: &'a Fixture, name: &str) -> &'a str {
    fixture
        .config
        .get(name)
        .and_then(|v| v.as_str())
        .unwrap_or_default()
}

pub(super) fn flag(fixture: &Fixture, name: &str, default: bool) -> bool {
    fixture
        .config
        .get(name)
        .and_then(|v| v.as_bool())
        .unwrap_or(default)
}

/// The tensors along the first dimension of a stack.
pub(super) fn unstacked(stack: &Tensor) -> Result<Vec<Tensor>> {
    Ok((0..stack.dim(0)?)
        .map(|i| stack.get(i))
        .collect::<Result<_, _>>()?)
}

/// Data scaled back, and the value to which −1 is.
pub(super) fn inverse_scaler(fixture: &Fixture, x: &Tensor) -> Result<(Tensor, f64)> {
    match word(fixture, "inverse_scaler") {
        "" | "identity" | "x" => Ok((x.clone(), -1.0)),
        "(x+1)/2" => Ok((x.affine(0.5, 0.5)?, 0.0)),
        other => Err(unsupported(format!("the inverse scaler {other}"))),
    }
}

/// Marginals, drifts, discretisations and priors.
pub(super) fn sde(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let (schedule, n) = (process.schedule(), steps(fixture)?);
    let chain = process.chain(n)?;
    let (x, score) = (fixture.input_f64("x")?, fixture.input_f64("score")?);
    let times = values(fixture.input("t")?)?;
    let points: Vec<Point> = times.iter().map(|t| schedule.at(*t)).collect();
    let out = &fixture.outputs;
    let scalars = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let list: Vec<f64> = times.iter().map(|t| f(*t)).collect();
        Ok(Tensor::new(list, x.device())?)
    };
    let each = |f: &dyn Fn(&Tensor, &Tensor, f64) -> diffusion_core::Result<Tensor>| {
        let rows = times
            .iter()
            .enumerate()
            .map(|(i, t)| f(&x.narrow(0, i, 1)?, &score.narrow(0, i, 1)?, *t))
            .collect::<diffusion_core::Result<Vec<_>>>()?;
        anyhow::Ok(Tensor::cat(&rows, 0)?)
    };
    let at = At::Each(&points);
    check.stored(out, "mean", &at.coef(|p| p.alpha).times(&x)?)?;
    check.stored(out, "std", &scalars(&|t| schedule.at(t).sigma)?)?;
    let drift = each(&|x, _, t| forward_drift(x, &schedule.rates(t)))?;
    check.stored(out, "drift", &drift)?;
    let diffusion = scalars(&|t| schedule.rates(t).g2.sqrt())?;
    check.stored(out, "diffusion", &diffusion)?;
    check.stored(out, "rev_sde_diffusion", &diffusion)?;
    let forward = each(&|x, _, t| Ok(x.affine(chain.kernel(t).alpha - 1.0, 0.0)?))?;
    check.stored(out, "disc_f", &forward)?;
    let noise = scalars(&|t| chain.kernel(t).variance.sqrt())?;
    check.stored(out, "disc_G", &noise)?;
    check.stored(out, "rev_sde_disc_G", &noise)?;
    check.stored(out, "rev_ode_disc_G", &noise.zeros_like()?)?;
    let prior_at = x.affine(if process.prior_std() == 1.0 { 1.0 } else { 3.0 }, 0.0)?;
    check.stored(
        out,
        "prior_logp",
        &normal_log_density(&prior_at, process.prior_std())?,
    )?;
    let reverse = each(&|x, s, t| reverse_drift(x, s, &schedule.rates(t)))?;
    check.stored(out, "rev_sde_drift", &reverse)?;
    let flow = each(&|x, s, t| flow_velocity(x, s, &schedule.rates(t)))?;
    check.stored(out, "rev_ode_drift", &flow)?;
    for (name, weight) in [("rev_sde_disc_f", 1.0), ("rev_ode_disc_f", 0.5)] {
        let f = each(&|x, s, t| Ok((x - chain.kernel(t).reversed(x, s, weight)?)?))?;
        check.stored(out, name, &f)?;
    }
    let levels = chain.levels();
    if let Some(stored) = out.get("discrete_sigmas") {
        let ours: Vec<f64> = levels.iter().map(|p| p.sigma).collect();
        check.values("discrete_sigmas", &ours, &values(stored)?);
    }
    if let Process::Vp(vp) = process {
        let table = Discretisation::ddpm_table(&vp, n)?;
        for (name, ours) in [
            ("discrete_betas", table.betas()),
            ("alphas_cumprod", table.alpha_bar()),
        ] {
            if let Some(stored) = out.get(name) {
                check.values(name, ours, &values(stored)?);
            }
        }
    }
    Ok(())
}

/// One step of every predictor and corrector, each item at its own time.
pub(super) fn predictor_corrector_steps(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let (schedule, n) = (process.schedule(), steps(fixture)?);
    let chain = process.chain(n)?;
    let model = model(fixture, process)?;
    let (x, z) = (fixture.input_f64("x")?, fixture.input_f64("noise")?);
    let times = values(fixture.input("t")?)?;
    let points: Vec<Point> = times.iter().map(|t| schedule.at(*t)).collect();
    let out = &fixture.outputs;

    let one = |step: &dyn Fn(&Tensor, &Point, &Point, &mut Ctx<'_>) -> Result<Tensor>,
               mean: bool| {
        let mut rows = Vec::new();
        for (i, from) in points.iter().enumerate() {
            let mut noise = RecordedNoise::new([z.narrow(0, i, 1)?]);
            let mut ctx = Ctx::new(&model, &mut noise, 0..1);
            // Into the data no noise is added: the mean of the step.
            let to = if mean { Point::data(0.0) } else { *from };
            rows.push(step(&x.narrow(0, i, 1)?, from, &to, &mut ctx)?);
        }
        anyhow::Ok(Tensor::cat(&rows, 0)?)
    };
    let euler = EulerMaruyama {
        steps: Some(n),
        ..EulerMaruyama::new(schedule.clone())
    };
    let reverse = ReverseDiffusion::of(chain.clone());
    let flow = ReverseDiffusion {
        flow: true,
        ..reverse.clone()
    };
    let ancestral = AncestralScore {
        chain: Some(chain.clone()),
        large: matches!(process, Process::Vp(_)),
        noise_into_data: false,
    };
    for (suffix, mean) in [("x", false), ("x_mean", true)] {
        let y = one(&|x, a, b, c| Ok(euler.step(x, a, b, c, &mut ())?), mean)?;
        check.stored(out, &format!("euler_maruyama.{suffix}"), &y)?;
        let y = one(&|x, a, b, c| Ok(reverse.step(x, a, b, c, &mut ())?), mean)?;
        check.stored(out, &format!("reverse_diffusion.{suffix}"), &y)?;
        let y = one(&|x, a, b, c| Ok(flow.step(x, a, b, c, &mut ())?), mean)?;
        check.stored(out, &format!("reverse_diffusion_ode.{suffix}"), &y)?;
        let y = one(&|x, a, b, c| Ok(ancestral.step(x, a, b, c, &mut ())?), mean)?;
        check.stored(out, &format!("ancestral_sampling.{suffix}"), &y)?;
    }

    let at = At::Each(&points);
    let score = |x: &Tensor| -> Result<Tensor> {
        let mut noise = RecordedNoise::new([]);
        let mut ctx = Ctx::new(&model, &mut noise, 0..points.len() as u64);
        Ok(ctx.denoise_each(x, &points)?.score(x, at)?)
    };
    check.stored(out, "score", &score(&x)?)?;
    for name in ["langevin", "ald"] {
        let corrector = corrector(fixture, process, name, &chain)?;
        let (mut now, mut mean) = (x.clone(), x.clone());
        for _ in 0..corrector.steps {
            let s = score(&now)?;
            let sizes: Coef = corrector.sizes(&s, &z, at)?;
            (mean, now) = langevin_step(&now, &s, &z, &sizes)?;
        }
        check.stored(out, &format!("{name}.x"), &now)?;
        check.stored(out, &format!("{name}.x_mean"), &mean)?;
    }
    Ok(())
}

/// The corrector of a name with the fixture's ratio and number of steps.
pub(super) fn corrector(
    fixture: &Fixture,
    process: Process,
    name: &str,
    chain: &Discretisation,
) -> Result<Langevin> {
    let ratio = setting(fixture, "snr", 0.16)?;
    let size = match name {
        "langevin" => StepSize::SignalToNoise {
            ratio,
            norms: Norms::BatchMean,
        },
        "ald" => StepSize::NoiseLevel { ratio },
        other => return Err(unsupported(format!("the corrector {other}"))),
    };
    Ok(Langevin {
        size,
        steps: setting(fixture, "n_steps", 1.0)? as usize,
        chain: matches!(process, Process::Vp(_)).then(|| chain.clone()),
    })
}
