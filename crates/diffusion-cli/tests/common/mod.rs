//! Running the command in a folder.

// Each test file uses some of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

/// What the command says and how it ends.
pub fn diffusion(args: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_diffusion"))
        .args(args)
        .current_dir(folder)
        .output()
        .unwrap()
}

/// What it wrote, as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output of a command that must succeed.
pub fn succeeds(args: &[&str], folder: &Path) -> String {
    let output = diffusion(args, folder);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a command that must be refused with this code and these words, without a panic.
pub fn refuses(args: &[&str], folder: &Path, code: i32, words: &[&str]) {
    let output = diffusion(args, folder);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    for word in words {
        assert!(
            message.contains(word),
            "{args:?}: no `{word}` in: {message}"
        );
    }
}
