//! The classifier learns, is deterministic, and refuses what it must.

use super::augment::{bilinear, moved_batch, turned};
use super::*;
use crate::data::{Labels, Pixels, digits};
use diffusion_ops::rng::{Key, stream};

#[test]
fn recognises_97_of_100_held_out_digits() {
    let (train, test) = digits::load().unwrap().split().unwrap();
    let classifier = Classifier::train(&train, &ClassifierConfig::default()).unwrap();
    let (images, _) = test.all(&Device::Cpu).unwrap();
    let accuracy = classifier
        .accuracy(&images, test.labels().unwrap())
        .unwrap();
    assert!(accuracy >= 0.97, "{accuracy}");
    let features = classifier.features(&images).unwrap();
    assert_eq!(features.dims(), [359, classifier.feature_size()]);
    let spread = features.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(spread.iter().all(|v| *v >= 0.0 && v.is_finite()));
    assert!(spread.iter().any(|v| *v > 0.1));
    // A random guess would be right one time in ten.
    let shuffled: Vec<u32> = test
        .labels()
        .unwrap()
        .iter()
        .map(|l| (l + 1) % 10)
        .collect();
    assert!(classifier.accuracy(&images, &shuffled).unwrap() < 0.1);
    assert!(classifier.accuracy(&images, &shuffled[1..]).is_err());
}

/// A hash of the bits of all logits of the test images after one epoch.
fn fingerprint(seed: u64) -> u64 {
    let (train, test) = digits::load().unwrap().split().unwrap();
    let config = ClassifierConfig {
        epochs: 1,
        seed,
        ..ClassifierConfig::default()
    };
    let classifier = Classifier::train(&train, &config).unwrap();
    let (images, _) = test.all(&Device::Cpu).unwrap();
    let logits = classifier.logits(&images).unwrap().flatten_all().unwrap();
    let bits = logits
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits);
    let text: String = bits.map(|word| format!("{word:08x}")).collect();
    diffusion_ops::init::fnv1a(&text)
}

/// Runs in a process of its own, because the number of threads is fixed at the first tensor.
#[test]
fn fingerprint_child() {
    use std::io::Write;
    writeln!(std::io::stdout(), "bits {:016x}", fingerprint(0)).unwrap();
}

#[test]
fn training_gives_the_same_bits_again_on_any_number_of_threads() {
    let ours = fingerprint(0);
    assert_eq!(ours, fingerprint(0));
    assert_ne!(ours, fingerprint(1));
    for threads in ["1", "2", "4"] {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "metric::classifier::tests::fingerprint_child",
                "--nocapture",
            ])
            .env("RAYON_NUM_THREADS", threads)
            .env("CANDLE_NUM_THREADS", threads)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains(&format!("bits {ours:016x}")),
            "{threads} threads: {text}"
        );
    }
}

#[test]
fn moves_follow_the_formula() {
    // A plane a + b y + c x is reproduced exactly by bilinear values inside the image.
    let (height, width) = (9, 7);
    let ramp = |y: f64, x: f64| 0.3 + 0.25 * y - 0.125 * x;
    let image: Vec<f32> = (0..63)
        .map(|i| ramp(f64::from(i / 7), f64::from(i % 7)) as f32)
        .collect();
    let config = ClassifierConfig::default();
    let mut seen = std::collections::BTreeSet::new();
    for epoch in 0..50 {
        let moved = moved_batch(&image, (1, height, width), &[0], epoch, &config);
        let key = Key::new(config.seed, stream::AUGMENT).step(epoch);
        let draw: Vec<f64> = key.uniform(4).into_iter().map(|u| 2.0 * u - 1.0).collect();
        // The centre only shifts; the pixel right of it also turns and grows.
        let (dy, dx) = (0.6 * draw[0], 0.6 * draw[1]);
        let centre = ramp(4.0 + dy, 3.0 + dx);
        assert!((f64::from(moved[4 * 7 + 3]) - centre).abs() < 1e-5);
        let angle = (12.0 * draw[2]).to_radians();
        let radius = 1.0 / (1.0 + 0.1 * draw[3]);
        let (y, x) = (
            -angle.sin() * radius + 4.0 + dy,
            angle.cos() * radius + 3.0 + dx,
        );
        assert!((f64::from(moved[4 * 7 + 4]) - ramp(y, x)).abs() < 1e-5);
        seen.insert(moved[31].to_bits());
    }
    assert_eq!(seen.len(), 50);
    let still = ClassifierConfig {
        shift: 0.0,
        rotation: 0.0,
        zoom: 0.0,
        ..config
    };
    assert_eq!(
        moved_batch(&image, (1, height, width), &[0], 5, &still),
        image
    );
    let corner = [1.0, 2.0, 3.0, 4.0];
    assert_eq!(bilinear(&corner, (2, 2), (-5.0, 9.0)), 2.0);
    assert_eq!(bilinear(&corner, (2, 2), (0.5, 0.5)), 2.5);
}

#[test]
fn bad_data_and_settings_are_refused() {
    let pixels = || Pixels::Levels {
        values: vec![0, 9, 5, 3],
        max: 9,
    };
    let plain = Dataset::new("plain", (1, 1, 2), pixels(), None).unwrap();
    let labels = |names: &[&str]| Labels {
        values: vec![0, 0],
        classes: names.iter().map(ToString::to_string).collect(),
    };
    let one = Dataset::new("one", (1, 1, 2), pixels(), Some(labels(&["a"]))).unwrap();
    let two = Dataset::new("two", (1, 1, 2), pixels(), Some(labels(&["a", "b"]))).unwrap();
    let train = |data, change: fn(&mut ClassifierConfig)| {
        let mut config = ClassifierConfig {
            epochs: 2,
            ..ClassifierConfig::default()
        };
        change(&mut config);
        Classifier::train(data, &config)
    };
    // Without two classes it learns turns, and knows no class to be right about.
    for data in [&plain, &one] {
        let turns = train(data, |_| ()).unwrap();
        assert!(turns.classes().is_empty());
        let (images, _) = data.all(&Device::Cpu).unwrap();
        assert_eq!(turns.logits(&images).unwrap().dims(), [2, 2]);
        let error = turns.accuracy(&images, &[0, 0]).unwrap_err().to_string();
        assert!(error.contains("without classes"), "{error}");
    }
    for (change, field) in [
        ((|c| c.batch = 0) as fn(&mut ClassifierConfig), "batch"),
        (|c| c.learning_rate = f64::NAN, "learning_rate"),
        (|c| c.weight_decay = -1.0, "weight_decay"),
        (|c| c.shift = -1.0, "shift"),
        (|c| c.rotation = f64::NAN, "rotation"),
        (|c| c.zoom = 1.0, "zoom"),
    ] {
        assert!(train(&two, change).unwrap_err().to_string().contains(field));
    }
    let message = train(&two, |c| {
        (c.learning_rate, c.weight_decay, c.epochs) = (1e30, 0.0, 5)
    })
    .unwrap_err()
    .to_string();
    assert!(message.contains("finite"), "{message}");
    let good = train(&two, |_| ()).unwrap();
    let wrong = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(
        good.features(&wrong)
            .unwrap_err()
            .to_string()
            .contains("[B, 1, 1, 2]")
    );
}

#[test]
fn turns_are_told_apart_without_labels() {
    let (train, test) = digits::load().unwrap().split().unwrap();
    let without = |data: &Dataset| data.clone().without_labels();
    let config = ClassifierConfig {
        epochs: 30,
        ..ClassifierConfig::fitted(&train)
    };
    let classifier = Classifier::train(&without(&train), &config).unwrap();
    let (images, _) = test.all(&Device::Cpu).unwrap();
    let mut right = 0;
    for quarter in 0..4 {
        let images = turned(&images, &vec![quarter; test.len()]).unwrap();
        let told = classifier.predict(&images).unwrap();
        right += told.iter().filter(|t| **t as usize == quarter).count();
    }
    let share = right as f64 / (4 * test.len()) as f64;
    assert!(share > 0.75, "{share}");
}

#[test]
fn four_quarters_are_a_whole_turn() {
    let image = Tensor::from_vec(
        (0..18).map(|v| v as f32).collect(),
        (1, 2, 3, 3),
        &Device::Cpu,
    );
    let image = image.unwrap();
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let once = turned(&image, &[1]).unwrap();
    assert_eq!(
        values(&once)[..9],
        [2.0, 5.0, 8.0, 1.0, 4.0, 7.0, 0.0, 3.0, 6.0]
    );
    assert_eq!(
        values(&turned(&once, &[1]).unwrap()),
        values(&turned(&image, &[2]).unwrap())
    );
    assert_eq!(values(&turned(&once, &[3]).unwrap()), values(&image));
}

#[test]
fn convolutions_learn_and_any_shape_has_a_network() {
    let (train, test) = digits::load().unwrap().split().unwrap();
    let config = ClassifierConfig {
        architecture: Architecture::Convolutional { channels: 8 },
        epochs: 6,
        ..ClassifierConfig::default()
    };
    let classifier = Classifier::train(&train, &config).unwrap();
    let (images, _) = test.all(&Device::Cpu).unwrap();
    let accuracy = classifier
        .accuracy(&images, test.labels().unwrap())
        .unwrap();
    assert!(accuracy > 0.9, "{accuracy}");
    let pixels = Pixels::Levels {
        values: (0..3 * 31 * 17 * 2).map(|i| (i % 251) as u8).collect(),
        max: 255,
    };
    let odd = Dataset::new("odd", (3, 31, 17), pixels, None).unwrap();
    let config = ClassifierConfig {
        epochs: 1,
        ..ClassifierConfig::fitted(&odd)
    };
    let classifier = Classifier::train(&odd, &config).unwrap();
    let (images, _) = odd.all(&Device::Cpu).unwrap();
    assert_eq!(classifier.features(&images).unwrap().dims(), [2, 64]);
}
