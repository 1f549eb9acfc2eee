//! Other libraries' files.
