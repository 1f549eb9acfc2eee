//! What can go wrong when networks are configured, loaded and run.

use std::fmt;

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong when networks are configured, loaded and run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration that no network can have.
    #[error("configuration field `{field}` is {found}, expected {expected}; {remedy}")]
    Config {
        /// The field, with its path.
        field: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
        /// What to do.
        remedy: String,
    },
    /// An input that the network cannot take.
    #[error("input `{name}` is {found}, expected {expected}")]
    Input {
        /// The argument.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// Weights that don't fit the network.
    #[error("{0}")]
    Weights(Box<WeightReport>),
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn config(
        field: impl Into<String>,
        found: impl fmt::Display,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Config {
            field: field.into(),
            found: found.to_string(),
            expected: expected.into(),
            remedy: remedy.into(),
        }
    }
}

/// A tensor of the wrong shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The tensor.
    pub name: String,
    /// The shape that the network has.
    pub expected: Vec<usize>,
    /// The shape of the given weight.
    pub found: Vec<usize>,
}

/// Everything that is wrong with a set of weights, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightReport {
    /// Names that the network has and the weights lack.
    pub missing: Vec<String>,
    /// Names that the weights have and the network lacks.
    pub unexpected: Vec<String>,
    /// Names that both have, with different shapes.
    pub mismatched: Vec<Mismatch>,
    /// Tensors that hold a NaN or an infinity.
    pub non_finite: Vec<String>,
    /// Constants that are not those of the configuration.
    pub differing: Vec<String>,
}

impl WeightReport {
    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn into_result(self) -> Result<()> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(Error::Weights(Box::new(self)))
        }
    }
}

impl fmt::Display for WeightReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the weights don't fit the network:")?;
        for (what, names) in [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("with a NaN or an infinity", &self.non_finite),
            ("with other constants", &self.differing),
        ] {
            if !names.is_empty() {
                write!(f, " {} {what} ({});", names.len(), names.join(", "))?;
            }
        }
        for Mismatch {
            name,
            expected,
            found,
        } in &self.mismatched
        {
            write!(f, " `{name}` has shape {found:?}, expected {expected:?};")?;
        }
        write!(
            f,
            " check that the weights and the configuration belong to the same model"
        )
    }
}
