//! A folder of ours gives the same samples again, here and in diffusers, and folders of diffusers
//! are sampled with the labels that they mean.
//!
//! The part in diffusers runs when the environment variable `DIFFUSION_PYTHON` names a Python that
//! has it.

// The exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use diffusion_core::checkpoint::write_safetensors_atomic;
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::limits::Limits;
use diffusion_core::noise::CounterNoise;
use diffusion_core::tensor::At;
use diffusion_images::classes::Classes;
use diffusion_images::model::ImageModel;
use diffusion_images::saved::SavedModel;
use diffusion_nn::Store;
use diffusion_nn::net::unet2d::{UNet2D, UNet2DConfig};
use diffusion_tests::outputs::outputs;
use diffusion_tests::unet::SavedUNet;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

fn unet_config(classes: bool) -> UNet2DConfig {
    let config = json!({
        "sample_size": [8, 12],
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": classes.then_some(4),
    });
    serde_json::from_value(config).unwrap()
}

/// A pipeline with weights of a seed.
fn model(scheduler: Value, conditional: bool) -> SavedModel {
    let config = unet_config(conditional);
    let store = Store::new(3, DType::F32, &Device::Cpu);
    UNet2D::new(&config, &store.root()).unwrap();
    let weights = store.frozen().unwrap();
    let classes = match conditional {
        true => Classes::with_null_last(["a", "b", "c"].map(String::from).to_vec()),
        false => Classes::default(),
    };
    SavedModel::new(config, weights, classes, scheduler.to_string()).unwrap()
}

fn write(path: &Path, scheduler: Value) {
    model(scheduler, false).write(path).unwrap();
}

fn run(path: &Path) -> BTreeMap<String, Tensor> {
    run_labels(path, None)
}

fn run_labels(path: &Path, labels: Option<&[u32]>) -> BTreeMap<String, Tensor> {
    outputs(&SavedUNet::open(path).unwrap(), 7, 3, 5, labels).unwrap()
}

/// Largest difference of two tensors.
fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let gap = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    let values: Vec<f64> = gap.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f64::abs).fold(0.0, f64::max)
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    let values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    values
        .to_vec1::<f64>()
        .unwrap()
        .into_iter()
        .map(f64::to_bits)
        .collect()
}

fn schedulers() -> [Value; 2] {
    [
        json!({"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}),
        json!({
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 200,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "variance_type": "fixed_large",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": true,
        }),
    ]
}

#[test]
fn a_folder_that_is_loaded_again_gives_the_same_bits() {
    for scheduler in schedulers() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        write(&model, scheduler);
        let first = run(&model);
        assert_eq!(first["xs"].dims(), [7, 3, 2, 8, 12]);
        // Copied elsewhere and loaded anew, so that nothing but the files can matter.
        let again = dir.path().join("again");
        for part in ["unet", "scheduler", "."] {
            std::fs::create_dir_all(again.join(part)).unwrap();
            for entry in std::fs::read_dir(model.join(part)).unwrap() {
                let from = entry.unwrap().path();
                if from.is_file() {
                    std::fs::copy(&from, again.join(part).join(from.file_name().unwrap())).unwrap();
                }
            }
        }
        let second = run(&again);
        assert_eq!(first.len(), second.len());
        for (name, tensor) in &first {
            assert_eq!(bits(tensor), bits(&second[name]), "{name}");
        }
        // The comparison above must be able to fail: other weights give other samples.
        let file = again.join("unet/diffusion_pytorch_model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let last = bytes.len() - 2;
        bytes[last] ^= 0x40;
        std::fs::write(&file, bytes).unwrap();
        assert_ne!(bits(&run(&again)["xs"]), bits(&first["xs"]));
    }
}

#[test]
fn one_label_built_into_the_network_is_that_label() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let whole = model(schedulers()[0].clone(), true);
    whole.write(&at("whole")).unwrap();
    let read = SavedModel::open(&at("whole"), &Limits::default()).unwrap();
    assert_eq!(read.classes, whole.classes);
    assert_eq!(read.classes.null(), Some(3));
    let mut seen = Vec::new();
    for label in 0..4 {
        let folder = at(&label.to_string());
        let one = read.clone().with_label_folded(label).unwrap();
        one.write(&folder).unwrap();
        let (built_in, asked) = (run(&folder), run_labels(&at("whole"), Some(&[label; 3])));
        // The sum of the two biases is rounded once more than the sum with the vector.
        assert!(gap(&built_in["xs"], &asked["xs"]) < 1e-4);
        seen.push(asked["xs"].clone());
    }
    assert!(gap(&seen[0], &seen[3]) > 0.01);
    assert!(read.clone().with_label_folded(4).is_err());
    let plain = SavedModel::open(&at("0"), &Limits::default()).unwrap();
    assert!(plain.with_label_folded(0).is_err());
}

#[test]
fn folders_of_the_earlier_layout_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let whole = model(schedulers()[0].clone(), true);
    whole.write(&at("whole")).unwrap();
    // The withheld label in the network's bias, the others beside it relative to that one.
    whole
        .clone()
        .with_label_folded(3)
        .unwrap()
        .write(&at("old"))
        .unwrap();
    let table = &whole.weights["class_embedding.weight"];
    let relative = table.narrow(0, 0, 3).unwrap();
    let relative = relative.broadcast_sub(&table.get(3).unwrap()).unwrap();
    let folder = at("old").join("class_embedding");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("config.json"), r#"{"names": ["a", "b", "c"]}"#).unwrap();
    write_safetensors_atomic(
        &folder.join("diffusion_pytorch_model.safetensors"),
        &BTreeMap::from([("weight".to_string(), relative)]),
        &BTreeMap::new(),
    )
    .unwrap();
    let old = SavedModel::open(&at("old"), &Limits::default()).unwrap();
    assert_eq!(old.classes, whole.classes);
    old.write(&at("new")).unwrap();
    let labels = Some(&[2, 3, 0][..]);
    let expected = run_labels(&at("whole"), labels);
    for name in ["old", "new"] {
        assert!(gap(&run_labels(&at(name), labels)["xs"], &expected["xs"]) < 1e-4);
    }
    assert!(at("new/classes.json").exists() && !at("new/class_embedding").exists());
}

#[test]
fn classes_of_a_model_of_diffusers_are_the_labels_that_it_means() {
    for (name, names, null) in [
        ("classes", &["0", "1", "2", "3"][..], None),
        ("classes_null", &["0", "1", "2"], Some(3)),
        ("classes_timestep", &["first", "second"], Some(2)),
    ] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("parity/pipeline.{name}"));
        let model = ImageModel::open(&folder, &Device::Cpu).unwrap();
        assert_eq!(model.classes(), names);
        assert_eq!(model.labels().null(), null);
        let golden = folder.join("golden.safetensors");
        let golden =
            diffusion_core::checkpoint::read_safetensors(&golden, &Limits::default()).unwrap();
        let labels = golden["labels"].to_vec1::<i64>().unwrap();
        // The first call was made on the first noise, at the first timestep.
        let t = golden["timesteps"]
            .get(0)
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        let point = model.table().unwrap().index(t as i64);
        let (x, expected) = (&golden["noise.0"], golden["model_outputs"].get(0).unwrap());
        let mut noise = CounterNoise::new(0, 0..3);
        for (i, label) in labels.into_iter().enumerate() {
            let asked = (Some(label as u32) != null).then(|| vec![label as u32; 3]);
            let mut call = Call {
                noise: &mut noise,
                items: 0..3,
                tracked: false,
            };
            let denoiser = model.denoiser(asked.as_deref()).unwrap();
            let said = denoiser.predict(x, At::All(point), &mut call).unwrap();
            let (said, expected) = (said.value.get(i).unwrap(), expected.get(i).unwrap());
            assert!(gap(&said, &expected) < 2e-5, "{name}, image {i}");
        }
        if null.is_none() {
            let error = model.denoiser(None).err().unwrap().to_string();
            assert!(error.contains("classes.json"), "{error}");
        }
    }
}

#[test]
fn diffusers_gives_the_same_samples() {
    let Some(python) = std::env::var_os("DIFFUSION_PYTHON") else {
        eprintln!("DIFFUSION_PYTHON names no Python with diffusers: that part is left out");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/diffusers_loads_ours.py");
    let labels = [2, 3, 0];
    for (scheduler, conditional) in schedulers().into_iter().zip([false, true]) {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("model"), dir.path().join("out.safetensors"));
        model(scheduler, conditional).write(&folder).unwrap();
        let labels = conditional.then_some(&labels[..]);
        let mut tensors = run_labels(&folder, labels);
        let peer = |folder: &Path, tensors: &BTreeMap<String, Tensor>| {
            write_safetensors_atomic(&file, tensors, &BTreeMap::new()).unwrap();
            let out = Command::new(&python)
                .arg(&script)
                .arg(folder)
                .arg(&file)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned()
                + &String::from_utf8_lossy(&out.stderr);
            (out.status.code(), text)
        };
        let (code, text) = peer(&folder, &tensors);
        assert_eq!(code, Some(0), "{text}");
        if conditional {
            // With a label built in, a call of the pipeline gives what was asked for by label.
            let saved = SavedModel::open(&folder, &Limits::default()).unwrap();
            let one = dir.path().join("one");
            saved.with_label_folded(2).unwrap().write(&one).unwrap();
            let mut asked = run_labels(&folder, Some(&[2; 3]));
            asked.remove("labels");
            let (code, text) = peer(&one, &asked);
            assert_eq!(code, Some(0), "{text}");
            assert!(text.contains("images from the pipeline"), "{text}");
        }
        // One changed sample must be noticed.
        let xs = tensors["xs"].affine(1.0, 1e-3).unwrap();
        tensors.insert("xs".into(), xs);
        let (code, text) = peer(&folder, &tensors);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("DIFFERS"), "{text}");
    }
}
