//! Writing to the terminal without dying of a reader that went away.
//!
//! The standard macros panic when a pipe is closed (`| head`) or a disk is full; hours of training must
//! not end because nobody reads their progress.

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
