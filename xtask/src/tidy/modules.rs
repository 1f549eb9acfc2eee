//! Directions between the modules of diffusion-core, read from its `crate::` paths.

use super::Finding;
use super::source::Text;

/// A module may use those of its own floor and of the floors below. Adding a module is adding a name.
const FLOORS: [(u8, &[&str]); 6] = [
    (0, &["error", "limits", "noise"]),
    (
        1,
        &[
            "tensor",
            "schedule",
            "forward",
            "predict",
            "checkpoint",
            "report",
            "ode",
            "quadrature",
        ],
    ),
    (2, &["grid", "sde", "denoiser"]),
    (
        3,
        &["loss", "sample", "guide", "likelihood", "distill", "search"],
    ),
    (4, &["oracle", "train"]),
    (5, &["interop"]),
];

/// Modules that read and write files; the rest is a function of its inputs and a seed.
const FILES: [&str; 3] = ["checkpoint", "interop", "limits"];

/// The one file of a run that grows line by line, so that it is no checkpoint.
const LOG: &str = "train/metrics.rs";

const SOURCES: &str = "crates/diffusion-core/src/";

/// Checks every source of diffusion-core, tests left out.
pub fn check(texts: &[Text]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for text in texts
        .iter()
        .filter(|text| text.is_rust() && !text.is_test())
    {
        let Some(inner) = text.path.strip_prefix(SOURCES) else {
            continue;
        };
        let own = inner.split(['/', '.']).next().unwrap_or_default();
        if own == "lib" {
            continue;
        }
        let Some(floor) = floor(own) else {
            let what = format!("module `{own}` has no floor, add it to xtask/src/tidy/modules.rs");
            findings.push(Finding::new(&text.path, 0, what));
            continue;
        };
        // Test modules and comments become empty lines, so that line numbers stay.
        let code: String = text.lines().iter().fold(String::new(), |mut code, line| {
            if !line.test && !line.is_comment() {
                code.push_str(line.text);
            }
            code.push('\n');
            code
        });
        for (line, module) in used(&code) {
            if self::floor(module).is_some_and(|other| other > floor) {
                findings.push(Finding::new(
                    &text.path,
                    line,
                    format!(
                        "`{own}` uses `{module}`, which stands above it: move what is shared down"
                    ),
                ));
            }
        }
        if !FILES.contains(&own) && inner != LOG {
            for (index, line) in code.lines().enumerate() {
                if line.contains("std::fs") || line.contains("File::") {
                    let what =
                        format!("`{own}` touches files, leave that to checkpoint or interop");
                    findings.push(Finding::new(&text.path, index + 1, what));
                }
            }
        }
    }
    findings
}

fn floor(module: &str) -> Option<u8> {
    FLOORS
        .iter()
        .find(|(_, names)| names.contains(&module))
        .map(|(floor, _)| *floor)
}

/// The modules that stand right after `crate::`, groups included, each with its line.
fn used(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (at, path) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let start = at + path.len();
        let rest = &code[start..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut name = 0;
            for (index, c) in group.char_indices() {
                if depth == 0 && matches!(c, ',' | '}' | ':' | ' ' | '\n' | '{') {
                    if name < index && !matches!(&group[name..index], "self" | "as") {
                        found.push((start + 1 + name, &group[name..index]));
                    }
                    name = index + 1;
                }
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => {
                        depth -= 1;
                        name = index + 1;
                    }
                    _ => {}
                }
            }
        } else {
            let end = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            found.push((start, &rest[..end]));
        }
    }
    found
        .into_iter()
        .map(|(at, name)| (code[..at].matches('\n').count() + 1, name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(code: &str) -> Vec<&str> {
        used(code)
            .into_iter()
            .map(|(_, name)| name)
            .filter(|n| floor(n).is_some())
            .collect()
    }

    #[test]
    fn uses_are_found_in_every_form() {
        assert_eq!(names("use crate::schedule::Point;"), ["schedule"]);
        assert_eq!(
            names("use crate::{Result, grid::{Grid, train}, sde};"),
            ["grid", "sde"]
        );
        assert_eq!(
            names("use crate::{\n    error::Error,\n    loss,\n};"),
            ["error", "loss"]
        );
        assert_eq!(
            names("let x = crate::train::f(crate::predict::g());"),
            ["train", "predict"]
        );
        assert!(names("use subcrate::train; $crate::train").is_empty());
    }

    #[test]
    fn arrows_that_point_up_are_found() {
        let file = |path: &str, text: &str| Text {
            path: format!("{SOURCES}{path}"),
            text: text.to_owned(),
        };
        let texts = [
            file(
                "schedule/vp.rs",
                "//! x\n\nuse crate::error::Error;\nuse crate::grid::Grid;\n",
            ),
            file(
                "sample/ddim.rs",
                "// crate::train\n#[cfg(test)]\nmod tests {\n    use crate::train::T;\n}\n",
            ),
            file("train/mod.rs", "use crate::sample::S;\nuse std::fs;\n"),
            file("checkpoint/mod.rs", "use std::fs;\n"),
            file("novel.rs", ""),
        ];
        let findings: Vec<String> = check(&texts).iter().map(ToString::to_string).collect();
        assert_eq!(findings.len(), 3, "{findings:#?}");
        assert!(findings[0].contains("schedule/vp.rs:4: `schedule` uses `grid`"));
        assert!(findings[1].contains("train/mod.rs:2: `train` touches files"));
        assert!(findings[2].contains("`novel` has no floor"));
    }
}
