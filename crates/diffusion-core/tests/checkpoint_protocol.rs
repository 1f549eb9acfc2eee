//! What the checkpoint protocol survives: a failure of any operation, a power cut before any
//! operation, any changed byte, any truncation, and a second writer.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use diffusion_core::Error;
use diffusion_core::checkpoint::fault::{Fault, Faulty, PowerCut};
use diffusion_core::checkpoint::{Checkpoints, DiskStorage, Keep, RunLock, Snapshot, Storage};
use diffusion_ops::rng::{Key, stream};

/// A checkpoint whose every value tells its step.
fn snapshot(step: u64) -> Snapshot {
    let tensor = |n: usize| {
        Tensor::full(step as f32, n, &Device::Cpu)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    let group = |names: &[(&str, usize)]| {
        names
            .iter()
            .map(|(n, len)| (n.to_string(), tensor(*len)))
            .collect::<BTreeMap<_, _>>()
    };
    Snapshot {
        step,
        groups: BTreeMap::from([
            ("params".to_string(), group(&[("a", 40), ("b", 3)])),
            ("adam_m".to_string(), group(&[("a", 40)])),
            ("objective".to_string(), BTreeMap::new()),
        ]),
        state: format!("{{\"step\": {step}}}\n").into_bytes(),
        score: Some(10.0 - step as f64),
    }
}

/// Checks that all of a checkpoint is of one step, and says which.
fn whole(found: &Snapshot) -> u64 {
    let expected = snapshot(found.step);
    assert_eq!(found.state, expected.state);
    assert_eq!(found.score, expected.score);
    assert_eq!(
        found.groups.keys().collect::<Vec<_>>(),
        expected.groups.keys().collect::<Vec<_>>()
    );
    for (name, group) in &expected.groups {
        assert_eq!(found.groups[name].len(), group.len());
        for (tensor, value) in group {
            let values = |t: &Tensor| t.to_vec1::<f32>().unwrap();
            assert_eq!(
                values(&found.groups[name][tensor]),
                values(value),
                "{name}/{tensor}"
            );
        }
    }
    found.step
}

const KEEP: Keep = Keep {
    last: 1,
    every: None,
    best: 0,
};

fn open(run: &Path, keep: Keep) -> Checkpoints {
    Checkpoints::open(run, Box::new(DiskStorage::new()), keep).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn every_failing_operation_leaves_a_sound_checkpoint() {
    let mut points = 0;
    for fault in [
        Fault::NoSpace,
        Fault::Device,
        Fault::ReadOnly,
        Fault::ShortWrite,
    ] {
        let mut at = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            let run = &dir.path().join("run");
            open(run, KEEP).save(&snapshot(1)).unwrap();
            let storage = Faulty::new(DiskStorage::new(), at, fault);
            let counter = storage.counter();
            let result = Checkpoints::open(run, Box::new(storage), KEEP)
                .and_then(|mut c| c.save(&snapshot(2)));
            if counter.load(Ordering::SeqCst) <= at {
                assert!(result.is_ok());
                break;
            }
            let error = result.unwrap_err();
            assert!(
                matches!(error, Error::Io { .. }),
                "{fault:?} at {at}: {error}"
            );
            assert!(
                error
                    .to_string()
                    .contains(&dir.path().display().to_string()),
                "{error}"
            );
            // The next start accepts the old or the new one, cleans up, and can save again.
            let mut after = open(run, KEEP);
            let loaded = after.load().unwrap();
            assert!(
                loaded.rejected.is_empty(),
                "{fault:?} at {at}: {:?}",
                loaded.rejected
            );
            assert!([1, 2].contains(&whole(&loaded.snapshot.unwrap())));
            after.save(&snapshot(3)).unwrap();
            assert_eq!(after.steps().unwrap(), [3]);
            let names = fs::read_dir(run.join("checkpoints")).unwrap().count();
            assert_eq!(names, 1, "{fault:?} at {at}: something was left behind");
            at += 1;
            points += 1;
        }
    }
    println!("{points} failing operations, all survived");
    assert!(points >= 4 * 30, "{points}");
}

#[test]
fn a_failed_save_can_be_followed_by_another_in_the_same_run() {
    let mut failed = 0;
    for at in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), KEEP).save(&snapshot(1)).unwrap();
        let storage = Faulty::new(DiskStorage::new(), at, Fault::NoSpace);
        let Ok(mut checkpoints) = Checkpoints::open(dir.path(), Box::new(storage), KEEP) else {
            continue;
        };
        if checkpoints.save(&snapshot(2)).is_ok() {
            continue;
        }
        failed += 1;
        checkpoints.save(&snapshot(3)).unwrap();
        assert_eq!(whole(&checkpoints.load().unwrap().snapshot.unwrap()), 3);
    }
    assert!(failed > 20, "{failed}");
}

#[test]
fn a_power_cut_before_any_operation_leaves_the_old_or_the_new() {
    let run = Path::new("run");
    let base = PowerCut::new(u64::MAX);
    let disk = base.disk();
    let mut checkpoints = Checkpoints::open(run, Box::new(base), KEEP).unwrap();
    checkpoints.save(&snapshot(1)).unwrap();
    let (mut cuts, mut old, mut new) = (0u64, 0u64, 0u64);
    for seed in 0..1000u64 {
        // Every operation in turn, with ever other choices of what got lost.
        let at = seed % 50;
        let second = disk.reopen(at);
        let after = second.disk();
        let result =
            Checkpoints::open(run, Box::new(second), KEEP).and_then(|mut c| c.save(&snapshot(2)));
        cuts += u64::from(result.is_err());
        let mut checkpoints =
            Checkpoints::open(run, Box::new(after.recover(seed, u64::MAX)), KEEP).unwrap();
        match whole(&checkpoints.load().unwrap().snapshot.unwrap()) {
            1 => old += 1,
            2 => new += 1,
            other => panic!("step {other}"),
        }
        if result.is_ok() {
            // A save that has returned is durable.
            assert_eq!(checkpoints.steps().unwrap().last(), Some(&2));
        }
        checkpoints.save(&snapshot(3)).unwrap();
        assert_eq!(whole(&checkpoints.load().unwrap().snapshot.unwrap()), 3);
    }
    println!("1000 power cuts: {cuts} within a save, {old} came back old, {new} new");
    assert!(cuts > 500 && old > 300 && new > 20, "{cuts} {old} {new}");
}

#[test]
fn the_power_cut_storage_does_lose_what_was_not_synced() {
    let run = Path::new("run");
    let file = run.join("f");
    let mut lost = 0;
    for seed in 0..200 {
        let mut storage = PowerCut::new(u64::MAX);
        let disk = storage.disk();
        storage.create_dir(run).unwrap();
        storage.create(&file).unwrap();
        storage.append(&file, &[7; 500]).unwrap();
        let back = disk.recover(seed, u64::MAX);
        let intact = back.read(&file).is_ok_and(|(mut r, len)| {
            let mut bytes = Vec::new();
            r.read_to_end(&mut bytes).unwrap();
            len == 500 && bytes == [7; 500]
        });
        lost += u32::from(!intact);
        storage.sync_file(&file).unwrap();
        storage.sync_dir(run).unwrap();
        storage.sync_dir(Path::new("")).unwrap();
        let (_, len) = disk
            .recover(seed, u64::MAX)
            .read(&file)
            .map(|(_, n)| ((), n))
            .unwrap();
        assert_eq!(len, 500);
    }
    assert!(lost > 150, "{lost} of 200");
}

/// A run with checkpoints 1 and 2, to be damaged.
fn pair() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let keep = Keep { last: 5, ..KEEP };
    let mut checkpoints = open(dir.path(), keep);
    checkpoints.save(&snapshot(1)).unwrap();
    checkpoints.save(&snapshot(2)).unwrap();
    dir
}

fn falls_back(run: &Path, what: &str) {
    let loaded = open(run, Keep { last: 5, ..KEEP }).load().unwrap();
    assert_eq!(whole(&loaded.snapshot.unwrap()), 1, "{what}");
    assert_eq!(loaded.rejected.len(), 1, "{what}");
    assert!(
        loaded.rejected[0].path.ends_with("step-000000002") && !loaded.rejected[0].why.is_empty()
    );
}

#[test]
fn every_changed_byte_is_noticed() {
    let dir = pair();
    let newest = dir.path().join("checkpoints/step-000000002");
    let mut files: Vec<_> = fs::read_dir(&newest)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    assert_eq!(files.len(), 5);
    let mut flips = 0;
    for (f, file) in files.iter().enumerate() {
        let sound = fs::read(file).unwrap();
        let manifest = file.ends_with("MANIFEST.json");
        // Every byte of the manifest; a hundred random ones of each other file.
        let positions: Vec<usize> = match manifest {
            true => (0..sound.len()).collect(),
            false => (0..100)
                .map(|i| {
                    let key = Key::new(1, stream::TEST).item(f as u64).step(i);
                    key.below(sound.len() as u64) as usize
                })
                .collect(),
        };
        for (i, &at) in positions.iter().enumerate() {
            let mut damaged = sound.clone();
            damaged[at] ^= 1 << (i % 8);
            fs::write(file, &damaged).unwrap();
            falls_back(dir.path(), &format!("{} byte {at}", file.display()));
            flips += 1;
        }
        fs::write(file, &sound).unwrap();
    }
    println!("{flips} changed bytes, all noticed");
    assert!(flips >= 500);
    assert_eq!(
        whole(&open(dir.path(), KEEP).load().unwrap().snapshot.unwrap()),
        2
    );
}

#[test]
fn every_truncated_missing_or_foreign_file_is_noticed() {
    let dir = pair();
    let newest = dir.path().join("checkpoints/step-000000002");
    let mut cuts = 0;
    for entry in fs::read_dir(&newest).unwrap() {
        let file = entry.unwrap().path();
        let sound = fs::read(&file).unwrap();
        for i in 0..64 {
            fs::write(&file, &sound[..sound.len() * i / 64]).unwrap();
            falls_back(dir.path(), "truncated");
            cuts += 1;
        }
        fs::write(&file, [&sound[..], b" "].concat()).unwrap();
        falls_back(dir.path(), "longer");
        fs::remove_file(&file).unwrap();
        falls_back(dir.path(), "missing");
        fs::write(&file, &sound).unwrap();
    }
    println!("{cuts} truncations, all noticed");
    fs::write(newest.join("extra"), b"").unwrap();
    falls_back(dir.path(), "foreign file");
    fs::remove_file(newest.join("extra")).unwrap();
    // A sound checkpoint under another step's name.
    let alias = dir.path().join("checkpoints/step-000000003");
    copy(&newest, &alias);
    let loaded = open(dir.path(), KEEP).load().unwrap();
    assert_eq!(whole(&loaded.snapshot.unwrap()), 2);
    assert!(
        loaded.rejected[0].why.contains("step 2; expected 3"),
        "{:?}",
        loaded.rejected
    );
}

#[test]
fn with_only_damaged_checkpoints_nothing_starts_in_silence() {
    let dir = pair();
    for step in [1, 2] {
        let manifest = dir
            .path()
            .join(format!("checkpoints/step-00000000{step}/MANIFEST.json"));
        fs::write(manifest, b"{}").unwrap();
    }
    let error = open(dir.path(), KEEP).load().unwrap_err();
    assert!(matches!(error, Error::Checkpoint(_)));
    let text = error.to_string();
    assert!(
        text.contains("step-000000001") && text.contains("step-000000002"),
        "{text}"
    );
}

#[test]
fn a_rejected_step_is_replaced_when_it_comes_again() {
    let dir = pair();
    let newest = dir.path().join("checkpoints/step-000000002");
    fs::write(newest.join("state.json"), b"{}").unwrap();
    let mut checkpoints = open(dir.path(), KEEP);
    assert_eq!(whole(&checkpoints.load().unwrap().snapshot.unwrap()), 1);
    checkpoints.save(&snapshot(2)).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [2]);
    assert_eq!(
        whole(&open(dir.path(), KEEP).load().unwrap().snapshot.unwrap()),
        2
    );
}

#[test]
fn pruning_keeps_the_newest_the_best_and_the_regular_and_no_rejected_one_pushes_out_a_sound_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoints = open(
        dir.path(),
        Keep {
            last: 2,
            every: Some(4),
            best: 1,
        },
    );
    for step in 1..=9 {
        let mut s = snapshot(step);
        s.score = Some(if step == 3 { 0.0 } else { step as f64 });
        checkpoints.save(&s).unwrap();
    }
    assert_eq!(checkpoints.steps().unwrap(), [3, 4, 8, 9]);

    let dir = pair();
    let newest = dir.path().join("checkpoints/step-000000002");
    copy(&newest, &dir.path().join("checkpoints/step-000000009"));
    let mut checkpoints = open(dir.path(), KEEP);
    assert_eq!(whole(&checkpoints.load().unwrap().snapshot.unwrap()), 2);
    checkpoints.save(&snapshot(5)).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [5, 9]);
    assert_eq!(
        whole(&open(dir.path(), KEEP).load().unwrap().snapshot.unwrap()),
        5
    );
}

#[test]
fn what_is_not_finite_is_never_written() {
    let dir = pair();
    let mut bad = snapshot(3);
    let nan = Tensor::new(&[1f32, f32::NAN], &Device::Cpu).unwrap();
    bad.groups
        .get_mut("adam_m")
        .unwrap()
        .insert("a".into(), nan);
    let error = open(dir.path(), KEEP).save(&bad).unwrap_err();
    assert!(matches!(error, Error::Numeric(_)));
    assert!(error.to_string().contains("adam_m: `a`"), "{error}");
    assert_eq!(open(dir.path(), KEEP).steps().unwrap(), [1, 2]);
}

#[test]
fn leftovers_of_an_interrupted_save_are_deleted_on_start() {
    let dir = pair();
    let root = dir.path().join("checkpoints");
    copy(&root.join("step-000000002"), &root.join(".tmp-3-99999"));
    fs::write(root.join(".tmp-file"), b"x").unwrap();
    fs::write(dir.path().join(".tmp-metrics"), b"x").unwrap();
    let checkpoints = open(dir.path(), KEEP);
    assert_eq!(checkpoints.steps().unwrap(), [1, 2]);
    assert_eq!(fs::read_dir(root).unwrap().count(), 2);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_second_writer_is_refused_at_once_and_told_who_the_first_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = RunLock::open(dir.path()).unwrap();
    let guard = first.acquire().unwrap();
    let started = Instant::now();
    let mut second = RunLock::open(dir.path()).unwrap();
    let error = second.acquire().unwrap_err();
    assert!(
        started.elapsed().as_millis() < 1000,
        "a busy machine may pause a test, but not for long"
    );
    assert!(matches!(error, Error::Checkpoint(_)));
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    drop(guard);
    second.acquire().unwrap();
}
