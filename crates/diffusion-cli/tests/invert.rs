//! `diffusion images invert` as a user meets it.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

mod common;

use common::{refuses, succeeds};

#[test]
fn images_come_back_and_more_calls_bring_them_nearer() {
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
        "--out",
        "t",
    ];
    succeeds(&train, at);
    let invert = |iterations: &str, more: &[&str]| {
        let base = [
            "images",
            "invert",
            "--model",
            "t",
            "-q",
            "--json",
            "-n",
            "3",
            "--steps",
            "8",
            "--out",
            "i.png",
            "--iterations",
            iterations,
        ];
        let said = succeeds(&[&base[..], more].concat(), at);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        said["grey_levels"]["mean"].as_f64().unwrap()
    };
    let one = invert("1", &["--latents", "l.safetensors"]);
    let many = invert("30", &["--batch", "2"]);
    assert!(many < 0.01 * one && many < 0.5, "{one} and {many}");
    assert!(at.join("i.png").is_file() && at.join("l.safetensors").is_file());

    let base = ["images", "invert", "--model", "t", "--out", "no.png"];
    let refused = |more: &[&str], said: &str| refuses(&[&base[..], more].concat(), at, 2, &[said]);
    refused(&["-n", "0"], "-n");
    refused(&["-n", "100000"], "held-out");
    refused(&["--iterations", "0"], "iterations");
    refused(&["--steps", "0"], "steps");
    refused(&["--grid", "nosuch"], "nosuch");
    assert!(!at.join("no.png").exists());
}
