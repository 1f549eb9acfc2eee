//! Whole models: the same seed gives the same bytes, and every weight learns.

// Helpers of tests may stop a test as its body may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use diffusion_core::grid::Grid;
use diffusion_core::guide::Clip;
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::{Cancel, Objective, Quiet, Source, StepCtx};
use diffusion_images::config::ImageConfig;
use diffusion_images::data::{self, Dataset};
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::train::{Images, Task};
use diffusion_images::{preset, run};

fn tiny(data: &Dataset) -> ImageConfig {
    let mut config = preset::preset("tiny", data).unwrap();
    preset::set_steps(&mut config, 6);
    config.train.checkpoint_every = 3;
    config
}

fn train(out: &Path) {
    let data = data::open("digits").unwrap();
    let (quiet, cancel) = (&mut Quiet, Cancel::new());
    run::train(
        &tiny(&data),
        &data,
        out,
        false,
        &Device::Cpu,
        quiet,
        &cancel,
    )
    .unwrap();
}

fn sample(model: &ImageModel, count: usize, batch: usize) -> Tensor {
    let request = SampleRequest {
        count,
        sampler: SamplerConfig::named("ddim-eta1").unwrap(),
        grid: Grid::Trailing,
        steps: 4,
        labels: Some((0..count as u32).map(|i| i % 10).collect()),
        guidance: 2.0,
        clip: Clip::None,
        batch,
        brownian: false,
        seed: 5,
    };
    model.sample(&request, &mut ()).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// All files below a folder, but the lock's, which names its process.
fn hash_folder(folder: &Path, hasher: &mut DefaultHasher) -> usize {
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let mut files = 0;
    for path in paths {
        let name = path.file_name().unwrap().to_os_string();
        if path.is_dir() {
            files += hash_folder(&path, hasher);
        } else if name != "lock" {
            (name, std::fs::read(&path).unwrap()).hash(hasher);
            files += 1;
        }
    }
    files
}

/// Runs in a process of its own: trains, samples, and prints a hash of every byte of both.
#[test]
fn repeat_child() {
    if std::env::var_os("REPEAT").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    train(&out);
    let mut hasher = DefaultHasher::new();
    let files = hash_folder(&out, &mut hasher);
    let model = ImageModel::open(&out, &Device::Cpu).unwrap();
    bits(&sample(&model, 3, 3)).hash(&mut hasher);
    println!("hash {files} {:016x}", hasher.finish());
}

/// Rows D1 and D3 of the table of promises.
#[test]
fn twenty_repeats_on_one_two_and_four_threads_give_the_same_bytes() {
    let mut seen = Vec::new();
    for repeat in 0..20 {
        let threads = ["1", "2", "4"][repeat % 3];
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "repeat_child", "--nocapture"])
            .env("REPEAT", "1")
            .env("RAYON_NUM_THREADS", threads)
            .env("CANDLE_NUM_THREADS", threads)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let at = text.find("hash ").expect(&text);
        seen.push(text[at..].lines().next().unwrap().to_string());
    }
    println!("20 repeats: {}", seen[0]);
    assert!(seen.iter().all(|hash| *hash == seen[0]), "{seen:#?}");
    // Weights, configurations, card, metrics, two checkpoints.
    let files: usize = seen[0].split(' ').nth(1).unwrap().parse().unwrap();
    assert!(files >= 15, "{files}");
}

/// Row D3 of the table of promises.
#[test]
fn an_image_does_not_depend_on_its_batch() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path());
    let model = ImageModel::open(folder.path(), &Device::Cpu).unwrap();
    let whole = sample(&model, 64, 64);
    for batch in [1, 3] {
        let parts = sample(&model, 64, batch);
        let gap = (&whole - &parts).unwrap().abs().unwrap().max_all().unwrap();
        let gap: f32 = gap.to_scalar().unwrap();
        println!("batches of {batch} against one of 64: {gap:e}");
        assert!(gap <= 1e-5, "{batch}: {gap}");
        assert_eq!(bits(&whole), bits(&parts), "batches of {batch}");
    }
}

/// Row N7 of the table of promises: one step reaches every weight of every preset.
#[test]
fn every_weight_of_every_preset_gets_a_gradient() {
    for (source, name) in [
        ("digits", "tiny"),
        ("digits", "small"),
        ("digits", "quick"),
        ("mnist", "quick"),
        ("mnist", "medium"),
        ("emoji", "medium"),
    ] {
        let data = data::open(source).unwrap();
        let config = preset::preset(name, &data).unwrap();
        let mut task = Task::new(&config, &Device::Cpu).unwrap();
        let images = Images::new(&data, &config, &Device::Cpu);
        let items: Vec<usize> = (0..4).map(|i| i * data.len() / 4).collect();
        let ctx = StepCtx::new(1, 0, items.iter().map(|i| *i as u64).collect());
        let batch = images.batch(&items, 0).unwrap();
        let losses = task.losses(0, &batch, &ctx).unwrap();
        let grads = diffusion_ops::backward(&losses[0].value).unwrap();
        let parameters = task.parameters();
        for (parameter, var) in &parameters {
            let grad = grads.get(var).expect(parameter);
            let size = grad.to_dtype(DType::F64).unwrap().sqr().unwrap();
            let size: f64 = size.sum_all().unwrap().to_scalar().unwrap();
            assert!(size.is_finite(), "{source} {name} {parameter}: {size}");
            // A softmax does not see what is added to all scores.
            let blind = parameter.ends_with("to_k.bias");
            assert!(blind || size > 0.0, "{source} {name} {parameter}: {size}");
        }
        println!(
            "{source} {name}: {} weights, each with a gradient",
            parameters.len()
        );
    }
}
