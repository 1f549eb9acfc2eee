//! EQUATIONS.md against the code and the tests that its rows name.

use std::path::Path;

use super::Finding;
use super::source::Text;

const FILE: &str = "EQUATIONS.md";

/// How many rows each section has: the survey's formulas are all there and none is lost.
const SECTIONS: &[(&str, usize)] = &[
    ("N1", 10),
    ("N2", 3),
    ("N3", 3),
    ("N4", 4),
    ("N5", 2),
    ("N6", 1),
    ("N7", 7),
    ("N8", 1),
    ("N9", 2),
    ("N10", 1),
    ("N11", 2),
    ("F1", 12),
    ("F2", 13),
    ("F3", 10),
    ("F4", 9),
    ("F5", 5),
    ("F6", 15),
    ("F7", 24),
    ("F8", 24),
    ("F9", 16),
    ("F10", 29),
    ("F11", 3),
];

/// A row of one of the tables.
#[derive(Debug, PartialEq)]
struct Row<'a> {
    line: usize,
    label: &'a str,
    formula: &'a str,
    code: &'a str,
    test: &'a str,
    state: &'a str,
}

/// Checks the document.
pub fn check(root: &Path, texts: &[Text]) -> Vec<Finding> {
    match texts.iter().find(|text| text.path == FILE) {
        Some(text) => judge(&text.text, SECTIONS, &|path| {
            texts
                .iter()
                .find(|text| text.path == path)
                .map(|text| text.text.clone())
                .or_else(|| std::fs::read_to_string(root.join(path)).ok())
        }),
        None => vec![Finding::new(
            FILE,
            0,
            "missing, it maps formulas to code and tests",
        )],
    }
}

/// Rows whose first cell is a label such as `N1.2`; anything else in a table is a heading.
fn rows(text: &str) -> (Vec<Row<'_>>, Vec<Finding>) {
    let (mut rows, mut findings) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let Some(inner) = line
            .trim()
            .strip_prefix('|')
            .and_then(|line| line.strip_suffix('|'))
        else {
            continue;
        };
        let cells: Vec<&str> = inner.split('|').map(str::trim).collect();
        let is_label = cells[0].split_once('.').is_some_and(|(section, number)| {
            section.starts_with(['N', 'F'])
                && section[1..].parse::<u32>().is_ok()
                && number.parse::<u32>().is_ok()
        });
        if !is_label {
            continue;
        }
        let [label, formula, code, test, state] = cells[..] else {
            let what = format!(
                "row `{}` has {} cells, expected 5: label, formula, code, test, state (write ∣ for \
                 a bar inside a cell)",
                cells[0],
                cells.len()
            );
            findings.push(Finding::new(FILE, line_number, what));
            continue;
        };
        rows.push(Row {
            line: line_number,
            label,
            formula,
            code,
            test,
            state,
        });
    }
    (rows, findings)
}

fn judge(
    text: &str,
    sections: &[(&str, usize)],
    read: &dyn Fn(&str) -> Option<String>,
) -> Vec<Finding> {
    let (rows, mut findings) = rows(text);
    for (section, count) in sections {
        let numbers: Vec<&str> = rows
            .iter()
            .filter_map(|row| row.label.split_once('.'))
            .filter(|(name, _)| name == section)
            .map(|(_, number)| number)
            .collect();
        let expected: Vec<String> = (1..=*count).map(|number| number.to_string()).collect();
        if numbers != expected {
            let what = format!(
                "section {section} has rows {numbers:?}, expected 1 to {count} in order: restore \
                 the row, or change the table in xtask/src/tidy/equations.rs"
            );
            findings.push(Finding::new(FILE, 0, what));
        }
    }
    for row in &rows {
        let mut find = |what: String| {
            findings.push(Finding::new(
                FILE,
                row.line,
                format!("{}: {what}", row.label),
            ));
        };
        if row
            .label
            .split_once('.')
            .is_none_or(|(name, _)| sections.iter().all(|s| s.0 != name))
        {
            find("belongs to no known section, add it to xtask/src/tidy/equations.rs".to_owned());
        }
        if row.formula.is_empty() {
            find("has no formula, write it".to_owned());
        }
        match row.state {
            "open" => {
                if row.code.contains("::") || row.test.contains("::") {
                    find("is open but names code, set the state to done".to_owned());
                }
                if !row.code.contains("diffusion-") {
                    find("is open, name the crate that will hold it".to_owned());
                }
            }
            "done" => {
                for (cell, kind) in [(row.code, "code"), (row.test, "test")] {
                    let names = quoted(cell);
                    if names.is_empty() {
                        find(format!("is done but names no {kind}, write `path::name`"));
                    }
                    for name in names {
                        if let Err(what) = resolve(name, kind == "test", read) {
                            find(what);
                        }
                    }
                }
            }
            other => find(format!(
                "has the state `{other}`, expected `done` or `open`"
            )),
        }
    }
    findings
}

/// The words between back ticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Whether `path::item` (or `path::Type::item`) exists.
pub fn resolve(
    name: &str,
    test: bool,
    read: &dyn Fn(&str) -> Option<String>,
) -> Result<(), String> {
    let Some((path, item)) = name.split_once(".rs::") else {
        return Err(format!("`{name}` is no `path.rs::item`, write it so"));
    };
    let path = format!("{path}.rs");
    let item = item.rsplit("::").next().unwrap_or_default();
    let Some(text) = read(&path) else {
        return Err(format!("`{path}` does not exist, correct the path"));
    };
    let exists = if test {
        has_test(&text, item)
    } else {
        has_item(&text, item)
    };
    let kind = if test { "#[test] fn" } else { "item" };
    if exists {
        Ok(())
    } else {
        Err(format!("`{path}` has no {kind} `{item}`, correct the name"))
    }
}

/// What can stand before the name of an item.
const KEYWORDS: [&str; 8] = [
    "fn", "struct", "enum", "trait", "const", "static", "type", "mod",
];

fn has_item(text: &str, item: &str) -> bool {
    text.lines().any(|line| declares(line, item, &KEYWORDS))
}

fn has_test(text: &str, item: &str) -> bool {
    let mut marked = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[test]") {
            marked = true;
        } else if marked && declares(line, item, &["fn"]) {
            return true;
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            marked = false;
        }
    }
    false
}

fn declares(line: &str, item: &str, keywords: &[&str]) -> bool {
    let line = line.trim_start();
    if line.starts_with("//") {
        return false;
    }
    let words: Vec<&str> = line
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .collect();
    if words
        .windows(2)
        .any(|pair| keywords.contains(&pair[0]) && pair[1] == item)
    {
        return true;
    }
    // A variant of an enum stands alone on its line.
    keywords.contains(&"enum")
        && line.starts_with(|c: char| c.is_uppercase())
        && line.strip_prefix(item).is_some_and(|rest| {
            rest.starts_with([',', '(', ' ']) && (rest.len() == 1 || !rest.contains("::"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "pub struct Vp {\n}\nimpl Vp {\n    pub const fn at(&self) {}\n}\n\
                          enum Kind {\n    Flow,\n}\n// fn ghost\n#[test]\n#[ignore]\nfn law() {}\n\
                          fn helper() {}\n";

    fn read(path: &str) -> Option<String> {
        (path == "a/vp.rs").then(|| SOURCE.to_owned())
    }

    #[test]
    fn items_and_tests_are_told_apart() {
        for (name, test, good) in [
            ("a/vp.rs::Vp", false, true),
            ("a/vp.rs::Vp::at", false, true),
            ("a/vp.rs::Kind::Flow", false, true),
            ("a/vp.rs::ghost", false, false),
            ("a/vp.rs::law", true, true),
            ("a/vp.rs::helper", true, false),
            ("a/vp.rs::helper", false, true),
            ("a/ve.rs::Ve", false, false),
            ("Vp", false, false),
        ] {
            assert_eq!(resolve(name, test, &read).is_ok(), good, "{name}");
        }
    }

    #[test]
    fn a_sound_table_passes() {
        let text = "| label | formula | code | test | state |\n|---|---|---|---|---|\n\
                    | N1.1 | x = y | `a/vp.rs::Vp`, `a/vp.rs::Vp::at` | `a/vp.rs::law` | done |\n\
                    | N1.2 | z | diffusion-hybrids | – | open |\n";
        assert_eq!(judge(text, &[("N1", 2)], &read), []);
    }

    #[test]
    fn each_rule_has_a_row_that_breaks_it() {
        for (row, part) in [
            ("| N1.1 | x | y | open |", "has 4 cells"),
            ("| N1.1 | | diffusion-core | – | open |", "has no formula"),
            (
                "| N1.1 | x | `a/vp.rs::Vp` | – | open |",
                "is open but names code",
            ),
            ("| N1.1 | x | soon | – | open |", "name the crate"),
            ("| N1.1 | x | `a/vp.rs::Vp` | – | done |", "names no test"),
            (
                "| N1.1 | x | `a/vp.rs::No` | `a/vp.rs::law` | done |",
                "has no item `No`",
            ),
            (
                "| N1.1 | x | `a/vp.rs::Vp` | `a/vp.rs::helper` | done |",
                "no #[test] fn `helper`",
            ),
            (
                "| N1.1 | x | `b.rs::Vp` | `a/vp.rs::law` | done |",
                "`b.rs` does not exist",
            ),
            (
                "| N1.1 | x | diffusion-core | – | later |",
                "has the state `later`",
            ),
            (
                "| N1.2 | x | diffusion-core | – | open |",
                "expected 1 to 1 in order",
            ),
            (
                "| N2.1 | x | diffusion-core | – | open |",
                "belongs to no known section",
            ),
        ] {
            let findings = judge(row, &[("N1", 1)], &read);
            assert!(
                findings.iter().any(|finding| finding.what.contains(part)),
                "{row}: {findings:?}"
            );
        }
    }
}
