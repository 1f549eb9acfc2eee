//! The carried fixtures: every one must pass, none may be unsupported, and a spoilt one must fail.

// The exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

use candle_core::Tensor;
use diffusion_core::checkpoint::{read_safetensors, write_safetensors_atomic};
use diffusion_core::limits::Limits;
use diffusion_tests::parity::{Outcome, TABLE, Verdict, find, run};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn carried() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("parity")
}

#[test]
fn every_carried_fixture_passes() {
    let outcomes: Vec<Outcome> = find(&carried())
        .unwrap()
        .iter()
        .map(|path| run(path))
        .collect();
    let bad: Vec<String> = outcomes
        .iter()
        .filter(|o| o.verdict != Verdict::Pass)
        .map(ToString::to_string)
        .collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    // A fixture that was lost would pass unnoticed.
    assert!(outcomes.len() >= 135, "only {} fixtures", outcomes.len());
    let seen: BTreeSet<(String, String)> =
        outcomes.into_iter().map(|o| (o.kind, o.system)).collect();
    for (kind, system, _) in TABLE {
        let elsewhere = ["unet2d_adm", "unet2d_ncsnpp"].contains(system);
        let here = seen.contains(&(kind.to_string(), system.to_string()));
        assert!(here || elsewhere, "no carried fixture of {kind} {system}");
    }
}

/// Copies a fixture, changes one value of one file a little, and runs it.
fn spoilt(name: &str, file: &str, tensor: &str) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(carried().join(name)).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join(format!("{file}.safetensors"));
    let mut tensors = read_safetensors(&path, &Limits::default()).unwrap();
    let old = &tensors[tensor];
    let mut values = old.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let last = values.len() - 1;
    values[last] += 0.01 * (1.0 + values[last].abs());
    let new = Tensor::from_vec(values, old.shape(), old.device()).unwrap();
    tensors.insert(tensor.to_string(), new);
    write_safetensors_atomic(&path, &tensors, &BTreeMap::new()).unwrap();
    run(dir.path())
}

#[test]
fn one_changed_number_is_noticed() {
    for (name, file, tensor) in [
        ("scheduler.heun.plain", "outputs", "xs"),
        ("scheduler.ddpm.threshold", "outputs", "x0s"),
        ("scheduler.edm_euler.exp_v_churn", "inputs", "noise.5"),
        ("scheduler.euler.karras", "outputs", "sigmas"),
        (
            "function.add_noise.zero_snr",
            "outputs",
            "target.v_prediction",
        ),
        ("authors.score_sde.likelihood_vp_gaussian", "outputs", "bpd"),
        ("authors.score_sde.pc_inpainting_ve", "inputs", "m"),
        (
            "module.unet2d.grad_plain",
            "grads",
            "down_blocks.0.resnets.0.conv1.weight",
        ),
        (
            "module.unet2d.old_attention_names",
            "weights",
            "conv_out.weight",
        ),
    ] {
        let outcome = spoilt(name, file, tensor);
        assert_eq!(outcome.verdict, Verdict::Fail, "{outcome}");
        let about = if file == "outputs" { tensor } else { "outside" };
        assert!(outcome.note.contains(about), "{outcome}");
    }
}

#[test]
fn a_missing_gradient_or_output_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["fixture.json", "inputs.safetensors", "weights.safetensors"] {
        let from = carried().join("module.unet2d.grad_plain").join(file);
        std::fs::copy(from, dir.path().join(file)).unwrap();
    }
    let outcome = run(dir.path());
    assert_eq!(outcome.verdict, Verdict::Fail, "{outcome}");
    assert!(outcome.note.contains("nothing was compared"), "{outcome}");
}
