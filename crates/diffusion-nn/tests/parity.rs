//! Checks against stored numbers of the original library. They are kept outside the crate: name
//! their folder in `DIFFUSION_PARITY` and run with `--ignored`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{DType, Device, Tensor};
use diffusion_nn::layer::*;
use diffusion_nn::net::unet2d::{UNet2D, UNet2DConfig, translate_deprecated};
use diffusion_nn::{Mode, Store, Strictness};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

type Tensors = BTreeMap<String, Tensor>;

fn tensors(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu)
        .unwrap()
        .into_iter()
        .collect()
}

struct Fixture {
    name: String,
    json: serde_json::Value,
    dir: PathBuf,
    inputs: Tensors,
    outputs: Tensors,
}

fn fixtures(prefix: &str) -> Vec<Fixture> {
    let root = std::env::var("DIFFUSION_PARITY").expect("DIFFUSION_PARITY names the fixtures");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            let json = std::fs::read_to_string(dir.join("fixture.json")).unwrap();
            all.push(Fixture {
                json: serde_json::from_str(&json).unwrap(),
                inputs: tensors(&dir.join("inputs.safetensors")),
                outputs: tensors(&dir.join("outputs.safetensors")),
                name,
                dir,
            });
        }
    }
    assert!(!all.is_empty(), "no fixture {prefix}*");
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

impl Fixture {
    fn weights(&self) -> Tensors {
        tensors(&self.dir.join("weights.safetensors"))
    }

    fn check(&self, ours: &Tensor, name: &str) {
        let theirs = &self.outputs[name];
        assert_eq!(ours.dims(), theirs.dims(), "{}", self.name);
        let flat = |t: &Tensor| {
            t.to_dtype(DType::F64)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        let abs = self.json["tolerance"]["abs"].as_f64().unwrap();
        let rel = self.json["tolerance"]["rel"].as_f64().unwrap();
        let (mut worst, mut share) = (0f64, 0f64);
        for (a, b) in flat(ours).into_iter().zip(flat(theirs)) {
            assert!(a.is_finite());
            worst = worst.max((a - b).abs());
            share = share.max((a - b).abs() / (abs + rel * b.abs()));
        }
        println!(
            "{} {name}: max abs {worst:.1e}, {share:.3} of the tolerance",
            self.name
        );
        assert!(
            share <= 1.0,
            "{} {name}: {share} times the tolerance",
            self.name
        );
    }
}

#[test]
#[ignore = "needs DIFFUSION_PARITY"]
fn unet2d() {
    for f in fixtures("module.unet2d.") {
        let config: UNet2DConfig = serde_json::from_value(f.json["config"].clone()).unwrap();
        let weights = translate_deprecated(&f.weights()).unwrap();
        let (x, t) = (&f.inputs["sample"], &f.inputs["timestep"]);
        let labels = f.inputs.get("class_labels");
        let net = Store::serve(&weights, DType::F32, &Device::Cpu, |s| {
            UNet2D::new(&config, s)
        });
        let y = net.unwrap().forward(x, t, labels, Mode::Eval).unwrap();
        assert!(!y.track_op());
        f.check(&y, "sample");
        let grads = f.dir.join("grads.safetensors");
        if !grads.exists() {
            continue;
        }
        let store = Store::new(0, DType::F32, &Device::Cpu);
        let net = UNet2D::new(&config, &store.root()).unwrap();
        store.load(&weights, Strictness::Exact).unwrap();
        let y = net.forward(x, t, labels, Mode::Eval).unwrap();
        let loss = (y - &f.inputs["target"])
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap();
        f.check(&loss, "loss");
        let ours = loss.backward().unwrap();
        let theirs = tensors(&grads);
        assert_eq!(theirs.len(), store.named().len());
        let stored = f.json["call"]["grad_tolerance_rel_to_max"]
            .as_f64()
            .unwrap();
        let mut worst = 0f64;
        for (name, var) in store.named() {
            let max = |t: &Tensor| {
                let v = t
                    .abs()
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap();
                f64::from(v.into_iter().fold(0.0, f32::max))
            };
            let gap = max(&(ours.get(&var).unwrap() - &theirs[&name]).unwrap());
            let size = max(&theirs[&name]);
            if size < 1e-6 {
                assert!(gap < 1e-6, "{name}: {gap:e}");
                continue;
            }
            worst = worst.max(gap / size);
            assert!(
                gap <= stored.min(1e-3) * size,
                "{} {name}: {gap:e} of {size:e}",
                f.name
            );
        }
        println!("{} gradients: {worst:.1e} of the largest entry", f.name);
    }
}

#[test]
#[ignore = "needs DIFFUSION_PARITY"]
fn parts() {
    for f in fixtures("module.part.") {
        let c = &f.json["config"];
        let int = |key: &str| c[key].as_u64().unwrap() as usize;
        let weights = f.weights();
        Store::serve(&weights, DType::F32, &Device::Cpu, |scope| {
            match f.json["call"]["class"].as_str().unwrap() {
                "Attention" => {
                    let config = AttentionConfig {
                        cross_attention_dim: Some(int("cross_attention_dim")),
                        bias: c["bias"].as_bool().unwrap(),
                        ..AttentionConfig::new(int("query_dim"), int("heads"), int("dim_head"))
                    };
                    let context = f.inputs.get("encoder_hidden_states");
                    let y = Attention::new(scope, config)?;
                    f.check(
                        &y.forward(&f.inputs["hidden_states"], context, None)?,
                        "out",
                    );
                }
                "GaussianFourierProjection" => {
                    let (log, flip) = (c["log"].as_bool(), c["flip_sin_to_cos"].as_bool());
                    let layer = GaussianFourier::new(
                        scope,
                        int("embedding_size"),
                        c["scale"].as_f64().unwrap(),
                        log.unwrap(),
                        flip.unwrap(),
                    )?;
                    f.check(&layer.forward(&f.inputs["x"])?, "out");
                }
                "ResnetBlock2D" => {
                    let config = ResnetBlock2DConfig {
                        temb_channels: Some(int("temb_channels")),
                        groups: int("groups"),
                        eps: c["eps"].as_f64().unwrap(),
                        output_scale_factor: c["output_scale_factor"].as_f64().unwrap(),
                        ..ResnetBlock2DConfig::new(int("in_channels"), int("out_channels"))
                    };
                    let x = &f.inputs["input_tensor"];
                    let layer = ResnetBlock2D::new(scope, config)?;
                    f.check(&layer.forward(x, f.inputs.get("temb"), Mode::Eval)?, "out");
                }
                "TimestepEmbedding" => {
                    let config =
                        TimestepEmbeddingConfig::new(int("in_channels"), int("time_embed_dim"));
                    let layer = TimestepEmbedding::new(scope, config)?;
                    f.check(&layer.forward(&f.inputs["sample"])?, "out");
                }
                other => panic!("{}: {other}", f.name),
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
#[ignore = "needs DIFFUSION_PARITY"]
fn sinusoidal_embeddings() {
    for f in fixtures("function.timestep_embedding.") {
        let k = &f.json["call"]["kwargs"];
        let number = |key: &str, default: f64| k[key].as_f64().unwrap_or(default);
        let y = timestep_embedding(
            &f.inputs["timesteps"],
            k["embedding_dim"].as_u64().unwrap() as usize,
            k["flip_sin_to_cos"].as_bool().unwrap_or(false),
            number("downscale_freq_shift", 1.0),
            number("scale", 1.0),
            number("max_period", 1e4),
        );
        f.check(&y.unwrap(), f.outputs.keys().next().unwrap());
    }
}
