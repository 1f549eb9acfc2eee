//! Networks and their parts, with gradients where they are stored.

use super::compare::Check;
use super::fixture::{Fixture, Tensors, values};
use super::unsupported;
use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use diffusion_nn::layer::{
    Activation, Attention, AttentionConfig, GaussianFourier, ResnetBlock2D, ResnetBlock2DConfig,
    TimeEmbeddingNorm, TimestepEmbedding, TimestepEmbeddingConfig,
};
use diffusion_nn::net::unet2d::{UNet2D, UNet2DConfig, translate_deprecated};
use diffusion_nn::{Mode, Scope, Store, Strictness};
use serde_json::{Map, Value};

/// What may stand in `call` of a network.
const KNOWN: &[&str] = &[
    "runner",
    "class",
    "seed",
    "weights_style",
    "grad_tolerance_rel_to_max",
];

/// Gradients that are zero but for rounding are compared within this.
const ZERO_GRADIENT: f64 = 1e-6;

/// A whole `UNet2DModel`.
///
/// # Errors
/// `Unsupported` for other classes, runners and arguments, and anything that goes wrong.
pub fn unet(fixture: &Fixture, check: &mut Check) -> Result<()> {
    if (fixture.text("class"), fixture.text("runner")) != ("UNet2DModel", "forward") {
        return Err(unsupported(format!("the class {}", fixture.text("class"))));
    }
    refuse_unknown(fixture, KNOWN)?;
    let config: UNet2DConfig = serde_json::from_value(Value::Object(fixture.config.clone()))
        .context("config is not one of a UNet2DModel")?;
    let weights = match fixture.text("weights_style") {
        "" => fixture.tensors("weights")?,
        "deprecated_attention" => translate_deprecated(&fixture.tensors("weights")?)?,
        other => return Err(unsupported(format!("the weights' style {other}"))),
    };
    let sample = fixture.input("sample")?;
    let timestep = fixture.input("timestep")?.to_dtype(DType::F32)?;
    let labels = fixture.inputs.get("class_labels");
    let forward = |net: &UNet2D| net.forward(sample, &timestep, labels, Mode::Eval);

    let build = |scope: &Scope| UNet2D::new(&config, scope);
    let served = Store::serve(&weights, DType::F32, &Device::Cpu, build)?;
    check.stored(&fixture.outputs, "sample", &forward(&served)?)?;
    let grads = fixture.tensors("grads")?;
    if grads.is_empty() {
        return Ok(());
    }

    let store = Store::new(0, DType::F32, &Device::Cpu);
    let net = build(&store.root())?;
    store.load(&weights, Strictness::Exact)?;
    let loss = (forward(&net)? - fixture.input("target")?)?
        .sqr()?
        .mean_all()?;
    check.stored(&fixture.outputs, "loss", &loss)?;
    let ours = loss.backward()?;
    let relative = fixture.number("grad_tolerance_rel_to_max")?;
    let relative = relative.context("call.grad_tolerance_rel_to_max is missing")?;
    let params = store.named();
    if let Some(name) = grads.keys().find(|name| !params.contains_key(*name)) {
        check.failures.push(format!(
            "a gradient is stored for `{name}`, which is no parameter"
        ));
    }
    for (name, var) in &params {
        let stored = grads
            .get(name)
            .with_context(|| format!("no stored gradient of `{name}`"))?;
        let Some(ours) = ours.get(var.as_tensor()) else {
            check.failures.push(format!("no gradient of `{name}`"));
            continue;
        };
        let stored = values(stored)?;
        let largest = stored.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        // A softmax does not see what is added to all keys alike.
        let zero = largest < ZERO_GRADIENT || name.ends_with("to_k.bias");
        let bound = if zero {
            ZERO_GRADIENT
        } else {
            relative * largest
        };
        check.within(&format!("grad {name}"), &values(ours)?, &stored, |_| bound);
    }
    Ok(())
}

/// A part of a network.
///
/// # Errors
/// As [`unet`].
pub fn part(fixture: &Fixture, check: &mut Check) -> Result<()> {
    refuse_unknown(fixture, &["runner", "class", "seed", "args"])?;
    let weights = fixture.tensors("weights")?;
    let config = Config {
        map: &fixture.config,
    };
    let run: fn(&Fixture, &Config<'_>, &Tensors) -> Result<Tensor> = match fixture.text("class") {
        "TimestepEmbedding" => timestep_embedding,
        "GaussianFourierProjection" => gaussian_fourier,
        "Attention" => attention,
        "ResnetBlock2D" => resnet_block,
        other => return Err(unsupported(format!("the class {other}"))),
    };
    let ours = run(fixture, &config, &weights)?;
    check.stored(&fixture.outputs, "out", &ours)
}

fn serve<T>(weights: &Tensors, build: impl FnOnce(&Scope) -> diffusion_nn::Result<T>) -> Result<T> {
    Ok(Store::serve(weights, DType::F32, &Device::Cpu, build)?)
}

fn timestep_embedding(f: &Fixture, config: &Config<'_>, weights: &Tensors) -> Result<Tensor> {
    config.known(&["in_channels", "time_embed_dim", "act_fn", "out_dim"])?;
    let mut sizes =
        TimestepEmbeddingConfig::new(config.need("in_channels")?, config.need("time_embed_dim")?);
    sizes.act_fn = config.activation("act_fn")?;
    sizes.out_dim = config.size("out_dim")?;
    let layer = serve(weights, |scope| TimestepEmbedding::new(scope, sizes))?;
    Ok(layer.forward(f.input("sample")?)?)
}

fn gaussian_fourier(f: &Fixture, config: &Config<'_>, weights: &Tensors) -> Result<Tensor> {
    config.known(&[
        "embedding_size",
        "scale",
        "set_W_to_weight",
        "log",
        "flip_sin_to_cos",
    ])?;
    let (size, scale) = (config.need("embedding_size")?, config.number("scale", 1.0)?);
    let (log, flip) = (
        config.flag("log", true),
        config.flag("flip_sin_to_cos", false),
    );
    let layer = serve(weights, |scope| {
        GaussianFourier::new(scope, size, scale, log, flip)
    })?;
    Ok(layer.forward(f.input("x")?)?)
}

fn attention(f: &Fixture, config: &Config<'_>, weights: &Tensors) -> Result<Tensor> {
    config.known(&[
        "query_dim",
        "cross_attention_dim",
        "heads",
        "dim_head",
        "bias",
        "norm_num_groups",
        "eps",
        "residual_connection",
        "rescale_output_factor",
    ])?;
    let heads = config.size("heads")?.unwrap_or(8);
    let dim_head = config.size("dim_head")?.unwrap_or(64);
    let mut sizes = AttentionConfig::new(config.need("query_dim")?, heads, dim_head);
    sizes.cross_attention_dim = config.size("cross_attention_dim")?;
    sizes.bias = config.flag("bias", false);
    sizes.norm_num_groups = config.size("norm_num_groups")?;
    sizes.eps = config.number("eps", 1e-5)?;
    sizes.residual_connection = config.flag("residual_connection", false);
    sizes.rescale_output_factor = config.number("rescale_output_factor", 1.0)?;
    if f.inputs.contains_key("attention_mask") {
        return Err(unsupported("an attention mask"));
    }
    let layer = serve(weights, |scope| Attention::new(scope, sizes))?;
    let context = f.inputs.get("encoder_hidden_states");
    Ok(layer.forward(f.input("hidden_states")?, context, None)?)
}

fn resnet_block(f: &Fixture, config: &Config<'_>, weights: &Tensors) -> Result<Tensor> {
    config.known(&[
        "in_channels",
        "out_channels",
        "temb_channels",
        "groups",
        "groups_out",
        "eps",
        "time_embedding_norm",
        "output_scale_factor",
        "non_linearity",
        "dropout",
        "skip_time_act",
        "use_in_shortcut",
    ])?;
    let from = config.need("in_channels")?;
    let mut sizes = ResnetBlock2DConfig::new(from, config.size("out_channels")?.unwrap_or(from));
    if config.map.contains_key("temb_channels") {
        sizes.temb_channels = config.size("temb_channels")?;
    }
    sizes.groups = config.size("groups")?.unwrap_or(sizes.groups);
    sizes.groups_out = config.size("groups_out")?;
    sizes.eps = config.number("eps", sizes.eps)?;
    sizes.output_scale_factor = config.number("output_scale_factor", 1.0)?;
    sizes.dropout = config.number("dropout", 0.0)?;
    sizes.skip_time_act = config.flag("skip_time_act", false);
    sizes.use_in_shortcut = config.map.get("use_in_shortcut").and_then(Value::as_bool);
    sizes.non_linearity = config.activation("non_linearity")?;
    sizes.time_embedding_norm = match config
        .map
        .get("time_embedding_norm")
        .and_then(Value::as_str)
    {
        None | Some("default") => TimeEmbeddingNorm::Default,
        Some("scale_shift") => TimeEmbeddingNorm::ScaleShift,
        Some(other) => return Err(unsupported(format!("time_embedding_norm {other}"))),
    };
    let layer = serve(weights, |scope| ResnetBlock2D::new(scope, sizes))?;
    Ok(layer.forward(f.input("input_tensor")?, f.inputs.get("temb"), Mode::Eval)?)
}

/// The arguments of a part's constructor.
struct Config<'a> {
    map: &'a Map<String, Value>,
}

impl Config<'_> {
    fn known(&self, known: &[&str]) -> Result<()> {
        match self
            .map
            .keys()
            .find(|k| !k.starts_with('_') && !known.contains(&k.as_str()))
        {
            Some(other) => Err(unsupported(format!("config.{other}"))),
            None => Ok(()),
        }
    }

    fn size(&self, name: &str) -> Result<Option<usize>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(size) => Ok(Some(size as usize)),
                None => Err(anyhow!("config.{name}: {value}; expected a size")),
            },
        }
    }

    fn need(&self, name: &str) -> Result<usize> {
        self.size(name)?
            .with_context(|| format!("config.{name} is missing"))
    }

    fn number(&self, name: &str, default: f64) -> Result<f64> {
        let number = super::fixture::number(self.map.get(name), name)?;
        Ok(number.unwrap_or(default))
    }

    fn flag(&self, name: &str, default: bool) -> bool {
        self.map
            .get(name)
            .and_then(Value::as_bool)
            .unwrap_or(default)
    }

    fn activation(&self, name: &str) -> Result<Activation> {
        match self.map.get(name) {
            None => Ok(Activation::Silu),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| unsupported(format!("the activation {value}"))),
        }
    }
}

fn refuse_unknown(fixture: &Fixture, known: &[&str]) -> Result<()> {
    match fixture.unknown_in_call(known).first() {
        Some(other) => Err(unsupported(format!("call.{other}"))),
        None => Ok(()),
    }
}
