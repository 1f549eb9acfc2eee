//! The command as a user meets it: a whole run, and every refusal in one clear line.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

mod common;

use common::{refuses, succeeds};
use std::process::Command;

const TINY: [&str; 8] = [
    "images", "train", "--preset", "tiny", "--steps", "6", "-q", "--out",
];

#[test]
fn train_resume_sample_inspect() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train = |out: &str, more: &[&str]| {
        let args: Vec<&str> = TINY
            .iter()
            .copied()
            .chain([out])
            .chain(more.iter().copied())
            .collect();
        succeeds(&args, at)
    };
    train("a", &["--seed", "3"]);
    train("b", &["--seed", "3", "--threads", "1"]);
    train("c", &["--seed", "4"]);
    let weights = |model: &str| {
        std::fs::read(
            at.join(model)
                .join("unet/diffusion_pytorch_model.safetensors"),
        )
        .unwrap()
    };
    assert_eq!(
        weights("a"),
        weights("b"),
        "the same seed on another number of threads"
    );
    assert_ne!(weights("a"), weights("c"), "another seed");
    let metrics = std::fs::read_to_string(at.join("a/run/metrics.jsonl")).unwrap();
    let look = metrics.lines().last().unwrap();
    let look: serde_json::Value = serde_json::from_str(look).unwrap();
    assert_eq!(look["event"], "evaluated");
    assert!(look["held_out_loss"].as_f64().unwrap() > 0.0, "{look}");
    let step = look["step"].as_u64().unwrap();
    assert!(
        at.join(format!("a/run/samples/step-{step:06}.png"))
            .is_file()
    );

    let sample = |out: &str, more: &[&str]| {
        let base = [
            "images", "sample", "--model", "a", "-n", "5", "--steps", "3", "-q", "--out", out,
        ];
        let args: Vec<&str> = base.iter().copied().chain(more.iter().copied()).collect();
        succeeds(&args, at);
        std::fs::read(at.join(out)).unwrap()
    };
    let first = sample("1.png", &[]);
    assert_eq!(
        first,
        sample("2.png", &["--batch", "2", "--threads", "1"]),
        "batch and threads"
    );
    assert_ne!(first, sample("3.png", &["--seed", "9"]));
    assert_ne!(first, sample("4.png", &["--class", "7", "--guidance", "2"]));
    for sampler in [
        "ddpm",
        "ddpm-large",
        "ddim",
        "ddim-eta1",
        "euler",
        "heun",
        "edm",
        "dpmpp-1",
        r#"{"name": "unipc-3", "b": "bh1"}"#,
        r#"{"name": "dpm_multistep", "order": 3, "stochastic": true}"#,
    ] {
        sample("s.png", &["--sampler", sampler]);
    }
    for grid in ["log-snr", r#"{"kind": "karras", "rho": 5}"#] {
        sample("s.png", &["--grid", grid]);
    }
    sample("s.png", &["--sampler", "dpmpp-2m-sde", "--brownian"]);
    sample("s.png", &["--sampler", "analytic", "--moments", "5"]);
    sample(
        "s.png",
        &[
            "--sampler",
            "analytic-ddim",
            "--moments",
            "5",
            "--data",
            "digits",
        ],
    );
    // These run every item by itself, and ask for one label of many.
    for sampler in ["dpm-12", "dpm-23"] {
        let more = ["--sampler", sampler, "--class", "all", "--guidance", "2"];
        assert_ne!(sample("s.png", &more), sample("s.png", &more[..4]));
    }
    let refused = |more: &[&str], said: &str| {
        let base = ["images", "sample", "--model", "a", "--out", "no.png"];
        refuses(&[&base[..], more].concat(), at, 2, &[said]);
    };
    refused(&["--sampler", "dpmpp-2n"], "did you mean dpmpp-2m?");
    refused(
        &["--sampler", r#"{"name": "deis", "order": 0}"#],
        "order: 0",
    );
    refused(&["--grid", r#"{"kind": "karras", "rho": -3}"#], "rho: -3");
    refused(&["--moments", "5"], "--moments");
    refused(&["--data", "digits"], "--data");
    refused(&["--size", "8"], "--size");
    refused(&["--out", "no.jpg"], "--out");
    refused(&["--steps", "20000000", "--grid", "karras"], "100000");
    let help = succeeds(&["images", "sample", "--help"], at);
    assert!(
        help.contains("unipc-3") && help.contains("quadratic"),
        "{help}"
    );
    let texts = diffusion_images::picture::read_texts(&at.join("4.png")).unwrap();
    for (key, value) in [
        ("class", "7"),
        ("guidance", "2"),
        ("sampler", "dpmpp-2m"),
        ("steps", "3"),
        ("seed", "0"),
    ] {
        assert!(
            texts.iter().any(|(k, v)| k == key && v == value),
            "{key} in {texts:?}"
        );
    }
    let said: serde_json::Value =
        serde_json::from_str(&succeeds(&["inspect", "a", "--json"], at)).unwrap();
    assert_eq!(said["image_shape"], serde_json::json!([1, 8, 8]));
    assert_eq!(said["classes"].as_array().unwrap().len(), 10);
    assert!(succeeds(&["inspect", "a"], at).contains("1000 steps"));

    // A run is not overwritten by accident, and a finished one resumes to what it was.
    let before = weights("a");
    let again: Vec<&str> = TINY.iter().copied().chain(["a"]).collect();
    refuses(
        &again,
        at,
        1,
        &["a training run is here already", "--resume"],
    );
    succeeds(&["images", "train", "--resume", "-q", "--out", "a"], at);
    assert_eq!(before, weights("a"));
}

#[test]
fn an_interrupted_run_saves_and_goes_on_bit_for_bit() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let start = |out: &str| {
        Command::new(env!("CARGO_BIN_EXE_diffusion"))
            .args([
                "images", "train", "--preset", "tiny", "--steps", "60", "-q", "--out", out,
            ])
            .current_dir(at)
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = start("stopped");
    // Wait until training has begun to report, then ask it to stop.
    let metrics = at.join("stopped/run/metrics.jsonl");
    let began = std::time::Instant::now();
    while !std::fs::metadata(&metrics).is_ok_and(|m| m.len() > 0) {
        assert!(began.elapsed().as_secs() < 60, "training never reported");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), None);
    let stopped_early = status.code() == Some(130);
    assert!(stopped_early || status.success(), "{status}");
    succeeds(
        &["images", "train", "--resume", "-q", "--out", "stopped"],
        at,
    );
    assert!(start("whole").wait().unwrap().success());
    for file in [
        "unet/diffusion_pytorch_model.safetensors",
        "run/metrics.jsonl",
    ] {
        let read = |model: &str| std::fs::read(at.join(model).join(file)).unwrap();
        assert_eq!(read("stopped"), read("whole"), "{file}");
    }
}

#[test]
fn refusals_name_the_value_and_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let out = ["--out", "x"];
    let train = |args: &[&str], code, words: &[&str]| {
        let all: Vec<&str> = ["images", "train", "-q"]
            .iter()
            .copied()
            .chain(args.iter().copied())
            .chain(out)
            .collect();
        refuses(&all, at, code, words);
        assert!(
            !at.join("x/model_index.json").exists(),
            "{args:?} left a model"
        );
    };
    train(&["--data", "nowhere"], 1, &["nowhere", "no such file"]);
    train(&["--preset", "huge"], 2, &["huge", "tiny"]);
    train(&["--device", "tpu"], 2, &["tpu", "cuda:N"]);
    train(&["--steps", "0"], 2, &["steps", "at least 1"]);
    train(&["--resume"], 1, &["config.toml", "run to resume"]);
    train(
        &["--resume", "--preset", "tiny"],
        2,
        &["cannot be used with"],
    );
    train(&["--size", "32"], 2, &["digits"]);
    std::fs::write(at.join("bad.toml"), "[train]\nlearning_rate = 1").unwrap();
    train(&["--config", "bad.toml"], 2, &["bad.toml", "learning_rate"]);
    std::fs::write(at.join("nan.toml"), "[train]\nlr = nan").unwrap();
    train(&["--config", "nan.toml"], 2, &["lr"]);
    train(&["--config", "absent.toml"], 1, &["absent.toml"]);
    std::fs::write(at.join("data.idx"), [0u8, 0, 8, 3, 255, 255, 255, 255]).unwrap();
    train(&["--data", "data.idx"], 1, &["data.idx"]);

    refuses(
        &["inspect", "nowhere"],
        at,
        1,
        &["nowhere", "model_index.json"],
    );
    refuses(
        &["images", "sample", "--model", "nowhere", "--out", "a.png"],
        at,
        1,
        &["nowhere"],
    );
    refuses(
        &[
            "images",
            "sample",
            "--model",
            ".",
            "--out",
            "a.png",
            "--sampler",
            "dimm",
        ],
        at,
        2,
        &["dimm", "ddim"],
    );
    refuses(&["images"], at, 2, &["Usage"]);
}

#[test]
fn a_damaged_model_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let args: Vec<&str> = TINY
        .iter()
        .copied()
        .chain(["m", "--unconditional"])
        .collect();
    succeeds(&args, at);
    let sample = |more: &[&str], code, words: &[&str]| {
        let mut all = vec!["images", "sample", "--model", "m", "-q", "--out", "a.png"];
        all.extend(more);
        for (option, value) in [("-n", "2"), ("--steps", "2")] {
            if !more.contains(&option) {
                all.extend([option, value]);
            }
        }
        refuses(&all, at, code, words);
        assert!(!at.join("a.png").exists(), "a picture in spite of an error");
    };
    sample(&["--class", "3"], 2, &["unconditional"]);
    sample(&["--guidance", "3"], 2, &["guidance"]);
    sample(&["-n", "0"], 2, &["at least 1"]);
    sample(&["--steps", "2000"], 2, &["1 to 1000"]);
    sample(&["--grid", "zigzag"], 2, &["zigzag", "karras"]);
    sample(&["--batch", "0"], 2, &["at least 1"]);
    sample(&["--guidance", "-1"], 2, &["guidance", "-1"]);
    // A full disk, and a device that must not be replaced by a file.
    let full = [
        "images",
        "sample",
        "--model",
        "m",
        "-n",
        "2",
        "--steps",
        "2",
        "--out",
        "/dev/full",
    ];
    if std::fs::metadata("/dev/full").is_ok_and(|m| !m.is_file()) {
        refuses(&full, at, 1, &["/dev/full", "free some space"]);
        assert!(!std::fs::metadata("/dev/full").unwrap().is_file());
    }
    let weights = at.join("m/unet/diffusion_pytorch_model.safetensors");
    let sound = std::fs::read(&weights).unwrap();
    // A NaN in a weight.
    let mut bad = sound.clone();
    let end = bad.len();
    bad[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, &bad).unwrap();
    sample(&[], 1, &["NaN", "time_emb_proj.weight"]);
    // Cut off.
    std::fs::write(&weights, &sound[..end - 100]).unwrap();
    sample(&[], 1, &["diffusion_pytorch_model.safetensors"]);
    std::fs::write(&weights, b"").unwrap();
    sample(&[], 1, &["diffusion_pytorch_model.safetensors"]);
    std::fs::write(&weights, &sound).unwrap();
    // Another network than the configuration says.
    let config = at.join("m/unet/config.json");
    let said = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        said.replace("\"layers_per_block\": 1", "\"layers_per_block\": 2"),
    )
    .unwrap();
    sample(&[], 1, &["missing"]);
    std::fs::write(
        &config,
        said.replace("\"layers_per_block\"", "\"layers_per_brick\""),
    )
    .unwrap();
    sample(&[], 1, &["layers_per_brick"]);
    std::fs::write(&config, "{").unwrap();
    sample(&[], 1, &["config.json"]);
    std::fs::write(&config, &said).unwrap();
    std::fs::write(
        at.join("m/scheduler/scheduler_config.json"),
        r#"{"_class_name": "Mystery"}"#,
    )
    .unwrap();
    sample(&[], 1, &["Mystery"]);
}

#[test]
fn evaluate_says_how_far_samples_are_from_real_images() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train: Vec<&str> = TINY.iter().copied().chain(["m"]).collect();
    succeeds(&train, at);
    let evaluate = ["images", "evaluate", "--model", "m", "--data", "digits"];
    let more = ["-n", "40", "--steps", "2", "-q", "--json"];
    let args: Vec<&str> = evaluate.iter().chain(&more).copied().collect();
    let found: serde_json::Value = serde_json::from_str(&succeeds(&args, at)).unwrap();
    let frechet = |row: &str| found[row]["frechet"]["value"].as_f64().unwrap();
    // Six steps of training give noise, far from digits.
    assert!(frechet("samples") > 5.0 * frechet("floor"), "{found}");
    assert!(
        found["floor"]["accuracy"]["value"].as_f64().unwrap() > 0.95,
        "{found}"
    );
    assert_eq!(found["samples"]["samples"], 40);
    refuses(
        &[&evaluate[..], &["-n", "5"]].concat(),
        at,
        2,
        &["-n", "6 to 100000"],
    );
}

#[test]
fn likelihood_in_bits_with_baselines_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train: Vec<&str> = TINY.iter().copied().chain(["m"]).collect();
    succeeds(&train, at);
    fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
        let command = ["images", "likelihood", "--model", "m", "-n", "6", "-q"];
        [&command[..], more].concat()
    }
    let found = |more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&succeeds(&[&with(more)[..], &["--json"]].concat(), at)).unwrap()
    };
    let vlb = found(&["--method", "vlb", "--steps", "5", "--variance", "analytic"]);
    let bits = |of: &serde_json::Value| of.as_f64().unwrap();
    let bound = &vlb["bound"];
    let steps = bound["steps"].as_array().unwrap();
    let parts: f64 = steps.iter().map(|p| bits(&p["bits"])).sum();
    let sum = parts + bits(&bound["prior"]) + bits(&bound["decoder"]);
    assert!((sum - bits(&bound["total"]["mean"])).abs() < 1e-4, "{vlb}");
    assert_eq!((&bound["count"], &vlb["levels"]), (&5.into(), &17.into()));
    // Six steps of training: worse than counting, which is better than nothing.
    let baseline = |name: &str| bits(&vlb["baselines"][name]);
    assert!(
        bits(&bound["total"]["mean"]) > baseline("histogram"),
        "{vlb}"
    );
    assert!(baseline("histogram") < baseline("uniform"), "{vlb}");
    // The size of a batch does not matter.
    let small = with(&["--method", "vlb", "--steps", "5", "--json"]);
    let whole = succeeds(&small, at);
    let halves: serde_json::Value =
        serde_json::from_str(&succeeds(&[&small[..], &["--batch", "4"]].concat(), at)).unwrap();
    let whole: serde_json::Value = serde_json::from_str(&whole).unwrap();
    let total = |found: &serde_json::Value| bits(&found["bound"]["total"]["mean"]);
    assert!((total(&whole) - total(&halves)).abs() < 1e-4);

    let flow = found(&["--method", "ode", "--tolerance", "0.01"]);
    assert!(bits(&flow["flow"]["total"]["mean"]).is_finite(), "{flow}");
    assert!(flow["bound"].is_null(), "{flow}");
    let text = succeeds(&with(&["--method", "vlb", "--steps", "3"]), at);
    assert!(
        text.contains("histogram of pixels") && text.contains("decoder"),
        "{text}"
    );

    refuses(&with(&["--steps", "1001"]), at, 2, &["1001", "2 to 1000"]);
    refuses(
        &with(&["--variance", "learned"]),
        at,
        2,
        &["learned", "analytic"],
    );
    refuses(&with(&["--importance", "0"]), at, 2, &["--importance"]);
    refuses(
        &["images", "likelihood", "--model", "m", "-n", "0"],
        at,
        2,
        &["-n", "1 to"],
    );
    refuses(&with(&["--data", "mnist"]), at, 2, &["data `mnist`", "28"]);
}

#[test]
fn convert_between_files_and_folders() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train: Vec<&str> = TINY.iter().copied().chain(["m"]).collect();
    succeeds(&train, at);
    succeeds(&["convert", "m", "w.safetensors"], at);
    succeeds(&["convert", "m", "whole"], at);
    let config = "m/unet/config.json";
    let bare = ["convert", "w.safetensors", "bare", "--network", config];
    succeeds(&[&bare[..], &["--classes", "m/classes.json"]].concat(), at);
    // The pixels of unconditional samples, without the settings that a file keeps.
    let sample = |model: &str, more: &[&str]| {
        let base = [
            "images", "sample", "--model", model, "-n", "2", "--steps", "2", "-q",
        ];
        let args: Vec<&str> = base
            .iter()
            .chain(&["--out", "s.png"])
            .chain(more)
            .copied()
            .collect();
        succeeds(&args, at);
        let decoder = png::Decoder::new(std::io::BufReader::new(
            std::fs::File::open(at.join("s.png")).unwrap(),
        ));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        pixels
    };
    let expected = sample("m", &[]);
    assert_eq!(sample("whole", &[]), expected);
    assert_eq!(sample("bare", &[]), expected);
    let classes = ["--class", "3"];
    assert_eq!(sample("whole", &classes), sample("m", &classes));
    // One label built into the network gives what was asked for by label, up to rounding.
    let near = |a: &[u8], b: &[u8]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.abs_diff(*b) <= 1)
    };
    succeeds(&["convert", "m", "threes", "--class", "3"], at);
    succeeds(&["convert", "m", "any", "--class", "none"], at);
    assert!(near(&sample("threes", &[]), &sample("m", &classes)));
    assert!(near(&sample("any", &[]), &expected));
    assert!(!near(&sample("threes", &[]), &expected));
    refuses(
        &["convert", "threes", "n", "--class", "3"],
        at,
        2,
        &["unconditional"],
    );
    refuses(
        &["convert", "m", "n", "--class", "x"],
        at,
        2,
        &["one of 0, 1"],
    );
    assert!(std::fs::read_dir(at).unwrap().all(|e| {
        let name = e.unwrap().file_name();
        !name.to_string_lossy().starts_with('.')
    }));

    refuses(
        &["convert", "m", "whole"],
        at,
        2,
        &["whole", "exists already"],
    );
    refuses(&["convert", "w.safetensors", "n"], at, 2, &["--network"]);
    refuses(
        &["convert", "m", "n", "--half"],
        at,
        2,
        &["--half", "a .safetensors file"],
    );
    let strip = ["convert", "m", "n.safetensors", "--strip", "nope."];
    refuses(&strip, at, 2, &["nope.", "class_embedding.weight"]);
    succeeds(&["convert", "m", "h.safetensors", "--half"], at);
    let size = |name: &str| std::fs::metadata(at.join(name)).unwrap().len();
    assert!(size("h.safetensors") < size("w.safetensors") * 2 / 3);
    std::fs::write(at.join("broken.pth"), b"PK").unwrap();
    refuses(
        &["convert", "broken.pth", "n.safetensors"],
        at,
        1,
        &["broken.pth"],
    );
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(at.join(config)).unwrap()).unwrap();
    config["block_out_channels"] = serde_json::json!([8, 24]);
    std::fs::write(at.join("other.json"), config.to_string()).unwrap();
    let other = ["convert", "w.safetensors", "n", "--network", "other.json"];
    refuses(
        &other,
        at,
        1,
        &["w.safetensors", "not the weights of this network"],
    );
    assert!(!at.join("n").exists());
}

#[test]
fn a_model_whose_withheld_label_is_not_known_has_classes_and_no_guidance() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train: Vec<&str> = TINY.iter().copied().chain(["m"]).collect();
    succeeds(&train, at);
    // As diffusers would write it.
    let classes = at.join("m/classes.json");
    std::fs::remove_file(&classes).unwrap();
    let said: serde_json::Value =
        serde_json::from_str(&succeeds(&["inspect", "m", "--json"], at)).unwrap();
    assert_eq!(said["classes"].as_array().unwrap().len(), 11);
    assert!(said["null_class"].is_null());
    let base = [
        "images", "sample", "--model", "m", "-n", "2", "--steps", "2", "-q", "--out", "s.png",
    ];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    succeeds(&with(&["--class", "10"]), at);
    let words = ["m/classes.json", "{\"null_class\": K}", "withheld"];
    refuses(&with(&[]), at, 2, &words);
    refuses(&with(&["--class", "3", "--guidance", "2"]), at, 2, &words);
    refuses(&["convert", "m", "n", "--class", "none"], at, 2, &words);
    // The network alone, as an average is saved, with what is known about its labels beside it.
    std::fs::write(at.join("known.json"), r#"{"null_class": 10}"#).unwrap();
    succeeds(&["convert", "m/unet", "bare"], at);
    refuses(
        &["convert", "bare", "n", "--class", "none"],
        at,
        2,
        &["bare/classes.json"],
    );
    let declared = [
        "convert",
        "m/unet",
        "any",
        "--classes",
        "known.json",
        "--class",
        "none",
    ];
    succeeds(&declared, at);
    succeeds(
        &[
            "images", "sample", "--model", "any", "-n", "1", "--steps", "2", "-q", "--out", "a.png",
        ],
        at,
    );
    std::fs::write(&classes, r#"{"null_class": 10}"#).unwrap();
    succeeds(&with(&[]), at);
    succeeds(&with(&["--class", "3", "--guidance", "2"]), at);
    refuses(&with(&["--class", "10"]), at, 2, &["one of 0, 1"]);
    std::fs::write(&classes, r#"{"null_class": 11}"#).unwrap();
    refuses(&with(&[]), at, 1, &["classes.json", "null_class: 11"]);
}
