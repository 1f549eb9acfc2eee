//! The score SDE code: networks, resampling, and the average of the weights.

use super::super::super::compare::Check;
use super::super::super::fixture::Fixture;
use super::super::super::training::averages;
use super::{config, gradients, serve};
use anyhow::{Context, Result};
use diffusion_core::train::EmaRule;
use diffusion_nn::Mode;
use diffusion_nn::layer::{Fir, upfirdn2d};
use diffusion_nn::net::ncsnpp::{ScoreConfig, ScoreUNet};

/// `NCSNpp` and `DDPM`.
///
/// # Errors
/// Anything that goes wrong.
pub fn network(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let config: ScoreConfig = config(&fixture.config)?;
    let (x, time) = (fixture.input("x")?, fixture.input("time_cond")?);
    let forward = |net: &ScoreUNet| Ok(net.forward(x, time, Mode::Eval)?);
    let build = |scope: &_| ScoreUNet::new(&config, scope);
    let served = serve(&fixture.tensors("weights")?, build)?;
    check.stored(&fixture.outputs, "out", &forward(&served)?)?;
    gradients(fixture, check, build, forward)
}

/// `upfirdn2d` and what is built on it.
///
/// # Errors
/// Anything that goes wrong.
pub fn fir_resampling(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let taps = fixture.config.get("fir_kernel");
    let taps: Vec<f64> = serde_json::from_value(taps.context("no fir_kernel")?.clone())?;
    let cases = fixture.config.get("upfirdn_cases");
    let cases: Vec<(usize, usize, (isize, isize))> =
        serde_json::from_value(cases.context("no upfirdn_cases")?.clone())?;
    let fir = Fir::new(&taps)?;
    let even = Fir::box_of(2);
    let (x, weight) = (fixture.input("x")?, fixture.input("conv_weight")?);
    let out = &fixture.outputs;
    for (name, ours) in [
        ("up", fir.upsample(x, 2, 1.0)?),
        ("down", fir.downsample(x, 2, 1.0)?),
        ("down_gain2", fir.downsample(x, 2, 2.0)?),
        ("conv_down", fir.conv_downsample(x, weight, None, 2, 1.0)?),
        ("naive_up", even.upsample(x, 2, 1.0)?),
        ("naive_down", even.downsample(x, 2, 1.0)?),
        ("up_default", even.upsample(x, 2, 1.0)?),
        ("down_default", even.downsample(x, 2, 1.0)?),
    ] {
        check.stored(out, name, &ours)?;
    }
    let kernel = fixture.input("kernel")?;
    for (i, (up, down, pad)) in cases.into_iter().enumerate() {
        let ours = upfirdn2d(x, kernel, up, down, pad)?;
        check.stored(out, &format!("upfirdn_{i}"), &ours)?;
    }
    Ok(())
}

/// `ExponentialMovingAverage`.
///
/// # Errors
/// Anything that goes wrong.
pub fn ema(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let decay = fixture.config.get("decay").and_then(|v| v.as_f64());
    let counted = fixture.config.get("use_num_updates");
    let rule = EmaRule::Constant {
        decay: decay.context("config.decay is missing")?,
        use_num_updates: counted.and_then(|v| v.as_bool()).unwrap_or(true),
    };
    let ours = averages(rule, fixture.input("params")?)?;
    check.stored(&fixture.outputs, "shadow", &ours)
}
