//! What a shell and its user do: readers that go away, folders of other things, names that collide.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

mod common;

use common::{refuses, succeeds};
use std::process::{Command, Stdio};

const TRAIN: [&str; 10] = [
    "images",
    "train",
    "--data",
    "digits",
    "--preset",
    "tiny",
    "--steps",
    "2",
    "--validate-every",
    "0",
];

fn train(more: &[&str]) -> Vec<String> {
    TRAIN.iter().chain(more).map(ToString::to_string).collect()
}

#[test]
fn a_reader_that_goes_away_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_diffusion"))
        .args(train(&["--out", "m"]))
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(folder.path().join("m/unet/config.json").exists());
}

#[test]
fn a_folder_of_other_things_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("photos");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("cat.txt"), "meow").unwrap();
    let args = train(&["--out", "photos"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    refuses(&args, folder.path(), 1, &["photos", "cat.txt", "--out"]);
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn a_folder_named_like_built_in_data_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let args = train(&["--out", "digits"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    succeeds(&args, folder.path());
    let resume = ["images", "train", "--out", "digits", "--resume", "-q"];
    assert!(succeeds(&resume, folder.path()).contains("trained for 2 steps"));
    let other = [&resume[..], &["--seed", "5"]].concat();
    refuses(&other, folder.path(), 2, &["--seed", "5", "expected 0"]);
}
