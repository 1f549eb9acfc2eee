//! Properties of the U-Net and its layers that need no stored numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{DType, Device, Tensor};
use diffusion_nn::layer::*;
use diffusion_nn::net::unet2d::{UNet2D, UNet2DConfig};
use diffusion_nn::{Error, Mode, Scope, Store};
use diffusion_ops::gradcheck::{max_abs_difference, max_relative_error, normal};
use diffusion_ops::rng::{Key, stream};

fn config(json: &str) -> UNet2DConfig {
    serde_json::from_str(json).unwrap()
}

/// One small network of each family.
fn family() -> Vec<(&'static str, UNet2DConfig, bool)> {
    vec![
        (
            "ddpm",
            config(
                r#"{"_class_name": "UNet2DModel", "block_out_channels": [8, 8, 16],
                "down_block_types": ["DownBlock2D", "UNetResAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 1, "norm_num_groups": 4, "downsample_padding": 0,
                "act_fn": "mish", "num_class_embeds": 4, "attention_head_dim": 4}"#,
            ),
            true,
        ),
        (
            "adm",
            config(
                r#"{"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
                "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
                "downsample_type": "resnet", "upsample_type": "resnet", "act_fn": "gelu",
                "resnet_time_scale_shift": "scale_shift", "class_embed_type": "timestep"}"#,
            ),
            true,
        ),
        (
            "ncsnpp",
            config(
                r#"{"block_out_channels": [32, 32], "layers_per_block": 1,
                "norm_num_groups": null, "time_embedding_type": "fourier",
                "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
                "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
                "mid_block_scale_factor": 1.414, "norm_eps": 1e-6}"#,
            ),
            false,
        ),
        (
            "learned",
            config(
                r#"{"block_out_channels": [8], "layers_per_block": 2, "norm_num_groups": 2,
                "down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"],
                "time_embedding_type": "learned", "num_train_timesteps": 9, "in_channels": 2,
                "out_channels": 5, "center_input_sample": true, "act_fn": "relu"}"#,
            ),
            false,
        ),
    ]
}

fn inputs(c: &UNet2DConfig, classes: bool) -> (Tensor, Tensor, Option<Tensor>) {
    let x = normal(1, (3, c.in_channels, 8, 12)).unwrap();
    let t = Tensor::new(&[1f64, 3.0, 7.0], &Device::Cpu).unwrap();
    let labels = classes.then(|| Tensor::new(&[0f64, 3.0, 2.0], &Device::Cpu).unwrap());
    (x, t, labels)
}

/// Moves every parameter away from special values such as a bias of 0.
fn stir(store: &Store) {
    for (k, var) in store.named().values().enumerate() {
        let noise = (normal(k as u64, var.shape().clone()).unwrap() * 0.1).unwrap();
        let noise = noise.to_dtype(var.dtype()).unwrap();
        var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
    }
}

#[test]
fn every_parameter_has_a_gradient_that_is_right() {
    for (name, c, classes) in family() {
        let store = Store::new(7, DType::F64, &Device::Cpu);
        let net = UNet2D::new(&c, &store.root()).unwrap();
        stir(&store);
        let (x, t, labels) = inputs(&c, classes);
        let w = normal(5, (3, c.out_channels, 8, 12)).unwrap();
        let loss = || {
            let y = net.forward(&x, &t, labels.as_ref(), Mode::Eval).unwrap();
            (y * &w).unwrap().sum_all().unwrap()
        };
        let grads = diffusion_ops::backward(&loss()).unwrap();
        let mut worst = 0f64;
        for (k, (param, var)) in store.named().iter().enumerate() {
            let grad = grads
                .get(var)
                .unwrap_or_else(|| panic!("{name} {param}: no gradient"));
            let size = grad
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
                .sqrt();
            assert!(size.is_finite(), "{name} {param}");
            if param.ends_with("to_k.bias") {
                // The softmax does not see a constant that is added to all scores.
                assert!(size < 1e-10, "{name} {param}: {size:e}");
                continue;
            }
            assert!(size > 1e-8, "{name} {param}: {size:e}");
            // The directional derivative along the gradient itself is its norm.
            let h = 1e-5 / size;
            let value = var.as_tensor().copy().unwrap();
            let at = |s: f64| {
                var.set(&(&value + (grad * s).unwrap()).unwrap()).unwrap();
                loss().to_scalar::<f64>().unwrap()
            };
            if k % 3 == 0 && c.act_fn != Activation::Relu {
                let numeric = (at(h) - at(-h)) / (2.0 * h * size);
                worst = worst.max((numeric - size).abs() / size.max(1e-2));
            }
            var.set(&value).unwrap();
        }
        println!(
            "{name}: {} parameters, directional error {worst:.1e}",
            store.num_parameters()
        );
        assert!(worst < 1e-6, "{name}: {worst:e}");
    }
}

fn layer_error(
    build: impl Fn(&Scope) -> Box<dyn Fn(&Tensor) -> diffusion_nn::Result<Tensor>>,
    x: Tensor,
) -> f64 {
    let store = Store::new(3, DType::F64, &Device::Cpu);
    let layer = build(&store.root());
    stir(&store);
    max_relative_error(|t| Ok(layer(&t[0]).unwrap()), &[x]).unwrap()
}

#[test]
fn input_gradients_of_layers() {
    let map = || normal(1, (2, 4, 5, 6)).unwrap();
    let temb = normal(2, (2, 3)).unwrap();
    for resample in [
        Resample::Keep,
        Resample::UpNearest,
        Resample::DownAverage,
        Resample::UpFir(Fir::default()),
        Resample::DownFir(Fir::default()),
    ] {
        for norm in [TimeEmbeddingNorm::Default, TimeEmbeddingNorm::ScaleShift] {
            let temb = temb.clone();
            let e = layer_error(
                |s| {
                    let config = ResnetBlock2DConfig {
                        groups: 2,
                        temb_channels: Some(3),
                        time_embedding_norm: norm,
                        resample: resample.clone(),
                        output_scale_factor: 1.3,
                        dropout: 0.3,
                        ..ResnetBlock2DConfig::new(4, 6)
                    };
                    let block = ResnetBlock2D::new(&s.sub("block"), config).unwrap();
                    let temb = temb.clone();
                    let mode = Mode::Train {
                        key: Key::new(1, stream::DROPOUT),
                    };
                    Box::new(move |x| block.forward(x, Some(&temb), mode))
                },
                map(),
            );
            assert!(e < 1e-6, "{resample:?} {norm:?}: {e:e}");
        }
    }
    let attention = |s: &Scope| {
        let config = AttentionConfig {
            bias: true,
            norm_num_groups: Some(2),
            residual_connection: true,
            rescale_output_factor: 1.5,
            ..AttentionConfig::new(4, 2, 3)
        };
        let layer = Attention::new(s, config).unwrap();
        Box::new(move |x: &Tensor| layer.forward(x, None, None)) as Box<_>
    };
    assert!(layer_error(attention, map()) < 1e-6);
    assert!(layer_error(attention, normal(1, (2, 7, 4)).unwrap()) < 1e-6);
    let e = layer_error(
        |s| {
            let layer = Downsample2D::new(s, 4, 3, 0).unwrap();
            Box::new(move |x| layer.forward(x))
        },
        map(),
    );
    assert!(e < 1e-6, "{e:e}");
    let e = layer_error(
        |s| {
            let layer = Upsample2D::new(s, 4, 3).unwrap();
            Box::new(move |x| layer.forward(x))
        },
        map(),
    );
    assert!(e < 1e-6, "{e:e}");
    let e = layer_error(
        |s| {
            let layer = LayerNorm::new(&s.sub("a"), 6, 1e-5).unwrap();
            let mlp = TimestepEmbedding::new(&s.sub("b"), TimestepEmbeddingConfig::new(6, 5));
            let mlp = mlp.unwrap();
            Box::new(move |x| mlp.forward(&layer.forward(x)?))
        },
        normal(1, (3, 6)).unwrap(),
    );
    assert!(e < 1e-6, "{e:e}");
    let e = layer_error(
        |s| {
            let layer = GaussianFourier::new(s, 4, 0.5, true, true).unwrap();
            Box::new(move |x| layer.forward(x))
        },
        (normal(1, 4).unwrap().abs().unwrap() + 0.5).unwrap(),
    );
    assert!(e < 1e-6, "{e:e}");
}

#[test]
fn dropout_is_reproducible_and_differs_by_step_and_layer() {
    let mut c = family().remove(0).1;
    c.dropout = 0.5;
    let store = Store::new(7, DType::F32, &Device::Cpu);
    let net = UNet2D::new(&c, &store.root()).unwrap();
    let (x, t, labels) = inputs(&c, true);
    let run = |mode| net.forward(&x, &t, labels.as_ref(), mode).unwrap();
    let key = Key::new(1, stream::DROPOUT);
    let first = run(Mode::Train { key });
    assert_eq!(
        max_abs_difference(&first, &run(Mode::Train { key })).unwrap(),
        0.0
    );
    let second = run(Mode::Train { key: key.step(1) });
    assert!(max_abs_difference(&first, &second).unwrap() > 1e-3);
    assert!(max_abs_difference(&first, &run(Mode::Eval)).unwrap() > 1e-3);
}

#[test]
fn gradient_checkpointing_changes_no_number() {
    for (name, mut c, classes) in family() {
        c.dropout = 0.2;
        let store = Store::new(7, DType::F64, &Device::Cpu);
        let mut net = UNet2D::new(&c, &store.root()).unwrap();
        stir(&store);
        let (x, t, labels) = inputs(&c, classes);
        let mode = Mode::Train {
            key: Key::new(1, stream::DROPOUT),
        };
        let mut run = |on| {
            net.set_gradient_checkpointing(on);
            let y = net.forward(&x, &t, labels.as_ref(), mode).unwrap();
            let loss = y.sqr().unwrap().sum_all().unwrap();
            let nodes = y.sorted_nodes().len();
            (y, diffusion_ops::backward(&loss).unwrap(), nodes)
        };
        let ((y, grads, nodes), (short_y, short, short_nodes)) = (run(false), run(true));
        assert!(short_nodes * 2 < nodes, "{name}: {short_nodes} of {nodes}");
        assert_eq!(max_abs_difference(&y, &short_y).unwrap(), 0.0, "{name}");
        for (param, var) in store.named() {
            let (a, b) = (grads.get(&var).unwrap(), short.get(&var).unwrap());
            let size = max_abs_difference(a, &a.zeros_like().unwrap()).unwrap();
            let error = max_abs_difference(a, b).unwrap();
            // Maps that go both down and across are summed in another order.
            assert!(
                error <= 1e-12 * size.max(1e-2),
                "{name} {param}: {error:e} of {size:e}"
            );
        }
    }
}

#[test]
fn frozen_weights_keep_no_graph_and_give_the_same_numbers() {
    for (name, c, classes) in family() {
        let store = Store::new(7, DType::F32, &Device::Cpu);
        let net = UNet2D::new(&c, &store.root()).unwrap();
        let frozen = Store::serve(&store.frozen().unwrap(), DType::F32, &Device::Cpu, |s| {
            UNet2D::new(&c, s)
        })
        .unwrap();
        let (x, t, labels) = inputs(&c, classes);
        let a = net.forward(&x, &t, labels.as_ref(), Mode::Eval).unwrap();
        let b = frozen.forward(&x, &t, labels.as_ref(), Mode::Eval).unwrap();
        assert!(a.track_op() && !b.track_op(), "{name}");
        assert_eq!(max_abs_difference(&a, &b).unwrap(), 0.0, "{name}");
    }
}

#[test]
fn bad_configurations_and_inputs_say_what_to_do() {
    let bad = |json: &str| {
        serde_json::from_str::<UNet2DConfig>(json)
            .unwrap_err()
            .to_string()
    };
    assert!(bad(r#"{"norm_groups": 4}"#).contains("norm_groups"));
    assert!(bad(r#"{"act_fn": "sine"}"#).contains("sine"));
    let build = |json: &str| {
        let store = Store::new(1, DType::F32, &Device::Cpu);
        UNet2D::new(&config(json), &store.root())
            .unwrap_err()
            .to_string()
    };
    assert!(build(r#"{"block_out_channels": [8]}"#).contains("down_block_types"));
    let small = r#""block_out_channels": [6, 6], "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"], "attention_head_dim": null"#;
    let error = build(&format!(r#"{{{small}, "norm_num_groups": 4}}"#));
    assert!(
        error.contains("norm1") && error.contains("divisor of its 6 channels"),
        "{error}"
    );
    assert!(build(&format!(r#"{{{small}, "norm_num_groups": null}}"#)).contains("null"));
    assert!(build(&format!(r#"{{{small}, "dropout": 1.0}}"#)).contains("dropout"));
    let c = config(&format!(r#"{{{small}, "norm_num_groups": 2}}"#));
    let again: UNet2DConfig = serde_json::from_str(&serde_json::to_string(&c).unwrap()).unwrap();
    assert_eq!(c, again);
    let store = Store::new(1, DType::F32, &Device::Cpu);
    let net = UNet2D::new(&c, &store.root()).unwrap();
    let t = Tensor::new(1f32, &Device::Cpu).unwrap();
    for shape in [(1, 3, 5, 4), (1, 4, 4, 4)] {
        let x = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let error = net.forward(&x, &t, None, Mode::Eval).unwrap_err();
        assert!(
            matches!(error, Error::Input { name: "sample", .. }),
            "{error}"
        );
    }
    let x = Tensor::zeros((1, 3, 4, 4), DType::F32, &Device::Cpu).unwrap();
    let error = net.forward(&x, &t, Some(&t), Mode::Eval).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Input {
                name: "class_labels",
                ..
            }
        ),
        "{error}"
    );
}
