//! The classes of a conditional model: their names, and the label that stands for none.
//!
//! A network that was trained with classifier-free guidance in mind has one label more than there
//! are classes: the one that images were given whose class was withheld. Neither the weights nor
//! diffusers' configuration say which it is, so a model folder says it in a file of ours, which
//! diffusers passes over:
//!
//! ```text
//! MODEL/classes.json     { "names": ["zero", "one", "two"], "null_class": 3 }
//! ```
//!
//! | key | what | when absent |
//! |---|---|---|
//! | `names` | the classes in the order of their labels, without the withheld label | the labels as numbers |
//! | `null_class` | the withheld label; it need not be the last | every label is a class, and there is no guidance |
//!
//! A folder of somebody else has no such file: all its labels are then classes. Whoever knows that
//! label `K` was the withheld one writes `{"null_class": K}` there.

use diffusion_core::checkpoint::write_atomic;
use diffusion_core::limits::Limits;
use diffusion_core::{Error, Report, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The name of the file in a model folder.
pub const FILE: &str = "classes.json";

/// The most labels whose names are made up; more must be named.
const UNNAMED: usize = 100_000;

/// What the labels of a network mean; the default is a network without labels.
///
/// A *class* is a number from 0 below the number of names, a *label* what the network is told; they
/// are the same up to the withheld label.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Classes {
    names: Vec<String>,
    null: Option<u32>,
    conditional: bool,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    names: Option<Vec<String>>,
    #[serde(default)]
    null_class: Option<u32>,
}

impl Classes {
    /// Classes of these names whose withheld label comes last, as training has them.
    pub fn with_null_last(names: Vec<String>) -> Self {
        let null = Some(names.len() as u32);
        Self {
            names,
            null,
            conditional: true,
        }
    }

    /// What the file of a model folder says about a network of `labels` labels, or what is so
    /// without one. `labels` is `None` for a network that takes any number as a label.
    ///
    /// # Errors
    /// As [`Classes::read_file`] and [`Classes::undeclared`].
    pub fn read(folder: &Path, labels: Option<usize>, limits: &Limits) -> Result<Self> {
        let file = folder.join(FILE);
        match file.exists() {
            true => Self::read_file(&file, labels, limits),
            false => Self::undeclared(&file, labels),
        }
    }

    /// Classes of which nothing is said: every label is one. `file` is where it would be said.
    ///
    /// # Errors
    /// `Unsupported` when nothing says how many there are.
    pub fn undeclared(file: &Path, labels: Option<usize>) -> Result<Self> {
        match labels {
            Some(labels) if labels <= UNNAMED => Ok(Self {
                names: (0..labels).map(|k| k.to_string()).collect(),
                null: None,
                conditional: true,
            }),
            labels => Err(Report::file(file, "no such file")
                .expected(match labels {
                    Some(n) => format!("the names of {n} labels"),
                    None => "the names of the classes, of which the network knows no number".into(),
                })
                .remedy("write {\"names\": [\"…\", …]} there")
                .unsupported()),
        }
    }

    /// What a file says about a network of `labels` labels.
    ///
    /// # Errors
    /// `Input` when the file is malformed or does not fit the network, `Limit` and `Io` of reading.
    pub fn read_file(file: &Path, labels: Option<usize>, limits: &Limits) -> Result<Self> {
        let text = limits.read_config(file)?;
        let wrong = |what: String| {
            Report::file(file, what)
                .expected("{\"names\": [\"…\", …], \"null_class\": K}, or either of the two")
                .remedy("correct the file, or get it again")
                .input()
        };
        if !text.trim_start().starts_with('{') {
            // A list would be taken for the values in their order.
            return Err(wrong("no JSON object".into()));
        }
        let mut reader = serde_json::Deserializer::from_str(&text);
        let Stored { names, null_class } = serde_path_to_error::deserialize(&mut reader)
            .map_err(|e| wrong(format!("{}: {}", e.path(), e.inner())))?;
        let bad = |what: String, expected: String| -> Error {
            Report::file(file, what)
                .expected(expected)
                .remedy("correct the file; num_class_embeds in unet/config.json counts the labels")
                .input()
        };
        let withheld = usize::from(null_class.is_some());
        let labels = match (labels, &names) {
            (Some(labels), _) => labels,
            (None, Some(names)) => names.len() + withheld,
            (None, None) => {
                let what = "no `names`".to_string();
                return Err(bad(what, "the names of the classes".into()));
            }
        };
        if let Some(null) = null_class.filter(|null| *null as usize >= labels) {
            let expected = format!("a label below {labels}, or null");
            return Err(bad(format!("null_class: {null}"), expected));
        }
        let count = labels - withheld;
        let names = match names {
            Some(names) if names.len() == count => names,
            Some(names) => {
                let expected = format!("{count}, for {labels} labels of which {withheld} withheld");
                return Err(bad(format!("names: {} of them", names.len()), expected));
            }
            None if labels <= UNNAMED => (0..labels as u32)
                .filter(|label| Some(*label) != null_class)
                .map(|label| label.to_string())
                .collect(),
            None => {
                let expected = format!("the names of more than {UNNAMED} labels");
                return Err(bad("no `names`".into(), expected));
            }
        };
        Ok(Self {
            names,
            null: null_class,
            conditional: true,
        })
    }

    /// Writes the file of a model folder; nothing for a network without labels.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if !self.conditional {
            return Ok(());
        }
        let stored = Stored {
            names: Some(self.names.clone()),
            null_class: self.null,
        };
        let text =
            serde_json::to_string_pretty(&stored).map_err(|e| Report::new(FILE, e).config())?;
        write_atomic(&folder.join(FILE), format!("{text}\n").as_bytes())
    }

    /// Whether the network takes labels.
    pub fn conditional(&self) -> bool {
        self.conditional
    }

    /// The names of the classes; none for a network without labels.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The label that stands for no class, where one is known.
    pub fn null(&self) -> Option<u32> {
        self.null
    }

    /// The class of this name, or of this number where no class has it for a name.
    ///
    /// # Errors
    /// `Config` when there is none.
    pub fn find(&self, name: &str) -> Result<u32> {
        let by_name = self.names.iter().position(|n| n == name);
        let by_number = || name.parse().ok().filter(|k| *k < self.names.len());
        match by_name.or_else(by_number) {
            Some(class) => Ok(class as u32),
            None => Err(Report::new("class", name)
                .expected(self.expected())
                .config()),
        }
    }

    /// The label of a class.
    ///
    /// # Errors
    /// `Config` when there is no such class.
    pub fn label(&self, class: u32) -> Result<u32> {
        if class as usize >= self.names.len() {
            return Err(Report::new("class", class)
                .expected(self.expected())
                .config());
        }
        // Labels from the withheld one on are one more than their class.
        Ok(class + u32::from(self.null.is_some_and(|null| class >= null)))
    }

    /// The label that stands for no class, in the folder `at` where there is one.
    ///
    /// # Errors
    /// `Config` that says how to declare it when none is known.
    pub fn null_label(&self, at: Option<&Path>) -> Result<u32> {
        self.null.ok_or_else(|| {
            let file = at.map_or_else(|| PathBuf::from(FILE), |folder| folder.join(FILE));
            Report::file(&file, "no label is said to stand for no class")
                .expected("such a label, for guidance and for samples without a class")
                .remedy(format!(
                    "give a class and leave the guidance at 1, or, if label K was the withheld one \
                     in training, write {{\"null_class\": K}} to {}",
                    file.display()
                ))
                .config()
        })
    }

    fn expected(&self) -> String {
        match self.names.as_slice() {
            [] => "no class: this model is unconditional".to_string(),
            names => format!("one of {}", names.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, labels: Option<usize>) -> Result<Classes> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        Classes::read(folder.path(), labels, &Limits::default())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let classes = Classes::with_null_last(vec!["cat".into(), "dog".into()]);
        classes.write(folder.path()).unwrap();
        let limits = Limits::default();
        assert_eq!(
            Classes::read(folder.path(), Some(3), &limits).unwrap(),
            classes
        );
        assert_eq!(classes.label(1).unwrap(), 1);
        assert_eq!(classes.null_label(None).unwrap(), 2);
        assert_eq!(classes.find("dog").unwrap(), 1);
        assert_eq!(classes.find("0").unwrap(), 0);
        assert!(classes.label(2).is_err() && classes.find("2").is_err());
        let empty = tempfile::tempdir().unwrap();
        Classes::default().write(empty.path()).unwrap();
        assert!(!empty.path().join(FILE).exists());
    }

    #[test]
    fn without_a_file_every_label_is_a_class_and_none_is_withheld() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits::default();
        let classes = Classes::read(folder.path(), Some(3), &limits).unwrap();
        assert_eq!(classes.names(), ["0", "1", "2"]);
        let error = classes.null_label(Some(folder.path())).unwrap_err();
        assert!(matches!(error, Error::Config(_)));
        for part in ["classes.json", "{\"null_class\": K}", "guidance"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        for labels in [None, Some(1 << 40)] {
            let error = Classes::read(folder.path(), labels, &limits).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
            assert!(error.to_string().contains("names"), "{error}");
        }
    }

    #[test]
    fn the_withheld_label_may_be_any() {
        let classes = read(r#"{"null_class": 1}"#, Some(4)).unwrap();
        assert_eq!(classes.names(), ["0", "2", "3"]);
        let labels: Vec<u32> = (0..3).map(|k| classes.label(k).unwrap()).collect();
        assert_eq!(labels, [0, 2, 3]);
        let classes = read(r#"{"names": ["a"], "null_class": 0}"#, None).unwrap();
        assert_eq!(classes.label(0).unwrap(), 1);
    }

    #[test]
    fn what_does_not_fit_the_network_is_refused_by_name() {
        for (text, labels, part) in [
            ("[]", Some(2), "names"),
            (r#"{"name": []}"#, Some(2), "name"),
            (r#"{"names": ["a"]}"#, Some(2), "1 of them"),
            (r#"{"null_class": 2}"#, Some(2), "null_class: 2"),
            (r#"{"null_class": -1}"#, Some(2), "null_class"),
            (r#"{"null_class": 0}"#, None, "no `names`"),
            ("{}", Some(1 << 40), "no `names`"),
        ] {
            let error = read(text, labels).unwrap_err();
            assert!(matches!(error, Error::Input(_)), "{error}");
            let message = error.to_string();
            assert!(
                message.contains(part) && message.contains(FILE),
                "{message}"
            );
        }
    }
}
