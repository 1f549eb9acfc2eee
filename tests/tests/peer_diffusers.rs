//! A folder of ours gives the same samples again, here and in diffusers.
//!
//! The part in diffusers runs when the environment variable `DIFFUSION_PYTHON` names a Python that
//! has it.

// The exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use diffusion_core::checkpoint::write_safetensors_atomic;
use diffusion_core::interop::folder::write_pipeline;
use diffusion_nn::Store;
use diffusion_nn::net::unet2d::{UNet2D, UNet2DConfig};
use diffusion_tests::outputs::outputs;
use diffusion_tests::unet::SavedUNet;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

fn unet_config() -> Value {
    json!({
        "_class_name": "UNet2DModel",
        "sample_size": [8, 12],
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    })
}

/// Writes a pipeline with weights of a seed.
fn write(path: &Path, scheduler: Value) {
    let config: UNet2DConfig = serde_json::from_value(unet_config()).unwrap();
    let store = Store::new(3, DType::F32, &Device::Cpu);
    UNet2D::new(&config, &store.root()).unwrap();
    let weights = store.frozen().unwrap();
    write_pipeline(path, "DDPMPipeline", unet_config(), &weights, scheduler).unwrap();
}

fn run(path: &Path) -> BTreeMap<String, Tensor> {
    outputs(&SavedUNet::open(path).unwrap(), 7, 3, 5).unwrap()
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
fn diffusers_gives_the_same_samples() {
    let Some(python) = std::env::var_os("DIFFUSION_PYTHON") else {
        eprintln!("DIFFUSION_PYTHON names no Python with diffusers: that part is left out");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/diffusers_loads_ours.py");
    for scheduler in schedulers() {
        let dir = tempfile::tempdir().unwrap();
        let (model, file) = (dir.path().join("model"), dir.path().join("out.safetensors"));
        write(&model, scheduler);
        let mut tensors = run(&model);
        let peer = |tensors: &BTreeMap<String, Tensor>| {
            write_safetensors_atomic(&file, tensors, &BTreeMap::new()).unwrap();
            let out = Command::new(&python)
                .arg(&script)
                .arg(&model)
                .arg(&file)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned()
                + &String::from_utf8_lossy(&out.stderr);
            (out.status.code(), text)
        };
        let (code, text) = peer(&tensors);
        assert_eq!(code, Some(0), "{text}");
        // One changed sample must be noticed.
        let xs = tensors["xs"].affine(1.0, 1e-3).unwrap();
        tensors.insert("xs".into(), xs);
        let (code, text) = peer(&tensors);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("DIFFERS"), "{text}");
    }
}
