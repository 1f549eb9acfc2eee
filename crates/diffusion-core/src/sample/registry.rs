//! Samplers by name, for configurations and command lines.

use super::config::{ByScore, RungeKutta, SdeTolerance, Tolerance};
use super::{
    Ancestral, Basis, Belief, Churn, Consistency, Ddim, Deis, Direction, DpmAdaptive, DpmMultistep,
    DpmPpSde, DpmSinglestep, Euler, EulerMaruyama, FlowHeun, Heun, Ipndm, Kdpm2, Pndm, SaSolver,
    SamplerConfig, Start, Tcd, Third, UniPc, UniPcB, Variance,
};
use crate::error::{Report, Result};
use serde_json::Value;

/// A named sampler.
pub struct Named {
    /// The name.
    pub name: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// The sampler with its usual parameters.
    pub config: fn() -> SamplerConfig,
}

/// The multistep solver of this belief and order with its usual end.
fn multistep(belief: Belief, order: usize) -> DpmMultistep {
    DpmMultistep {
        belief,
        order,
        ..DpmMultistep::default()
    }
}

fn singlestep(belief: Belief, order: usize) -> SamplerConfig {
    SamplerConfig::DpmSinglestep(DpmSinglestep {
        belief,
        order,
        ..DpmSinglestep::default()
    })
}

fn sde(order: usize) -> SamplerConfig {
    SamplerConfig::DpmMultistep(DpmMultistep {
        stochastic: true,
        ..multistep(Belief::X0, order)
    })
}

fn ddim(eta: f64) -> SamplerConfig {
    SamplerConfig::Ddim(Ddim {
        eta,
        direction: Direction::Rederived,
    })
}

fn deis(basis: Basis, order: usize) -> SamplerConfig {
    SamplerConfig::Deis(Deis {
        basis,
        order,
        ..Deis::default()
    })
}

fn unipc(order: usize, b: UniPcB) -> SamplerConfig {
    SamplerConfig::UniPc(UniPc {
        order,
        b,
        ..UniPc::default()
    })
}

fn adaptive(order: usize) -> SamplerConfig {
    SamplerConfig::DpmAdaptive(DpmAdaptive {
        order,
        ..DpmAdaptive::default()
    })
}

macro_rules! samplers {
    ($($name:literal, $about:literal, $config:expr;)*) => {
        &[$(Named { name: $name, about: $about, config: || $config }),*]
    };
}

/// Every named sampler; adding one is adding a line.
#[rustfmt::skip]
pub const SAMPLERS: &[Named] = samplers![
    "ddpm", "ancestral sampling with the small variance", SamplerConfig::Ddpm(Ancestral::default());
    "ddpm-large", "ancestral sampling with the large variance", SamplerConfig::Ddpm(Ancestral { variance: Variance::FixedLarge, ..Ancestral::default() });
    "ddpm-learned", "ancestral sampling with the network's variance", SamplerConfig::Ddpm(Ancestral { variance: Variance::LearnedRange, ..Ancestral::default() });
    "ddim", "deterministic DDIM", ddim(0.0);
    "ddim-eta1", "DDIM with eta = 1", ddim(1.0);
    "euler", "Euler in sigma/alpha", SamplerConfig::Euler(Euler::default());
    "euler-a", "Euler ancestral: DDIM with eta = 1", ddim(1.0);
    "heun", "Heun in sigma/alpha, two calls a step", SamplerConfig::Heun(Heun::default());
    "edm", "Heun with EDM's churn (40, 0.05 to 50, 1.003)", SamplerConfig::Heun(Heun { churn: Churn { s_churn: 40.0, s_min: 0.05, s_max: Some(50.0), s_noise: 1.003, ..Churn::default() } });
    "kdpm2", "DPM2 of k-diffusion, two calls a step", SamplerConfig::Kdpm2(Kdpm2::default());
    "kdpm2-a", "DPM2 ancestral of k-diffusion, two calls a step", SamplerConfig::Kdpm2(Kdpm2 { eta: 1.0 });
    "lms", "linear multistep method of order 4", SamplerConfig::Deis(Deis::lms(4));
    "dpm-2m", "DPM-Solver of order 2, multistep", SamplerConfig::DpmMultistep(multistep(Belief::Epsilon, 2));
    "dpm-3m", "DPM-Solver of order 3, multistep", SamplerConfig::DpmMultistep(multistep(Belief::Epsilon, 3));
    "dpm-2s", "DPM-Solver of order 2, singlestep", singlestep(Belief::Epsilon, 2);
    "dpm-3s", "DPM-Solver of order 3, singlestep (fast)", singlestep(Belief::Epsilon, 3);
    "dpm-12", "DPM-Solver with adaptive steps, orders 1 and 2", adaptive(2);
    "dpm-23", "DPM-Solver with adaptive steps, orders 2 and 3", adaptive(3);
    "dpmpp-1", "DPM-Solver++ of order 1", SamplerConfig::DpmMultistep(multistep(Belief::X0, 1));
    "dpmpp-2m", "DPM-Solver++ 2M", SamplerConfig::DpmMultistep(multistep(Belief::X0, 2));
    "dpmpp-3m", "DPM-Solver++ 3M, with the factor that makes it third order", SamplerConfig::DpmMultistep(multistep(Belief::X0, 3));
    "dpmpp-3m-published", "DPM-Solver++ 3M as published", SamplerConfig::DpmMultistep(DpmMultistep { third: Third::Published, ..multistep(Belief::X0, 3) });
    "dpmpp-2s", "DPM-Solver++ of order 2, singlestep", singlestep(Belief::X0, 2);
    "dpmpp-3s", "DPM-Solver++ of order 3, singlestep", singlestep(Belief::X0, 3);
    "dpmpp-1-sde", "SDE-DPM-Solver++ of order 1", sde(1);
    "dpmpp-2m-sde", "SDE-DPM-Solver++ 2M", sde(2);
    "dpmpp-3m-sde", "SDE-DPM-Solver++ 3M", sde(3);
    "dpmpp-sde", "DPM-Solver++ SDE of k-diffusion, two calls a step", SamplerConfig::DpmPpSde(DpmPpSde::default());
    "deis", "DEIS of order 3 in ln(sigma/alpha)", deis(Basis::LogRho, 3);
    "deis-rho", "DEIS of order 3 in sigma/alpha", deis(Basis::Rho, 3);
    "deis-t", "DEIS of order 3 in time", deis(Basis::Time, 3);
    "unipc", "UniPC of order 2, B(h) = e^h - 1", unipc(2, UniPcB::Bh2);
    "unipc-3", "UniPC of order 3, B(h) = e^h - 1", unipc(3, UniPcB::Bh2);
    "unipc-bh1", "UniPC of order 2, B(h) = h", unipc(2, UniPcB::Bh1);
    "unipc-3-bh1", "UniPC of order 3, B(h) = h", unipc(3, UniPcB::Bh1);
    "pndm", "PNDM started by pseudo Runge-Kutta steps", SamplerConfig::Pndm(Pndm { start: Start::RungeKutta, ..Pndm::default() });
    "plms", "PNDM started by a pseudo Heun step", SamplerConfig::Pndm(Pndm::default());
    "ipndm", "DDIM with extrapolated noise", SamplerConfig::Ipndm(Ipndm::default());
    "sa-solver", "SA-Solver, predictor and corrector of order 2, tau = 1", SamplerConfig::SaSolver(SaSolver::default());
    "flow-heun", "Heun on straight paths, two calls a step", SamplerConfig::FlowHeun(FlowHeun::default());
    "em", "Euler-Maruyama on the reverse SDE", SamplerConfig::EulerMaruyama(EulerMaruyama::default());
    "em-flow", "Euler on the probability flow in time", SamplerConfig::EulerMaruyama(EulerMaruyama { lambda: 1.0, ..EulerMaruyama::default() });
    "reverse-diffusion", "the reverse SDE discretised as its forward SDE is", SamplerConfig::PredictorCorrector(ByScore::default());
    "pc", "reverse diffusion with a Langevin correction, two calls a step", SamplerConfig::PredictorCorrector(ByScore { corrections: 1, ..ByScore::default() });
    "flow-rk4", "Runge-Kutta of order 4 on the flow in time, four calls a step", SamplerConfig::FlowRk(RungeKutta::default());
    "rk45", "adaptive Dormand-Prince on the flow", SamplerConfig::FlowOde(Tolerance::default());
    "adaptive-sde", "the reverse SDE with adaptive steps", SamplerConfig::AdaptiveSde(SdeTolerance::default());
    "consistency", "jumps to the data with fresh noise between", SamplerConfig::Consistency(Consistency::default());
    "tcd", "trajectory consistency sampling, gamma = 0.3", SamplerConfig::Tcd(Tcd::default());
];

/// Names of samplers, comma by comma.
pub fn names() -> String {
    let names: Vec<&str> = SAMPLERS.iter().map(|s| s.name).collect();
    names.join(", ")
}

impl SamplerConfig {
    /// The sampler of this name with its usual parameters.
    ///
    /// # Errors
    /// `Config` listing the names.
    pub fn named(name: &str) -> Result<Self> {
        match SAMPLERS.iter().find(|s| s.name == name) {
            Some(found) => Ok((found.config)()),
            None => Err(Report::new("sampler", name)
                .expected(format!("one of {}", names()))
                .config()),
        }
    }

    /// A sampler by name, or as JSON with its parameters: `{"name": "dpm_multistep", "order": 3}`, or
    /// what differs from a named one, `{"name": "unipc-3", "b": "bh1"}`.
    ///
    /// # Errors
    /// `Config` listing the names, or saying what is wrong in the JSON.
    pub fn parse(text: &str) -> Result<Self> {
        if !text.trim_start().starts_with('{') {
            return Self::named(text);
        }
        let wrong = |error: serde_json::Error| {
            Report::new("sampler", text)
                .expected(format!("a sampler's parameters as JSON ({error})"))
                .config()
        };
        let mut fields: serde_json::Map<String, Value> =
            serde_json::from_str(text).map_err(wrong)?;
        let name = fields.get("name").and_then(Value::as_str).unwrap_or("");
        if let Some(known) = SAMPLERS.iter().find(|s| s.name == name) {
            let own = serde_json::to_value((known.config)()).map_err(wrong)?;
            fields.remove("name");
            if let Value::Object(mut all) = own {
                for (key, value) in fields {
                    overlay(all.entry(key).or_insert(Value::Null), value);
                }
                fields = all;
            }
        }
        let config: Self = serde_json::from_value(Value::Object(fields)).map_err(wrong)?;
        config.check()?;
        Ok(config)
    }
}

/// Objects are merged, everything else is replaced.
fn overlay(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                overlay(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_is_known_and_no_other() {
        for Named { name, .. } in SAMPLERS {
            assert!(SamplerConfig::named(name).is_ok(), "{name}");
            let twice = SAMPLERS.iter().filter(|s| s.name == *name).count();
            assert_eq!(twice, 1, "{name}");
        }
        let error = SamplerConfig::named("dimm").err().unwrap().to_string();
        assert!(
            error.contains("dimm") && error.contains("dpmpp-2m"),
            "{error}"
        );
    }

    #[test]
    fn what_differs_from_a_named_sampler() {
        let text = r#"{"name": "edm", "churn": {"s_churn": 7}}"#;
        let Ok(SamplerConfig::Heun(heun)) = SamplerConfig::parse(text) else {
            panic!("not Heun");
        };
        assert_eq!((heun.churn.s_churn, heun.churn.s_noise), (7.0, 1.003));
        for wrong in [
            r#"{"name": "edm", "churns": {}}"#,
            r#"{"name": "nosuch"}"#,
            r#"{"order": 3}"#,
        ] {
            assert!(SamplerConfig::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn survives_a_round_trip_through_json() {
        for Named { name, config, .. } in SAMPLERS {
            let text = serde_json::to_string(&config()).unwrap();
            let back: SamplerConfig = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&back).unwrap(), text, "{name}");
        }
    }
}
