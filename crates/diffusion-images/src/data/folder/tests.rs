//! Broken files, fits and backgrounds of a folder.

use super::super::{Fit, Pixels, open_import, splits, splits_import};
use super::*;
use image::{GrayImage, Luma, LumaA, Rgba, RgbaImage};

fn grey(path: &Path, width: u32, height: u32, value: u8) {
    let picture = GrayImage::from_fn(width, height, |x, _| Luma([value.wrapping_add(x as u8)]));
    picture.save(path).unwrap();
}

fn values(data: &Dataset) -> Vec<u8> {
    match data.pixels() {
        Pixels::Levels { values, .. } => values,
        Pixels::Real(_) => Vec::new(),
    }
}

fn skip() -> Import {
    Import {
        broken: Broken::Skip,
        ..Import::default()
    }
}

#[test]
fn broken_files_stop_the_reading_or_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for class in ["a", "b"] {
        std::fs::create_dir(file(class)).unwrap();
        grey(&file(&format!("{class}/1.png")), 2, 1, 10);
    }
    grey(&file("b/3.png"), 2, 1, 20);
    let whole = std::fs::read(file("b/3.png")).unwrap();
    std::fs::write(file("a/2.png"), &whole[..whole.len() - 3]).unwrap();
    std::fs::write(file("b/2.jpg"), "no picture").unwrap();
    let message = import(folder.path(), &Import::default())
        .unwrap_err()
        .to_string();
    assert!(message.contains("2.png"), "{message}");
    let (data, skipped) = open_import(folder.path().to_str().unwrap(), &skip()).unwrap();
    assert_eq!(values(&data), [10, 11, 10, 11, 20, 21]);
    assert_eq!(data.labels().unwrap(), [0, 1, 1]);
    let names: Vec<_> = skipped.iter().map(|s| s.file.clone()).collect();
    assert_eq!(names, [file("a/2.png"), file("b/2.jpg")]);
    assert!(skipped[0].reason.contains("2.png") && skipped[1].reason.contains("a text file"));
    // A file of another size is not broken.
    grey(&file("b/4.png"), 3, 1, 0);
    let message = import(folder.path(), &skip()).unwrap_err().to_string();
    assert!(message.contains("3x1"), "{message}");
    for name in ["a/1.png", "b/1.png", "b/3.png", "b/4.png"] {
        std::fs::write(file(name), "gone").unwrap();
    }
    let message = import(folder.path(), &skip()).unwrap_err().to_string();
    assert!(
        message.contains("6 broken files") && message.contains("1.png"),
        "{message}"
    );
}

#[test]
fn every_cut_of_a_picture_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let (good, cut) = (folder.path().join("a.png"), folder.path().join("b.png"));
    grey(&good, 5, 3, 7);
    let whole = std::fs::read(&good).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&cut, &whole[..length]).unwrap();
        assert!(
            import(folder.path(), &Import::default()).is_err(),
            "{length}"
        );
        let (data, skipped) = import(folder.path(), &skip()).unwrap();
        assert_eq!((data.len(), skipped.len()), (1, 1), "{length}");
    }
}

#[test]
fn pictures_are_cropped_or_stretched() {
    let folder = tempfile::tempdir().unwrap();
    // Black, white, black: the centre square is white.
    let picture = GrayImage::from_fn(12, 4, |x, _| Luma([255 * u8::from((4..8).contains(&x))]));
    picture.save(folder.path().join("a.png")).unwrap();
    let with = |fit| Import {
        fit,
        ..Import::from(Options {
            resize: Some(4),
            ..Options::default()
        })
    };
    let (cropped, _) = import(folder.path(), &with(Fit::Crop)).unwrap();
    assert_eq!(values(&cropped), [255; 16]);
    let (stretched, _) = import(folder.path(), &with(Fit::Stretch)).unwrap();
    assert_eq!((stretched.height(), stretched.width()), (4, 4));
    let row = &values(&stretched)[..4];
    // Each edge stays dark, the middle bright, and the picture symmetric.
    assert!(row[0] < 20 && row[1] > 100, "{row:?}");
    assert_eq!((row[0], row[1]), (row[3], row[2]));
}

#[test]
fn transparency_shows_the_background() {
    let folder = tempfile::tempdir().unwrap();
    RgbaImage::from_pixel(1, 1, Rgba([100, 0, 255, 51]))
        .save(folder.path().join("a.png"))
        .unwrap();
    image::GrayAlphaImage::from_pixel(1, 1, LumaA([200, 0]))
        .save(folder.path().join("b.png"))
        .unwrap();
    let on = |background| {
        let asked = Import {
            background,
            ..Import::default()
        };
        values(&import(folder.path(), &asked).unwrap().0)
    };
    assert_eq!(on([255; 3]), [224, 204, 255, 255, 255, 255]);
    assert_eq!(on([0; 3]), [20, 0, 51, 0, 0, 0]);
    assert_eq!(on([10, 20, 30]), [28, 16, 75, 10, 20, 30]);
}

#[test]
fn duplicates_of_a_folder_fall_on_one_side() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..40u8 {
        // Each picture twice, under names that are far apart.
        grey(&folder.path().join(format!("a{i}.png")), 2, 2, 5 * i);
        grey(&folder.path().join(format!("z{i}.png")), 2, 2, 5 * i);
    }
    std::fs::write(folder.path().join("q.png"), "broken").unwrap();
    let spec = folder.path().to_str().unwrap();
    assert!(splits(spec, &Options::default()).is_err());
    let (sides, skipped) = splits_import(spec, &skip()).unwrap();
    assert_eq!(
        (skipped.len(), sides.train.len() + sides.test.len()),
        (1, 80)
    );
    let test = values(&sides.test);
    let test: Vec<&[u8]> = test.chunks(4).collect();
    assert!(!test.is_empty());
    assert!(
        values(&sides.train)
            .chunks(4)
            .all(|image| !test.contains(&image))
    );
}

#[test]
fn pictures_are_padded() {
    let folder = tempfile::tempdir().unwrap();
    GrayImage::from_pixel(8, 4, Luma([10]))
        .save(folder.path().join("a.png"))
        .unwrap();
    let with = |side, background| Import {
        fit: Fit::Pad,
        background,
        ..Import::from(Options {
            resize: Some(side),
            ..Options::default()
        })
    };
    let (padded, _) = import(folder.path(), &with(4, [200; 3])).unwrap();
    let (ground, ink) = ([200; 4], [10; 8]);
    assert_eq!(values(&padded), [&ground[..], &ink, &ground].concat());
    // Larger than the picture, and one pixel high.
    assert_eq!(
        import(folder.path(), &with(16, [0; 3])).unwrap().0.height(),
        16
    );
    assert_eq!(
        values(&import(folder.path(), &with(1, [0; 3])).unwrap().0),
        [10]
    );
    // Grey on a coloured ground is colour.
    let (colour, _) = import(folder.path(), &with(4, [1, 2, 3])).unwrap();
    assert_eq!(colour.channels(), 3);
    assert_eq!(values(&colour)[16..24], [2, 2, 2, 2, 10, 10, 10, 10]);
}

#[test]
fn all_broken_files_are_named_up_to_a_bound() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    grey(&file("good.png"), 2, 2, 1);
    std::fs::write(file("a.png"), "text").unwrap();
    let one = import(folder.path(), &Import::default()).unwrap_err();
    let one = one.to_string();
    assert!(
        one.contains("a.png: a text file") && one.contains("--broken skip"),
        "{one}"
    );
    for i in 0..NAMED {
        std::fs::write(file(&format!("b{i:02}.jpg")), "GIF89a").unwrap();
    }
    let message = import(folder.path(), &Import::default())
        .unwrap_err()
        .to_string();
    for clue in [
        "21 of 22 files",
        "a.png (a text file)",
        "b18.jpg (a GIF image)",
        "1 more",
        "--broken skip",
    ] {
        assert!(message.contains(clue), "no {clue:?} in: {message}");
    }
    assert!(
        !message.contains("b19") && !message.contains('\n'),
        "{message}"
    );
}

/// Grey and coloured pictures of 3x2 pixels in two classes.
fn mixed() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for class in ["a", "b"] {
        std::fs::create_dir(folder.path().join(class)).unwrap();
    }
    for i in 0..20u8 {
        let path = folder
            .path()
            .join(format!("{}/{i:02}.png", ["a", "b"][usize::from(i % 2)]));
        if i % 3 == 0 {
            let pixel = |x: u32, y: u32| Rgba([10 * i, x as u8, y as u8, 255]);
            RgbaImage::from_fn(3, 2, pixel).save(path).unwrap();
        } else {
            grey(&path, 3, 2, 9 * i);
        }
    }
    folder
}

fn with_memory(memory: u64) -> Import {
    Import {
        memory,
        ..Import::default()
    }
}

#[test]
fn the_memory_changes_no_bit() {
    let folder = mixed();
    let cpu = candle_core::Device::Cpu;
    let bits = |data: &Dataset, items: &[usize], flips: &[bool]| {
        let (x, y) = data.batch_flipped(items, flips, &cpu).unwrap();
        let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let x: Vec<u32> = x.into_iter().map(f32::to_bits).collect();
        (x, y.unwrap().to_vec1::<u32>().unwrap())
    };
    let spec = folder.path().to_str().unwrap();
    let (whole, _) = open_import(spec, &with_memory(1 << 20)).unwrap();
    // 13 grey pictures of 6 bytes and 7 of 18: all, some and none of them are kept.
    assert_eq!(whole.kept_bytes(), 13 * 6 + 7 * 18);
    let (sides, _) = splits_import(spec, &with_memory(1 << 20)).unwrap();
    for memory in [0, 5, 6, 50, 203, 204] {
        let (some, _) = open_import(spec, &with_memory(memory)).unwrap();
        assert_eq!(some.digest(), whole.digest());
        for _ in 0..2 {
            for items in [&[3usize, 19, 0, 3][..], &[7], &[12, 11, 10, 9, 8]] {
                let flips: Vec<bool> = items.iter().map(|i| i % 2 == 1).collect();
                assert_eq!(bits(&some, items, &flips), bits(&whole, items, &flips));
            }
            assert_eq!(values(&some), values(&whole));
            assert!(some.kept_bytes() <= memory, "{memory}");
        }
        let (again, _) = splits_import(spec, &with_memory(memory)).unwrap();
        assert_eq!(again.train.digest(), sides.train.digest());
        assert_eq!(values(&again.test), values(&sides.test));
    }
}

#[test]
fn files_that_change_after_opening_are_named() {
    let folder = mixed();
    let file = folder.path().join("a/04.png");
    let first = std::fs::read(&file).unwrap();
    let (data, _) = import(folder.path(), &with_memory(0)).unwrap();
    let batch = || {
        data.batch(&[0, 1, 2, 3], &candle_core::Device::Cpu)
            .map(|_| ())
    };
    batch().unwrap();
    let changed = |clue: &str| {
        let message = batch().unwrap_err().to_string();
        for clue in ["04.png: changed since", clue, "--resume"] {
            assert!(message.contains(clue), "no {clue:?} in: {message}");
        }
        assert_eq!(message.matches("04.png").count(), 1, "{message}");
    };
    std::fs::remove_file(&file).unwrap();
    changed("No such file");
    grey(&file, 3, 2, 77);
    changed("another picture");
    grey(&file, 2, 3, 36);
    changed("2x3 pixels");
    std::fs::write(&file, &first[..40]).unwrap();
    changed("ends early");
    std::fs::write(&file, &first).unwrap();
    batch().unwrap();
    // What is in memory does not care.
    let (kept, _) = import(folder.path(), &with_memory(1 << 20)).unwrap();
    std::fs::remove_file(&file).unwrap();
    values(&kept);
}
