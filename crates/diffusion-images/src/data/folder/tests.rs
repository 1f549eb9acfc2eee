//! Broken files, fits and backgrounds of a folder.

use super::super::{open_import, splits, splits_import};
use super::*;
use image::{GrayImage, Luma, LumaA, Rgba, RgbaImage};

fn grey(path: &Path, width: u32, height: u32, value: u8) {
    let picture = GrayImage::from_fn(width, height, |x, _| Luma([value.wrapping_add(x as u8)]));
    picture.save(path).unwrap();
}

fn values(data: &Dataset) -> &[u8] {
    match data.pixels() {
        Pixels::Levels { values, .. } => values,
        Pixels::Real(_) => &[],
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
        values(&import(folder.path(), &asked).unwrap().0).to_vec()
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
    let test: Vec<&[u8]> = values(&sides.test).chunks(4).collect();
    assert!(!test.is_empty());
    assert!(
        values(&sides.train)
            .chunks(4)
            .all(|image| !test.contains(&image))
    );
}
