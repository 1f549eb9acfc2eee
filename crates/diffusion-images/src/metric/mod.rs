//! Measures of sample quality.
