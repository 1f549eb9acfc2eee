//! Which packages may stand in the tree of which crate.

use std::path::Path;

use anyhow::Result;

use super::Finding;
use super::crates::Member;
use crate::shell;

/// What a crate of this workspace may depend on, directly or not.
enum Room {
    /// Only these crates of the workspace.
    Only(&'static [&'static str]),
    /// Every crate of the workspace.
    All,
}

/// What every domain stands on.
const GROUND: &[&str] = &["diffusion-ops", "diffusion-core", "diffusion-nn"];
const DOMAIN: Room = Room::Only(GROUND);

/// The map of ARCHITECTURE.md. Adding a crate is adding a row.
const ROOMS: &[(&str, Room)] = &[
    ("diffusion-ops", Room::Only(&[])),
    ("diffusion-core", Room::Only(&["diffusion-ops"])),
    ("diffusion-nn", Room::Only(&["diffusion-ops"])),
    ("diffusion-images", DOMAIN),
    ("diffusion-cli", Room::All),
    ("diffusion-tests", Room::All),
    ("diffusion-benches", Room::All),
    ("xtask", Room::Only(&[])),
];

/// Packages that exactly one domain pays for, with that domain.
const RESERVED: &[(&str, &str)] = &[
    ("polars", "diffusion-timeseries"),
    ("polars-core", "diffusion-timeseries"),
    ("hound", "diffusion-waveform"),
    ("petgraph", "diffusion-discrete"),
    ("image", "diffusion-images"),
];

/// Asks cargo for the tree of each member and compares it with the tables.
pub fn check(root: &Path, members: &[Member]) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for member in members {
        let mut command = shell::cargo(root, "tree");
        command.args(["-p", &member.name, "-e", "normal", "--prefix", "none"]);
        command.args(["--format", "{p}"]);
        let tree = shell::output(&mut command)?;
        findings.extend(judge(&member.name, &member.manifest, &packages(&tree)));
    }
    Ok(findings)
}

/// The package names in a tree that was printed without prefixes; the first is the crate itself.
pub fn packages(tree: &str) -> Vec<&str> {
    let mut names: Vec<&str> = tree
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Those of a program's packages for which it would have to use another domain than `domain`.
pub fn strangers<'a>(domain: &str, packages: &[&'a str]) -> Vec<&'a str> {
    let reserved = |name: &str| RESERVED.iter().any(|(n, d)| *n == name && *d != domain);
    let ours = |name: &str| name.starts_with("diffusion-") && !GROUND.contains(&name);
    let mut found = packages.to_vec();
    found.retain(|name| reserved(name) || ours(name) && *name != domain);
    found
}

fn judge(name: &str, manifest: &str, packages: &[&str]) -> Vec<Finding> {
    let Some((_, room)) = ROOMS.iter().find(|(known, _)| *known == name) else {
        let what = format!(
            "`{name}` has no place in the dependency table, add a row to xtask/src/tidy/tree.rs"
        );
        return vec![Finding::new(manifest, 0, what)];
    };
    let Room::Only(allowed) = room else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for package in packages {
        let ours = package.starts_with("diffusion-");
        if ours && !allowed.contains(package) {
            findings.push(Finding::new(
                manifest,
                0,
                format!("`{name}` reaches `{package}`, remove the arrow (see ARCHITECTURE.md)"),
            ));
        }
        for (reserved, domain) in RESERVED {
            if package == reserved && name != *domain {
                findings.push(Finding::new(
                    manifest,
                    0,
                    format!("`{name}` builds `{package}`, which only `{domain}` may use"),
                ));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_read_and_judged() {
        let tree = "diffusion-core v0.1.0 (path)\ncandle-core v0.11.1\nimage v0.25.0\n\
                    diffusion-nn v0.1.0 (path)\ndiffusion-ops v0.1.0 (path)\ncandle-core v0.11.1 (*)\n";
        let packages = packages(tree);
        assert_eq!(
            packages,
            ["candle-core", "diffusion-nn", "diffusion-ops", "image"]
        );
        let findings = |name| {
            judge(name, "Cargo.toml", &packages)
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        let core = findings("diffusion-core");
        assert_eq!(core.len(), 2);
        assert!(core[0].contains("`diffusion-core` reaches `diffusion-nn`"));
        assert!(core[1].contains("only `diffusion-images` may use"));
        assert!(findings("diffusion-images").is_empty());
        assert!(findings("diffusion-cli").is_empty());
        assert_eq!(findings("xtask").len(), 3);
        assert!(findings("diffusion-new")[0].contains("has no place"));
        let all = [
            "candle-core",
            "diffusion-images",
            "diffusion-nn",
            "hound",
            "image",
        ];
        assert_eq!(strangers("diffusion-images", &all), ["hound"]);
        assert_eq!(
            strangers("diffusion-waveform", &all),
            ["diffusion-images", "image"]
        );
    }
}
