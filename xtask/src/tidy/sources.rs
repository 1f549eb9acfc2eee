//! What holds for every text: documentation, length, no unfinished code, no machine's paths.

use super::Finding;
use super::source::Text;

/// Lines of a Rust file, tests apart.
const LONGEST: usize = 500;

/// Files that may be longer, each with the reason.
const LONG: &[(&str, &str)] = &[];

/// Macros that stand for code that is not there; put together here so that this file passes itself.
const UNFINISHED: [&str; 2] = [concat!("todo", "!("), concat!("unimplemented", "!(")];

/// Beginnings of paths that exist on one machine only.
const MACHINE: [&str; 4] = [
    concat!("/wo", "rk/"),
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
];

/// Macros with which a program speaks; libraries emit events.
const PRINTING: [&str; 4] = ["println!(", "eprintln!(", "print!(", "eprint!("];

/// Checks all texts.
pub fn check(texts: &[Text]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for text in texts {
        for (index, line) in text.text.lines().enumerate() {
            if let Some(path) = MACHINE.iter().find(|path| starts_a_path(line, path)) {
                let what = format!("a path of somebody's machine (`{path}`), make it relative");
                findings.push(Finding::new(&text.path, index + 1, what));
            }
        }
        if text.is_rust() {
            rust(text, &mut findings);
        }
    }
    for (path, _) in LONG {
        if texts.iter().all(|text| text.path != *path) {
            let what = format!("`{path}` may be long but does not exist, remove it from the list");
            findings.push(Finding::new("xtask/src/tidy/sources.rs", 0, what));
        }
    }
    findings
}

fn rust(text: &Text, findings: &mut Vec<Finding>) {
    if !text.text.starts_with("//! ") {
        let what = "does not open with a `//!` module documentation, say what the file is for";
        findings.push(Finding::new(&text.path, 1, what));
    }
    let lines = text.lines();
    let length = lines.iter().filter(|line| !line.test).count();
    let allowed = LONG.iter().any(|(path, _)| *path == text.path);
    if length > LONGEST && !text.is_test() && !allowed {
        let what = format!("{length} lines without tests, at most {LONGEST}: split the file");
        findings.push(Finding::new(&text.path, length, what));
    }
    let library = text.path.starts_with("crates/")
        && text.path.contains("/src/")
        && !text.path.starts_with("crates/diffusion-cli/");
    for line in lines.iter().filter(|line| !line.is_comment()) {
        if let Some(name) = UNFINISHED.iter().find(|name| line.text.contains(*name)) {
            let what = format!("`{name}..)`, finish the code or take it out");
            findings.push(Finding::new(&text.path, line.number, what));
        }
        let prints = library && !line.test && PRINTING.iter().any(|name| calls(line.text, name));
        if prints {
            let what = "a library prints, emit a tracing event instead";
            findings.push(Finding::new(&text.path, line.number, what));
        }
    }
}

/// Whether `path` begins a path in `line`, and is not the middle of a longer one or of an address.
fn starts_a_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        !line[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | '/'))
    })
}

fn calls(line: &str, name: &str) -> bool {
    line.match_indices(name)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        check(&[Text {
            path: path.to_owned(),
            text: text.to_owned(),
        }])
        .iter()
        .map(ToString::to_string)
        .collect()
    }

    #[test]
    fn each_rule_has_a_file_that_breaks_it() {
        let long = format!("//! Long.\n{}", "fn f() {}\n".repeat(LONGEST));
        let tests = format!(
            "//! Tests.\n#[cfg(test)]\nmod tests {{\n{}}}\n",
            "    //\n".repeat(600)
        );
        let home = format!("//! See {}me/x.\n", "/ho");
        let later = format!("//! Later.\nfn f() {{ {}!() }}\n", "todo");
        let library = "crates/diffusion-nn/src/a.rs";
        for (path, text, part) in [
            (library, "use x;\n", "a.rs:1: does not open with"),
            (library, long.as_str(), "501 lines without tests"),
            (
                library,
                home.as_str(),
                "a.rs:1: a path of somebody's machine",
            ),
            (library, later.as_str(), "a.rs:2: `todo"),
            (
                library,
                "//! Loud.\nfn f() { println!(\"x\") }\n",
                "a.rs:2: a library prints",
            ),
        ] {
            let found = findings(path, text);
            assert!(
                found.len() == 1 && found[0].contains(part),
                "{part}: {found:?}"
            );
        }
        for (path, text) in [
            (library, tests.as_str()),
            ("crates/diffusion-nn/tests/a.rs", long.as_str()),
            (
                "crates/diffusion-cli/src/a.rs",
                "//! Loud.\nfn f() { println!(\"x\") }\n",
            ),
            ("README.md", "https://example.org/home/page and docs/work/x"),
        ] {
            assert!(findings(path, text).is_empty(), "{path}");
        }
    }
}
