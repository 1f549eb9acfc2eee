//! The status tables of the READMEs, generated from `xtask/status.toml`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::source::Text;
use super::{Finding, equations};

const SOURCE: &str = "xtask/status.toml";
const BEGIN: &str = "<!-- status:begin -->";
const END: &str = "<!-- status:end -->";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Status {
    system: Vec<System>,
}

/// A row: a system of the survey and how far it has come.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct System {
    name: String,
    /// The crates that hold it, without their common prefix.
    crates: Vec<String>,
    #[serde(default)]
    implemented: State,
    #[serde(default)]
    parity: State,
    #[serde(default)]
    reproduced: State,
    #[serde(default)]
    benchmarked: State,
    /// Where the code is, as `path.rs::item`; needed as soon as anything is there.
    #[serde(default)]
    code: Vec<String>,
}

#[derive(Clone, Copy, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum State {
    #[default]
    Open,
    Part,
    Yes,
    /// There is nothing to compare or to measure.
    None,
}

impl State {
    fn shown(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Part => "in part",
            State::Yes => "yes",
            State::None => "–",
        }
    }
}

fn load(root: &Path) -> Result<Status> {
    let path = root.join(SOURCE);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

/// The crate whose rows a README shows; the page of the repository shows all of them.
fn subject(path: &str) -> Option<Option<&str>> {
    if path == "README.md" {
        return Some(None);
    }
    let name = path
        .strip_prefix("crates/diffusion-")?
        .strip_suffix("/README.md")?;
    Some(Some(name))
}

/// Compares the tables with the data, and the data with the code.
pub fn check(root: &Path, texts: &[Text]) -> Result<Vec<Finding>> {
    let status = load(root)?;
    let mut findings = evidence(&status, &|path| {
        std::fs::read_to_string(root.join(path)).ok()
    });
    if texts.iter().all(|text| text.path != "README.md") {
        findings.push(Finding::new(
            "README.md",
            0,
            "missing, it is what people read first",
        ));
    }
    for text in texts {
        let Some(name) = subject(&text.path) else {
            continue;
        };
        let line = text
            .text
            .lines()
            .position(|line| line.trim() == BEGIN)
            .map(|line| line + 1);
        match replaced(&text.text, &table(&status, name)) {
            Ok(new) if new == text.text => {}
            Ok(_) => findings.push(Finding::new(
                &text.path,
                line.unwrap_or(0),
                format!("the status table differs from {SOURCE}, run `cargo xtask tidy --fix`"),
            )),
            // Only crates that hold systems of the survey have a table.
            Err(_) if name.is_some() && line.is_none() && !holds(&status, name) => {}
            Err(error) => findings.push(Finding::new(
                &text.path,
                line.unwrap_or(0),
                error.to_string(),
            )),
        }
    }
    Ok(findings)
}

/// Rewrites the tables that differ; gives the files that were changed.
pub fn fix(root: &Path) -> Result<Vec<String>> {
    let status = load(root)?;
    let mut changed = Vec::new();
    for text in super::source::texts(root)? {
        let Some(name) = subject(&text.path) else {
            continue;
        };
        let Ok(new) = replaced(&text.text, &table(&status, name)) else {
            continue;
        };
        if new != text.text {
            std::fs::write(root.join(&text.path), new).with_context(|| text.path.clone())?;
            changed.push(text.path);
        }
    }
    Ok(changed)
}

/// A state that claims something must name code that exists.
fn evidence(status: &Status, read: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for system in &status.system {
        let mut find = |what: String| {
            findings.push(Finding::new(SOURCE, 0, format!("{}: {what}", system.name)));
        };
        let begun = matches!(system.implemented, State::Part | State::Yes);
        if begun == system.code.is_empty() {
            find("`code` must be given when, and only when, something is implemented".to_owned());
        }
        let claims = [system.parity, system.reproduced, system.benchmarked];
        if !begun
            && claims
                .iter()
                .any(|claim| matches!(claim, State::Part | State::Yes))
        {
            find("not implemented, yet claims a result, correct the states".to_owned());
        }
        for name in &system.code {
            if let Err(what) = equations::resolve(name, false, read) {
                find(what);
            }
        }
    }
    findings
}

fn holds(status: &Status, name: Option<&str>) -> bool {
    name.is_some_and(|name| {
        status
            .system
            .iter()
            .any(|system| system.crates.iter().any(|c| c == name))
    })
}

fn table(status: &Status, name: Option<&str>) -> String {
    let mut lines = vec![
        "| system | crate | implemented | parity | reproduced | benchmarked |".to_owned(),
        "|---|---|---|---|---|---|".to_owned(),
    ];
    for system in &status.system {
        if name.is_none_or(|name| system.crates.iter().any(|c| c == name)) {
            lines.push(format!(
                "| {} | {} | {} | {} | {} | {} |",
                system.name,
                system.crates.join(", "),
                system.implemented.shown(),
                system.parity.shown(),
                system.reproduced.shown(),
                system.benchmarked.shown(),
            ));
        }
    }
    lines.join("\n")
}

/// The text with the table between its markers replaced.
fn replaced(text: &str, table: &str) -> Result<String> {
    let Some((before, rest)) = text.split_once(BEGIN) else {
        bail!("no line `{BEGIN}`, add it and `{END}` where the status table belongs");
    };
    let Some((_, after)) = rest.split_once(END) else {
        bail!("no line `{END}` after `{BEGIN}`, add it");
    };
    Ok(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = r#"
        [[system]]
        name = "DDPM"
        crates = ["core", "images"]
        implemented = "yes"
        parity = "part"
        benchmarked = "none"
        code = ["a.rs::Ddpm"]

        [[system]]
        name = "CSDI"
        crates = ["timeseries"]
    "#;

    fn read(path: &str) -> Option<String> {
        (path == "a.rs").then(|| "pub struct Ddpm;".to_owned())
    }

    #[test]
    fn the_table_is_generated_and_put_between_the_markers() {
        let status: Status = toml::from_str(DATA).unwrap();
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&text, &table(&status, None)).unwrap();
        assert!(new.contains("| DDPM | core, images | yes | in part | open | – |\n| CSDI |"));
        assert!(new.starts_with("a\n") && new.ends_with("\nb\n") && !new.contains("old"));
        assert_eq!(replaced(&new, &table(&status, None)).unwrap(), new);
        assert!(!table(&status, Some("images")).contains("CSDI"));
        assert!(replaced("a", "b").unwrap_err().to_string().contains(BEGIN));
        assert!(replaced(BEGIN, "b").unwrap_err().to_string().contains(END));
    }

    #[test]
    fn claims_need_code() {
        let count = |data: &str| evidence(&toml::from_str(data).unwrap(), &read).len();
        assert_eq!(count(DATA), 0);
        assert_eq!(count(&DATA.replace("a.rs::Ddpm", "a.rs::Gone")), 1);
        assert_eq!(count(&DATA.replace("code = [\"a.rs::Ddpm\"]", "")), 1);
        assert_eq!(count(&DATA.replace("implemented = \"yes\"", "")), 2);
        assert!(
            toml::from_str::<Status>("[[system]]\nname = \"x\"\ncrates = []\nextra = 1").is_err()
        );
    }

    #[test]
    fn pages_are_told_apart() {
        assert_eq!(subject("README.md"), Some(None));
        assert_eq!(subject("crates/diffusion-nn/README.md"), Some(Some("nn")));
        assert_eq!(subject("data/README.md"), None);
    }
}
