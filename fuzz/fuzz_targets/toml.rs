//! Bytes as a `toml` file.
#![no_main]

use diffusion_tests::targets::{Format, fuzz};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz(Format::Toml, bytes));
