//! The text files of the repository, and which of their lines are tests.

use std::path::Path;

use anyhow::{Context, Result};

/// Folders of the repository that are ours; whatever else lies beside them is not looked at.
const ROOMS: [&str; 7] = [
    ".cargo", ".ci", "benches", "crates", "data", "tests", "xtask",
];

/// What we can read as text.
const ENDINGS: [&str; 9] = ["rs", "md", "toml", "json", "py", "html", "txt", "sh", "yml"];

/// Larger files are data, not text that somebody wrote.
const LIMIT: u64 = 1 << 20;

/// A text file.
pub struct Text {
    /// Relative to the repository, with forward slashes.
    pub path: String,
    /// All of it.
    pub text: String,
}

/// A line of Rust.
pub struct Line<'a> {
    /// From 1.
    pub number: usize,
    /// With its indentation.
    pub text: &'a str,
    /// Inside a `#[cfg(test)]` module.
    pub test: bool,
}

impl Text {
    /// Whether this is a Rust source.
    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether the whole file is a test.
    pub fn is_test(&self) -> bool {
        self.path.starts_with("tests/tests/") || self.path.contains("/tests/")
    }

    /// The lines, each marked as test or not.
    pub fn lines(&self) -> Vec<Line<'_>> {
        lines(&self.text)
    }
}

impl Line<'_> {
    /// Whether the line is only a comment or documentation.
    pub fn is_comment(&self) -> bool {
        self.text.trim_start().starts_with("//")
    }
}

/// Marks the modules under `#[cfg(test)]`. The end of one is the brace at its own indentation, which
/// is where the formatter puts it.
fn lines(text: &str) -> Vec<Line<'_>> {
    let mut lines: Vec<Line<'_>> = Vec::new();
    let mut end: Option<String> = None;
    let mut announced = false;
    for (index, text) in text.lines().enumerate() {
        let body = text.trim_start();
        let indent = &text[..text.len() - body.len()];
        let mut test = end.is_some();
        if let Some(closing) = &end {
            if text == closing {
                end = None;
            }
        } else if body.starts_with("#[cfg(test)]") {
            announced = true;
            test = true;
        } else if announced {
            test = true;
            if body.starts_with("#[") {
                // Another attribute of the same item.
            } else {
                announced = false;
                if body.ends_with('{') {
                    end = Some(format!("{indent}}}"));
                }
            }
        }
        lines.push(Line {
            number: index + 1,
            text,
            test,
        });
    }
    lines
}

/// All text files of the repository, sorted by path.
pub fn texts(root: &Path) -> Result<Vec<Text>> {
    let mut texts = Vec::new();
    let entries = std::fs::read_dir(root).with_context(|| root.display().to_string())?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_file() || ROOMS.contains(&name.as_str()) {
            walk(&entry.path(), &name, &mut texts)?;
        }
    }
    texts.sort_by(|a: &Text, b: &Text| a.path.cmp(&b.path));
    Ok(texts)
}

fn walk(path: &Path, name: &str, texts: &mut Vec<Text>) -> Result<()> {
    let at = || path.display().to_string();
    if path.is_dir() {
        if path
            .file_name()
            .is_some_and(|last| last == "target" || last == "__pycache__")
        {
            return Ok(());
        }
        for entry in std::fs::read_dir(path).with_context(at)? {
            let entry = entry?;
            let inner = format!("{name}/{}", entry.file_name().to_string_lossy());
            walk(&entry.path(), &inner, texts)?;
        }
        return Ok(());
    }
    let ending = path.extension().and_then(|ending| ending.to_str());
    let wanted = ending.is_some_and(|ending| ENDINGS.contains(&ending)) || name == ".ci/run";
    // Files that are broken on purpose are not for reading.
    if !wanted || name.starts_with("tests/bad/") || path.metadata().with_context(at)?.len() > LIMIT
    {
        return Ok(());
    }
    let text = std::fs::read_to_string(path).with_context(at)?;
    texts.push(Text {
        path: name.to_owned(),
        text,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_modules_are_marked() {
        let text = "fn a() {}\n#[cfg(test)]\n#[path = \"x\"]\nmod tests {\n    fn b() {\n    }\n}\nfn c() {}\n\
                    #[cfg(test)]\nuse d;\nfn e() {}\n";
        let marks: String = lines(text)
            .iter()
            .map(|line| if line.test { 't' } else { '.' })
            .collect();
        assert_eq!(marks, ".tttttt.tt.");
    }
}
