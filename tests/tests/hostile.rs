//! Malformed files of every format: no panic, no hang, no memory beyond what the file justifies.
//!
//! `cargo xtask hostile` is the long form of the first test.

// Helpers of tests may stop a test as its body may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use diffusion_tests::hostile::{files, seeds};
use diffusion_tests::targets::{Bench, Format, Verdict};

#[cfg(target_os = "linux")]
#[test]
fn the_readers_survive_sixty_files_of_every_format() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_hostile"))
        .args(["--files", "60", "--seed", "1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}{complaint}");
    for format in Format::ALL {
        let line = text.lines().find(|line| line.starts_with(format.name()));
        let numbers: Vec<usize> = line
            .expect(&text)
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        // Files; each of them was refused or accepted.
        assert!(numbers[0] >= 60, "{text}");
        assert_eq!(numbers[0], numbers[1] + numbers[2], "{text}");
        assert!(numbers[1] >= 10, "{text}");
    }
}

/// The formats that have a reader of their own.
const READ: [Format; 8] = [
    Format::Png,
    Format::Jpeg,
    Format::Idx,
    Format::Safetensors,
    Format::Pth,
    Format::Json,
    Format::Toml,
    Format::Manifest,
];

#[test]
fn what_the_files_are_made_from_is_accepted() {
    let bench = Bench::new().unwrap();
    for format in READ {
        for seed in seeds(format, &bench).unwrap() {
            let verdict = bench.feed(format, &seed.name, &seed.bytes).unwrap();
            assert_eq!(verdict, Verdict::Accepted, "{format:?} {}", seed.name);
        }
    }
}

#[test]
fn the_files_depend_on_the_seed_and_differ_from_each_other() {
    let bench = Bench::new().unwrap();
    for format in Format::ALL {
        let made = |seed| files(format, 300, seed, &bench).unwrap();
        let bytes = |seed| made(seed).into_iter().map(|s| s.bytes).collect::<Vec<_>>();
        let (one, two) = (bytes(1), bytes(2));
        assert!(one == bytes(1), "{format:?}");
        assert!(one.len() >= 300 && one != two, "{format:?}");
        let distinct: BTreeSet<&[u8]> = one.iter().map(Vec::as_slice).collect();
        assert!(
            distinct.len() * 10 >= one.len() * 8,
            "{format:?} {}",
            distinct.len()
        );
    }
}

#[test]
fn a_refusal_says_what_was_found_in_one_short_text() {
    let bench = Bench::new().unwrap();
    for format in READ {
        for sample in files(format, 40, 3, &bench).unwrap().into_iter().take(40) {
            let verdict = bench.feed(format, &sample.name, &sample.bytes).unwrap();
            if let Verdict::Refused(text) = verdict {
                assert!(
                    (20..4000).contains(&text.len()),
                    "{format:?} {}: {text}",
                    sample.what
                );
            }
        }
    }
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

/// A corpus folder holds the formats' valid files and the first small malformed ones.
/// `WRITE_BAD_FILES=1` writes those that are missing; findings of a fuzzer are added by hand.
#[test]
fn the_corpus_of_the_fuzz_targets_replays() {
    let bench = Bench::new().unwrap();
    for format in Format::ALL {
        let folder = corpus().join(format.name());
        if std::env::var_os("WRITE_BAD_FILES").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            let mut all = seeds(format, &bench).unwrap();
            let small = files(format, 400, 0, &bench).unwrap();
            all.extend(
                small
                    .into_iter()
                    .filter(|s| s.bytes.len() <= 2048)
                    .step_by(29)
                    .take(12),
            );
            for (number, sample) in all.iter().enumerate() {
                let name = format!("{number:02}-{}", sample.name);
                std::fs::write(folder.join(name), &sample.bytes).unwrap();
            }
        }
        let mut replayed = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes.len() <= 16 << 10, "{} is not small", path.display());
            diffusion_tests::targets::fuzz(format, &bytes);
            replayed += 1;
        }
        assert!(replayed >= 10, "{} files in {}", replayed, folder.display());
    }
}

#[test]
fn every_bad_file_goes_through_the_fuzz_targets() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bad");
    for format in [Format::Png, Format::Jpeg, Format::Idx] {
        for entry in std::fs::read_dir(folder.join(format.name())).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            diffusion_tests::targets::fuzz(format, &bytes);
        }
    }
    assert_eq!(Format::from_str("png", false), Ok(Format::Png));
}
