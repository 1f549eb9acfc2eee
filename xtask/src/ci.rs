//! `cargo xtask ci`: everything that must hold before a change is merged, in the order of cost.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::{consumers, fuzz, shell, tidy};

/// Format, lints, the fuzz targets, a program outside the workspace for each domain crate, tidy,
/// documentation, and the tests of the README.
///
/// Stops at the first step that fails and prints each step with its seconds. The tests are run with
/// the very command that README.md shows to a newcomer, the block that follows the line
/// `<!-- ci:test -->`, so that what the page says cannot go stale.
///
/// Example:
///   cargo xtask ci
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Leave the tests out: a quick look before a commit.
    #[arg(long)]
    no_test: bool,
}

/// Marks the code block of README.md that holds the test command.
const MARK: &str = "<!-- ci:test -->";

/// Runs the steps; the first failure ends the task.
pub fn run(args: &Args) -> Result<ExitCode> {
    let root = shell::root()?;
    let start = Instant::now();
    // Read first: a page without the command should not cost a build to discover.
    let tests = test_commands(&root)?;

    step("fmt", || {
        succeed(shell::cargo(&root, "fmt").args(["--all", "--check"]))
    })?;
    step("clippy", || {
        succeed(shell::cargo(&root, "clippy").args([
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "--deny",
            "warnings",
        ]))
    })?;
    step("fuzz targets", || fuzz::check(&root))?;
    step("consumers", || consumers::check(&root, false))?;
    step("tidy", || {
        let findings = tidy::check(&root)?;
        findings.iter().for_each(|finding| println!("{finding}"));
        ensure!(findings.is_empty(), "{} findings", findings.len());
        Ok(())
    })?;
    step("doc", || {
        succeed(
            shell::cargo(&root, "doc")
                .args(["--workspace", "--no-deps", "--quiet"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    })?;
    if args.no_test {
        println!("ci: tests left out");
    } else {
        for words in &tests {
            step(&words.join(" "), || {
                let [_, subcommand, rest @ ..] = words.as_slice() else {
                    bail!("README.md: `{}` is no cargo command", words.join(" "));
                };
                succeed(
                    shell::cargo(&root, subcommand)
                        .args(rest)
                        .current_dir(&root),
                )
            })?;
        }
    }
    println!("ci: passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("ci: {name} ...");
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("ci: {name}: {verdict}, {seconds:.1} s");
    result.with_context(|| format!("step `{name}`"))
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = shell::status(command)?;
    ensure!(
        status.success(),
        "`{}` ended with {status}",
        shell::shown(command)
    );
    Ok(())
}

fn test_commands(root: &Path) -> Result<Vec<Vec<String>>> {
    let path = root.join("README.md");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    parse(&text)
}

/// The commands in the code block after [`MARK`], one a line, split at white space.
fn parse(readme: &str) -> Result<Vec<Vec<String>>> {
    let Some((_, after)) = readme.split_once(MARK) else {
        bail!(
            "README.md: no line `{MARK}`; put it above the code block with the test command \
             (`cargo test --workspace`)"
        );
    };
    let mut lines = after.lines().skip_while(|line| line.trim().is_empty());
    let open = lines.next().unwrap_or_default();
    ensure!(
        open.trim_start().starts_with("```"),
        "README.md: `{MARK}` is followed by `{open}`; expected a fenced code block"
    );
    let mut commands = Vec::new();
    for line in lines {
        let line = line.trim();
        if line.starts_with("```") {
            ensure!(
                !commands.is_empty(),
                "README.md: the block after `{MARK}` holds no command"
            );
            return Ok(commands);
        }
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        ensure!(
            line.starts_with("cargo ") && !line.contains(['\'', '"', '|', ';', '&', '$']),
            "README.md: `{line}` after `{MARK}`; expected a plain cargo command without shell syntax"
        );
        commands.push(line.split_whitespace().map(str::to_owned).collect());
    }
    bail!("README.md: the code block after `{MARK}` has no end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marked_block_gives_the_commands() {
        let readme = "a\n<!-- ci:test -->\n\n```sh\n# all of it\ncargo test --workspace\n```\nb";
        assert_eq!(parse(readme).unwrap(), [["cargo", "test", "--workspace"]]);
    }

    #[test]
    fn what_is_not_a_command_is_refused() {
        for (readme, part) in [
            ("cargo test", "no line"),
            (
                "<!-- ci:test -->\ncargo test",
                "expected a fenced code block",
            ),
            ("<!-- ci:test -->\n```\n```", "holds no command"),
            ("<!-- ci:test -->\n```\ncargo test", "has no end"),
            (
                "<!-- ci:test -->\n```\nmake test\n```",
                "plain cargo command",
            ),
            (
                "<!-- ci:test -->\n```\ncargo test | tail\n```",
                "plain cargo command",
            ),
        ] {
            let message = parse(readme).unwrap_err().to_string();
            assert!(message.contains(part), "{readme:?}: {message}");
        }
    }
}
