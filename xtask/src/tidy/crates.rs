//! Manifests: what every package has, and that nothing is listed for nobody.

use std::path::Path;

use anyhow::{Context, Result};

use super::Finding;
use super::source::Text;

/// A package of the workspace.
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its folder, relative to the repository.
    pub folder: String,
    /// Its manifest, relative to the repository.
    pub manifest: String,
    table: toml::Table,
}

/// Packages that are for programs, not for libraries that others build on.
const PROGRAMS_ONLY: [&str; 3] = ["anyhow", "clap", "indicatif"];

impl Member {
    fn is_library(&self) -> bool {
        self.folder.starts_with("crates/") && self.name != "diffusion-cli"
    }

    /// Names of the sections' dependencies, the ones that depend on the platform included.
    fn dependencies(&self, kinds: &[&str]) -> Vec<&str> {
        let mut tables = vec![&self.table];
        if let Some(targets) = self.table.get("target").and_then(toml::Value::as_table) {
            tables.extend(targets.values().filter_map(toml::Value::as_table));
        }
        let sections = tables.into_iter().flat_map(|table| {
            kinds
                .iter()
                .filter_map(|kind| table.get(*kind).and_then(toml::Value::as_table))
        });
        sections
            .flat_map(|section| section.keys().map(String::as_str))
            .collect()
    }
}

const KINDS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

/// All packages, sorted by folder.
pub fn members(root: &Path) -> Result<Vec<Member>> {
    let mut folders: Vec<String> = ["benches", "tests", "xtask"]
        .iter()
        .map(|name| (*name).to_owned())
        .collect();
    let crates = root.join("crates");
    for entry in std::fs::read_dir(&crates).with_context(|| crates.display().to_string())? {
        folders.push(format!("crates/{}", entry?.file_name().to_string_lossy()));
    }
    folders.sort();
    let read = |folder: String| {
        let manifest = format!("{folder}/Cargo.toml");
        let text =
            std::fs::read_to_string(root.join(&manifest)).with_context(|| manifest.clone())?;
        let table: toml::Table = text.parse().with_context(|| manifest.clone())?;
        let name = table
            .get("package")
            .and_then(|package| package.get("name"))
            .and_then(toml::Value::as_str)
            .with_context(|| format!("{manifest}: no package.name"))?;
        Ok(Member {
            name: name.to_owned(),
            folder,
            manifest,
            table: table.clone(),
        })
    };
    folders.into_iter().map(read).collect()
}

/// Checks the manifests of the members and of the workspace.
pub fn check(root: &Path, members: &[Member], texts: &[Text]) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for member in members {
        findings.extend(check_member(root, member, texts));
    }
    let path = root.join("Cargo.toml");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let table: toml::Table = text.parse().context("Cargo.toml")?;
    let listed = table
        .get("workspace")
        .and_then(|workspace| workspace.get("dependencies"))
        .and_then(toml::Value::as_table)
        .context("Cargo.toml: no [workspace.dependencies]")?;
    for name in listed.keys() {
        if !members
            .iter()
            .any(|member| member.dependencies(&KINDS).contains(&name.as_str()))
        {
            let line = text
                .lines()
                .position(|line| line.starts_with(&format!("{name} =")));
            findings.push(Finding::new(
                "Cargo.toml",
                line.map_or(0, |line| line + 1),
                format!("no package uses the workspace dependency `{name}`, remove it"),
            ));
        }
    }
    Ok(findings)
}

fn check_member(root: &Path, member: &Member, texts: &[Text]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |file: &str, what: String| findings.push(Finding::new(file, 0, what));
    let inherits = member
        .table
        .get("lints")
        .and_then(|lints| lints.get("workspace"))
        .and_then(toml::Value::as_bool);
    if inherits != Some(true) {
        find(
            &member.manifest,
            "does not inherit the lints, add `[lints]` `workspace = true`".into(),
        );
    }
    if member.folder.starts_with("crates/")
        && !root.join(&member.folder).join("README.md").is_file()
    {
        let file = format!("{}/README.md", member.folder);
        find(
            &file,
            "missing, say what the crate is for and show its smallest use".into(),
        );
    }
    if member.is_library() {
        for name in member.dependencies(&["dependencies"]) {
            if PROGRAMS_ONLY.contains(&name) {
                let what = format!("`{name}` in a library, it belongs to programs");
                find(&member.manifest, what);
            }
        }
    }
    let prefix = format!("{}/", member.folder);
    for name in member.dependencies(&KINDS) {
        let word = name.replace('-', "_");
        let used = texts
            .iter()
            .filter(|text| text.is_rust() && text.path.starts_with(&prefix))
            .any(|text| contains_word(&text.text, &word));
        if !used {
            let what =
                format!("no source of this package names the dependency `{name}`, remove it");
            find(&member.manifest, what);
        }
    }
    findings
}

fn contains_word(text: &str, word: &str) -> bool {
    let letter = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        !text[..at].ends_with(letter) && !text[at + word.len()..].starts_with(letter)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_whole() {
        assert!(contains_word("use image::x;", "image"));
        assert!(!contains_word("use diffusion_images::x; my_image", "image"));
    }

    #[test]
    fn a_manifest_is_judged() {
        let manifest = "[package]\nname = \"diffusion-x\"\n[dependencies]\nclap = \"4\"\nunused-one = \"1\"\n\
                        [target.'cfg(unix)'.dependencies]\nlibc = \"0.2\"\n";
        let member = Member {
            name: "diffusion-x".to_owned(),
            folder: "crates/diffusion-x".to_owned(),
            manifest: "crates/diffusion-x/Cargo.toml".to_owned(),
            table: manifest.parse().unwrap(),
        };
        assert_eq!(member.dependencies(&KINDS), ["clap", "unused-one", "libc"]);
        let text = "use clap::Parser;\nuse libc::c_int;".to_owned();
        let texts = [Text {
            path: "crates/diffusion-x/src/lib.rs".to_owned(),
            text,
        }];
        let folder = tempfile::tempdir().unwrap();
        let findings: Vec<String> = check_member(folder.path(), &member, &texts)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(findings.len(), 4, "{findings:#?}");
        for (finding, part) in findings.iter().zip([
            "inherit the lints",
            "README.md: missing",
            "`clap` in a library",
            "`unused-one`",
        ]) {
            assert!(finding.contains(part), "{finding}");
        }
    }
}
