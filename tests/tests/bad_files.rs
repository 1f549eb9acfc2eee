//! Malformed image files are refused with a clear message: no panic, no half-read result, no
//! memory beyond what the file justifies, no wait.

// Helpers of tests may stop a test as its body may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../bad/corpus.rs"]
mod corpus;

use corpus::{IMAGES, LABELS, cases, crc32, gzip, idx, png};
use diffusion_images::data::{self, Dataset, Options};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn bad(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bad").join(name)
}

fn seed(name: &str) -> Vec<u8> {
    std::fs::read(bad("seeds").join(name)).unwrap()
}

/// A folder in which one file after another is tried.
struct Bench {
    folder: tempfile::TempDir,
    tried: usize,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            tried: 0,
        }
    }

    /// Reads bytes as an IDX file or, for pictures, as the only file of a folder.
    fn read(&mut self, name: &str, bytes: &[u8]) -> diffusion_core::Result<Dataset> {
        let file = self.folder.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        self.tried += 1;
        let picture = name.ends_with(".png") || name.ends_with(".jpg");
        let source = if picture { self.folder.path() } else { &file };
        let start = Instant::now();
        let result = data::open(source.to_str().unwrap());
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{name}: {:?}",
            start.elapsed()
        );
        std::fs::remove_file(&file).unwrap();
        result
    }
}

fn pixels(data: &Dataset) -> Vec<f32> {
    let (x, _) = data.all(&candle_core::Device::Cpu).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn corpus_files_are_those_of_the_generator() {
    for case in cases() {
        let path = bad(case.name);
        if std::env::var_os("WRITE_BAD_FILES").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &case.bytes).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), case.bytes, "{}", case.name);
    }
}

#[test]
fn every_message_names_file_finding_and_remedy() {
    let mut bench = Bench::new();
    for case in cases() {
        let name = case.name.rsplit_once('/').unwrap().1;
        let message = bench.read(name, &case.bytes).unwrap_err().to_string();
        for clue in case.clues.iter().chain(&[name, "expected", "("]) {
            assert!(
                message.contains(clue),
                "{}: no {clue:?} in: {message}",
                case.name
            );
        }
        assert!(!message.contains('\n'), "{message:?}");
    }
    assert!(bench.tried >= 50, "{}", bench.tried);
}

#[test]
fn every_prefix_of_a_good_file_is_refused() {
    let mut bench = Bench::new();
    let good = idx(IMAGES, &[3, 4, 5], &(0..60).collect::<Vec<u8>>());
    let mut files = vec![
        ("a".to_string(), good.clone()),
        ("a.gz".to_string(), gzip(&good)),
    ];
    for name in SEEDS {
        files.push((name.to_string(), seed(name)));
    }
    for (name, bytes) in files {
        assert!(bytes.len() <= 4096, "{name}");
        assert!(bench.read(&name, &bytes).is_ok(), "{name}");
        for length in 0..bytes.len() {
            let result = bench.read(&name, &bytes[..length]);
            assert!(
                result.is_err(),
                "{name}: the first {length} of {} bytes",
                bytes.len()
            );
        }
    }
    assert!(bench.tried > 2000, "{}", bench.tried);
}

const SEEDS: [&str; 7] = [
    "palette.png",
    "alpha.png",
    "grey16.png",
    "one-bit.png",
    "color.jpg",
    "grey.jpg",
    "progressive.jpg",
];

#[test]
fn seeds_decode_to_the_documented_values() {
    let mut bench = Bench::new();
    let mut shape = |name: &str| {
        let data = bench.read(name, &seed(name)).unwrap();
        (
            (data.channels(), data.height(), data.width()),
            pixels(&data),
        )
    };
    assert_eq!(shape("palette.png").0, (3, 4, 5));
    assert_eq!(shape("alpha.png").0, (3, 3, 4));
    assert_eq!(shape("color.jpg").0, (3, 9, 13));
    assert_eq!(shape("grey.jpg").0, (1, 9, 13));
    // Baseline and progressive code the same coefficients.
    assert_eq!(shape("color.jpg"), shape("progressive.jpg"));
    let (one_bit, values) = shape("one-bit.png");
    assert_eq!(one_bit, (1, 4, 4));
    assert!(values.iter().all(|v| v.abs() == 1.0));
    let (grey16, values) = shape("grey16.png");
    assert_eq!(grey16, (1, 3, 4));
    for (i, value) in values.iter().enumerate() {
        // The seed holds the bytes 0, 1, 2, … as little-endian samples.
        let sample = (2 * i + 256 * (2 * i + 1)) as f64;
        let expected = (sample / 257.0).round() / 127.5 - 1.0;
        assert!(
            (f64::from(*value) - expected).abs() < 1e-6,
            "{i}: {value}, {expected}"
        );
    }
}

#[test]
fn every_value_of_every_png_header_byte() {
    // Two rows of three pixels, each row led by filter 0.
    let row = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90];
    let good = png(3, 2, 8, 2, &[row, row].concat());
    let mut bench = Bench::new();
    let original = pixels(&bench.read("a.png", &good).unwrap());
    // Length, name, content and checksum of IHDR.
    for at in 8..33 {
        for value in 0..=255 {
            let mut bytes = good.clone();
            bytes[at] = value;
            let changed = bytes != good;
            assert_eq!(
                bench.read("a.png", &bytes).is_err(),
                changed,
                "byte {at} = {value}"
            );
            if changed && (16..29).contains(&at) {
                // With a checksum that fits only the content decides.
                let crc = crc32(&bytes[12..29]);
                bytes[29..33].copy_from_slice(&crc.to_be_bytes());
                if let Ok(data) = bench.read("a.png", &bytes) {
                    let width = u32::from_be_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]);
                    assert_eq!(data.width(), width as usize, "byte {at} = {value}");
                    assert!(pixels(&data).len() <= 3 * original.len());
                }
            }
        }
    }
    assert!(bench.tried > 9000, "{}", bench.tried);
}

#[test]
fn every_value_of_every_idx_header_byte() {
    let good = idx(IMAGES, &[2, 2, 3], &(0..12).collect::<Vec<u8>>());
    let packed = gzip(&good);
    let mut bench = Bench::new();
    let original = pixels(&bench.read("a", &good).unwrap());
    for at in 0..16 {
        for value in 0..=255 {
            let mut bytes = good.clone();
            bytes[at] = value;
            assert_eq!(
                bench.read("a", &bytes).is_err(),
                bytes != good,
                "byte {at} = {value}"
            );
            let inside = bench.read("a.gz", &gzip(&bytes));
            assert_eq!(inside.is_err(), bytes != good, "packed byte {at} = {value}");
        }
    }
    // A change of the gzip file itself is noticed, or is in its time stamp or the filling bits that
    // follow the three header bits of a stored block.
    for at in 0..packed.len() {
        for bit in 0..8 {
            let mut bytes = packed.clone();
            bytes[at] ^= 1 << bit;
            if let Ok(data) = bench.read("a.gz", &bytes) {
                assert!(
                    pixels(&data) == original && at <= 10,
                    "byte {at}, bit {bit}"
                );
            }
        }
    }
    assert!(bench.tried > 8000, "{}", bench.tried);
}

#[test]
fn changed_jpeg_bytes_never_panic() {
    let mut bench = Bench::new();
    let mut refused = 0;
    for name in ["color.jpg", "grey.jpg", "progressive.jpg"] {
        let good = seed(name);
        for at in 0..good.len() {
            for value in [
                0,
                1,
                0x7f,
                0x80,
                0xff,
                good[at] ^ 1,
                good[at].wrapping_add(1),
            ] {
                let mut bytes = good.clone();
                bytes[at] = value;
                refused += usize::from(bench.read("a.jpg", &bytes).is_err());
            }
        }
    }
    assert!(refused >= 500, "{refused} of {}", bench.tried);
}

#[test]
fn labels_must_belong_to_the_images() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let images = file("train-images-idx3-ubyte");
    std::fs::write(&images, idx(IMAGES, &[2, 1, 2], &[0, 255, 255, 0])).unwrap();
    let labels = file("train-labels-idx1-ubyte.gz");
    let open = || data::open(images.to_str().unwrap());
    assert_eq!(open().unwrap().labels(), None);
    std::fs::write(&labels, gzip(&idx(LABELS, &[2], &[7, 3]))).unwrap();
    let data = open().unwrap();
    assert_eq!(
        (data.labels(), data.classes().len()),
        (Some(&[7, 3][..]), 8)
    );
    for (bytes, clues) in [
        (
            idx(LABELS, &[3], &[0, 1, 2]),
            ["3 labels", "2, one for each image"],
        ),
        (
            idx(LABELS, &[u32::MAX], &[0, 1]),
            ["4294967295", "4294967303 bytes instead of 10"],
        ),
        (
            idx(IMAGES, &[2, 1, 1], &[0, 1]),
            ["00 00 08 03", "not as labels"],
        ),
        (vec![], ["empty file", "magic"]),
    ] {
        std::fs::write(&labels, bytes).unwrap();
        let message = open().unwrap_err().to_string();
        for clue in clues.iter().chain(&["train-labels-idx1-ubyte.gz"]) {
            assert!(message.contains(clue), "no {clue:?} in: {message}");
        }
    }
    // The official test images are found beside the training images.
    std::fs::remove_file(&labels).unwrap();
    let test = idx(IMAGES, &[1, 1, 2], &[5, 5]);
    std::fs::write(file("t10k-images-idx3-ubyte.gz"), gzip(&test)).unwrap();
    let splits = data::splits(images.to_str().unwrap(), &Options::default()).unwrap();
    assert_eq!((splits.train.len(), splits.test.len()), (2, 1));
    std::fs::write(
        file("t10k-images-idx3-ubyte.gz"),
        idx(IMAGES, &[1, 2, 1], &[5, 5]),
    )
    .unwrap();
    let message = data::splits(images.to_str().unwrap(), &Options::default()).unwrap_err();
    assert!(message.to_string().contains("1x2x1"), "{message}");
}

/// Runs in a process of its own: reads one file and prints by how much the peak memory grew.
#[test]
fn memory_child() {
    let Ok(source) = std::env::var("BAD_FILE") else {
        return;
    };
    let before = peak_kib();
    let message = data::open(&source).unwrap_err();
    println!("grew by {} KiB: {message}", peak_kib() - before);
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap_or(0)
}

/// 64 MiB and twice the file's length, with 1 GiB of address space.
#[cfg(target_os = "linux")]
#[test]
fn absurd_claims_take_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut sources = Vec::new();
    for name in cases().iter().map(|case| case.name) {
        if ["absurd", "65535", "20000", "2147483647", "64-mib", "claims"]
            .iter()
            .any(|word| name.contains(word))
        {
            sources.push((bad(name), name.contains("idx/")));
        }
    }
    assert!(sources.len() >= 10, "{}", sources.len());
    for (i, (file, single)) in sources.iter().enumerate() {
        let source = if *single {
            file.clone()
        } else {
            let own = folder.path().join(i.to_string());
            std::fs::create_dir(&own).unwrap();
            std::fs::copy(file, own.join(file.file_name().unwrap())).unwrap();
            own
        };
        let length = std::fs::metadata(file).unwrap().len();
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -v 1048576 && exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "memory_child", "--nocapture"])
            .env("BAD_FILE", &source)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}: {text}", file.display());
        let grew = text
            .split("grew by ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let grew: u64 = grew.and_then(|number| number.parse().ok()).expect(&text);
        assert!(
            grew * 1024 <= (64 << 20) + 2 * length,
            "{}: {text}",
            file.display()
        );
    }
}
