//! Malformed files of every format: no panic, no hang, no memory beyond what the file justifies.
//!
//! `cargo xtask hostile` is the long form of the first test.

// Helpers of tests may stop a test as its body may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use diffusion_tests::hostile::{Maker, Sample, seeds};
use diffusion_tests::targets::{Bench, Format, Verdict};

/// Row H1 and H5 of the table of promises.
#[cfg(target_os = "linux")]
#[test]
fn five_hundred_files_of_every_format_are_refused() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_hostile"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{text}");
    assert!(output.status.success(), "{text}{complaint}");
    for format in Format::ALL {
        let line = text.lines().find(|line| line.starts_with(format.name()));
        let numbers: Vec<usize> = line
            .expect(&text)
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        let [files, refused, accepted, ..] = numbers[..] else {
            panic!("{text}");
        };
        assert!(refused >= 500, "{text}");
        // Whatever was not refused was accepted: nothing was lost on the way.
        assert_eq!(files, refused + accepted, "{text}");
    }
}

#[test]
fn what_the_files_are_made_from_is_accepted() {
    let bench = Bench::new().unwrap();
    for format in Format::ALL {
        for seed in seeds(format, &bench).unwrap() {
            let verdict = bench.feed(format, &seed.name, &seed.bytes).unwrap();
            assert_eq!(verdict, Verdict::Accepted, "{format:?} {}", seed.name);
        }
    }
}

fn made(format: Format, seed: u64, count: usize, bench: &Bench) -> Vec<Sample> {
    let maker = Maker::new(format, seed, bench).unwrap();
    let count = count.max(maker.thought_of() + 50);
    maker.take(count).collect()
}

#[test]
fn the_files_depend_on_the_seed_and_differ_from_each_other() {
    let bench = Bench::new().unwrap();
    for format in Format::ALL {
        let bytes = |seed| -> Vec<(String, Vec<u8>)> {
            let files = made(format, seed, 300, &bench);
            files.into_iter().map(|s| (s.name, s.bytes)).collect()
        };
        let (one, two) = (bytes(1), bytes(2));
        assert!(one == bytes(1), "{format:?}");
        assert!(one != two, "{format:?}");
        let distinct: BTreeSet<_> = one.iter().collect();
        assert_eq!(distinct.len(), one.len(), "{format:?}");
    }
}

/// Row H3: no beginning of a valid file is taken for the whole of it.
#[test]
fn every_prefix_of_every_valid_file_is_refused() {
    let bench = Bench::new().unwrap();
    for format in Format::ALL {
        let mut tried = 0;
        for seed in seeds(format, &bench).unwrap() {
            // JSON and TOML may end in white space, which is no part of what they say; a cut
            // configuration is a shorter configuration, as no TOML file says where it ends.
            let whole = seed.bytes.trim_ascii_end().len();
            for length in 0..whole.min(4096) {
                let bytes = &seed.bytes[..length];
                let what = format!("{format:?} {}: the first {length} bytes", seed.name);
                match bench.feed(format, &seed.name, bytes).unwrap() {
                    Verdict::Refused(_) => {}
                    Verdict::Accepted if format == Format::Toml => {}
                    // Two records of CIFAR-10, cut after the first, are one record.
                    Verdict::Accepted if format == Format::Cifar && length == 3073 => {}
                    other => panic!("{what}: {other:?}"),
                }
                tried += 1;
            }
        }
        println!("{}: {tried} prefixes", format.name());
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
            let small = made(format, 0, 400, &bench).into_iter();
            let small = small.filter(|s| s.bytes.len() <= 4096);
            all.extend(small.step_by(29).take(12));
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
}
