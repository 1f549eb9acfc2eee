//! A user's own folder of pictures: sizes that differ, broken files, and what a model remembers.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

mod common;

use common::{diffusion, text};
use std::path::Path;

/// Standard output and standard error of a command that must succeed.
fn succeeds(args: &[&str], folder: &Path) -> (String, String) {
    let output = diffusion(args, folder);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{args:?}: {said}");
    (text(&output.stdout), said)
}

/// Runs a command that must be refused with this code and these words, in one line.
fn refuses(args: &[&str], folder: &Path, code: i32, words: &[&str]) {
    let output = diffusion(args, folder);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    for word in words {
        assert!(
            message.contains(word),
            "{args:?}: no `{word}` in: {message}"
        );
    }
}

/// Bright and dark pictures, PNG and JPEG, grey, coloured and transparent, of many sizes.
fn pictures(folder: &Path, classes: [&str; 2], count: u32) {
    for i in 0..count {
        let class = match classes[(i % 2) as usize] {
            "" => folder.to_path_buf(),
            class => folder.join(class),
        };
        std::fs::create_dir_all(&class).unwrap();
        let (width, height) = (9 + i % 7, 8 + i % 5);
        let level = |x: u32, y: u32| (i % 2 * 160 + 5 * (x + y) + i % 20) as u8;
        match i % 4 {
            0 => image::GrayImage::from_fn(width, height, |x, y| image::Luma([level(x, y)]))
                .save(class.join(format!("{i:03}.png"))),
            1 => image::RgbaImage::from_fn(width, height, |x, y| {
                image::Rgba([level(x, y), 100, 30, 200])
            })
            .save(class.join(format!("{i:03}.png"))),
            _ => image::RgbImage::from_fn(width, height, |x, y| {
                image::Rgb([level(x, y), 50, level(y, x)])
            })
            .save(class.join(format!("{i:03}.jpg"))),
        }
        .unwrap();
    }
}

fn weights(model: &Path) -> Vec<u8> {
    std::fs::read(model.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

const TINY: [&str; 6] = ["images", "train", "--preset", "tiny", "--steps", "6"];

fn train<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&TINY[..], &["--out", out], more].concat()
}

#[test]
fn pictures_of_mixed_sizes_and_broken_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("photos"), ["dark", "light"], 160);
    let cut = std::fs::read(at.join("photos/dark/002.jpg")).unwrap();
    std::fs::write(at.join("photos/dark/cut.jpg"), &cut[..cut.len() / 2]).unwrap();
    std::fs::write(at.join("photos/light/page.jpg"), "<html>").unwrap();
    let photos = ["--data", "photos"];
    let sized = ["--data", "photos/", "--size", "8"];

    refuses(&train("m", &photos), at, 1, &["pixels", "--size 32"]);
    let broken = [
        "2 of 162 files",
        "dark/cut.jpg",
        "light/page.jpg",
        "--broken skip",
    ];
    refuses(&train("m", &sized), at, 1, &broken);
    let odd = [&photos[..], &["--size", "9", "--broken", "skip", "-q"]].concat();
    refuses(&train("m", &odd), at, 2, &["9 pixels", "a multiple of 2"]);
    assert!(!at.join("m").exists());

    let skip = [&sized[..], &["--broken", "skip", "--seed", "5"]].concat();
    let json = [&skip[..], &["--json"]].concat();
    let (found, said) = succeeds(&train("m", &json), at);
    for name in ["cut.jpg", "page.jpg"] {
        assert!(said.contains(name), "no {name} in {said}");
    }
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["skipped"], 2, "{found}");
    let card = std::fs::read_to_string(at.join("m/README.md")).unwrap();
    assert!(card.contains("| photos, ") && card.contains("dark, light"));
    assert!(card.contains("8 x 8 pixels and 3 channels"), "{card}");
    // The memory does not change the model, the mirror and the fit do.
    let other = |out: &str, more: &[&str]| {
        succeeds(&train(out, &[&skip[..], more].concat()), at);
        weights(&at.join(out))
    };
    assert_eq!(weights(&at.join("m")), other("none", &["--memory", "0"]));
    assert_ne!(weights(&at.join("m")), other("flipped", &["--flip"]));
    assert_ne!(weights(&at.join("m")), other("padded", &["--fit", "pad"]));

    // What was noted holds, from another folder, too.
    let model = at.join("m");
    let model = model.to_str().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let sample = ["images", "sample", "--model", model, "-n", "4", "-q"];
    let sample = [&sample[..], &["--steps", "2", "--out", "grid.png"]].concat();
    succeeds(&sample, elsewhere.path());
    let evaluate = ["images", "evaluate", "--model", model, "-n", "8", "-q"];
    let evaluate = [&evaluate[..], &["--steps", "2"]].concat();
    let (found, _) = succeeds(&evaluate, elsewhere.path());
    assert!(found.contains("floor"), "{found}");
    let with = |more: &[&'static str]| [&evaluate[..], more].concat();
    let size = ["--size: 16", "8, as the model was trained with"];
    refuses(&with(&["--size", "16"]), at, 2, &size);
    refuses(&with(&["--data", "photos", "--grey"]), at, 2, &["--grey"]);
    refuses(&with(&["--data", "nowhere"]), at, 1, &["nowhere"]);

    // A run goes on with the same images, wherever they are, and with no others.
    let resume = ["images", "train", "--resume", "-q", "--out", model];
    succeeds(&resume, elsewhere.path());
    std::fs::rename(at.join("photos"), at.join("moved")).unwrap();
    refuses(&resume, at, 1, &["data.toml", "photos", "--data"]);
    let moved = [&resume[..], &["--data", "moved"]].concat();
    succeeds(&moved, at);
    succeeds(&resume, at);
    let before = weights(&at.join("m"));
    std::fs::remove_dir_all(at.join("moved/light")).unwrap();
    pictures(&at.join("moved"), ["shade", "light"], 60);
    std::fs::remove_dir_all(at.join("moved/shade")).unwrap();
    let differ = ["training images that differ", "the run began with"];
    refuses(&resume, at, 1, &differ);
    refuses(
        &[&resume[..], &["--data", "digits"]].concat(),
        at,
        1,
        &differ,
    );
    refuses(
        &[&resume[..], &["--data", "moved", "--fit", "stretch"]].concat(),
        at,
        2,
        &["--fit: stretch", "crop"],
    );
    assert_eq!(before, weights(&at.join("m")));
}

#[test]
fn a_folder_without_classes_and_a_mirrored_run_that_is_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("photos"), ["", ""], 30);
    let args = |out| {
        let steps = ["images", "train", "--preset", "tiny", "--steps", "40", "-q"];
        let data = ["--data", "photos", "--size", "8", "--grey", "--flip"];
        let more = ["--memory", "0", "--out", out, "--validate-every", "0"];
        [&steps[..], &data, &more].concat()
    };
    succeeds(&args("whole"), at);
    let card = std::fs::read_to_string(at.join("whole/README.md")).unwrap();
    assert!(card.contains("none (unconditional)") && card.contains("1 channel."));
    // About a step at a time at first, then the rest.
    let stopped = [&args("stopped")[..], &["--minutes", "0.0001"]].concat();
    let (said, _) = succeeds(&stopped, at);
    assert!(said.contains("--resume goes on"), "{said}");
    let resume = ["images", "train", "--resume", "-q", "--out", "stopped"];
    let soon = ["--minutes", "0.0005", "--validate-every", "0"];
    succeeds(&[&resume[..], &soon].concat(), at);
    let rest = ["--minutes", "10", "--validate-every", "0", "--memory", "1"];
    succeeds(&[&resume[..], &rest].concat(), at);
    assert_eq!(weights(&at.join("stopped")), weights(&at.join("whole")));
    refuses(
        &["images", "evaluate", "--model", "whole", "--rgb"],
        at,
        2,
        &["--grey, --rgb: rgb", "grey, as the model was trained with"],
    );
}

#[test]
fn a_model_without_a_note_needs_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    succeeds(&train("m", &["-q"]), at);
    std::fs::remove_file(at.join("m/run/data.toml")).unwrap();
    let evaluate = ["images", "evaluate", "--model", "m"];
    refuses(&evaluate, at, 2, &["data.toml", "--data"]);
    std::fs::write(at.join("m/run/data.toml"), "images = 3\n[dato]").unwrap();
    refuses(&evaluate, at, 1, &["data.toml", "dato"]);
}
