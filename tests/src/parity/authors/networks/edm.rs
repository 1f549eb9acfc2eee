//! EDM: raw networks, preconditioned denoisers, losses, and the sampler on a network.

use super::super::super::compare::Check;
use super::super::super::fixture::{Fixture, values};
use super::super::super::unsupported;
use super::{config, gradients, serve, whole};
use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{
    Call, Denoiser, EdmNetwork, IddpmPrecond, Preconditioned, Preconditioner, VePrecond, VpPrecond,
};
use diffusion_core::grid::karras;
use diffusion_core::loss::{Denoising, TimeLaw, Weight};
use diffusion_core::noise::{CounterNoise, RecordedNoise};
use diffusion_core::sample::{Churn, Heun, Planned, sample};
use diffusion_core::schedule::{Edm, Point, Schedule, Ve, Vp};
use diffusion_core::tensor::At;
use diffusion_nn::net::song_unet::{DhariwalConfig, DhariwalUNet, SongConfig, SongUNet};
use diffusion_nn::{Mode, Scope};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Either network.
enum Net {
    Song(SongUNet),
    Dhariwal(DhariwalUNet),
}

/// How to build it.
enum Sizes {
    Song(SongConfig),
    Dhariwal(DhariwalConfig),
}

impl Sizes {
    /// From the arguments of the class of this name.
    fn new(class: &str, arguments: &Map<String, Value>) -> Result<Self> {
        match class {
            "SongUNet" => Ok(Self::Song(config(arguments)?)),
            "DhariwalUNet" => Ok(Self::Dhariwal(config(arguments)?)),
            other => Err(unsupported(format!("the network {other}"))),
        }
    }

    /// The network inside a preconditioner, whose own arguments are passed over.
    fn inside(map: &Map<String, Value>, outputs: usize) -> Result<Self> {
        const OTHERS: [&str; 24] = [
            "model_type",
            "img_channels",
            "use_fp16",
            "sigma_data",
            "sigma_min",
            "sigma_max",
            "net_sigma_min",
            "net_sigma_max",
            "beta_d",
            "beta_min",
            "M",
            "epsilon_t",
            "C_1",
            "C_2",
            "num_steps",
            "rho",
            "S_churn",
            "S_min",
            "S_max",
            "S_noise",
            "EDMLoss",
            "VPLoss",
            "VELoss",
            "precond",
        ];
        let channels = number(map, "img_channels", None)? as usize;
        let kept = |key: &&String| !OTHERS.contains(&key.as_str());
        let mut arguments: Map<String, Value> = map
            .iter()
            .filter(|(key, _)| kept(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        arguments.insert("in_channels".into(), channels.into());
        arguments.insert("out_channels".into(), (outputs * channels).into());
        let class = map.get("model_type").and_then(Value::as_str);
        Self::new(class.context("config.model_type is missing")?, &arguments)
    }

    fn build(&self, scope: &Scope) -> diffusion_nn::Result<Net> {
        match self {
            Self::Song(config) => SongUNet::new(config, scope).map(Net::Song),
            Self::Dhariwal(config) => DhariwalUNet::new(config, scope).map(Net::Dhariwal),
        }
    }
}

impl Net {
    fn forward(
        &self,
        x: &Tensor,
        noise: &Tensor,
        class: Option<&Tensor>,
        augment: Option<&Tensor>,
    ) -> diffusion_nn::Result<Tensor> {
        match self {
            Self::Song(net) => net.forward(x, noise, class, augment, Mode::Eval),
            Self::Dhariwal(net) => net.forward(x, noise, class, augment, Mode::Eval),
        }
    }

    /// As the function of a denoiser: the first `channels` of what it says.
    fn function<'a>(
        &'a self,
        class: Option<&'a Tensor>,
        channels: usize,
    ) -> impl Fn(&Tensor, &Tensor) -> diffusion_core::error::Result<Tensor> + 'a {
        move |x, noise| {
            let out = self
                .forward(x, noise, class, None)
                .map_err(candle_core::Error::wrap)?;
            Ok(out.narrow(1, 0, channels)?)
        }
    }
}

/// A number of the configuration, which may be written as `"inf"`.
fn number(map: &Map<String, Value>, name: &str, default: Option<f64>) -> Result<f64> {
    match (map.get(name), default) {
        (None | Some(Value::Null), Some(default)) => Ok(default),
        (Some(Value::String(word)), _) if word == "inf" => Ok(f64::INFINITY),
        (Some(value), _) => value
            .as_f64()
            .ok_or_else(|| anyhow!("config.{name}: {value}; expected a number")),
        (None, None) => Err(anyhow!("config.{name} is missing")),
    }
}

/// `SongUNet` and `DhariwalUNet` without a preconditioner.
///
/// # Errors
/// Anything that goes wrong.
pub fn raw(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let mut arguments = fixture.config.clone();
    let class = arguments.remove("class_name");
    let class = class.as_ref().and_then(Value::as_str);
    let sizes = Sizes::new(class.context("config.class_name is missing")?, &arguments)?;
    let (x, noise) = (fixture.input("x")?, fixture.input("noise_labels")?);
    let class = fixture.inputs.get("class_labels");
    let augment = fixture.inputs.get("augment_labels");
    let forward = |net: &Net| Ok(net.forward(x, noise, class, augment)?);
    let served = serve(&fixture.tensors("weights")?, |scope| sizes.build(scope))?;
    check.stored(&fixture.outputs, "out", &forward(&served)?)?;
    gradients(fixture, check, |scope| sizes.build(scope), forward)
}

/// A preconditioned network: `D(x; σ)` and the levels that it knows.
///
/// # Errors
/// Anything that goes wrong.
pub fn preconditioned(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let map = &fixture.config;
    match fixture.name.as_str() {
        name if name.starts_with("precond_edm") => {
            let span = (
                number(map, "sigma_min", Some(0.0))?,
                number(map, "sigma_max", Some(f64::INFINITY))?,
            );
            let net = inside(fixture, 1)?;
            let channels = number(map, "img_channels", None)? as usize;
            let denoiser = EdmNetwork {
                f: net.function(fixture.inputs.get("class_labels"), channels),
                sigma_data: number(map, "sigma_data", Some(0.5))?,
                negative: false,
                dtype: DType::F32,
            };
            denoised(fixture, check, &denoiser, |sigma| sigma, span)
        }
        name if name.starts_with("precond_vp") => {
            let beta_min = number(map, "beta_min", Some(0.1))?;
            let schedule = Vp {
                beta_min,
                beta_max: beta_min + number(map, "beta_d", Some(19.9))?,
                t_min: number(map, "epsilon_t", Some(1e-5))?,
            };
            let steps = number(map, "M", Some(1000.0))? as usize;
            behind(fixture, check, VpPrecond { schedule, steps }, 1)
        }
        name if name.starts_with("precond_ve") => {
            let preconditioner = VePrecond {
                sigma_min: number(map, "sigma_min", Some(0.02))?,
                sigma_max: number(map, "sigma_max", Some(100.0))?,
            };
            behind(fixture, check, preconditioner, 1)
        }
        name if name.starts_with("precond_iddpm") => {
            let ours = IddpmPrecond::new(
                number(map, "M", Some(1000.0))? as usize,
                number(map, "C_1", Some(0.001))?,
                number(map, "C_2", Some(0.008))?,
            )?;
            // The authors' own table is what their network was trained with: f32 loses a
            // thousandth at the small levels.
            let weights = fixture.tensors("weights")?;
            let stored = values(weights.get("u").context("no weight `u`")?)?;
            check.within("u", ours.levels(), &stored, |u| 1e-2 * u.abs() + 1e-6);
            behind(fixture, check, IddpmPrecond::from_levels(stored)?, 2)
        }
        other => Err(unsupported(format!("the preconditioner of {other}"))),
    }
}

/// The network inside a preconditioner, on its weights `model.*`.
fn inside(fixture: &Fixture, outputs: usize) -> Result<Net> {
    let sizes = Sizes::inside(&fixture.config, outputs)?;
    let mut weights = fixture.tensors("weights")?;
    // A table of levels belongs to the preconditioner.
    weights.remove("u");
    serve(&weights, |scope| sizes.build(&scope.sub("model")))
}

fn behind<P: Preconditioner>(
    fixture: &Fixture,
    check: &mut Check,
    preconditioner: P,
    outputs: usize,
) -> Result<()> {
    let net = inside(fixture, outputs)?;
    let channels = number(&fixture.config, "img_channels", None)? as usize;
    let levels: Vec<f64> = match fixture.inputs.get("sigmas_to_round") {
        Some(sigmas) => values(sigmas)?,
        None => Vec::new(),
    };
    let rounded: Vec<f64> = levels
        .iter()
        .map(|sigma| preconditioner.round_sigma(*sigma))
        .collect();
    let span = preconditioner.span();
    let round = |sigma: f64| {
        let place = levels.iter().position(|level| *level == sigma);
        place.map_or(sigma, |i| rounded[i])
    };
    let denoiser = Preconditioned {
        preconditioner,
        f: net.function(fixture.inputs.get("class_labels"), channels),
        dtype: DType::F32,
    };
    denoised(fixture, check, &denoiser, round, span)
}

fn denoised(
    fixture: &Fixture,
    check: &mut Check,
    denoiser: &dyn Denoiser,
    round: impl Fn(f64) -> f64,
    span: (f64, f64),
) -> Result<()> {
    let x = fixture.input("x")?;
    let points: Vec<Point> = values(fixture.input("sigma")?)?
        .into_iter()
        .map(|sigma| Point::new(sigma, 1.0, sigma))
        .collect();
    let said = denoised_at(denoiser, x, At::Each(&points))?;
    check.stored(&fixture.outputs, "D", &said)?;
    if let (Some(sigmas), Some(stored)) = (
        fixture.inputs.get("sigmas_to_round"),
        fixture.outputs.get("round_sigma"),
    ) {
        let ours: Vec<f64> = values(sigmas)?.into_iter().map(round).collect();
        check.values("round_sigma", &ours, &values(stored)?);
    }
    for (name, ours) in [("net_sigma_min", span.0), ("net_sigma_max", span.1)] {
        let stored = number(&fixture.config, name, Some(ours))?;
        check.values(name, &[ours], &[stored]);
    }
    Ok(())
}

fn denoised_at(denoiser: &dyn Denoiser, x: &Tensor, at: At<'_>) -> Result<Tensor> {
    let mut noise = CounterNoise::new(0, 0..0);
    let mut call = Call {
        noise: &mut noise,
        items: 0..x.dim(0)? as u64,
        tracked: false,
    };
    Ok(denoiser.predict(x, at, &mut call)?.x0(x, at)?)
}

/// EDM's denoiser on the fixture's network.
fn edm<'a>(
    fixture: &'a Fixture,
    net: &'a Net,
    class: Option<&'a Tensor>,
) -> Result<EdmNetwork<impl Fn(&Tensor, &Tensor) -> diffusion_core::error::Result<Tensor> + 'a>> {
    let channels = number(&fixture.config, "img_channels", None)? as usize;
    Ok(EdmNetwork {
        f: net.function(class, channels),
        sigma_data: number(&fixture.config, "sigma_data", Some(0.5))?,
        negative: false,
        dtype: DType::F32,
    })
}

/// `edm_sampler`: Heun with churn, its state in f64.
///
/// # Errors
/// Anything that goes wrong.
pub fn sampler(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let map = &fixture.config;
    let net = inside(fixture, 1)?;
    let denoiser = edm(fixture, &net, fixture.inputs.get("class_labels"))?;
    let steps = number(map, "num_steps", Some(18.0))? as usize;
    let levels = karras(
        number(map, "sigma_min", Some(0.002))?,
        number(map, "sigma_max", Some(80.0))?,
        steps,
        number(map, "rho", Some(7.0))?,
    );
    let s_max = number(map, "S_max", Some(f64::INFINITY))?;
    let churn = Churn {
        s_churn: number(map, "S_churn", Some(0.0))?,
        s_min: number(map, "S_min", Some(0.0))?,
        s_max: s_max.is_finite().then_some(s_max),
        s_noise: number(map, "S_noise", Some(1.0))?,
        ..Churn::default()
    };
    // The authors draw in every step; only raised levels use what was drawn.
    let recorded = fixture.input("noise")?;
    let mut used = Vec::new();
    for (i, sigma) in levels.iter().enumerate() {
        if churn.gamma(*sigma, steps) > 0.0 {
            used.push(recorded.get(i)?);
        }
    }
    let mut points: Vec<Point> = levels.iter().map(|s| Point::new(*s, 1.0, *s)).collect();
    points.push(Point::data(0.0));
    let first = levels.first().copied().context("no steps")?;
    let start = (fixture.input_f64("latents")? * first)?;
    let items = 0..start.dim(0)? as u64;
    let solver = Planned::new(Heun { churn }, &points).in_f64();
    let mut noise = RecordedNoise::new(used);
    let ours = sample(&solver, &denoiser, start, &mut noise, items)?;
    let out = &fixture.outputs;
    whole(check, out, "samples", &ours)?;
    check.stored(out, "t_steps", &Tensor::new(levels, &Device::Cpu)?)
}

/// `EDMLoss`, `VPLoss` and `VELoss`, entry by entry, on EDM's denoiser.
///
/// # Errors
/// Anything that goes wrong.
pub fn losses(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let net = inside(fixture, 1)?;
    let denoiser = edm(fixture, &net, fixture.inputs.get("labels"))?;
    let empty = Map::new();
    let part = |name: &str| match fixture.config.get(name) {
        Some(Value::Object(map)) => map.clone(),
        _ => empty.clone(),
    };
    let drawn = |name: &str| values(fixture.input(name)?);
    let mut compare = |key: &str, loss: Denoising, points: Vec<Point>| -> Result<()> {
        let x0 = fixture.input_f64("images")?;
        let epsilon = fixture.input_f64(&format!("{key}_noise"))?;
        let mut noise = CounterNoise::new(0, 0..0);
        let mut call = Call {
            noise: &mut noise,
            items: 0..x0.dim(0)? as u64,
            tracked: false,
        };
        let ours = loss.entries(&denoiser, &x0, &epsilon, &points, &mut call)?;
        check.stored(&fixture.outputs, &format!("{key}_loss"), &ours)
    };

    let map = part("EDMLoss");
    let (mean, std) = (
        number(&map, "P_mean", Some(-1.2))?,
        number(&map, "P_std", Some(1.2))?,
    );
    let loss = Denoising {
        schedule: Arc::new(Edm::default()),
        weight: Weight::Edm {
            sigma_data: number(&map, "sigma_data", Some(0.5))?,
        },
        time: TimeLaw::LogNormal { mean, std },
    };
    let points = drawn("edm_rnd_normal")?
        .into_iter()
        .map(|z| loss.schedule.at((z * std + mean).exp()))
        .collect();
    compare("edm", loss, points)?;

    let map = part("VPLoss");
    let beta_min = number(&map, "beta_min", Some(0.1))?;
    let vp = Vp {
        beta_min,
        beta_max: beta_min + number(&map, "beta_d", Some(19.9))?,
        t_min: number(&map, "epsilon_t", Some(1e-5))?,
    };
    let points = drawn("vp_rnd_uniform")?
        .into_iter()
        .map(|u| vp.at(1.0 + u * (vp.t_min - 1.0)))
        .collect();
    compare("vp", simple(vp), points)?;

    let map = part("VELoss");
    let ve = Ve {
        sigma_min: number(&map, "sigma_min", Some(0.02))?,
        sigma_max: number(&map, "sigma_max", Some(100.0))?,
    };
    let points = drawn("ve_rnd_uniform")?
        .into_iter()
        .map(|u| ve.at(u))
        .collect();
    compare("ve", simple(ve), points)
}

/// The error of the noise, which is 1/σ̂² times that of the data.
fn simple(schedule: impl Schedule + Send + Sync + 'static) -> Denoising {
    Denoising {
        schedule: Arc::new(schedule),
        weight: Weight::Simple,
        time: TimeLaw::Uniform,
    }
}
