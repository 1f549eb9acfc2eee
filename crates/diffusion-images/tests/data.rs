//! Folders and IDX files through the public interface: what is read, and what is refused.

// Helpers of tests may stop a test as its body may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::Device;
use diffusion_images::data::{self, Color, Dataset, Options};
use flate2::{Compression, write::GzEncoder};
use image::{GrayImage, Luma, Rgb, RgbImage};
use std::io::Write;
use std::path::Path;

fn grey(path: &Path, width: u32, height: u32, value: u8) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    GrayImage::from_pixel(width, height, Luma([value]))
        .save(path)
        .unwrap();
}

fn color(path: &Path, width: u32, height: u32, value: [u8; 3]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(width, height, Rgb(value))
        .save(path)
        .unwrap();
}

fn open(folder: &Path, options: &Options) -> diffusion_core::Result<Dataset> {
    data::open_with(folder.to_str().unwrap(), options)
}

fn refused(folder: &Path, options: &Options, clues: &[&str]) {
    let message = open(folder, options).unwrap_err().to_string();
    for clue in clues {
        assert!(message.contains(clue), "no {clue:?} in: {message}");
    }
}

fn values(data: &Dataset) -> Vec<u8> {
    let (x, _) = data.all(&Device::Cpu).unwrap();
    let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    x.iter()
        .map(|v| (127.5 * (v + 1.0)).round() as u8)
        .collect()
}

#[test]
fn files_are_read_in_the_order_of_their_names() {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in [("b.png", 2), ("a.png", 1), ("c10.png", 3), ("c9.png", 4)] {
        grey(&folder.path().join(name), 2, 1, value);
    }
    let data = open(folder.path(), &Options::default()).unwrap();
    assert_eq!(
        (data.len(), data.channels(), data.height(), data.width()),
        (4, 1, 1, 2)
    );
    assert_eq!(values(&data), [1, 1, 2, 2, 3, 3, 4, 4]);
    assert!(data.labels().is_none() && data.classes().is_empty());
}

#[test]
fn sub_folders_are_classes() {
    let folder = tempfile::tempdir().unwrap();
    grey(&folder.path().join("dog/x.png"), 1, 1, 9);
    grey(&folder.path().join("cat/y.png"), 1, 1, 7);
    grey(&folder.path().join("cat/z.png"), 1, 1, 8);
    let data = open(folder.path(), &Options::default()).unwrap();
    assert_eq!(data.classes(), ["cat", "dog"]);
    assert_eq!(data.labels().unwrap(), [0, 0, 1]);
    assert_eq!(values(&data), [7, 8, 9]);
    grey(&folder.path().join("cat/deep/w.png"), 1, 1, 8);
    refused(
        folder.path(),
        &Options::default(),
        &["deep", "inside a class folder", "images only"],
    );
    std::fs::remove_dir_all(folder.path().join("cat/deep")).unwrap();
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    refused(
        folder.path(),
        &Options::default(),
        &["empty", "without images", "remove"],
    );
    std::fs::remove_dir(folder.path().join("empty")).unwrap();
    grey(&folder.path().join("stray.png"), 1, 1, 0);
    refused(
        folder.path(),
        &Options::default(),
        &["stray.png", "beside class folders"],
    );
}

#[test]
fn one_size_or_a_resize() {
    let folder = tempfile::tempdir().unwrap();
    grey(&folder.path().join("a.png"), 4, 4, 100);
    grey(&folder.path().join("b.png"), 9, 5, 200);
    refused(
        folder.path(),
        &Options::default(),
        &["b.png", "9x5", "4x4", "a.png", "--size"],
    );
    let with = |resize| Options {
        resize: Some(resize),
        ..Options::default()
    };
    let data = open(folder.path(), &with(2)).unwrap();
    assert_eq!((data.height(), data.width()), (2, 2));
    assert_eq!(values(&data), [100, 100, 100, 100, 200, 200, 200, 200]);
    refused(folder.path(), &with(0), &["size: 0", "1 to 4096"]);
    refused(folder.path(), &with(5000), &["size: 5000"]);
}

#[test]
fn grey_becomes_colour_when_a_colour_file_appears() {
    let folder = tempfile::tempdir().unwrap();
    grey(&folder.path().join("a.png"), 2, 1, 5);
    color(&folder.path().join("b.png"), 2, 1, [255, 0, 0]);
    grey(&folder.path().join("c.png"), 2, 1, 6);
    let with = |color| Options {
        color,
        ..Options::default()
    };
    let expected = [5, 5, 5, 5, 5, 5, 255, 255, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6];
    assert_eq!(
        values(&open(folder.path(), &with(Color::Auto)).unwrap()),
        expected
    );
    assert_eq!(
        values(&open(folder.path(), &with(Color::Rgb)).unwrap()),
        expected
    );
    let data = open(folder.path(), &with(Color::Grey)).unwrap();
    assert_eq!(values(&data), [5, 5, 76, 76, 6, 6]);
}

#[test]
fn clutter_is_passed_over_and_strangers_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    refused(
        folder.path(),
        &Options::default(),
        &["without images", "PNG or JPEG"],
    );
    for name in [
        ".DS_Store",
        "Thumbs.db",
        "readme.TXT",
        "LICENSE",
        "notes.md",
        "desktop.ini",
    ] {
        std::fs::write(file(name), "text").unwrap();
    }
    refused(folder.path(), &Options::default(), &["without images"]);
    grey(&file("a.png"), 3, 3, 1);
    assert_eq!(open(folder.path(), &Options::default()).unwrap().len(), 1);
    std::fs::write(file("b.mp4"), [0, 0, 0, 24, b'f', b't', b'y', b'p']).unwrap();
    refused(
        folder.path(),
        &Options::default(),
        &["b.mp4", "00 00 00 18", "PNG or JPEG", "remove"],
    );
    std::fs::remove_file(file("b.mp4")).unwrap();
    std::fs::write(file("text.png"), "not a picture").unwrap();
    refused(
        folder.path(),
        &Options::default(),
        &["text.png", "a text file", "PNG or JPEG"],
    );
}

#[test]
fn content_decides_not_the_name() {
    let folder = tempfile::tempdir().unwrap();
    grey(&folder.path().join("a.png"), 3, 2, 50);
    std::fs::rename(folder.path().join("a.png"), folder.path().join("a.jpeg")).unwrap();
    let data = open(folder.path(), &Options::default()).unwrap();
    assert_eq!(values(&data), [50; 6]);
}

#[test]
fn train_and_test_folders_are_a_split() {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in [
        ("train/b/1.png", 1),
        ("train/a/2.png", 2),
        ("test/a/3.png", 3),
    ] {
        grey(&folder.path().join(name), 1, 1, value);
    }
    let spec = folder.path().to_str().unwrap();
    let message = data::splits(spec, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("classes [a]") && message.contains("[a, b]"),
        "{message}"
    );
    grey(&folder.path().join("test/b/4.png"), 1, 1, 4);
    let splits = data::splits(spec, &Options::default()).unwrap();
    assert_eq!(
        (values(&splits.train), values(&splits.test)),
        (vec![2, 1], vec![3, 4])
    );
    assert_eq!(values(&data::open(spec).unwrap()), [2, 1, 3, 4]);
}

#[test]
fn other_sources_are_split_by_index() {
    let splits = data::splits("digits", &Options::default()).unwrap();
    assert_eq!((splits.train.len(), splits.test.len()), (1438, 359));
    let options = Options {
        resize: Some(8),
        ..Options::default()
    };
    let message = data::open_with("digits", &options).unwrap_err().to_string();
    assert!(message.contains("folder of images only"), "{message}");
    let message = data::open("no/such/data").unwrap_err().to_string();
    assert!(
        message.contains("no/such/data") && message.contains("`digits`"),
        "{message}"
    );
}

#[cfg(unix)]
#[test]
fn odd_names_links_and_pipes() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let odd = |bytes: &[u8]| folder.path().join(std::ffi::OsStr::from_bytes(bytes));
    grey(&odd(b"a.png"), 1, 1, 1);
    std::fs::rename(odd(b"a.png"), odd(b"\xff\xfe.png")).unwrap();
    assert_eq!(open(folder.path(), &Options::default()).unwrap().len(), 1);
    std::os::unix::fs::symlink("nowhere.png", odd(b"link.png")).unwrap();
    refused(folder.path(), &Options::default(), &["link.png"]);
    std::fs::remove_file(odd(b"link.png")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(odd(b"pipe.png"))
        .status();
    if made.is_ok_and(|status| status.success()) {
        refused(
            folder.path(),
            &Options::default(),
            &["pipe.png", "a pipe", "a regular file"],
        );
        let pipe = odd(b"pipe.png");
        assert!(
            data::open(pipe.to_str().unwrap())
                .unwrap_err()
                .to_string()
                .contains("a pipe")
        );
        std::fs::remove_file(pipe).unwrap();
    }
    std::fs::remove_file(odd(b"\xff\xfe.png")).unwrap();
    grey(&odd(b"cat/x.png"), 1, 1, 1);
    std::fs::rename(odd(b"cat"), odd(b"c\xff")).unwrap();
    refused(folder.path(), &Options::default(), &["not UTF-8", "rename"]);
}

#[test]
fn a_rotated_photograph_is_upright() {
    // A minimal Exif block: little-endian TIFF with one entry, Orientation = 6 (turn right).
    let exif = [
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0".as_slice(),
        &[0; 4],
    ]
    .concat();
    let mut jpeg = Vec::new();
    let picture = RgbImage::from_fn(16, 8, |x, _| Rgb(if x < 8 { [0; 3] } else { [255; 3] }));
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100);
    picture.write_with_encoder(encoder).unwrap();
    let segment = [
        &[0xff, 0xe1],
        &(exif.len() as u16 + 2).to_be_bytes()[..],
        &exif,
    ]
    .concat();
    jpeg.splice(2..2, segment);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.jpg"), jpeg).unwrap();
    let data = open(folder.path(), &Options::default()).unwrap();
    assert_eq!((data.height(), data.width()), (16, 8));
    let values = values(&data);
    assert!(values[0] < 30 && values[15 * 8] > 225, "left became top");
}

#[test]
fn gzip_that_unpacks_absurdly_is_refused_and_a_plain_one_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, count: u32, side: u32, level| {
        let path = folder.path().join(name);
        let mut gz = GzEncoder::new(std::fs::File::create(&path).unwrap(), level);
        gz.write_all(&[0, 0, 8, 3]).unwrap();
        for size in [count, side, side] {
            gz.write_all(&size.to_be_bytes()).unwrap();
        }
        for _ in 0..count {
            gz.write_all(&vec![0; (side * side) as usize]).unwrap();
        }
        gz.finish().unwrap();
        path
    };
    // 80 MiB of zeros in some 80 kB: a thousand to one.
    let bomb = write("bomb.gz", 80, 1024, Compression::best());
    let length = std::fs::metadata(&bomb).unwrap().len();
    assert!(length < 200_000, "{length}");
    let message = data::open(bomb.to_str().unwrap()).unwrap_err().to_string();
    for clue in [
        "bomb.gz",
        "80x1024x1024",
        "at most 200 bytes for each",
        "unpack the file first",
    ] {
        assert!(message.contains(clue), "no {clue:?} in: {message}");
    }
    // As small as this it does no harm.
    let dark = write("dark.gz", 3, 64, Compression::best());
    assert_eq!(data::open(dark.to_str().unwrap()).unwrap().len(), 3);
}

#[test]
fn a_folder_of_idx_files_is_found_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let idx = |name: &str, kind: u8, sizes: &[u32], values: &[u8]| {
        let mut bytes = vec![0, 0, 8, kind];
        bytes.extend(sizes.iter().flat_map(|n| n.to_be_bytes()));
        bytes.extend(values);
        std::fs::write(folder.path().join(name), bytes).unwrap();
    };
    idx("train-images-idx3-ubyte", 3, &[2, 1, 2], &[1, 2, 3, 4]);
    idx("train-labels-idx1-ubyte", 1, &[2], &[1, 0]);
    idx("t10k-images-idx3-ubyte", 3, &[1, 1, 2], &[5, 6]);
    idx("t10k-labels-idx1-ubyte", 1, &[1], &[1]);
    let spec = folder.path().to_str().unwrap();
    let splits = data::splits(spec, &Options::default()).unwrap();
    assert_eq!(values(&splits.train), [1, 2, 3, 4]);
    assert_eq!(values(&splits.test), [5, 6]);
    assert_eq!(splits.train.labels().unwrap(), [1, 0]);
}
