//! Devices and threads.

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

/// candle's second pool spins while it waits, which on a busy machine costs more than it gives; a
/// limit of 0 lets it sleep.
const SPIN: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";

/// Starts this program again with the thread pools set, because they are read once, before any
/// tensor exists. `None` when nothing has to be done.
pub fn with_threads(threads: Option<u16>) -> Option<ExitCode> {
    let mut wanted: Vec<(&str, String)> = Vec::new();
    if std::env::var_os(SPIN).is_none() {
        wanted.push((SPIN, "0".into()));
    }
    if let Some(threads) = threads {
        wanted.extend(POOLS.map(|name| (name, threads.to_string())));
    }
    wanted.retain(|(name, value)| std::env::var(name).as_ref() != Ok(value));
    if wanted.is_empty() {
        return None;
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            eprintln!("error: cannot set the number of threads: {error}");
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
    eprintln!("error: cannot start again with another number of threads: {error}");
    ExitCode::FAILURE
}

#[cfg(not(unix))]
fn replace(mut command: Command) -> ExitCode {
    match command.status() {
        Ok(status) => ExitCode::from(status.code().unwrap_or(1) as u8),
        Err(error) => {
            eprintln!("error: cannot start again with another number of threads: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert!(device("cpu").unwrap().is_cpu());
        assert!(device("tpu").unwrap_err().to_string().contains("tpu"));
        assert!(device("cuda:x").unwrap_err().to_string().contains("cuda:N"));
    }
}
