//! The trainer's promises: the same bytes after any interruption, nothing updated with numbers that
//! are not finite, phases and accumulation that add up.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use diffusion_core::checkpoint::fault::{Fault, Faulty};
use diffusion_core::checkpoint::{DiskStorage, RunLock, read_safetensors};
use diffusion_core::limits::Limits;
use diffusion_core::train::{
    AdamWConfig, Both, Cancel, Event, GuardConfig, JsonLines, Loss, LossValue, LrSchedule,
    Objective, Observer, Outcome, Policy, Quiet, SaveFailure, Source, SpikeRule, StepCtx,
    TrainConfig, Trainer,
};
use diffusion_core::{Error, Result};

const ITEMS: usize = 13;

struct Numbers;

impl Source for Numbers {
    type Batch = Tensor;

    fn len(&self) -> usize {
        ITEMS
    }

    fn batch(&self, items: &[usize], _epoch: u64) -> Result<Tensor> {
        let values: Vec<f32> = items.iter().map(|&i| (i as f32 * 0.7).sin()).collect();
        Ok(Tensor::from_vec(values, (items.len(), 1), &Device::Cpu)?)
    }
}

/// A tiny denoiser with a hidden layer, state of its own, and faults on demand.
struct Net {
    w1: Var,
    w2: Var,
    mean_loss: f64,
    /// Steps (from 0) at which something goes wrong, and what.
    faults: BTreeMap<u64, &'static str>,
    seen: Vec<u64>,
}

impl Net {
    fn new() -> Self {
        let cpu = &Device::Cpu;
        let ramp = |n: usize| {
            (0..n)
                .map(|i| ((i * 7 + 3) as f32 * 0.37).sin() * 0.5)
                .collect::<Vec<f32>>()
        };
        Self {
            w1: Var::from_vec(ramp(16), (2, 8), cpu).unwrap(),
            w2: Var::from_vec(ramp(8), (8, 1), cpu).unwrap(),
            mean_loss: 0.0,
            faults: BTreeMap::new(),
            seen: Vec::new(),
        }
    }

    fn params(&self) -> BTreeMap<String, Var> {
        BTreeMap::from([
            ("w1".into(), self.w1.clone()),
            ("w2".into(), self.w2.clone()),
        ])
    }
}

impl Objective for Net {
    type Batch = Tensor;

    fn losses(&mut self, _phase: usize, x: &Tensor, ctx: &StepCtx) -> Result<Vec<Loss>> {
        self.seen.push(ctx.step);
        let cpu = &Device::Cpu;
        let eps = ctx.noise(&[1], DType::F32, cpu)?;
        let t: Vec<f32> = ctx.times().iter().map(|&t| t as f32).collect();
        let t = Tensor::from_vec(t, (ctx.items.len(), 1), cpu)?;
        let noisy = ((x * (1.0 - &t)?)? + (&eps * &t)?)?;
        let input = Tensor::cat(&[&noisy, &t], 1)?;
        let out = input.matmul(&self.w1)?.tanh()?.matmul(&self.w2)?;
        let mut loss = (out - eps)?.sqr()?.mean_all()?;
        match self.faults.get(&ctx.step) {
            Some(&"nan") => loss = (loss * f64::NAN)?,
            Some(&"infinite") => loss = (loss * f64::INFINITY)?,
            Some(&"spike") => loss = (loss * 1e4)?,
            Some(&"gradient") => {
                // Finite itself, with an infinite derivative at zero.
                let zero = (self.w2.as_tensor() - self.w2.as_tensor().detach())?;
                loss = (loss + zero.sqrt()?.sum_all()?)?;
            }
            Some(&"large") => {
                let huge = (self.w2.as_tensor().sum_all()? * 1e30)?;
                loss = (loss + (&huge - huge.detach())?)?;
            }
            _ => {}
        }
        Ok(vec![Loss::new("simple", loss)])
    }

    fn after_step(&mut self, losses: &[LossValue], ctx: &StepCtx) -> Result<()> {
        self.mean_loss = 0.9 * self.mean_loss + 0.1 * losses[0].value;
        if self.faults.get(&ctx.step) == Some(&"weight") {
            self.w1.set(&(self.w1.as_tensor() * f64::INFINITY)?)?;
        }
        Ok(())
    }

    fn describe(&self, _phase: usize, ctx: &StepCtx) -> Option<String> {
        let first = ctx.times().first().copied()?;
        Some(format!("first time {first:.3}"))
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::from([(
            "mean_loss".into(),
            Tensor::new(self.mean_loss, &Device::Cpu)?,
        )]))
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.mean_loss = state["mean_loss"].to_scalar::<f64>()?;
        Ok(())
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        steps: 30,
        batch_size: 4,
        lr: 1e-2,
        schedule: LrSchedule::Cosine {
            warmup: 5,
            cycles: 0.5,
        },
        checkpoint_every: 7,
        keep_last: 2,
        log_every: 3,
        ..TrainConfig::default()
    }
}

fn trainer(net: &Net, config: TrainConfig) -> Trainer {
    Trainer::new(net.params(), config.check().unwrap()).unwrap()
}

/// All bytes under a run folder but the lock's.
fn bytes(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            out.extend(
                bytes(&path)
                    .into_iter()
                    .map(|(n, b)| (format!("{name}/{n}"), b)),
            );
        } else if name != "lock" {
            out.insert(name, fs::read(path).unwrap());
        }
    }
    out
}

fn train(
    folder: &Path,
    net: &mut Net,
    config: TrainConfig,
    watch: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    let mut trainer = trainer(net, config).run_folder(folder);
    let metrics = JsonLines::new(folder.join("metrics.jsonl"));
    trainer.run(net, &Numbers, &mut Both(metrics, watch), &Cancel::new())
}

#[test]
fn stopping_at_any_step_changes_no_byte() {
    let whole = tempfile::tempdir().unwrap();
    let done = train(whole.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    assert_eq!(done, Outcome::Finished { step: 30 });
    let expected = bytes(whole.path());
    assert!(expected.contains_key("checkpoints/step-000000030/ema.safetensors"));
    assert_eq!(
        expected["metrics.jsonl"]
            .iter()
            .filter(|&&b| b == b'\n')
            .count(),
        10
    );
    for stop in 0..30 {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Net::new();
        let cancel = Cancel::new();
        if stop == 0 {
            cancel.set();
        }
        let outcome = {
            let mut trainer = trainer(
                &net,
                TrainConfig {
                    log_every: 1,
                    ..config()
                },
            )
            .run_folder(dir.path());
            let asked = cancel.clone();
            let mut watch = |event: &Event| {
                if matches!(event, Event::Step { step, .. } if *step == stop) {
                    asked.set();
                }
            };
            trainer
                .run(&mut net, &Numbers, &mut watch, &cancel)
                .unwrap()
        };
        assert_eq!(outcome, Outcome::Interrupted { step: stop });
        let mut resumed = None;
        // A fresh network with other weights: everything comes from the checkpoint.
        let mut net = Net::new();
        net.w1.set(&net.w1.affine(3.0, 1.0).unwrap()).unwrap();
        train(dir.path(), &mut net, config(), &mut |event| {
            if let Event::Started { resumed_from } = event {
                resumed = *resumed_from;
            }
        })
        .unwrap();
        assert_eq!(resumed, Some(stop));
        assert_eq!(net.seen.first(), Some(&stop), "no step is repeated");
        let found = bytes(dir.path());
        for (name, content) in &expected {
            // The first run logged other steps.
            if name.starts_with("checkpoints/step-000000030") {
                assert_eq!(&found[name], content, "{name} after a stop at {stop}");
            }
        }
    }
}

#[test]
fn a_crash_loses_at_most_one_interval_and_changes_no_byte() {
    let whole = tempfile::tempdir().unwrap();
    train(whole.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    let expected = bytes(whole.path());
    for stop in [1, 6, 7, 8, 20, 29] {
        let dir = tempfile::tempdir().unwrap();
        // An observer that fails is as abrupt an end as there is inside a process.
        struct Crash(u64);
        impl Observer for Crash {
            fn on(&mut self, event: &Event) -> Result<()> {
                match event {
                    Event::Step { step, .. } if *step >= self.0 => Err(Error::Interrupted),
                    _ => Ok(()),
                }
            }
        }
        let mut net = Net::new();
        let mut first = trainer(
            &net,
            TrainConfig {
                log_every: 1,
                ..config()
            },
        )
        .run_folder(dir.path());
        first
            .run(&mut net, &Numbers, &mut Crash(stop), &Cancel::new())
            .unwrap_err();
        drop(first);
        let mut from = None;
        train(dir.path(), &mut Net::new(), config(), &mut |event| {
            if let Event::Started { resumed_from } = event {
                from = *resumed_from;
            }
        })
        .unwrap();
        assert_eq!(from.unwrap_or(0), (stop - 1) / 7 * 7, "stop {stop}");
        let found = bytes(dir.path());
        let last = |b: &BTreeMap<String, Vec<u8>>| -> Vec<(String, Vec<u8>)> {
            b.clone()
                .into_iter()
                .filter(|(n, _)| n.contains("step-000000030"))
                .collect()
        };
        assert_eq!(last(&found), last(&expected), "stop {stop}");
    }
}

#[test]
fn the_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one() {
    let whole = tempfile::tempdir().unwrap();
    train(whole.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut net = Net::new();
    let mut first = trainer(&net, config()).run_folder(dir.path());
    let cancel = Cancel::new();
    let asked = cancel.clone();
    let stop = move |event: &Event| {
        if matches!(event, Event::Saved { step: 14, .. }) {
            asked.set();
        }
    };
    let metrics = JsonLines::new(dir.path().join("metrics.jsonl"));
    first
        .run(&mut net, &Numbers, &mut Both(metrics, stop), &cancel)
        .unwrap();
    train(dir.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    assert_eq!(bytes(dir.path()), bytes(whole.path()));
}

#[test]
fn accumulation_equals_a_larger_batch() {
    let run = |batch_size, accumulate| {
        let mut net = Net::new();
        let config = TrainConfig {
            batch_size,
            accumulate,
            ..config()
        };
        trainer(&net, config)
            .run(&mut net, &Numbers, &mut Quiet, &Cancel::new())
            .unwrap();
        net.w1.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (one, four) = (run(8, 1), run(2, 4));
    let gap = one
        .iter()
        .zip(&four)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    println!("accumulation against one batch: {gap:e}");
    assert!(gap < 1e-5, "{gap}");
}

/// Two players: one raises x·y, the other lowers it.
struct Players {
    x: Var,
    y: Var,
    log: Vec<(u64, usize)>,
}

impl Objective for Players {
    type Batch = Tensor;

    fn phases(&self) -> usize {
        2
    }

    fn trains(&self, phase: usize, name: &str) -> bool {
        (phase == 0) == (name == "x")
    }

    fn losses(&mut self, phase: usize, _: &Tensor, ctx: &StepCtx) -> Result<Vec<Loss>> {
        self.log.push((ctx.step, ctx.phase));
        assert_eq!(ctx.phase, phase);
        let product = (self.x.as_tensor() * self.y.as_tensor())?.sum_all()?;
        Ok(vec![Loss::new("product", product).weight(if phase == 0 {
            1.0
        } else {
            -1.0
        })])
    }
}

#[test]
fn players_alternate_and_touch_only_their_own() {
    let cpu = &Device::Cpu;
    let x = Var::new(&[1f32], cpu).unwrap();
    let y = Var::new(&[1f32], cpu).unwrap();
    let params = BTreeMap::from([("x".into(), x.clone()), ("y".into(), y.clone())]);
    let config = TrainConfig {
        steps: 1,
        lr: 0.5,
        ..TrainConfig::default()
    };
    let mut adamw = config.clone();
    adamw.adamw.weight_decay = 0.0;
    let mut objective = Players {
        x: x.clone(),
        y: y.clone(),
        log: Vec::new(),
    };
    let mut trainer = Trainer::new(params, adamw.check().unwrap()).unwrap();
    trainer
        .run(&mut objective, &Numbers, &mut Quiet, &Cancel::new())
        .unwrap();
    assert_eq!(objective.log, [(0, 0), (0, 1)]);
    // The first Adam step has length lr: x falls by 0.5; then y rises, since the new x is positive.
    assert!((x.to_vec1::<f32>().unwrap()[0] - 0.5).abs() < 1e-6);
    assert!((y.to_vec1::<f32>().unwrap()[0] - 1.5).abs() < 1e-6);
}

#[test]
fn clipping_bounds_the_first_update_direction_and_is_reported() {
    let mut norms = Vec::new();
    let mut net = Net::new();
    let mut watch = |event: &Event| {
        if let Event::Step { grad_norm, .. } = event {
            norms.push(*grad_norm);
        }
    };
    let config = TrainConfig {
        clip_norm: Some(1e-3),
        log_every: 1,
        ..config()
    };
    trainer(&net, config)
        .run(&mut net, &Numbers, &mut watch, &Cancel::new())
        .unwrap();
    assert_eq!(norms.len(), 30);
    assert!(
        norms.iter().all(|&n| n > 1e-3 && n.is_finite()),
        "the norm is that before clipping"
    );
}

/// Reads every tensor and every line of the metrics that a run has left.
fn nothing_but_numbers(run: &Path) {
    for (name, bytes) in bytes(run) {
        if name.ends_with(".safetensors") {
            let path = run.join(&name);
            for tensor in read_safetensors(&path, &Limits::default())
                .unwrap()
                .values()
            {
                let values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                let values = values.to_vec1::<f64>().unwrap();
                assert!(values.iter().all(|v| v.is_finite()), "{name}");
            }
        } else {
            let text = String::from_utf8(bytes).unwrap().to_lowercase();
            let words = text.split(|c: char| !c.is_alphanumeric());
            let bad = words
                .filter(|w| ["nan", "inf", "infinity"].contains(w))
                .count();
            assert_eq!(bad, 0, "{name}: {text}");
        }
    }
}

#[test]
fn every_fault_is_caught_in_its_step_before_anything_is_updated() {
    let mut injected = 0;
    for (fault, expected) in [
        ("nan", "loss `simple` = NaN (F32)"),
        ("infinite", "loss `simple` = inf (F32)"),
        ("gradient", "gradient of `w2` (F32) is not finite"),
        ("large", "too large to be squared"),
        ("weight", "weight `w1` is not finite"),
    ] {
        for step in [0, 1, 2, 6, 7, 8, 13, 20] {
            let dir = tempfile::tempdir().unwrap();
            let mut net = Net::new();
            net.faults.insert(step, fault);
            let error = train(dir.path(), &mut net, config(), &mut |_| {}).unwrap_err();
            assert!(matches!(error, Error::Numeric(_)), "{error}");
            let text = error.to_string();
            for part in [
                expected,
                &format!("step {}", step + 1),
                "examples ",
                "first time 0.",
            ] {
                assert!(text.contains(part), "`{text}` lacks `{part}`");
            }
            let stands = match step / 7 * 7 {
                0 => "there is no checkpoint".to_string(),
                last => format!("the checkpoint of step {last} stands"),
            };
            assert!(text.contains(&stands), "`{text}` lacks `{stands}`");
            nothing_but_numbers(dir.path());
            injected += 1;
            if fault != "weight" {
                // The weights are those of a run that simply ended before.
                let mut reference = Net::new();
                let cancel = Cancel::new();
                let asked = cancel.clone();
                let mut stop = move |event: &Event| {
                    if matches!(event, Event::Step { step: s, .. } if *s == step) {
                        asked.set();
                    }
                };
                if step == 0 {
                    cancel.set();
                }
                trainer(
                    &reference,
                    TrainConfig {
                        log_every: 1,
                        ..config()
                    },
                )
                .run(&mut reference, &Numbers, &mut stop, &cancel)
                .unwrap();
                for (name, var) in net.params() {
                    let values = |v: &Var| v.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    assert_eq!(
                        values(&var),
                        values(&reference.params()[&name]),
                        "{fault} {name}"
                    );
                }
            }
        }
    }
    println!("{injected} faults injected, each caught in its step");
    assert!(injected >= 30);
}

/// Row T3 of the table of promises, on losses and gradients of real training.
#[test]
fn ten_thousand_clean_steps_raise_at_most_one_alarm() {
    let mut net = Net::new();
    let mut alarms = Vec::new();
    let mut watch = |event: &Event| {
        if let Event::Spike { step, why, .. } = event {
            alarms.push(format!("step {step}: {why}"));
        }
    };
    let config = TrainConfig {
        steps: 10_000,
        batch_size: 32,
        lr: 1e-3,
        schedule: LrSchedule::Constant {},
        log_every: 1000,
        ..config()
    };
    trainer(&net, config)
        .run(&mut net, &Numbers, &mut watch, &Cancel::new())
        .unwrap();
    println!("{} alarms in 10 000 clean steps", alarms.len());
    assert!(alarms.len() <= 1, "{alarms:#?}");
}

fn with_policy(policy: Policy) -> TrainConfig {
    TrainConfig {
        guard: GuardConfig {
            policy,
            spike: SpikeRule::default(),
        },
        ..config()
    }
}

#[test]
fn skipping_leaves_out_single_steps_and_gives_up_on_many() {
    let policy = || Policy::Skip {
        max_in_row: 2,
        max_fraction: 0.1,
    };
    let mut net = Net::new();
    net.faults = BTreeMap::from([(3, "nan"), (4, "gradient"), (11, "large")]);
    let mut skipped = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &mut net, with_policy(policy()), &mut |event| {
        if let Event::Skipped { step, .. } = event {
            skipped.push(*step);
        }
    })
    .unwrap();
    assert_eq!(skipped, [4, 5, 12]);
    for faults in [vec![3, 4, 5], vec![3, 9, 15, 21]] {
        let mut net = Net::new();
        net.faults = faults.into_iter().map(|s| (s, "nan")).collect();
        let dir = tempfile::tempdir().unwrap();
        let error = train(dir.path(), &mut net, with_policy(policy()), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("in a row"), "{error}");
    }
    // Leaving out an update does not mend a weight.
    let mut net = Net::new();
    net.faults.insert(3, "weight");
    let dir = tempfile::tempdir().unwrap();
    assert!(train(dir.path(), &mut net, with_policy(policy()), &mut |_| {}).is_err());
}

#[test]
fn rolling_back_mends_weights_and_leaves_out_the_step() {
    for fault in ["nan", "weight"] {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Net::new();
        net.faults.insert(10, fault);
        let mut log = Vec::new();
        train(
            dir.path(),
            &mut net,
            with_policy(Policy::Rollback { max_in_row: 3 }),
            &mut |event| match event {
                Event::RolledBack { step, to, .. } => log.push(("back", *step, *to)),
                Event::Skipped { step, .. } => log.push(("skip", *step, 0)),
                _ => {}
            },
        )
        .unwrap();
        assert_eq!(log, [("back", 11, 7), ("skip", 11, 0)]);
        assert_eq!(net.seen[..14], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7, 8, 9]);
        assert_eq!(net.seen[14], 11);
        // The metrics have each step once.
        let text = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        let steps: Vec<u64> = text
            .lines()
            .map(|l| {
                serde_json::from_str::<serde_json::Value>(l).unwrap()["step"]
                    .as_u64()
                    .unwrap()
            })
            .collect();
        assert_eq!(steps, [3, 6, 9, 11, 12, 15, 18, 21, 24, 27, 30]);
    }
    let mut net = Net::new();
    net.faults = (0..5).map(|s| (s, "nan")).collect();
    let dir = tempfile::tempdir().unwrap();
    let policy = with_policy(Policy::Rollback { max_in_row: 3 });
    let error = train(dir.path(), &mut net, policy.clone(), &mut |_| {}).unwrap_err();
    assert!(
        error.to_string().contains("3 rollbacks did not help"),
        "{error}"
    );
    let error = trainer(&Net::new(), policy)
        .run(&mut Net::new(), &Numbers, &mut Quiet, &Cancel::new())
        .unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
}

#[test]
fn a_spike_is_reported_and_a_rollback_recovers_from_it() {
    let long = |policy| TrainConfig {
        steps: 300,
        batch_size: 32,
        checkpoint_every: 50,
        schedule: LrSchedule::Constant {},
        clip_norm: None,
        ..with_policy(policy)
    };
    let run = |policy, fault: bool| {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Net::new();
        if fault {
            net.faults.insert(220, "spike");
        }
        let mut spikes = Vec::new();
        train(dir.path(), &mut net, long(policy), &mut |event| {
            if let Event::Spike { step, .. } = event {
                spikes.push(*step);
            }
        })
        .unwrap();
        (spikes, net.mean_loss)
    };
    let (spikes, clean) = run(Policy::Stop, false);
    assert!(spikes.is_empty(), "false alarms {spikes:?}");
    assert_eq!(run(Policy::Stop, true).0, [221]);
    let (spikes, recovered) = run(Policy::Rollback { max_in_row: 3 }, true);
    assert_eq!(spikes, [221]);
    println!("mean loss {clean} clean, {recovered} after a rollback");
    assert!(
        (recovered / clean - 1.0).abs() < 0.02,
        "{recovered} {clean}"
    );
}

#[test]
fn another_configuration_or_model_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    let other = TrainConfig {
        batch_size: 8,
        steps: 60,
        ..config()
    };
    let error = train(dir.path(), &mut Net::new(), other.clone(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::Checkpoint(_)));
    let text = error.to_string();
    assert!(
        text.contains("batch_size was 4, is 8") && text.contains("steps was 30, is 60"),
        "{text}"
    );
    let mut net = Net::new();
    let mut allowed = trainer(&net, other)
        .run_folder(dir.path())
        .allow_config_change();
    let outcome = allowed
        .run(&mut net, &Numbers, &mut Quiet, &Cancel::new())
        .unwrap();
    assert_eq!(outcome, Outcome::Finished { step: 60 });

    let mut net = Net::new();
    let mut params = net.params();
    params.insert(
        "w3".into(),
        Var::zeros(2, DType::F32, &Device::Cpu).unwrap(),
    );
    let mut grown = Trainer::new(params, config().check().unwrap())
        .unwrap()
        .run_folder(dir.path())
        .allow_config_change();
    let error = grown
        .run(&mut net, &Numbers, &mut Quiet, &Cancel::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("`w3`: missing"), "{error}");

    let mut net = Net::new();
    let mut named = trainer(&net, config())
        .run_folder(dir.path())
        .identity("another model");
    assert!(
        named
            .run(&mut net, &Numbers, &mut Quiet, &Cancel::new())
            .is_err()
    );
}

#[test]
fn a_full_disk_stops_or_is_survived() {
    for (policy, survives) in [(SaveFailure::Stop, false), (SaveFailure::Continue, true)] {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Net::new();
        let storage = Faulty::new(DiskStorage::new(), 12, Fault::NoSpace);
        let config = TrainConfig {
            save_failure: policy,
            ..config()
        };
        let mut trainer = trainer(&net, config)
            .run_folder(dir.path())
            .storage(Box::new(storage));
        let mut failed = 0;
        let mut watch =
            |event: &Event| failed += u64::from(matches!(event, Event::SaveFailed { .. }));
        let result = trainer.run(&mut net, &Numbers, &mut watch, &Cancel::new());
        if survives {
            assert_eq!(result.unwrap(), Outcome::Finished { step: 30 });
            assert_eq!(failed, 1);
        } else {
            assert!(matches!(result.unwrap_err(), Error::Io { .. }));
        }
    }
}

#[test]
fn time_runs_out_and_the_run_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let short = TrainConfig {
        max_minutes: Some(1e-9),
        ..config()
    };
    let outcome = train(dir.path(), &mut Net::new(), short, &mut |_| {}).unwrap();
    // The clock may be too coarse to see the time pass before the first step.
    assert!(
        matches!(outcome, Outcome::OutOfTime { step } if step < 30),
        "{outcome:?}"
    );
    let outcome = train(dir.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    assert_eq!(outcome, Outcome::Finished { step: 30 });
}

#[test]
fn a_run_folder_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut lock = RunLock::open(dir.path()).unwrap();
    let _guard = lock.acquire().unwrap();
    let error = train(dir.path(), &mut Net::new(), config(), &mut |_| {}).unwrap_err();
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
}

#[test]
fn rejected_checkpoints_are_reported_and_the_one_before_is_used() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &mut Net::new(), config(), &mut |_| {}).unwrap();
    let expected = bytes(dir.path());
    fs::write(
        dir.path()
            .join("checkpoints/step-000000030/params.safetensors"),
        b"",
    )
    .unwrap();
    let mut log = Vec::new();
    train(
        dir.path(),
        &mut Net::new(),
        config(),
        &mut |event| match event {
            Event::Rejected { path, why } => log.push(format!("{} {why}", path.display())),
            Event::Started { resumed_from } => log.push(format!("{resumed_from:?}")),
            _ => {}
        },
    )
    .unwrap();
    assert!(
        log[0].contains("step-000000030") && log[0].contains("params.safetensors"),
        "{log:?}"
    );
    assert_eq!(log[1], "Some(28)");
    assert_eq!(bytes(dir.path()), expected);
}

#[test]
fn losses_without_a_gradient_are_refused() {
    struct Detached(Var);
    impl Objective for Detached {
        type Batch = Tensor;
        fn losses(&mut self, _: usize, _: &Tensor, _: &StepCtx) -> Result<Vec<Loss>> {
            Ok(vec![Loss::new("d", self.0.as_tensor().detach().sum_all()?)])
        }
    }
    let x = Var::new(&[1f32], &Device::Cpu).unwrap();
    let params = BTreeMap::from([("x".into(), x.clone())]);
    let mut trainer = Trainer::new(params, config().check().unwrap()).unwrap();
    let error = trainer
        .run(&mut Detached(x), &Numbers, &mut Quiet, &Cancel::new())
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no parameter received a gradient"),
        "{error}"
    );
}

#[test]
fn memory_does_not_grow() {
    // Resident pages, where the system tells; a graph kept alive would cost far more.
    let resident = || -> Option<f64> {
        let text = fs::read_to_string("/proc/self/statm").ok()?;
        Some(text.split(' ').nth(1)?.parse::<f64>().ok()? * 4.0 / 1024.0)
    };
    let mut net = Net::new();
    let config = TrainConfig {
        steps: 3000,
        log_every: 100,
        ..config()
    };
    let mut samples = Vec::new();
    let mut watch = |event: &Event| {
        if let (Event::Step { step, .. }, Some(mib)) = (event, resident())
            && *step > 1000
        {
            samples.push((*step as f64, mib));
        }
    };
    trainer(&net, config)
        .run(&mut net, &Numbers, &mut watch, &Cancel::new())
        .unwrap();
    if samples.is_empty() {
        return;
    }
    let n = samples.len() as f64;
    let (mx, my) = samples
        .iter()
        .fold((0.0, 0.0), |(a, b), (x, y)| (a + x / n, b + y / n));
    let slope = samples
        .iter()
        .map(|(x, y)| (x - mx) * (y - my))
        .sum::<f64>()
        / samples.iter().map(|(x, _)| (x - mx).powi(2)).sum::<f64>();
    println!("memory: {:.4} MiB a hundred steps", slope * 100.0);
    // Other tests of this binary run at the same time; alone it is below 0.01.
    assert!(slope * 100.0 < 1.0, "{slope}");
}

#[test]
fn averaged_weights_can_be_used_in_place() {
    let mut net = Net::new();
    let mut trainer = trainer(&net, config());
    trainer
        .run(&mut net, &Numbers, &mut Quiet, &Cancel::new())
        .unwrap();
    let ema = trainer.ema().unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_ne!(values(&ema["w1"]), values(&net.w1));
    trainer.use_ema().unwrap();
    assert_eq!(values(&ema["w1"]), values(&net.w1));
    assert_eq!(trainer.step(), 30);
}

/// [`Net`], which leaves the parameters alone between the update and the moving average.
struct HandsOff(Net);

impl Objective for HandsOff {
    type Batch = Tensor;

    fn losses(&mut self, phase: usize, x: &Tensor, ctx: &StepCtx) -> Result<Vec<Loss>> {
        self.0.losses(phase, x, ctx)
    }

    fn writes_parameters(&self) -> bool {
        false
    }
}

#[test]
fn the_average_taken_with_the_update_is_the_one_taken_after_it() {
    let bits = |map: BTreeMap<String, Tensor>| {
        let values = map.into_values();
        let values = values.map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        values
            .map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let run = |together: bool| {
        let net = Net::new();
        let mut params = net.params();
        // One that never has a gradient is averaged, too.
        let idle = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        params.insert("idle".into(), Var::from_tensor(&idle).unwrap());
        let mut trainer = Trainer::new(params, config().check().unwrap()).unwrap();
        let cancel = Cancel::new();
        match together {
            true => trainer.run(&mut HandsOff(net), &Numbers, &mut Quiet, &cancel),
            false => {
                let mut net = net;
                trainer.run(&mut net, &Numbers, &mut Quiet, &cancel)
            }
        }
        .unwrap();
        let now = trainer.params().iter();
        let now = now
            .map(|(n, v)| (n.clone(), v.as_tensor().clone()))
            .collect();
        (bits(now), bits(trainer.ema().unwrap()))
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn weights_that_leave_the_finite_are_found_and_kept_from_the_average() {
    // A rate that is past the range of f32 after the first update.
    let config = TrainConfig {
        lr: 1e39,
        schedule: LrSchedule::Constant {},
        adamw: AdamWConfig {
            weight_decay: 0.0,
            ..AdamWConfig::default()
        },
        ..config()
    };
    let net = Net::new();
    let mut trainer = Trainer::new(net.params(), config.check().unwrap()).unwrap();
    let error = trainer
        .run(&mut HandsOff(net), &Numbers, &mut Quiet, &Cancel::new())
        .unwrap_err();
    assert!(
        error.to_string().contains("weight `w1` is not finite"),
        "{error}"
    );
    for average in trainer.ema().unwrap().values() {
        let values = average.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.is_finite()));
    }
}
