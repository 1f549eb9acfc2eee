//! `NVlabs/edm`: the sampler of the ablation, which runs the older samplers in one frame.

use super::score_sde::unstacked;
use crate::parity::compare::Check;
use crate::parity::fixture::{Fixture, number};
use crate::parity::unsupported;
use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use diffusion_core::denoiser::{Call, from_fn};
use diffusion_core::grid::{exponential, iddpm, karras};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::ode::Tableau;
use diffusion_core::predict::{Kind, Prediction};
use diffusion_core::sample::{Churn, Ctx, FlowRk, Planned, Solver};
use diffusion_core::schedule::linear::linspace;
use diffusion_core::schedule::{Designed, NoiseLaw, Point, Scaling};
use diffusion_core::tensor::At;
use serde_json::{Map, Value};
use std::sync::Arc;

/// One case: a solver, a discretisation, a schedule and a scaling.
struct Case<'a>(&'a Map<String, Value>);

impl Case<'_> {
    fn word(&self, name: &str) -> &str {
        self.0.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn number(&self, name: &str, default: f64) -> Result<f64> {
        Ok(number(self.0.get(name), name)?.unwrap_or(default))
    }

    fn steps(&self) -> Result<usize> {
        Ok(self.number("num_steps", 18.0)? as usize)
    }

    /// The limits of `σ̂`: the discretisation's own, within those of the network.
    fn limits(&self) -> Result<(f64, f64)> {
        let original = NoiseLaw::Vp {
            beta_d: 19.9,
            beta_min: 0.1,
        };
        let (low, high) = match self.word("discretization") {
            "vp" => (
                original.sigma_hat(self.number("epsilon_s", 1e-3)?),
                original.sigma_hat(1.0),
            ),
            "ve" => (0.02, 100.0),
            "iddpm" => (0.002, 81.0),
            "edm" => (0.002, 80.0),
            other => return Err(unsupported(format!("the discretisation {other}"))),
        };
        Ok((
            self.number("sigma_min", low)?
                .max(self.number("net_sigma_min", 0.0)?),
            self.number("sigma_max", high)?
                .min(self.number("net_sigma_max", f64::INFINITY)?),
        ))
    }

    /// The levels at which the run stops, noisiest first.
    fn levels(&self) -> Result<Vec<f64>> {
        let (low, high) = self.limits()?;
        let n = self.steps()?;
        Ok(match self.word("discretization") {
            "vp" => {
                let last = self.number("epsilon_s", 1e-3)?;
                let law = NoiseLaw::vp_between(low, high, last);
                linspace(1.0, last, n)
                    .into_iter()
                    .map(|t| law.sigma_hat(t))
                    .collect()
            }
            "ve" => exponential(low, high, n),
            "iddpm" => iddpm(
                (low, high),
                n,
                self.number("M", 1000.0)? as usize,
                self.number("C_1", 1e-3)?,
                self.number("C_2", 8e-3)?,
            )?,
            "edm" => karras(low, high, n, self.number("rho", 7.0)?),
            other => return Err(unsupported(format!("the discretisation {other}"))),
        })
    }

    fn process(&self) -> Result<Designed> {
        let (sigma_min, sigma_max) = self.limits()?;
        let noise = match self.word("schedule") {
            "vp" => NoiseLaw::vp_between(sigma_min, sigma_max, self.number("epsilon_s", 1e-3)?),
            "ve" => NoiseLaw::Sqrt,
            "linear" => NoiseLaw::Linear,
            other => return Err(unsupported(format!("the schedule {other}"))),
        };
        let scaling = match self.word("scaling") {
            "vp" => Scaling::Vp,
            "none" => Scaling::None,
            other => return Err(unsupported(format!("the scaling {other}"))),
        };
        Ok(Designed {
            noise,
            scaling,
            sigma_min,
            sigma_max,
        })
    }

    fn method(&self) -> Result<Tableau> {
        match self.word("solver") {
            "euler" => Ok(Tableau::euler()),
            "heun" => Ok(Tableau::second_order(self.number("alpha", 1.0)?)?),
            other => Err(unsupported(format!("the solver {other}"))),
        }
    }
}

/// Every case of the fixture.
pub(super) fn run(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let (m, v) = (fixture.input_f64("m")?, fixture.input_f64("v")?);
    let model = from_fn(|x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
        let At::All(p) = at else {
            return Err(diffusion_core::Report::new("model", "a point an item").unsupported());
        };
        let s2 = p.sigma_hat().powi(2);
        let x = x.affine(1.0 / p.alpha, 0.0)?;
        let pull = x.broadcast_mul(&v)?.broadcast_add(&m.affine(s2, 0.0)?)?;
        let value = pull.broadcast_div(&v.affine(1.0, s2)?)?;
        Ok(Prediction::new(Kind::X0, value))
    });
    let cases = fixture.config.get("cases").and_then(Value::as_array);
    for case in cases.context("config.cases is missing")? {
        let Some(case) = case.as_object().map(Case) else {
            bail!("config.cases: {case}; expected an object");
        };
        let process = case.process()?;
        let mut points: Vec<Point> = case
            .levels()?
            .into_iter()
            .map(|level| process.at_sigma_hat(level))
            .collect();
        let Some(first) = points.first().copied() else {
            bail!("config.cases: no steps");
        };
        points.push(Point::data(0.0));
        let s_max = case.number("S_max", f64::INFINITY)?;
        let step = FlowRk::new(case.method()?, Arc::new(process)).with_churn(Churn {
            s_churn: case.number("S_churn", 0.0)?,
            s_min: case.number("S_min", 0.0)?,
            s_max: s_max.is_finite().then_some(s_max),
            s_noise: case.number("S_noise", 1.0)?,
            ..Churn::default()
        });
        // A draw belongs to a step, whether the step uses it or not.
        let mut draws = Vec::new();
        for (z, at) in unstacked(&fixture.input_f64("noise")?)?
            .into_iter()
            .zip(&points)
        {
            if step.churn.gamma(at.sigma_hat(), points.len() - 1) > 0.0 {
                draws.push(z);
            }
        }
        let mut noise = RecordedNoise::new(draws);
        let x = fixture.input_f64("latents")?.affine(first.sigma, 0.0)?;
        let items = x.dim(0)? as u64;
        let mut ctx = Ctx::new(&model, &mut noise, 0..items);
        let y = Planned::new(step, &points).solve(x, &mut ctx, &mut ())?;
        check.stored(&fixture.outputs, case.word("key"), &y)?;
    }
    Ok(())
}
