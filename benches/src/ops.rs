//! Single operations, forward (`f`) and forward with backward (`fb`).

use crate::case::{Case, Reference, Spec, Work, normal};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use diffusion_nn::layer::{ResnetBlock2D, ResnetBlock2DConfig};
use diffusion_nn::{Mode, Store};
use diffusion_ops::{
    Activation, attention, conv1d, conv2d, gated_tanh, group_norm_act, layer_norm, linear, silu,
    softmax,
};
use serde_json::{Value, json};
use std::rc::Rc;

type Function = Rc<dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>>;

/// An operation: what the peer calls it with its settings, the shapes of its arguments, and ours.
struct Op {
    name: &'static str,
    config: Value,
    arguments: &'static [(&'static str, &'static [usize])],
    function: Function,
}

fn op(
    name: &'static str,
    config: Value,
    arguments: &'static [(&'static str, &'static [usize])],
    function: impl Fn(&[Tensor]) -> candle_core::Result<Tensor> + 'static,
) -> Rc<Op> {
    Rc::new(Op {
        name,
        config,
        arguments,
        function: Rc::new(function),
    })
}

/// A 3×3 convolution that keeps (stride 1) or halves (stride 2) the map.
fn conv(
    name: &'static str,
    arguments: &'static [(&'static str, &'static [usize])],
    stride: usize,
) -> Rc<Op> {
    let config = json!({ "op": "conv2d", "stride": stride, "padding": 1 });
    op(name, config, arguments, move |t| {
        conv2d(&t[0], &t[1], Some(&t[2]), stride, 1, 1)
    })
}

/// A convolution of audio with 3 taps.
fn audio(name: &'static str, dilation: usize) -> Rc<Op> {
    let config = json!({ "op": "conv1d", "dilation": dilation });
    let arguments: &[(&str, &[usize])] = &[
        ("x", &[4, 64, 16_000]),
        ("weight", &[128, 64, 3]),
        ("bias", &[128]),
    ];
    op(name, config, arguments, move |t| {
        conv1d(&t[0], &t[1], Some(&t[2]), 1, (dilation, dilation), dilation)
    })
}

/// The operations that are timed forward and with backward.
fn both() -> Vec<Rc<Op>> {
    vec![
        conv(
            "conv2d-3x3-16x32x28x28-64",
            &[
                ("x", &[16, 32, 28, 28]),
                ("weight", &[64, 32, 3, 3]),
                ("bias", &[64]),
            ],
            1,
        ),
        conv(
            "conv2d-3x3-16x64x32x32-64",
            &[
                ("x", &[16, 64, 32, 32]),
                ("weight", &[64, 64, 3, 3]),
                ("bias", &[64]),
            ],
            1,
        ),
        conv(
            "conv2d-3x3-8x128x16x16-128",
            &[
                ("x", &[8, 128, 16, 16]),
                ("weight", &[128, 128, 3, 3]),
                ("bias", &[128]),
            ],
            1,
        ),
        conv(
            "conv2d-3x3-stride2-8x128x16x16-128",
            &[
                ("x", &[8, 128, 16, 16]),
                ("weight", &[128, 128, 3, 3]),
                ("bias", &[128]),
            ],
            2,
        ),
        audio("conv1d-3-4x64x16000-128-dilation1", 1),
        audio("conv1d-3-4x64x16000-128-dilation512", 512),
        op(
            "group-norm-silu-32-16x64x32x32",
            json!({ "op": "group_norm_silu", "groups": 32, "eps": 1e-5 }),
            &[("x", &[16, 64, 32, 32]), ("weight", &[64]), ("bias", &[64])],
            |t| group_norm_act(&t[0], &t[1], &t[2], 32, 1e-5, Some(Activation::Silu)),
        ),
        op(
            "layer-norm-4096x256",
            json!({ "op": "layer_norm", "eps": 1e-5 }),
            &[("x", &[4096, 256]), ("weight", &[256]), ("bias", &[256])],
            |t| layer_norm(&t[0], &t[1], &t[2], 1e-5),
        ),
        op(
            "softmax-4096x256",
            json!({ "op": "softmax" }),
            &[("x", &[4096, 256])],
            |t| softmax(&t[0], 1),
        ),
        op(
            "attention-8x4x256x32",
            json!({ "op": "attention" }),
            &[
                ("q", &[8, 4, 256, 32]),
                ("k", &[8, 4, 256, 32]),
                ("v", &[8, 4, 256, 32]),
            ],
            |t| attention(&t[0], &t[1], &t[2], None, None),
        ),
        op(
            "linear-4096x256-1024",
            json!({ "op": "linear" }),
            &[
                ("x", &[4096, 256]),
                ("weight", &[1024, 256]),
                ("bias", &[1024]),
            ],
            |t| linear(&t[0], &t[1], Some(&t[2])),
        ),
        op(
            "silu-4x1024x1024",
            json!({ "op": "silu" }),
            &[("x", &[4, 1024, 1024])],
            |t| silu(&t[0]),
        ),
        op(
            "gated-tanh-4x128x16000",
            json!({ "op": "gated_tanh" }),
            &[("x", &[4, 128, 16_000])],
            |t| gated_tanh(&t[0], 1),
        ),
    ]
}

/// The operations that are timed forward alone.
fn forward() -> Vec<Rc<Op>> {
    vec![
        op(
            "matmul-1024x1024x1024",
            json!({ "op": "matmul" }),
            &[("a", &[1024, 1024]), ("b", &[1024, 1024])],
            |t| t[0].matmul(&t[1]),
        ),
        op(
            "matmul-64x576x16384",
            json!({ "op": "matmul" }),
            &[("a", &[64, 576]), ("b", &[576, 16_384])],
            |t| t[0].matmul(&t[1]),
        ),
        op(
            "exp-4x1024x1024",
            json!({ "op": "exp" }),
            &[("x", &[4, 1024, 1024])],
            |t| t[0].exp(),
        ),
    ]
}

pub(crate) fn specs() -> Vec<Spec> {
    let single = |op: &Rc<Op>, backward: bool| {
        let (name, op) = (op.name, op.clone());
        let work = if backward { "fb" } else { "f" };
        Spec::new(format!("ops/{name}/{work}"), Work::Op, move || {
            Ok(Box::new(Single::new(&op, backward)?))
        })
    };
    let mut specs: Vec<Spec> = forward().iter().map(|op| single(op, false)).collect();
    for op in both() {
        specs.push(single(&op, false));
        specs.push(single(&op, true));
    }
    for (batch, work) in [(16, "f"), (16, "fb"), (1, "f")] {
        let name = format!("ops/resnet-block-{batch}x64x32x32/{work}");
        specs.push(Spec::new(name, Work::Op, move || {
            let backward = work == "fb";
            Ok(Box::new(Single::of(
                resnet_block(batch, backward)?,
                backward,
            )?))
        }));
    }
    specs
}

/// An operation on its arguments.
struct Single {
    config: Value,
    names: Vec<String>,
    arguments: Vec<Tensor>,
    /// What the arguments are views of while gradients are wanted.
    variables: Vec<Var>,
    function: Function,
}

/// A function with the values of its arguments.
struct Bound {
    config: Value,
    arguments: Vec<(String, Tensor)>,
    function: Function,
}

impl Single {
    fn new(op: &Op, backward: bool) -> Result<Self> {
        let arguments = op
            .arguments
            .iter()
            .enumerate()
            .map(|(i, (name, shape))| {
                let x = normal(i as u64, shape)?;
                // Weights of a usual size keep the results near 1.
                let fan_in: usize = shape.iter().skip(1).product();
                let scale = if *name == "weight" && shape.len() > 1 {
                    (fan_in as f64).powf(-0.5)
                } else {
                    1.0
                };
                Ok((name.to_string(), (x * scale)?))
            })
            .collect::<Result<_>>()?;
        let bound = Bound {
            config: op.config.clone(),
            arguments,
            function: op.function.clone(),
        };
        Self::of(bound, backward)
    }

    fn of(bound: Bound, backward: bool) -> Result<Self> {
        let (names, mut arguments): (Vec<_>, Vec<_>) = bound.arguments.into_iter().unzip();
        let mut variables = Vec::new();
        if backward {
            variables = arguments
                .iter()
                .map(Var::from_tensor)
                .collect::<candle_core::Result<_>>()?;
            arguments = variables.iter().map(|v| v.as_tensor().clone()).collect();
        }
        Ok(Self {
            config: bound.config,
            names,
            arguments,
            variables,
            function: bound.function,
        })
    }
}

impl Case for Single {
    /// The backward pass begins from ones, as candle's do on a result of many elements.
    fn call(&mut self) -> Result<()> {
        let y = (self.function)(&self.arguments)?;
        if !self.variables.is_empty() {
            std::hint::black_box(diffusion_ops::backward(&y)?);
        }
        std::hint::black_box(y);
        Ok(())
    }

    /// The gradients compared are those of the result summed against random weights: against ones
    /// those of norms and softmax would be zero.
    fn reference(&self) -> Result<Reference> {
        let mut config = self.config.clone();
        config["work"] = json!(if self.variables.is_empty() { "f" } else { "fb" });
        let mut reference = Reference::new(config);
        for (name, tensor) in self.names.iter().zip(&self.arguments) {
            reference.put("inputs", name, tensor)?;
        }
        let y = (self.function)(&self.arguments)?;
        reference.put("outputs", "y", &y)?;
        if self.variables.is_empty() {
            return Ok(reference);
        }
        let seed = normal(77, y.dims())?;
        reference.put("seed", "y", &seed)?;
        let grads = diffusion_ops::backward(&(y * seed)?.sum_all()?)?;
        for (name, var) in self.names.iter().zip(&self.variables) {
            let grad = grads
                .get(var)
                .with_context(|| format!("`{name}` has no gradient"))?;
            reference.put("gradients", name, grad)?;
        }
        Ok(reference)
    }
}

/// A residual block of 64 channels with a time embedding; its parameters are arguments, too.
fn resnet_block(batch: usize, backward: bool) -> Result<Bound> {
    let store = Store::new(1, DType::F32, &Device::Cpu);
    let config = ResnetBlock2DConfig {
        temb_channels: Some(256),
        ..ResnetBlock2DConfig::new(64, 64)
    };
    let mut block = ResnetBlock2D::new(&store.root(), config.clone())?;
    let mut arguments = vec![
        ("x".to_owned(), normal(1, &[batch, 64, 32, 32])?),
        ("temb".to_owned(), normal(2, &[batch, 256])?),
    ];
    let weights = store.frozen()?;
    if backward {
        let variables = store.named().into_iter();
        arguments.extend(variables.map(|(name, var)| (name, var.as_tensor().clone())));
    } else {
        block = Store::serve(&weights, DType::F32, &Device::Cpu, |scope| {
            ResnetBlock2D::new(scope, config)
        })?;
        arguments.extend(weights);
    }
    Ok(Bound {
        config: json!({ "op": "resnet_block" }),
        arguments,
        function: Rc::new(move |t| {
            block
                .forward(&t[0], Some(&t[1]), Mode::Eval)
                .map_err(candle_core::Error::wrap)
        }),
    })
}
