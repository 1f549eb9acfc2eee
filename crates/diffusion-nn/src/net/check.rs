//! What every network checks about its configuration.

use crate::error::{Error, Result};

/// Every field at least 1.
pub(crate) fn positive(fields: &[(&str, usize)]) -> Result<()> {
    match fields.iter().find(|(_, value)| *value == 0) {
        Some((field, _)) => Err(Error::config(
            *field,
            0,
            "at least 1",
            "give a positive number",
        )),
        None => Ok(()),
    }
}

/// A probability of dropping something.
pub(crate) fn probability(field: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    let expected = "at least 0 and less than 1";
    Err(Error::config(field, value, expected, "use 0 for none"))
}
