//! Results that a sceptic can check: each with its baseline and, where there is one, the published
//! number.

use crate::checkpoint::write_atomic;
use crate::error::{Report, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Which direction is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Errors, distances.
    Lower,
    /// Accuracies, scores.
    Higher,
}

/// What the value is compared with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// What it is.
    pub name: String,
    /// Its value on the same data.
    pub value: f64,
}

/// A number from the literature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The number.
    pub value: f64,
    /// On which data it was measured.
    pub dataset: String,
    /// Where it stands.
    pub source: String,
}

/// One measured number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub system: String,
    /// On which data.
    pub dataset: String,
    /// On which part of it.
    pub split: String,
    /// In which unit.
    pub metric: String,
    /// The number.
    pub value: f64,
    /// Which direction is good.
    pub better: Better,
    /// What a sceptic would compare with.
    pub baseline: Option<Baseline>,
    /// What a paper says.
    pub published: Option<Published>,
    /// How long it took.
    pub seconds: f64,
    /// What else to know.
    pub note: String,
}

/// A picture of a section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// File name beside the results.
    pub file: String,
    /// What it shows.
    pub caption: String,
}

/// Everything that the reproduction of one section of the survey measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The section.
    pub section: String,
    /// `quick` or `paper`.
    pub preset: String,
    /// The seed.
    pub seed: u64,
    /// The numbers.
    pub rows: Vec<Row>,
    /// The pictures.
    pub figures: Vec<Figure>,
}

impl Results {
    /// Empty results.
    pub fn new(section: &str, preset: &str, seed: u64) -> Self {
        Self {
            section: section.into(),
            preset: preset.into(),
            seed,
            rows: vec![],
            figures: vec![],
        }
    }

    /// Notes a picture.
    pub fn figure(&mut self, file: &str, caption: &str) {
        self.figures.push(Figure {
            file: file.into(),
            caption: caption.into(),
        });
    }

    /// Writes `results.json` into a folder.
    ///
    /// # Errors
    /// `Numeric` when a value is not finite (JSON could not hold it), `Io`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if let Some(row) = self.rows.iter().find(|r| !r.value.is_finite()) {
            return Err(
                Report::new(format!("{}: {}", row.system, row.metric), row.value)
                    .expected("a finite number")
                    .numeric(),
            );
        }
        let text =
            serde_json::to_string_pretty(self).map_err(|e| Report::new("results", e).numeric())?;
        write_atomic(&folder.join("results.json"), text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_results_read_back_and_nan_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut results = Results::new("foundations", "quick", 3);
        results.rows.push(Row {
            system: "DDIM".into(),
            dataset: "mixture".into(),
            split: "exact".into(),
            metric: "error".into(),
            value: 0.25,
            better: Better::Lower,
            baseline: Some(Baseline {
                name: "Euler".into(),
                value: 0.5,
            }),
            published: None,
            seconds: 1.0,
            note: String::new(),
        });
        results.write(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("results.json")).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), results);
        assert!(text.contains("\"better\": \"lower\""));
        results.rows[0].value = f64::NAN;
        assert!(
            results
                .write(folder.path())
                .unwrap_err()
                .to_string()
                .contains("DDIM")
        );
    }
}
