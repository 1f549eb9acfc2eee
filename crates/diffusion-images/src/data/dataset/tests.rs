//! Conversion, checks and selection of images in memory.

use super::*;

/// What the tests of the readers look at.
impl Dataset {
    /// Bytes of pixels that are in memory.
    pub(in crate::data) fn kept_bytes(&self) -> u64 {
        match &*self.store {
            Store::Memory(pixels) => pixels.len() as u64,
            Store::Files(files) => files.kept_bytes(),
        }
    }

    /// The pixels of all images, read anew.
    pub(in crate::data) fn pixels(&self) -> Pixels {
        let size = self.image_size();
        match &*self.store {
            Store::Memory(Pixels::Levels { values, max }) => Pixels::Levels {
                values: gather(values, &self.places, size),
                max: *max,
            },
            Store::Memory(Pixels::Real(values)) => Pixels::Real(gather(values, &self.places, size)),
            Store::Files(files) => {
                let all = files.read(&self.places).unwrap();
                let repeat = |planes: &std::borrow::Cow<[u8]>| planes.repeat(size / planes.len());
                Pixels::Levels {
                    values: all.iter().flat_map(repeat).collect(),
                    max: 255,
                }
            }
        }
    }
}

fn gather<T: Copy>(values: &[T], items: &[usize], size: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(items.len() * size);
    for &item in items {
        out.extend_from_slice(&values[item * size..][..size]);
    }
    out
}

fn bytes(count: usize) -> Dataset {
    let values = (0..count * 6).map(|v| (v * 51 % 256) as u8).collect();
    let labels = Labels {
        values: (0..count as u32).map(|v| v % 2).collect(),
        classes: vec!["even".into(), "odd".into()],
    };
    let pixels = Pixels::Levels { values, max: 255 };
    Dataset::new("toy", (1, 2, 3), pixels, Some(labels)).unwrap()
}

#[test]
fn eight_bits_become_minus_one_to_one() {
    let (x, y) = bytes(3).batch(&[2, 0], &Device::Cpu).unwrap();
    assert_eq!(x.dims(), [2, 1, 2, 3]);
    let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected = |v: usize| (f64::from((v * 51 % 256) as u8) / 127.5 - 1.0) as f32;
    for (i, value) in x.iter().enumerate() {
        let v = if i < 6 { 12 + i } else { i - 6 };
        assert!((value - expected(v)).abs() < 1e-7);
    }
    assert_eq!((x[6], x[11]), (-1.0, 1.0));
    assert_eq!(y.unwrap().to_vec1::<u32>().unwrap(), [0, 0]);
}

#[test]
fn real_values_pass_unchanged_and_are_checked() {
    let make = |values| Dataset::new("real", (1, 1, 2), Pixels::Real(values), None);
    let (x, y) = make(vec![-1.0, 0.25, 0.5, 1.0])
        .unwrap()
        .all(&Device::Cpu)
        .unwrap();
    assert_eq!(
        x.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        [-1.0, 0.25, 0.5, 1.0]
    );
    assert!(y.is_none());
    for (bad, clue) in [(1.5, "1.5"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let message = make(vec![0.0, 0.0, 0.0, bad]).unwrap_err().to_string();
        assert!(
            message.contains("image 1, value 1") && message.contains(clue),
            "{message}"
        );
    }
}

#[test]
fn wrong_counts_are_refused() {
    let levels = |n: usize| Pixels::Levels {
        values: vec![0; n],
        max: 255,
    };
    for (shape, n) in [
        ((1, 2, 3), 7),
        ((1, 2, 3), 0),
        ((0, 2, 3), 6),
        ((1 << 40, 1 << 40, 2), 4),
    ] {
        assert!(
            Dataset::new("toy", shape, levels(n), None).is_err(),
            "{shape:?} {n}"
        );
    }
    let labels = |values: Vec<u32>| {
        Some(Labels {
            values,
            classes: vec!["a".into()],
        })
    };
    let with = |values| Dataset::new("toy", (1, 1, 1), levels(2), labels(values));
    assert!(with(vec![0, 0]).is_ok());
    assert!(
        with(vec![0])
            .unwrap_err()
            .to_string()
            .contains("1 labels; expected 2")
    );
    assert!(
        with(vec![0, 1])
            .unwrap_err()
            .to_string()
            .contains("label 1")
    );
    let data = bytes(3);
    assert!(
        data.batch(&[3], &Device::Cpu)
            .unwrap_err()
            .to_string()
            .contains("item 3")
    );
    assert!(data.batch(&[], &Device::Cpu).is_err());
}

#[test]
fn split_and_select_keep_every_image_once() {
    let data = bytes(11);
    let (train, test) = data.split().unwrap();
    assert_eq!((train.len(), test.len()), (9, 2));
    assert_eq!(test.digest(), data.select(&[4, 9]).unwrap().digest());
    assert_ne!(test.digest(), data.select(&[9, 4]).unwrap().digest());
    assert!(
        bytes(4)
            .split()
            .unwrap_err()
            .to_string()
            .contains("at least 5")
    );
    assert!(check_total("x", MAX_DATASET_BYTES).is_ok());
    assert!(check_total("x", MAX_DATASET_BYTES + 1).is_err());
}

#[test]
fn flips_mirror_the_rows_and_nothing_else() {
    let data = bytes(2);
    let flat = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (plain, labels) = data.batch(&[0, 1, 1], &Device::Cpu).unwrap();
    let flips = [true, false, true];
    let (flipped, same) = data
        .batch_flipped(&[0, 1, 1], &flips, &Device::Cpu)
        .unwrap();
    let (plain, flipped) = (flat(plain), flat(flipped));
    for (image, flip) in flips.into_iter().enumerate() {
        for (y, x) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let from = if flip { 2 - x } else { x };
            let at = 6 * image + 3 * y;
            assert_eq!(flipped[at + x], plain[at + from]);
        }
    }
    let numbers = |y: Option<Tensor>| y.unwrap().to_vec1::<u32>().unwrap();
    assert_eq!(numbers(labels), numbers(same));
    let real = Dataset::new("real", (1, 1, 2), Pixels::Real(vec![-1.0, 0.5]), None).unwrap();
    let (x, _) = real.batch_flipped(&[0], &[true], &Device::Cpu).unwrap();
    assert_eq!(flat(x), [0.5, -1.0]);
    let message = data
        .batch_flipped(&[0], &[], &Device::Cpu)
        .unwrap_err()
        .to_string();
    assert!(message.contains("0 flips"), "{message}");
}

#[test]
fn flips_belong_to_items_not_to_places() {
    let key = Key::new(7, diffusion_ops::rng::stream::AUGMENT);
    let items: Vec<usize> = (0..1000).collect();
    let all = flips(key, &items);
    assert_eq!(flips(key, &[17, 3]), [all[17], all[3]]);
    // 1000 fair coins: mean 500, deviation 16.
    let count = |flips: &[bool]| flips.iter().filter(|&&flip| flip).count();
    assert!((420..580).contains(&count(&all)), "{}", count(&all));
    let next = flips(key.step(1), &items);
    let changed = all.iter().zip(&next).filter(|(a, b)| a != b).count();
    assert!((420..580).contains(&changed), "{changed}");
}
