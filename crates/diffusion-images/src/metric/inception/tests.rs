//! Against a network of the original's code with a sixteenth of its widths, whose weights and
//! features `tests/peers/inception.py --store` made.

use super::*;
use diffusion_core::checkpoint::{read_safetensors, write_safetensors_atomic};

/// By what the stored network's widths are divided.
const DIVISOR: usize = 16;

fn stored() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/inception.safetensors")
}

fn group(tensors: &BTreeMap<String, Tensor>, name: &str) -> BTreeMap<String, Tensor> {
    let prefix = format!("{name}/");
    let inside = tensors.iter().filter_map(|(key, tensor)| {
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        Some((key.strip_prefix(&prefix)?.to_string(), tensor))
    });
    inside.collect()
}

fn largest(tensor: Tensor) -> f32 {
    let values: Vec<f32> = tensor
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    values.into_iter().fold(0.0, f32::max)
}

#[test]
fn features_are_those_of_the_original() {
    let tensors = read_safetensors(&stored(), &Limits::default()).unwrap();
    let network = Inception::build(&group(&tensors, "weights"), &stored(), DIVISOR).unwrap();
    let images = group(&tensors, "images");
    assert_eq!(images.len(), 3);
    for (name, expected) in group(&tensors, "features") {
        let found = network.features(&images[&name]).unwrap();
        assert_eq!(found.dims(), [expected.dim(0).unwrap(), FEATURES / DIVISOR]);
        let gap = largest((&found - &expected).unwrap());
        let size = largest(expected);
        // 24 layers of sums in f32 in another order: measured below 2e-6 of the largest feature.
        assert!(gap <= 2e-5 * size, "{name}: {gap} of {size}");
        // Each image by itself gives what it gives beside others.
        let one = network.features(&images[&name].narrow(0, 0, 1).unwrap());
        let gap = largest((one.unwrap() - found.narrow(0, 0, 1).unwrap()).unwrap());
        assert!(gap <= 1e-6 * size, "{name}: {gap}");
    }
}

#[test]
fn interpolation_is_exact_where_nothing_is_between() {
    let same = interpolation(SIDE).unwrap().to_vec2::<f32>().unwrap();
    for (i, row) in same.iter().enumerate() {
        assert!((row[i] - 1.0).abs() < 1e-6);
    }
    for n in [1, 2, 28, 640] {
        let rows = interpolation(n).unwrap().to_vec2::<f32>().unwrap();
        for row in rows {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }
}

#[test]
fn other_weights_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inception.safetensors");
    let open = |entries: &[(&str, Vec<usize>)]| {
        let zeros =
            |shape: &Vec<usize>| Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu).unwrap();
        let tensors = entries.iter().map(|(n, s)| (n.to_string(), zeros(s)));
        write_safetensors_atomic(&file, &tensors.collect(), &BTreeMap::new()).unwrap();
        Inception::open(&file, &Limits::default())
            .err()
            .unwrap()
            .to_string()
    };
    let first = "Conv2d_1a_3x3.conv.weight";
    for (entries, part) in [
        (
            vec![("a", vec![1])],
            "no tensor `Conv2d_1a_3x3.conv.weight`",
        ),
        (vec![(first, vec![32, 1, 3, 3])], "[32, 1, 3, 3]"),
        (
            vec![(first, vec![32, 3, 3, 3]), ("fc.weight", vec![1000, 2])],
            "1000 classes",
        ),
    ] {
        let message = open(&entries);
        assert!(
            message.contains(part) && message.contains("inception.safetensors"),
            "{message}"
        );
    }
    let tensors = read_safetensors(&stored(), &Limits::default()).unwrap();
    let network = Inception::build(&group(&tensors, "weights"), &stored(), DIVISOR).unwrap();
    let flat = Tensor::zeros((2, 4, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let error = network.features(&flat).unwrap_err().to_string();
    assert!(error.contains("[2, 4, 8, 8]"), "{error}");
}
