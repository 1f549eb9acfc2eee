//! Which parameters of samplers mean something.

use super::{Churn, SamplerConfig};
use crate::error::{Report, Result};
use std::fmt::Debug;
use std::ops::RangeInclusive;

/// Refuses a value outside a range; NaN is outside every range.
fn within<T: PartialOrd + Debug>(field: &str, value: T, range: RangeInclusive<T>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(
        Report::new(format!("sampler, {field}"), format!("{value:?}"))
            .expected(format!("{:?} to {:?}", range.start(), range.end()))
            .remedy("leave it out for the usual value")
            .config(),
    )
}

fn positive(field: &str, value: f64) -> Result<()> {
    within(field, value, f64::MIN_POSITIVE..=f64::MAX)
}

fn churn(churn: &Churn) -> Result<()> {
    within("churn.s_churn", churn.s_churn, 0.0..=f64::MAX)?;
    within("churn.s_min", churn.s_min, 0.0..=f64::MAX)?;
    if let Some(most) = churn.s_max {
        within("churn.s_max", most, 0.0..=f64::MAX)?;
    }
    within("churn.s_noise", churn.s_noise, 0.0..=f64::MAX)
}

impl SamplerConfig {
    /// Refuses parameters without a meaning: orders that a method does not have, shares outside
    /// `[0, 1]`, tolerances that nothing can meet.
    ///
    /// # Errors
    /// `Config` naming the parameter and its range.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Ddim(step) => within("eta", step.eta, 0.0..=1.0),
            Self::Euler(step) => churn(&step.churn),
            Self::Heun(step) => churn(&step.churn),
            Self::Kdpm2(step) => within("eta", step.eta, 0.0..=1.0),
            Self::DpmMultistep(step) => within("order", step.order, 1..=3),
            Self::DpmSinglestep(step) => within("order", step.order, 1..=3),
            Self::DpmAdaptive(solver) => {
                within("order", solver.order, 2..=3)?;
                positive("atol", solver.atol)?;
                within("rtol", solver.rtol, 0.0..=f64::MAX)?;
                positive("h", solver.h)
            }
            Self::DpmPpSde(step) => within("s_noise", step.s_noise, 0.0..=f64::MAX),
            Self::Deis(step) => within("order", step.order, 1..=4),
            // The systems of its coefficients are hopeless beyond.
            Self::UniPc(step) => within("order", step.order, 1..=6),
            Self::Ipndm(step) => within("order", step.order, 1..=4),
            Self::SaSolver(step) => {
                within("predictor_order", step.predictor_order, 1..=6)?;
                within("corrector_order", step.corrector_order, 0..=6)?;
                within("tau.value", step.tau.value, 0.0..=f64::MAX)
            }
            Self::FlowHeun(step) => {
                within("s_churn", step.s_churn, 0.0..=f64::MAX)?;
                within("s_noise", step.s_noise, 0.0..=f64::MAX)
            }
            Self::Consistency(step) => {
                within("sigma_min", step.sigma_min, 0.0..=f64::MAX)?;
                within("s_noise", step.s_noise, 0.0..=f64::MAX)
            }
            Self::Tcd(step) => within("gamma", step.gamma, 0.0..=1.0),
            Self::EulerMaruyama(step) => within("lambda", step.lambda, 0.0..=1.0),
            Self::FlowOde(tolerance) => {
                positive("relative", tolerance.relative)?;
                positive("absolute", tolerance.absolute)
            }
            Self::AdaptiveSde(tolerance) => {
                positive("relative", tolerance.relative)?;
                positive("absolute", tolerance.absolute)
            }
            Self::Ddpm(_) | Self::Pndm(_) | Self::PredictorCorrector(_) | Self::FlowRk(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::SAMPLERS;

    #[test]
    fn every_named_sampler_means_something() {
        for named in SAMPLERS {
            (named.config)().check().unwrap();
        }
    }

    #[test]
    fn parameters_without_a_meaning_are_named() {
        for (text, said) in [
            (
                r#"{"name": "dpm_multistep", "order": 0}"#,
                "order: 0; expected 1 to 3",
            ),
            (r#"{"name": "dpm_singlestep", "order": 9}"#, "order: 9"),
            (r#"{"name": "deis", "order": 0}"#, "order: 0"),
            (r#"{"name": "uni_pc", "order": 40}"#, "order: 40"),
            (r#"{"name": "ipndm", "order": 9}"#, "order: 9"),
            (
                r#"{"name": "sa_solver", "predictor_order": 0}"#,
                "predictor_order: 0",
            ),
            (r#"{"name": "ddim", "eta": -1}"#, "eta: -1"),
            (r#"{"name": "tcd", "gamma": 7}"#, "gamma: 7"),
            (r#"{"name": "flow_ode", "relative": 0}"#, "relative: 0"),
            (
                r#"{"name": "edm", "churn": {"s_churn": -1}}"#,
                "s_churn: -1",
            ),
        ] {
            let error = SamplerConfig::parse(text).err().unwrap().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
