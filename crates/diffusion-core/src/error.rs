//! Errors say whose fault it is, and what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, sorted by whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a value that the user gave is malformed.
    #[error("{0}")]
    Input(Report),
    /// A configuration is wrong or contradicts itself.
    #[error("{0}")]
    Config(Report),
    /// Something is larger than a limit that protects this machine.
    #[error("{0}")]
    Limit(Report),
    /// Well-formed, but this version cannot do it.
    #[error("{0}")]
    Unsupported(Report),
    /// A computation left the finite numbers or failed to converge.
    #[error("{0}")]
    Numeric(Report),
    /// A checkpoint or run folder is damaged, in use, or from another configuration.
    #[error("{0}")]
    Checkpoint(Report),
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The run was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The tensor library refused.
    #[error("{0}")]
    Tensor(#[from] candle_core::Error),
}

/// The parts of a clear message: where, what was found, what was expected, what to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// File, field or argument.
    pub at: String,
    /// What is there.
    pub found: String,
    /// What should be there; may be empty.
    pub expected: String,
    /// What the user can do; may be empty.
    pub remedy: String,
}

/// Characters of a field in a message.
const LONGEST_FIELD: usize = 80;

impl Report {
    /// A message about `at`, which holds `found`.
    pub fn new(at: impl fmt::Display, found: impl fmt::Display) -> Self {
        Self {
            at: at.to_string(),
            found: found.to_string(),
            ..Self::default()
        }
    }

    /// A message about a file.
    pub fn file(path: &Path, found: impl fmt::Display) -> Self {
        Self::new(path.display(), found)
    }

    /// A message about a field of a text that was parsed; `.` and nothing stand for the whole of it.
    ///
    /// Nested texts have fields of any length: long ones are cut.
    pub fn field(
        at: impl fmt::Display,
        field: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        let field = field.to_string();
        match field.as_str() {
            "" | "." | "?" => Self::new(at, found),
            _ if field.chars().count() > LONGEST_FIELD => {
                let start: String = field.chars().take(LONGEST_FIELD).collect();
                Self::new(format_args!("{at}: {start}…"), found)
            }
            _ => Self::new(format_args!("{at}: {field}"), found),
        }
    }

    /// Adds what should have been there.
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.expected = expected.to_string();
        self
    }

    /// Adds what the user can do.
    pub fn remedy(mut self, remedy: impl fmt::Display) -> Self {
        self.remedy = remedy.to_string();
        self
    }

    /// Somebody gave malformed data.
    pub fn input(self) -> Error {
        Error::Input(self)
    }

    /// Somebody gave a wrong configuration.
    pub fn config(self) -> Error {
        Error::Config(self)
    }

    /// Something is too large.
    pub fn limit(self) -> Error {
        Error::Limit(self)
    }

    /// This version cannot do it.
    pub fn unsupported(self) -> Error {
        Error::Unsupported(self)
    }

    /// A computation failed.
    pub fn numeric(self) -> Error {
        Error::Numeric(self)
    }

    /// A checkpoint cannot be used.
    pub fn checkpoint(self) -> Error {
        Error::Checkpoint(self)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.found)?;
        if !self.expected.is_empty() {
            write!(f, "; expected {}", self.expected)?;
        }
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

impl Error {
    /// An input/output error about `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_as_one_sentence() {
        let error = Report::new("train.toml: lr", "-1")
            .expected("a positive number")
            .remedy("use 1e-3");
        assert_eq!(
            error.config().to_string(),
            "train.toml: lr: -1; expected a positive number (use 1e-3)"
        );
    }
}
