//! Properties of the networks of the original authors that need no stored numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{DType, Device, Tensor};
use diffusion_nn::net::guided_unet::{GuidedClassifier, GuidedConfig, GuidedSuperRes, GuidedUNet};
use diffusion_nn::net::ncsnpp::{ScoreConfig, ScoreUNet};
use diffusion_nn::net::song_unet::{DhariwalConfig, DhariwalUNet, SongConfig, SongUNet};
use diffusion_nn::{Mode, Result, Scope, Store, Strictness};
use diffusion_ops::gradcheck::{max_abs_difference, normal};
use diffusion_ops::rng::{Key, stream};
use serde_json::{Value, json};

/// A network as a function of its maps alone; everything else is fixed.
type Run = Box<dyn Fn(&Tensor, Mode) -> Result<Tensor>>;
/// A network and the parameters that its output does not depend on.
type Family = (&'static str, Box<dyn Fn(&Scope) -> Result<Run>>, usize);

fn vector(values: &[f64]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// `base` with some fields replaced.
fn with(mut base: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

fn guided(changes: Value) -> Value {
    let base = json!({"image_size": 8, "in_channels": 3, "model_channels": 64, "out_channels": 6,
        "num_res_blocks": 1, "attention_resolutions": [2], "channel_mult": [1, 1]});
    with(base, changes)
}

fn song(changes: Value) -> Value {
    let base = json!({"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8,
        "channel_mult": [1, 2], "channel_mult_emb": 2, "num_blocks": 1, "attn_resolutions": [4]});
    with(base, changes)
}

fn score(changes: Value) -> Value {
    let model = json!({"name": "ncsnpp", "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1,
        "attn_resolutions": [4]});
    json!({"model": with(model, changes), "data": {"image_size": 8, "num_channels": 3}})
}

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn unet(name: &'static str, changes: Value, classes: bool) -> Family {
    let config: GuidedConfig = parse(guided(changes));
    let build = move |scope: &Scope| {
        let net = GuidedUNet::new(&config, scope)?;
        let y = classes.then(|| vector(&[1.0, 0.0]));
        let run = move |x: &Tensor, mode| net.forward(x, &vector(&[3.5, 800.0]), y.as_ref(), mode);
        Ok(Box::new(run) as Run)
    };
    (name, Box::new(build), 3)
}

fn classifier(name: &'static str, changes: Value) -> Family {
    let config: GuidedConfig = parse(guided(changes));
    let build = move |scope: &Scope| {
        let net = GuidedClassifier::new(&config, scope)?;
        let run = move |x: &Tensor, mode| net.forward(x, &vector(&[3.5, 800.0]), mode);
        Ok(Box::new(run) as Run)
    };
    (name, Box::new(build), 3)
}

fn song_unet(name: &'static str, changes: Value, labels: bool) -> Family {
    let config: SongConfig = parse(song(changes));
    let build = move |scope: &Scope| {
        let net = SongUNet::new(&config, scope)?;
        let label = labels.then(|| normal(4, (2, 4)).unwrap());
        let run = move |x: &Tensor, mode| {
            let label = label.as_ref();
            net.forward(x, &vector(&[0.3, -1.0]), label, label, mode)
        };
        Ok(Box::new(run) as Run)
    };
    (name, Box::new(build), 3)
}

fn score_unet(name: &'static str, changes: Value) -> Family {
    let config: ScoreConfig = parse(score(changes));
    let build = move |scope: &Scope| {
        let net = ScoreUNet::new(&config, scope)?;
        let run = move |x: &Tensor, mode| net.forward(x, &vector(&[0.7, 9.0]), mode);
        Ok(Box::new(run) as Run)
    };
    (name, Box::new(build), 3)
}

/// One small network of each family and of each branch in it.
fn families() -> Vec<Family> {
    let song_labels = json!({"label_dim": 4, "augment_dim": 4});
    let dhariwal: DhariwalConfig = parse(song(with(
        song_labels.clone(),
        json!({"channels_per_head": 8, "attn_resolutions": [8, 4]}),
    )));
    let super_resolution: GuidedConfig = parse(guided(json!({"num_heads": 2})));
    vec![
        unet(
            "guided",
            json!({"num_classes": 5, "num_head_channels": 8, "use_scale_shift_norm": true,
                "resblock_updown": true, "use_new_attention_order": true}),
            true,
        ),
        unet(
            "improved",
            json!({"num_heads": 2, "num_heads_upsample": 4, "channel_mult": [1.5, 2],
                "model_channels": 64, "attention_resolutions": [1]}),
            false,
        ),
        unet(
            "pools",
            json!({"conv_resample": false, "use_checkpoint": true}),
            false,
        ),
        (
            "super resolution",
            Box::new(move |scope: &Scope| {
                let net = GuidedSuperRes::new(&super_resolution, scope)?;
                let low = normal(7, (2, 3, 3, 5)).unwrap();
                let run = move |x: &Tensor, mode| net.forward(x, &vector(&[2.0]), &low, None, mode);
                Ok(Box::new(run) as Run)
            }),
            3,
        ),
        classifier("adaptive", json!({"pool": "adaptive"})),
        classifier(
            "attention",
            json!({"pool": "attention", "num_head_channels": 16}),
        ),
        classifier("spatial", json!({"pool": "spatial"})),
        classifier("spatial_v2", json!({"pool": "spatial_v2"})),
        song_unet("ddpm++", song_labels.clone(), true),
        song_unet(
            "ncsn++",
            json!({"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
                "resample_filter": [1, 3, 3, 1]}),
            false,
        ),
        song_unet(
            "skips",
            json!({"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [2, 1],
                "num_blocks": 2, "resample_filter": [1, 2, 5, 1]}),
            false,
        ),
        (
            "adm",
            Box::new(move |scope: &Scope| {
                let net = DhariwalUNet::new(&dhariwal, scope)?;
                let label = normal(4, (2, 4)).unwrap();
                let run = move |x: &Tensor, mode| {
                    net.forward(x, &vector(&[0.3, -1.0]), Some(&label), Some(&label), mode)
                };
                Ok(Box::new(run) as Run)
            }),
            3,
        ),
        score_unet(
            "score ddpm",
            json!({"name": "ddpm", "nf": 64, "scale_by_sigma": true}),
        ),
        score_unet(
            "score biggan",
            json!({"progressive": "output_skip", "progressive_input": "input_skip",
                "progressive_combine": "cat", "fir": true, "skip_rescale": true}),
        ),
        score_unet(
            "score residual",
            json!({"progressive": "residual", "progressive_input": "residual", "fir": true,
                "fir_kernel": [1, 2, 4, 2, 1], "embedding_type": "fourier",
                "scale_by_sigma": true}),
        ),
        score_unet(
            "score layers",
            json!({"resblock_type": "ddpm", "progressive": "residual",
                "progressive_input": "residual"}),
        ),
        score_unet(
            "score filtered layers",
            json!({"resblock_type": "ddpm", "fir": true, "progressive_input": "input_skip"}),
        ),
        score_unet(
            "score unconditional",
            json!({"conditional": false, "nonlinearity": "elu"}),
        ),
        score_unet("score leaky", json!({"nonlinearity": "lrelu"})),
    ]
}

/// Moves every parameter away from special values such as a weight of 0.
fn stir(store: &Store) {
    for (k, var) in store.named().values().enumerate() {
        let size = (var.elem_count() / var.dim(0).unwrap().max(1)).max(4) as f64;
        let noise = normal(k as u64, var.shape().clone()).unwrap();
        let noise = (noise / size.sqrt()).unwrap();
        var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
    }
}

/// Whether the output does not depend on a parameter at all: what is added to all keys of a
/// softmax alike, and the maps of a time that is not told.
fn idle(family: &str, name: &str) -> bool {
    (family == "score unconditional" && name.contains("Dense_0")) || name.ends_with("NIN_1.b")
}

/// Every parameter of the families of these names has a gradient, and the derivative along all of
/// them is right.
fn every_parameter_has_a_gradient(named: impl Fn(&str) -> bool) {
    for (family, build, channels) in families() {
        if !named(family) {
            continue;
        }
        let store = Store::new(7, DType::F64, &Device::Cpu);
        let run = build(&store.root()).unwrap_or_else(|e| panic!("{family}: {e}"));
        stir(&store);
        let x = normal(1, (2, channels, 8, 8)).unwrap();
        let key = Key::new(1, stream::DROPOUT);
        let y = run(&x, Mode::Train { key }).unwrap_or_else(|e| panic!("{family}: {e}"));
        let w = normal(5, y.shape().clone()).unwrap();
        let loss = || {
            let y = run(&x, Mode::Train { key }).unwrap();
            (y * &w).unwrap().sum_all().unwrap()
        };
        let grads = diffusion_ops::backward(&loss()).unwrap();
        let mut square = 0.0;
        let mut missing = Vec::new();
        let mut moves = Vec::new();
        for (name, var) in store.named() {
            let grad = grads.get(&var);
            let size = grad.map_or(0.0, |g| {
                let sum = g.sqr().unwrap().sum_all().unwrap();
                sum.to_scalar::<f64>().unwrap()
            });
            assert!(size.is_finite(), "{family} {name}");
            if idle(family, &name) {
                assert!(size < 1e-16, "{family} {name}: {size:e}");
                continue;
            }
            if size < 1e-16 {
                missing.push(name);
                continue;
            }
            square += size;
            moves.push((var.clone(), var.copy().unwrap(), grad.unwrap().clone()));
        }
        assert!(missing.is_empty(), "{family}: no gradient of {missing:?}");
        if family == "score leaky" {
            // Finite differences step over the kinks.
            continue;
        }
        // The directional derivative along the whole gradient is its norm.
        let norm = f64::sqrt(square);
        let at = |s: f64| {
            for (var, value, grad) in &moves {
                var.set(&(value + (grad * s).unwrap()).unwrap()).unwrap();
            }
            loss().to_scalar::<f64>().unwrap()
        };
        let h = 1e-6 / norm;
        let numeric = (at(h) - at(-h)) / (2.0 * h * norm);
        assert!(
            (numeric / norm - 1.0).abs() < 1e-5,
            "{family}: {numeric} {norm}"
        );
    }
}

const CLASSIFIERS: [&str; 4] = ["adaptive", "attention", "spatial", "spatial_v2"];
const EDM: [&str; 4] = ["ddpm++", "ncsn++", "skips", "adm"];

#[test]
fn every_parameter_of_a_guided_network_has_a_gradient() {
    every_parameter_has_a_gradient(|name| {
        !CLASSIFIERS.contains(&name) && !EDM.contains(&name) && !name.starts_with("score")
    });
}

#[test]
fn every_parameter_of_a_classifier_has_a_gradient() {
    every_parameter_has_a_gradient(|name| CLASSIFIERS.contains(&name));
}

#[test]
fn every_parameter_of_a_network_of_edm_has_a_gradient() {
    every_parameter_has_a_gradient(|name| EDM.contains(&name));
}

#[test]
fn every_parameter_of_a_score_network_has_a_gradient() {
    every_parameter_has_a_gradient(|name| name.starts_with("score"));
}

#[test]
fn weights_are_saved_and_loaded_under_their_names() {
    for (family, build, channels) in families() {
        let x = normal(1, (2, channels, 8, 8))
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        let store = Store::new(7, DType::F32, &Device::Cpu);
        let run = build(&store.root()).unwrap();
        let saved = store.frozen().unwrap();
        let served = Store::serve(&saved, DType::F32, &Device::Cpu, &build).unwrap();
        let (a, b) = (
            run(&x, Mode::Eval).unwrap(),
            served(&x, Mode::Eval).unwrap(),
        );
        assert_eq!(max_abs_difference(&a, &b).unwrap(), 0.0, "{family}");
        let other = Store::new(8, DType::F32, &Device::Cpu);
        let run = build(&other.root()).unwrap();
        other.load(&saved, Strictness::Exact).unwrap();
        let c = run(&x, Mode::Eval).unwrap();
        assert_eq!(max_abs_difference(&a, &c).unwrap(), 0.0, "{family}");
    }
}

#[test]
fn maps_need_not_be_square_and_sizes_that_do_not_fit_are_refused() {
    for (family, build, channels) in families() {
        let store = Store::new(7, DType::F32, &Device::Cpu);
        let run = build(&store.root()).unwrap();
        let map = |h, w| {
            normal(1, (2, channels, h, w))
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap()
        };
        let logits = CLASSIFIERS.contains(&family);
        match run(&map(4, 6), Mode::Eval) {
            Ok(y) if logits => assert_eq!(y.dims(), [2, 6]),
            Ok(y) => assert_eq!(&y.dims()[2..], [4, 6], "{family}"),
            Err(error) => {
                assert_eq!(family, "attention", "{error}");
                assert!(error.to_string().contains("image_size"), "{error}");
            }
        }
        if !logits {
            let said = run(&map(8, 7), Mode::Eval).unwrap_err().to_string();
            assert!(said.contains("multiples of 2"), "{family}: {said}");
        }
        let wrong = normal(1, (2, channels + 1, 8, 8)).unwrap();
        let said = run(&wrong, Mode::Eval).unwrap_err().to_string();
        assert!(said.contains("[B, 3, H, W]"), "{family}: {said}");
    }
}

#[test]
fn dropout_and_dropped_labels_depend_on_the_key_alone() {
    let changes = json!({"dropout": 0.3, "label_dim": 4, "augment_dim": 4, "label_dropout": 0.5});
    let (_, build, channels) = song_unet("labels", changes, true);
    let store = Store::new(7, DType::F64, &Device::Cpu);
    let run = build(&store.root()).unwrap();
    stir(&store);
    let x = normal(1, (2, channels, 8, 8)).unwrap();
    let at = |step| {
        let key = Key::new(1, stream::DROPOUT).step(step);
        run(&x, Mode::Train { key }).unwrap()
    };
    assert_eq!(max_abs_difference(&at(3), &at(3)).unwrap(), 0.0);
    assert!(max_abs_difference(&at(3), &at(4)).unwrap() > 1e-3);
    assert!(max_abs_difference(&at(3), &run(&x, Mode::Eval).unwrap()).unwrap() > 1e-3);
}

/// Computing the insides of blocks again changes no gradient.
#[test]
fn checkpointing_keeps_the_numbers() {
    let gradients = |checkpoint: bool| {
        let (_, build, _) = unet(
            "u",
            json!({"use_checkpoint": checkpoint, "dropout": 0.2}),
            false,
        );
        let store = Store::new(7, DType::F64, &Device::Cpu);
        let run = build(&store.root()).unwrap();
        stir(&store);
        let key = Key::new(1, stream::DROPOUT);
        let y = run(&normal(1, (2, 3, 8, 8)).unwrap(), Mode::Train { key }).unwrap();
        let grads = diffusion_ops::backward(&y.sqr().unwrap().sum_all().unwrap()).unwrap();
        let of = |var: &candle_core::Var| grads.get(var).unwrap().clone();
        store.named().values().map(of).collect::<Vec<_>>()
    };
    for (a, b) in gradients(true).iter().zip(&gradients(false)) {
        let size = b
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!(max_abs_difference(a, b).unwrap() <= 1e-12 * size.max(1.0));
    }
}

/// The gradient of log p(y|x) is that of finite differences, and the probabilities sum to one.
#[test]
fn classifiers_know_the_gradient_of_their_probabilities() {
    let config: GuidedConfig = parse(guided(
        json!({"pool": "attention", "num_head_channels": 16}),
    ));
    let store = Store::new(7, DType::F64, &Device::Cpu);
    let net = GuidedClassifier::new(&config, &store.root()).unwrap();
    stir(&store);
    let x = normal(1, (2, 3, 8, 8)).unwrap();
    let t = vector(&[10.0, 500.0]);
    let log_p = |x: &Tensor, y: f64| {
        let p = net
            .log_prob(x, &t, &vector(&[y, 5.0 - y]), Mode::Eval)
            .unwrap();
        p.to_vec1::<f64>().unwrap()
    };
    let total: f64 = (0..6).map(|y| log_p(&x, f64::from(y))[0].exp()).sum();
    assert!((total - 1.0).abs() < 1e-12, "{total}");
    let grad = net.grad_log_prob(&x, &t, &vector(&[2.0, 3.0])).unwrap();
    let way = normal(9, x.shape().clone()).unwrap();
    let slope = (&grad * &way)
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar::<f64>()
        .unwrap();
    let at = |h: f64| -> f64 {
        log_p(&(&x + (&way * h).unwrap()).unwrap(), 2.0)
            .iter()
            .sum()
    };
    let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
    assert!(
        (numeric - slope).abs() < 1e-6 * slope.abs().max(1.0),
        "{numeric} {slope}"
    );
    let said = net
        .log_prob(&x, &t, &vector(&[6.0]), Mode::Eval)
        .unwrap_err();
    assert!(said.to_string().contains("0 to 5"), "{said}");
}

#[test]
fn impossible_configurations_are_refused_by_field() {
    let scope = || Store::new(0, DType::F32, &Device::Cpu).root();
    for (changes, field) in [
        (json!({"model_channels": 48}), "multiple of 32"),
        (json!({"num_head_channels": 5}), "num_head_channels"),
        (json!({"num_heads": 3}), "heads"),
        (json!({"dropout": 1.0}), "dropout"),
        (json!({"dims": 3}), "dims"),
        (json!({"channel_mult": []}), "channel_mult"),
        (json!({"pool": "spatial"}), "pool"),
    ] {
        let said = GuidedUNet::new(&parse(guided(changes)), &scope()).unwrap_err();
        assert!(said.to_string().contains(field), "{field}: {said}");
    }
    let changes = json!({"pool": "attention", "num_head_channels": 16, "image_size": null});
    let said = GuidedClassifier::new(&parse(guided(changes)), &scope()).unwrap_err();
    assert!(said.to_string().contains("image_size"), "{said}");
    for (changes, field) in [
        (json!({"resample_filter": [1, 2, 1]}), "resample_filter"),
        (json!({"model_channels": 7}), "features of the noise level"),
        (json!({"img_resolution": 1}), "img_resolution"),
        (json!({"label_dropout": -0.1}), "label_dropout"),
    ] {
        let said = SongUNet::new(&parse(song(changes)), &scope()).unwrap_err();
        assert!(said.to_string().contains(field), "{field}: {said}");
    }
    for (changes, field) in [
        (json!({"nf": 0}), "model.nf"),
        (json!({"sigma_min": 0.0}), "sigma_min"),
        (json!({"fir": true, "fir_kernel": [1]}), "fir_kernel"),
        (json!({"ch_mult": [1, 1, 1, 1, 1]}), "image_size"),
    ] {
        let said = ScoreUNet::new(&parse(score(changes)), &scope()).unwrap_err();
        assert!(said.to_string().contains(field), "{field}: {said}");
    }
    let unknown = serde_json::from_value::<GuidedConfig>(guided(json!({"num_headz": 2})));
    assert!(unknown.unwrap_err().to_string().contains("num_headz"));
    let unknown = serde_json::from_value::<ScoreConfig>(score(json!({"firr": true})));
    assert!(unknown.unwrap_err().to_string().contains("firr"));
}

/// The output of an unscaled network at σ_i, divided by σ_i.
#[test]
fn scaling_by_sigma_divides_by_the_level_of_the_table() {
    let x = normal(1, (1, 3, 8, 8)).unwrap();
    let at = |scale: bool, t: f64| {
        let changes = json!({"scale_by_sigma": scale, "num_scales": 11, "init_scale": 1.0});
        let config: ScoreConfig = parse(score(changes));
        let store = Store::new(7, DType::F64, &Device::Cpu);
        let net = ScoreUNet::new(&config, &store.root()).unwrap();
        net.forward(&x, &vector(&[t]), Mode::Eval)
    };
    // Between 50 and 0.01 the table of 11 levels has √0.5 in the middle.
    let scaled = (at(true, 5.0).unwrap() * 0.5f64.sqrt()).unwrap();
    assert!(max_abs_difference(&scaled, &at(false, 5.0).unwrap()).unwrap() < 1e-12);
    let said = at(true, 11.0).unwrap_err().to_string();
    assert!(said.contains("0 to 10"), "{said}");
}
