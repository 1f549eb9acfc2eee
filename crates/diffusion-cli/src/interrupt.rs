//! Ctrl-C (or a closed terminal): the first one saves and ends, a second one ends at once.

use anyhow::{Context, Result};
use diffusion_core::train::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The signal that arrived, 0 for none.
static ARRIVED: std::sync::OnceLock<Arc<AtomicUsize>> = std::sync::OnceLock::new();

/// Lets signals set `cancel`. A second signal ends the program as the signal would have.
///
/// # Errors
/// When the system refuses a handler.
pub fn listen(cancel: &Cancel) -> Result<()> {
    let arrived = ARRIVED
        .get_or_init(|| Arc::new(AtomicUsize::new(0)))
        .clone();
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let armed = Arc::new(AtomicBool::new(false));
        let context = "cannot listen for Ctrl-C";
        // Order matters: the second signal sees what the first one armed.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, armed.clone())
            .context(context)?;
        signal_hook::flag::register(signal, armed).context(context)?;
        signal_hook::flag::register_usize(signal, arrived.clone(), signal as usize)
            .context(context)?;
        signal_hook::flag::register(signal, cancel.flag()).context(context)?;
    }
    Ok(())
}

/// 130 after Ctrl-C, 143 after SIGTERM, 129 when the terminal was closed, `None` when nothing arrived.
pub fn exit_code() -> Option<ExitCode> {
    match ARRIVED.get()?.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(ExitCode::from(128 + signal as u8)),
    }
}
