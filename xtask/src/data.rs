//! `cargo xtask data`: the small data sets that the repository carries, and whole ones of the user.

mod import;

use std::fmt::Write as _;
use std::path::{Component, Path};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::shell;

/// Look after the data sets in `data/`, and bring whole ones in.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Compare every file with data/manifest.json and data/README.md.
    ///
    /// Checks length and SHA-256 of each listed file, that data/README.md names each file with its
    /// hash, and that no file in data/ is missing from the list.
    ///
    /// Example:
    ///   cargo xtask data verify
    #[command(verbatim_doc_comment)]
    Verify,
    Import(import::Args),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    files: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Relative to `data/`, with forward slashes.
    path: String,
    bytes: u64,
    sha256: String,
    source: String,
    version: String,
    licence: String,
    shape: String,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Verb::Import(args) = &args.verb {
        return import::run(args);
    }
    let findings = verify(&shell::root()?.join("data"))?;
    findings.iter().for_each(|finding| println!("{finding}"));
    if findings.is_empty() {
        println!("data: every file is as listed");
        return Ok(ExitCode::SUCCESS);
    }
    println!("data: {} findings", findings.len());
    Ok(ExitCode::FAILURE)
}

/// Everything that is not as the manifest and the page say.
fn verify(data: &Path) -> Result<Vec<String>> {
    let path = data.join("manifest.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let manifest: Manifest =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let path = data.join("README.md");
    let page = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;

    let mut findings = Vec::new();
    for entry in &manifest.files {
        let name = &entry.path;
        let mut find = |what: String| findings.push(format!("data/{name}: {what}"));
        if !Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            find("listed with a path that leaves data/; use a relative path".to_owned());
            continue;
        }
        for (field, value) in [
            ("source", &entry.source),
            ("version", &entry.version),
            ("licence", &entry.licence),
            ("shape", &entry.shape),
        ] {
            if value.trim().is_empty() {
                find(format!("empty `{field}` in manifest.json; state it"));
            }
        }
        if !page.contains(&format!("`{name}`")) || !page.contains(&entry.sha256) {
            find("not in data/README.md with its hash; add a row to its table of files".to_owned());
        }
        let bytes = match std::fs::read(data.join(name)) {
            Ok(bytes) => bytes,
            Err(error) => {
                find(format!(
                    "{error}; restore the file or drop its entry in manifest.json"
                ));
                continue;
            }
        };
        let length = bytes.len() as u64;
        if length != entry.bytes {
            find(format!(
                "{length} bytes, manifest.json says {}; restore the file",
                entry.bytes
            ));
        }
        let hash = sha256(&bytes);
        if hash != entry.sha256 {
            find(format!(
                "sha256 {hash}, manifest.json says {}; restore the file",
                entry.sha256
            ));
        }
    }

    let mut present = Vec::new();
    walk(data, "", &mut present)?;
    for name in present {
        let known = ["manifest.json", "README.md"].contains(&name.as_str());
        if !known && manifest.files.iter().all(|entry| entry.path != name) {
            findings.push(format!(
                "data/{name}: not in manifest.json; list it with its source and licence"
            ));
        }
    }
    Ok(findings)
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut entries = entries.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), &format!("{name}/"), files)?;
        } else {
            files.push(name);
        }
    }
    Ok(())
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(64), |mut hex, byte| {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_one() {
        // FIPS 180-4, example "abc".
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn the_repository_is_as_listed() {
        let findings = verify(&shell::root().unwrap().join("data")).unwrap();
        assert!(findings.is_empty(), "{findings:#?}");
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let entry = |path: &str, bytes: u64, hash: &str| {
            format!(
                r#"{{"path":"{path}","bytes":{bytes},"sha256":"{hash}","source":"s","version":"1",
                "licence":"","shape":"x"}}"#
            )
        };
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        write("a.txt", "abd");
        write("long.txt", "abcd");
        write("extra.txt", "");
        let entries = [
            entry("a.txt", 3, abc),
            entry("long.txt", 3, abc),
            entry("gone", 1, "00"),
            entry("../up", 1, "00"),
        ];
        write(
            "manifest.json",
            &format!(r#"{{"files":[{}]}}"#, entries.join(",")),
        );
        write("README.md", &format!("`a.txt` {abc}"));
        let findings = verify(folder.path()).unwrap().join("\n");
        for part in [
            "data/a.txt: empty `licence`",
            "data/a.txt: sha256 ",
            "data/long.txt: 4 bytes, manifest.json says 3",
            "data/long.txt: not in data/README.md",
            "data/gone: ",
            "data/../up: listed with a path that leaves data/",
            "data/extra.txt: not in manifest.json",
        ] {
            assert!(findings.contains(part), "{part}\n--\n{findings}");
        }
    }
}
