//! Properties of the list of cases, and small cases end to end.

use crate::{Work, find, serve, specs};
use candle_core::{Device, Tensor};
use std::collections::BTreeSet;

#[test]
fn names_are_unique_and_have_three_parts() {
    let specs = specs();
    let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names.len(), specs.len());
    for spec in &specs {
        let parts: Vec<&str> = spec.name.split('/').collect();
        assert_eq!(parts.len(), 3, "{}", spec.name);
        assert!(["ops", "images", "sampling", "timeseries", "waveform"].contains(&spec.domain()));
        assert_eq!(spec.work == Work::Train, parts[2] == "train");
    }
    for name in [
        "ops/conv2d-3x3-16x32x28x28-64/f",
        "ops/adamw-ema-10m/step",
        "images/unet-1m/train",
        "images/unet-1m/call-b16",
        "images/unet-35m/call-b1",
        "timeseries/csdi-transformer/train",
        "waveform/diffwave-base/call-b1",
    ] {
        assert!(names.contains(name), "{name}");
    }
    assert!(find("ops/nothing/f").is_err());
}

/// What the peer finds in the folder of an operation with a backward pass.
#[test]
fn an_operation_leaves_arguments_results_and_gradients() {
    let folder = tempfile::tempdir().unwrap();
    let mut out = Vec::new();
    let name = "ops/softmax-4096x256/fb";
    let mut input = "run 1\nquit\n".as_bytes();
    serve::serve(name, folder.path(), &mut input, &mut out).unwrap();
    assert_eq!(String::from_utf8(out).unwrap().lines().count(), 2);
    let path = folder.path().join("case.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let mut keys: Vec<&String> = tensors.keys().collect();
    keys.sort();
    assert_eq!(keys, ["gradients/x", "inputs/x", "outputs/y", "seed/y"]);
    // dx = y (g − Σ g y), the definition.
    let (y, g) = (&tensors["outputs/y"], &tensors["seed/y"]);
    let inner = (y * g).unwrap().sum_keepdim(1).unwrap();
    let dx = (y * g.broadcast_sub(&inner).unwrap()).unwrap();
    let gap: Tensor = (dx - &tensors["gradients/x"]).unwrap();
    let gap = gap.abs().unwrap().max_all().unwrap();
    assert!(gap.to_scalar::<f32>().unwrap() < 1e-6);
    let config = std::fs::read_to_string(folder.path().join("case.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        (&config["op"], &config["work"]),
        (&"softmax".into(), &"fb".into())
    );
}

/// Every parameter of the block is an argument with a gradient.
#[test]
fn the_residual_block_trains_all_its_parameters() {
    let case = find("ops/resnet-block-16x64x32x32/fb")
        .unwrap()
        .build()
        .unwrap();
    let reference = case.reference().unwrap();
    let group = |group: &str| -> BTreeSet<String> {
        let tensors = reference.tensors.keys();
        tensors
            .filter_map(|key| key.strip_prefix(group).map(str::to_owned))
            .collect()
    };
    let names = group("gradients/");
    assert_eq!(names, group("inputs/"));
    assert!(names.contains("conv1.weight") && names.contains("time_emb_proj.bias"));
}
