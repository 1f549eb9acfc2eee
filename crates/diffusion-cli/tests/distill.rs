//! `diffusion images distill` as a user meets it: a teacher, students, and every refusal.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

mod common;

use common::{refuses, succeeds};
use std::path::Path;

fn distill(at: &Path, out: &str, more: &[&str]) -> String {
    let base = [
        "images", "distill", "--model", "t", "-q", "--steps", "2", "--batch", "8", "--out", out,
    ];
    succeeds(&[&base[..], more].concat(), at)
}

fn weights(at: &Path, model: &str) -> Vec<u8> {
    std::fs::read(
        at.join(model)
            .join("unet/diffusion_pytorch_model.safetensors"),
    )
    .unwrap()
}

#[test]
fn a_student_is_sampled_as_it_was_distilled() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train = [
        "images",
        "train",
        "--preset",
        "tiny",
        "--steps",
        "4",
        "-q",
        "--validate-every",
        "0",
        "--seed",
        "3",
        "--out",
        "t",
    ];
    succeeds(&train, at);
    let said = distill(at, "s", &["--to", "2", "--from", "8", "--seed", "1"]);
    assert!(said.contains("distilled for 2 steps") && said.contains("images sample --model s"));
    distill(
        at,
        "again",
        &["--to", "2", "--from", "8", "--seed", "1", "--threads", "1"],
    );
    assert_eq!(weights(at, "s"), weights(at, "again"), "threads");
    let said = distill(
        at,
        "c",
        &[
            "--to",
            "2",
            "--from",
            "4",
            "--method",
            "consistency",
            "--json",
        ],
    );
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["sampler_steps"], 2);
    assert_eq!(said["finished"], true);
    distill(
        at,
        "k",
        &[
            "--to",
            "1",
            "--from",
            "2",
            "--method",
            "knowledge",
            "--pairs",
            "10",
        ],
    );

    let sample = |model: &str, more: &[&str]| {
        let base = [
            "images", "sample", "--model", model, "-n", "3", "-q", "--json", "--out", "g.png",
        ];
        let said = succeeds(&[&base[..], more].concat(), at);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let name = said["sampler"].as_str().unwrap().to_string();
        (name, said["steps"].as_u64().unwrap())
    };
    assert_eq!(sample("s", &[]), ("ddim".into(), 2));
    assert_eq!(sample("s", &["--steps", "4"]), ("ddim".into(), 4));
    assert_eq!(sample("s", &["--sampler", "ddpm"]), ("ddpm".into(), 20));
    assert_eq!(sample("c", &["--class", "all"]), ("consistency".into(), 2));
    assert_eq!(sample("k", &["--class", "7"]), ("ddim".into(), 1));
    assert_eq!(sample("t", &[]), ("dpmpp-2m".into(), 20));

    // A teacher of a long run has a longer warm-up than a student may have steps.
    let file = at.join("t/run/config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let long = text
        .replace("warmup = 0", "warmup = 100")
        .replace("steps = 4\n", "steps = 3000\n");
    assert_eq!(long.len(), text.len() + 5, "{text}");
    std::fs::write(&file, long).unwrap();
    distill(at, "short", &["--to", "2", "--from", "8"]);
    std::fs::write(&file, text).unwrap();
    // Images of another size are refused before anything is written.
    let other = [
        "images", "distill", "--model", "t", "--out", "o", "--data", "mnist",
    ];
    refuses(&other, at, 2, &["[1, 28, 28]", "[1, 8, 8]"]);

    // A finished run is not overwritten, and resumes to what it is.
    let before = weights(at, "s");
    refuses(
        &["images", "distill", "--model", "t", "--out", "s"],
        at,
        1,
        &["a training run is here already", "--resume"],
    );
    succeeds(&["images", "distill", "--resume", "-q", "--out", "s"], at);
    assert_eq!(before, weights(at, "s"));
    refuses(
        &["images", "distill", "--resume", "--seed", "9", "--out", "s"],
        at,
        2,
        &["--seed", "as the run began with"],
    );
    refuses(
        &["images", "train", "--resume", "--out", "s"],
        at,
        1,
        &["without --resume"],
    );

    let refused = |more: &[&str], code, words: &[&str]| {
        let base = ["images", "distill", "--model", "t", "--out", "n"];
        refuses(&[&base[..], more].concat(), at, code, words);
        assert!(!at.join("n").exists());
    };
    refused(&["--to", "4", "--from", "6"], 2, &["8, 16, 32"]);
    refused(&["--to", "2", "--method", "knowledge"], 2, &["--to 1"]);
    refused(
        &["--to", "3", "--from", "8", "--method", "consistency"],
        2,
        &["multiple of 3"],
    );
    refused(
        &["--method", "magic"],
        2,
        &["progressive", "consistency", "knowledge"],
    );
    refuses(
        &["images", "distill", "--model", "missing", "--out", "n"],
        at,
        1,
        &["missing"],
    );
    refuses(
        &["images", "distill", "--resume", "--out", "nowhere"],
        at,
        1,
        &["no such file", "without --resume"],
    );
}
