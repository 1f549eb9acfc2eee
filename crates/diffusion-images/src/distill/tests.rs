//! Tests: a teacher of some hundred steps, its students, and every way to stop and to be refused.

use super::*;
use crate::data::{self, Options};
use crate::distilled::Method;
use crate::model::{ImageModel, SampleRequest};
use crate::{preset, run};
use diffusion_core::grid::Grid;
use diffusion_core::guide::Clip;
use diffusion_core::sample::SamplerConfig;
use diffusion_core::train::{Event, Quiet};

/// A small teacher on few digits; velocities on the cosine table where asked.
fn teacher(folder: &Path, velocity: bool, steps: u64) -> Dataset {
    let all = data::splits("digits", &Options::default()).unwrap().train;
    let digits = all.select(&(0..64).collect::<Vec<_>>()).unwrap();
    let mut config = preset::preset("tiny", &digits).unwrap();
    preset::set_steps(&mut config, steps);
    config.train.batch_size = 8;
    if velocity {
        config.predicts = crate::config::Predicts::VPrediction;
        config.process.betas = diffusion_core::schedule::BetaSchedule::Cosine;
        config.weight = diffusion_core::loss::Weight::Velocity;
    }
    let (quiet, cancel) = (&mut Quiet, Cancel::new());
    run::train(
        &config,
        &digits,
        folder,
        false,
        &Device::Cpu,
        quiet,
        &cancel,
    )
    .unwrap();
    digits
}

fn config(teacher: &Path, method: Method, from: usize, to: usize, steps: u64) -> DistillConfig {
    let mut config = DistillConfig::new(teacher, method, to, steps).unwrap();
    config.from = from;
    config.train.batch_size = 8;
    config.pairs = 12;
    config
}

fn go(config: &DistillConfig, data: &Dataset, out: &Path, resume: bool) -> Result<Reached> {
    let mut quiet = |_: &Stage| Ok(Box::new(Quiet) as Box<dyn Observer>);
    distill(
        config,
        data,
        out,
        resume,
        &Device::Cpu,
        &mut quiet,
        &Cancel::new(),
    )
}

fn weights(model: &Path) -> Vec<u8> {
    std::fs::read(model.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

fn draw(
    model: &ImageModel,
    sampler: SamplerConfig,
    grid: Grid,
    steps: usize,
) -> candle_core::Tensor {
    let request = SampleRequest {
        count: 4,
        sampler,
        grid,
        steps,
        labels: None,
        guidance: 1.0,
        clip: Clip::Static { range: 1.0 },
        batch: 4,
        brownian: false,
        seed: 5,
    };
    model.sample(&request, &mut ()).unwrap()
}

#[test]
fn every_method_gives_a_model_that_says_how_to_sample_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let data = teacher(&at.join("t"), false, 3);
    for (method, from, to, stages) in [
        (Method::Progressive, 8, 2, 2),
        (Method::Knowledge, 4, 1, 1),
        (Method::Consistency, 8, 2, 1),
    ] {
        let out = at.join(method.name());
        let config = config(&at.join("t"), method, from, to, 2);
        let mut seen = Vec::new();
        let mut observe = |stage: &Stage| {
            seen.push(stage.clone());
            Ok(Box::new(Quiet) as Box<dyn Observer>)
        };
        let reached = distill(
            &config,
            &data,
            &out,
            false,
            &Device::Cpu,
            &mut observe,
            &Cancel::new(),
        )
        .unwrap();
        assert!(reached.finished && reached.stage.to == to && seen.len() == stages);
        let model = ImageModel::open(&out, &Device::Cpu).unwrap();
        let distilled = model.distilled().unwrap();
        assert_eq!((distilled.method, distilled.steps), (method, to));
        assert_eq!(model.classes().len(), 10);
        // A teacher that says noise has a student that says velocities.
        assert_eq!(model.scheduler().class(), "DDIMScheduler");
        assert_eq!(
            model.scheduler().kind(),
            diffusion_core::predict::Kind::Velocity
        );
        let images = draw(
            &model,
            distilled.sampler.clone(),
            distilled.grid.clone(),
            to,
        );
        assert_eq!(images.dims(), [4, 1, 8, 8]);
        // Once more over a finished run: the same model.
        let before = weights(&out);
        assert!(go(&config, &data, &out, true).unwrap().finished);
        assert_eq!(before, weights(&out));
        assert!(
            go(&config, &data, &out, false)
                .unwrap_err()
                .to_string()
                .contains("--resume")
        );
    }
}

/// A student of half the steps comes nearer to its teacher's images than the untaught teacher at as many
/// steps, and the grid of the student is every second point of the teacher's.
#[test]
fn the_student_of_one_halving_draws_what_its_teacher_draws() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let data = teacher(&at.join("t"), true, 60);
    let mut config = config(&at.join("t"), Method::Progressive, 4, 2, 60);
    config.train.batch_size = 16;
    go(&config, &data, &at.join("s"), false).unwrap();
    let teacher = ImageModel::open(&at.join("t"), &Device::Cpu).unwrap();
    let student = ImageModel::open(&at.join("s"), &Device::Cpu).unwrap();
    let table = student.table().unwrap();
    let points = |n| Grid::Trailing.points(&table, n).unwrap();
    let halves: Vec<_> = points(4).into_iter().step_by(2).collect();
    assert_eq!(points(2), halves);
    let ddim = || SamplerConfig::named("ddim").unwrap();
    let aim = draw(&teacher, ddim(), Grid::Trailing, 4);
    let off = |x: candle_core::Tensor| {
        let error = (x - &aim).unwrap().sqr().unwrap().mean_all().unwrap();
        error.to_scalar::<f32>().unwrap()
    };
    let taught = off(draw(&student, ddim(), Grid::Trailing, 2));
    let untaught = off(draw(&teacher, ddim(), Grid::Trailing, 2));
    assert!(taught < 0.7 * untaught, "{taught} {untaught}");
}

/// Stopped anywhere, a run goes on to the same bits.
#[test]
fn an_interrupted_distillation_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let data = teacher(&at.join("t"), true, 3);
    let mut first = config(&at.join("t"), Method::Consistency, 8, 2, 4);
    first.target_decay = 0.5;
    let second = config(&at.join("t"), Method::Progressive, 8, 2, 4);
    for (config, stop_at) in [(first, 2), (second, 6)] {
        let name = config.method.name();
        let (whole, cut) = (
            at.join(format!("{name}-whole")),
            at.join(format!("{name}-cut")),
        );
        go(&config, &data, &whole, false).unwrap();
        let cancel = Cancel::new();
        let steps = std::rc::Rc::new(std::cell::Cell::new(0));
        let mut observe = |_: &Stage| {
            let (cancel, steps) = (cancel.clone(), steps.clone());
            let stop = move |event: &Event| {
                if let Event::Step { .. } = event {
                    steps.set(steps.get() + 1);
                    if steps.get() == stop_at {
                        cancel
                            .flag()
                            .store(true, std::sync::atomic::Ordering::SeqCst);
                    }
                }
            };
            Ok(Box::new(stop) as Box<dyn Observer>)
        };
        let mut config = config;
        config.train.log_every = 1;
        let reached = distill(
            &config,
            &data,
            &cut,
            false,
            &Device::Cpu,
            &mut observe,
            &cancel,
        )
        .unwrap();
        assert!(!reached.finished, "{reached:?}");
        // There is something to look at all the same.
        assert!(
            ImageModel::open(&cut, &Device::Cpu)
                .unwrap()
                .distilled()
                .is_some()
        );
        let stored = stored_config(&cut).unwrap();
        assert_eq!(stored, config);
        assert!(go(&stored, &data, &cut, true).unwrap().finished);
        assert_eq!(weights(&whole), weights(&cut), "{name}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let data = teacher(&at.join("t"), true, 2);
    let refused = |method, from, to, words: &[&str]| {
        let config = config(&at.join("t"), method, from, to, 2);
        let error = go(&config, &data, &at.join("x"), false)
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(error.contains(word), "no `{word}` in {error}");
        }
        std::fs::remove_dir_all(at.join("x")).ok();
    };
    refused(Method::Progressive, 6, 4, &["8, 16, 32"]);
    refused(Method::Progressive, 8, 0, &["1 to 1000"]);
    refused(Method::Progressive, 2048, 4, &["1 to 1000", "--from"]);
    refused(Method::Knowledge, 8, 2, &["--to 1"]);
    refused(Method::Consistency, 9, 2, &["multiple of 2", "--from 16"]);
    let config = config(&at.join("t"), Method::Progressive, 4, 2, 2);
    let mut changed = config.clone();
    changed.teacher_digest = "0".into();
    let error = go(&changed, &data, &at.join("x"), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("changed since"), "{error}");
    let plain = data.clone().without_labels();
    let error = go(&config, &plain, &at.join("x"), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("trained on"), "{error}");
    let error = stored_config(&at.join("nowhere")).unwrap_err().to_string();
    assert!(error.contains("without --resume"), "{error}");
}
