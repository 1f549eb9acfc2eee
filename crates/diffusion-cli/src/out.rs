//! Writing to the terminal without dying of a reader that went away.
//!
//! The standard macros panic when a pipe is closed (`| head`) or a disk is full; hours of training must
//! not end because nobody reads their progress.

use diffusion_core::Report;
use std::path::Path;

/// A line on standard output.
macro_rules! out {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

/// A line on standard error.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

pub(crate) use {note, out};

/// Refuses a file of another ending, or in a folder that is not there, before any work is done.
pub fn must_be_writable(option: &str, file: &Path, ending: &str) -> anyhow::Result<()> {
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty());
    let refuse = |found: String, expected: String, remedy: &str| {
        Err(Report::new(option, found)
            .expected(expected)
            .remedy(remedy)
            .config()
            .into())
    };
    // Devices and pipes have the names that they have.
    let special = file.exists() && !file.is_file();
    if !special
        && file
            .extension()
            .is_none_or(|e| !e.eq_ignore_ascii_case(ending))
    {
        return refuse(
            file.display().to_string(),
            format!("a name that ends in .{ending}"),
            "change the ending: the format is always that",
        );
    }
    match folder {
        Some(folder) if !folder.is_dir() => refuse(
            format!("{}: no such folder {}", file.display(), folder.display()),
            "a file in a folder that exists".into(),
            "make the folder first",
        ),
        _ => Ok(()),
    }
}
