//! Time and memory of this process.

use anyhow::{Result, bail};
use std::time::Instant;

/// A moment on both clocks.
pub(crate) struct Moment {
    wall: Instant,
    cpu: f64,
}

impl Moment {
    /// This moment.
    pub fn now() -> Result<Self> {
        Ok(Self {
            wall: Instant::now(),
            cpu: process_seconds()?,
        })
    }

    /// Wall seconds and process CPU seconds (of all threads) since then.
    pub fn elapsed(&self) -> Result<(f64, f64)> {
        Ok((
            self.wall.elapsed().as_secs_f64(),
            process_seconds()? - self.cpu,
        ))
    }
}

#[cfg(unix)]
fn process_seconds() -> Result<f64> {
    use rustix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9;
    if seconds <= 0.0 {
        bail!("the clock of the process's CPU time stands at {seconds} s; it does not work here");
    }
    Ok(seconds)
}

#[cfg(not(unix))]
fn process_seconds() -> Result<f64> {
    bail!("the CPU time of a process is only measured on Unix; run the comparison there")
}

/// Memory of this process in KiB, where the system tells (Linux).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Now resident.
    pub resident: u64,
    /// The most that was resident since the start, or since [`Memory::reset_peak`].
    pub peak: u64,
}

impl Memory {
    /// What the system says now.
    pub fn now() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/self/status").ok()?)
    }

    /// Lets the peak begin anew from what is resident now. Without the permission the peak stays
    /// that since the start, which can only make a difference of peaks smaller.
    pub fn reset_peak() -> bool {
        std::fs::write("/proc/self/clear_refs", "5").is_ok()
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse().ok()
        };
        Some(Self {
            resident: field("VmRSS:")?,
            peak: field("VmHWM:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time_on_both_clocks() {
        let start = Moment::now().unwrap();
        let mut sum = 0f64;
        while start.elapsed().unwrap().1 < 0.01 {
            sum += std::hint::black_box(1.0);
        }
        let (wall, cpu) = start.elapsed().unwrap();
        assert!(sum > 0.0 && cpu >= 0.01 && wall > 0.0);
    }

    #[test]
    fn memory_is_read_from_its_lines() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let expected = Memory {
            resident: 1024,
            peak: 2048,
        };
        assert_eq!(Memory::parse(status), Some(expected));
        assert_eq!(Memory::parse("VmRSS:\t12 kB\n"), None);
    }
}
