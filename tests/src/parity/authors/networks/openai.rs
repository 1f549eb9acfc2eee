//! The U-Nets of improved-diffusion and guided-diffusion.

use super::super::super::compare::Check;
use super::super::super::fixture::Fixture;
use super::{config, gradients, serve};
use anyhow::Result;
use candle_core::Tensor;
use diffusion_nn::Mode;
use diffusion_nn::net::guided_unet::{GuidedClassifier, GuidedConfig, GuidedSuperRes, GuidedUNet};
use serde_json::Value;

/// The fixture's U-Net on its weights: `forward(x, timesteps, y)`. The configuration is
/// `config.model`, or all of `config`.
///
/// # Errors
/// When the configuration is none of a U-Net, or the weights don't fit.
pub fn openai_unet(fixture: &Fixture) -> Result<OpenAiUNet> {
    let config = unet_config(fixture)?;
    let net = serve(&fixture.tensors("weights")?, |s| {
        GuidedUNet::new(&config, s)
    })?;
    Ok(OpenAiUNet { net })
}

/// A loaded U-Net of improved-diffusion or guided-diffusion.
pub struct OpenAiUNet {
    /// The network.
    pub net: GuidedUNet,
}

impl OpenAiUNet {
    /// What the network says: `x [B, C, H, W]`, `timesteps [B]`, `y [B]` where it has classes.
    ///
    /// # Errors
    /// When the shapes don't fit.
    pub fn forward(&self, x: &Tensor, timesteps: &Tensor, y: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.net.forward(x, timesteps, y, Mode::Eval)?)
    }
}

fn unet_config(fixture: &Fixture) -> Result<GuidedConfig> {
    match fixture.config.get("model") {
        Some(Value::Object(model)) => config(model),
        _ => config(&fixture.config),
    }
}

/// `UNetModel`.
///
/// # Errors
/// Anything that goes wrong.
pub fn unet(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let (x, t) = (fixture.input("x")?, fixture.input("timesteps")?);
    let config = unet_config(fixture)?;
    let y = fixture
        .inputs
        .get("y")
        .filter(|_| config.num_classes.is_some());
    let served = openai_unet(fixture)?;
    check.stored(&fixture.outputs, "out", &served.forward(x, t, y)?)?;
    gradients(
        fixture,
        check,
        |scope| GuidedUNet::new(&config, scope),
        |net| Ok(net.forward(x, t, y, Mode::Eval)?),
    )
}

/// `SuperResModel`.
///
/// # Errors
/// Anything that goes wrong.
pub fn super_resolution(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let (x, t) = (fixture.input("x")?, fixture.input("timesteps")?);
    let low = fixture.input("low_res")?;
    let config = unet_config(fixture)?;
    let y = fixture
        .inputs
        .get("y")
        .filter(|_| config.num_classes.is_some());
    let forward = |net: &GuidedSuperRes| Ok(net.forward(x, t, low, y, Mode::Eval)?);
    let build = |scope: &_| GuidedSuperRes::new(&config, scope);
    let served = serve(&fixture.tensors("weights")?, build)?;
    check.stored(&fixture.outputs, "out", &forward(&served)?)?;
    gradients(fixture, check, build, forward)
}

/// `EncoderUNetModel`, and the gradient of `Σ log p(y|x)`.
///
/// # Errors
/// Anything that goes wrong.
pub fn classifier(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let (x, t) = (fixture.input("x")?, fixture.input("timesteps")?);
    let config = unet_config(fixture)?;
    let build = |scope: &_| GuidedClassifier::new(&config, scope);
    let forward = |net: &GuidedClassifier| Ok(net.forward(x, t, Mode::Eval)?);
    let served = serve(&fixture.tensors("weights")?, build)?;
    let out = &fixture.outputs;
    check.stored(out, "logits", &forward(&served)?)?;
    if out.contains_key("grad_log_p") {
        let grad = served.grad_log_prob(x, t, fixture.input("y")?)?;
        check.stored(out, "grad_log_p", &grad)?;
    }
    gradients(fixture, check, build, forward)
}
