//! Devices and threads.

use crate::out::note;
use anyhow::Result;
use candle_core::Device;
use diffusion_core::Report;
use std::process::{Command, ExitCode};

/// Environment variables that candle's thread pools read when they start.
const POOLS: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];

/// The device of a name such as `cpu`, `cuda:0` or `metal`.
///
/// # Errors
/// `Config` for unknown names and devices that this build or machine does not have.
pub fn device(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, index.parse::<usize>().ok()),
        None => (name, Some(0)),
    };
    let unknown = || {
        Report::new("--device", name)
            .expected("cpu, cuda, cuda:N, metal or metal:N")
            .config()
    };
    let index = index.ok_or_else(unknown)?;
    let missing = |error: candle_core::Error, feature: &str| {
        // The first line is the driver's; a backtrace may follow it.
        let error = error.to_string();
        let error = error.lines().next().unwrap_or_default();
        Report::new("--device", format!("{name}: {error}"))
            .remedy(format!(
                "use a build with --features {feature} on a machine that has one, or --device cpu"
            ))
            .config()
    };
    Ok(match kind {
        "cpu" => Device::Cpu,
        "cuda" => Device::new_cuda(index).map_err(|e| missing(e, "cuda"))?,
        "metal" => Device::new_metal(index).map_err(|e| missing(e, "metal"))?,
        _ => return Err(unknown().into()),
    })
}

/// What is set unless the user has: name, value, for which systems.
const DEFAULTS: [(&str, &str, bool); 3] = [
    // candle's second pool spins while it waits, which on a busy machine costs more than it gives;
    // a limit of 0 lets it sleep.
    ("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0", true),
    // Graphs of deep networks are walked by recursion on the threads of the pool.
    ("RUST_MIN_STACK", "33554432", true),
    // The allocator keeps the memory of one step for the next instead of handing it back to the
    // system, which would fill every page with zeros again; threads share one arena, since each of
    // the others ends at 64 MiB; and pages are large where the system offers them.
    (
        "GLIBC_TUNABLES",
        concat!(
            "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184",
            ":glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1",
        ),
        cfg!(all(target_os = "linux", target_env = "gnu")),
    ),
];

/// The variables that have to be set, given those that are.
fn missing(
    threads: Option<u16>,
    present: impl Fn(&str) -> Option<std::ffi::OsString>,
) -> Vec<(&'static str, String)> {
    let defaults = DEFAULTS
        .iter()
        .filter(|(name, _, here)| *here && present(name).is_none());
    let mut wanted: Vec<_> = defaults
        .map(|(name, value, _)| (*name, value.to_string()))
        .collect();
    if let Some(threads) = threads {
        let threads = threads.to_string();
        let pools = POOLS
            .iter()
            .filter(|name| present(name) != Some(threads.clone().into()));
        wanted.extend(pools.map(|name| (*name, threads.clone())));
    }
    wanted
}

/// Starts this program again with the thread pools and the allocator set, because they read their
/// variables once, before any tensor exists. `None` when nothing has to be done.
pub fn with_threads(threads: Option<u16>) -> Option<ExitCode> {
    let wanted = missing(threads, |name| std::env::var_os(name));
    if wanted.is_empty() {
        return None;
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            note!("error: cannot set the number of threads: {error}");
            return Some(ExitCode::FAILURE);
        }
    };
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1));
    command.envs(wanted);
    Some(replace(command))
}

#[cfg(unix)]
fn replace(mut command: Command) -> ExitCode {
    use std::os::unix::process::CommandExt;
    // The new program takes this one's place, so signals reach it directly.
    let error = command.exec();
    note!("error: cannot start again with another number of threads: {error}");
    ExitCode::FAILURE
}

#[cfg(not(unix))]
fn replace(mut command: Command) -> ExitCode {
    match command.status() {
        Ok(status) => ExitCode::from(status.code().unwrap_or(1) as u8),
        Err(error) => {
            note!("error: cannot start again with another number of threads: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pool_gets_the_number_of_threads_and_the_user_has_the_last_word() {
        let set = |names: &[(&str, &str)]| {
            let names: Vec<(String, String)> = names
                .iter()
                .map(|(n, v)| (n.to_string(), v.to_string()))
                .collect();
            move |name: &str| {
                let found = names.iter().find(|(n, _)| n == name);
                found.map(|(_, value)| value.clone().into())
            }
        };
        let wanted = missing(Some(3), set(&[("RAYON_NUM_THREADS", "8")]));
        for pool in POOLS {
            assert!(wanted.contains(&(pool, "3".to_string())), "{wanted:?}");
        }
        let all: Vec<(&str, &str)> = wanted.iter().map(|(n, v)| (*n, v.as_str())).collect();
        // The program that was started again has nothing more to set.
        assert_eq!(missing(Some(3), set(&all)), []);
        assert_eq!(missing(None, set(&all)), []);
        let own = missing(
            None,
            set(&[("RUST_MIN_STACK", "1"), ("GLIBC_TUNABLES", "")]),
        );
        assert_eq!(own, [("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0".to_string())]);
    }

    #[test]
    fn names_of_devices() {
        assert!(device("cpu").unwrap().is_cpu());
        assert!(device("tpu").unwrap_err().to_string().contains("tpu"));
        assert!(device("cuda:x").unwrap_err().to_string().contains("cuda:N"));
    }
}
