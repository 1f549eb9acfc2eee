//! Serves one case to the driver of `cargo xtask bench --against`.
//!
//! ```text
//! case list                  the cases, a line of JSON each
//! case serve NAME FOLDER     see diffusion_benches::serve
//! case memory NAME CALLS     the peak of the memory
//! ```

use anyhow::{Context, Result, bail};
use diffusion_benches::serve;
use std::io::{stdin, stdout};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // On a thread of the pool, or every parallel loop would begin by waking one.
    match rayon::scope(|_| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut out = stdout().lock();
    match words[..] {
        ["list"] => serve::list(&mut out),
        ["serve", name, folder] => {
            serve::serve(name, Path::new(folder), &mut stdin().lock(), &mut out)
        }
        ["memory", name, calls] => {
            let calls = calls
                .parse()
                .with_context(|| format!("`{calls}`; expected a number of calls"))?;
            serve::memory(name, calls, &mut out)
        }
        _ => bail!("usage: case list | case serve NAME FOLDER | case memory NAME CALLS"),
    }
}
