//! Where things are, and how other programs are started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result, ensure};

/// The folder that holds the workspace's `Cargo.toml`.
pub fn root() -> Result<PathBuf> {
    // The variable is set by `cargo run`; the compile-time value serves a binary started by hand.
    let own = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = own
        .parent()
        .context("the xtask package has no parent folder")?
        .to_path_buf();
    ensure!(
        root.join("Cargo.toml").is_file(),
        "{}: no Cargo.toml; run this task from inside the repository, as `cargo xtask`",
        root.display()
    );
    Ok(root)
}

/// Where cargo puts what it builds; `CARGO_TARGET_DIR` moves it, relative to the current folder.
pub fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || root.join("target"),
        |dir| std::path::absolute(&dir).unwrap_or_else(|_| PathBuf::from(dir)),
    )
}

/// The cargo that started us, working on this workspace.
///
/// The current folder stays the user's, so that relative paths in arguments mean what they say.
pub fn cargo(root: &Path, subcommand: &str) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command
        .arg(subcommand)
        .arg("--manifest-path")
        .arg(root.join("Cargo.toml"));
    command
}

/// Runs a command to its end with our own input and output.
pub fn status(command: &mut Command) -> Result<ExitStatus> {
    command
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))
}

/// Runs a command that must succeed and gives what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        shown(command),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).with_context(|| format!("{} printed no text", shown(command)))
}

/// The child's exit code as ours; a child that a signal ended counts as failed.
pub fn exit_code(status: ExitStatus) -> ExitCode {
    match status.code().map(u8::try_from) {
        Some(Ok(code)) => ExitCode::from(code),
        _ => ExitCode::FAILURE,
    }
}

/// A command as one would type it, for messages.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_stem().map_or_else(
        || program.display().to_string(),
        |stem| stem.to_string_lossy().into_owned(),
    );
    let mut words = vec![name];
    let mut arguments = command
        .get_args()
        .map(|argument| argument.to_string_lossy());
    while let Some(argument) = arguments.next() {
        // Always the same here, and long.
        if argument == "--manifest-path" {
            arguments.next();
        } else if argument.is_empty() || argument.contains(char::is_whitespace) {
            words.push(format!("'{argument}'"));
        } else {
            words.push(argument.into_owned());
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_holds_the_workspace() {
        let text = std::fs::read_to_string(root().unwrap().join("Cargo.toml")).unwrap();
        assert!(text.contains("[workspace]"));
    }

    #[test]
    fn a_command_is_shown_without_what_is_always_the_same() {
        let mut command = cargo(Path::new("somewhere"), "run");
        command.args(["-p", "diffusion-tests", "--", "two words", ""]);
        assert!(shown(&command).ends_with("run -p diffusion-tests -- 'two words' ''"));
    }
}
