//! One self-contained page over the results of all sections.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use serde::{Deserialize, Serialize};

/// What a section's example writes as `results.json`.
#[derive(Debug, Deserialize)]
pub struct Results {
    section: String,
    preset: String,
    seed: u64,
    rows: Vec<Row>,
    /// In the order of the page; without the list every picture of the folder is shown.
    figures: Option<Vec<Figure>>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Row {
    system: String,
    dataset: String,
    split: String,
    metric: String,
    value: f64,
    better: Better,
    baseline: Option<Baseline>,
    published: Option<Published>,
    seconds: Option<f64>,
    #[serde(default)]
    note: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Better {
    Lower,
    Higher,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Baseline {
    name: String,
    value: f64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Published {
    value: f64,
    dataset: String,
    source: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Figure {
    file: String,
    #[serde(default)]
    caption: String,
}

/// Rows that can be compared with each other: one data set, split and metric.
#[derive(Serialize)]
struct Group {
    dataset: String,
    split: String,
    metric: String,
    better: Better,
    rows: Vec<Shown>,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    row: Row,
    best: bool,
    /// Whether the baseline is beaten; none without a baseline.
    beats: Option<bool>,
}

#[derive(Serialize)]
struct Picture {
    uri: String,
    caption: String,
}

#[derive(Serialize)]
struct Part {
    section: String,
    preset: String,
    seed: u64,
    groups: Vec<Group>,
    pictures: Vec<Picture>,
}

/// Reads and checks one section's results.
pub fn read(path: &Path, section: &str) -> Result<Results> {
    let at = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(at)?;
    let results: Results = serde_json::from_str(&text).with_context(at)?;
    ensure!(
        results.section == section,
        "{}: section `{}`, expected `{section}`; the example wrote to another section's folder",
        path.display(),
        results.section
    );
    ensure!(
        !results.rows.is_empty(),
        "{}: no rows; the example measured nothing",
        path.display()
    );
    Ok(results)
}

/// Writes `index.html` over the sections that have results; gives its path, or none without any.
pub fn write(folder: &Path, sections: &[&str]) -> Result<Option<PathBuf>> {
    let mut parts = Vec::new();
    for section in sections {
        let path = folder.join(section).join("results.json");
        if path.exists() {
            parts.push(part(read(&path, section)?, &folder.join(section))?);
        }
    }
    if parts.is_empty() {
        return Ok(None);
    }
    let html = render(&parts)?;
    // Renamed into place: a browser that reloads never sees half a page.
    let (page, draft) = (folder.join("index.html"), folder.join(".index.html.tmp"));
    std::fs::write(&draft, html).with_context(|| draft.display().to_string())?;
    std::fs::rename(&draft, &page).with_context(|| page.display().to_string())?;
    Ok(Some(page))
}

fn render(parts: &[Part]) -> Result<String> {
    let mut environment = minijinja::Environment::new();
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::Html);
    environment.add_filter("number", number);
    environment.add_filter("duration", duration);
    let template = environment
        .template_from_str(include_str!("report.html"))
        .context("report.html")?;
    template
        .render(minijinja::context! { parts })
        .context("report.html")
}

fn part(results: Results, folder: &Path) -> Result<Part> {
    let figures = match results.figures {
        Some(figures) => figures,
        None => pictures_in(folder)?,
    };
    let pictures = figures
        .into_iter()
        .map(|figure| picture(folder, figure))
        .collect::<Result<_>>()?;
    Ok(Part {
        section: results.section,
        preset: results.preset,
        seed: results.seed,
        groups: group(results.rows),
        pictures,
    })
}

/// Sorts rows into groups in the order of their first appearance and marks the best of each.
fn group(rows: Vec<Row>) -> Vec<Group> {
    let mut places: BTreeMap<(String, String, String), usize> = BTreeMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for row in rows {
        let key = (row.dataset.clone(), row.split.clone(), row.metric.clone());
        let place = *places.entry(key).or_insert_with(|| {
            groups.push(Group {
                dataset: row.dataset.clone(),
                split: row.split.clone(),
                metric: row.metric.clone(),
                better: row.better,
                rows: Vec::new(),
            });
            groups.len() - 1
        });
        let beats = row
            .baseline
            .as_ref()
            .map(|base| wins(row.better, row.value, base.value));
        groups[place].rows.push(Shown {
            row,
            best: false,
            beats,
        });
    }
    for group in &mut groups {
        let best = group
            .rows
            .iter()
            .map(|shown| shown.row.value)
            .reduce(|a, b| if wins(group.better, b, a) { b } else { a });
        for shown in &mut group.rows {
            shown.best = Some(shown.row.value) == best;
        }
    }
    groups
}

fn wins(better: Better, a: f64, b: f64) -> bool {
    match better {
        Better::Lower => a < b,
        Better::Higher => a > b,
    }
}

fn pictures_in(folder: &Path) -> Result<Vec<Figure>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".png") || name.ends_with(".svg") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names
        .into_iter()
        .map(|file| Figure {
            caption: file[..file.len() - 4].replace(['-', '_'], " "),
            file,
        })
        .collect())
}

/// The picture as a data URI: an SVG in an image element cannot run scripts or clash with the page.
fn picture(folder: &Path, figure: Figure) -> Result<Picture> {
    let path = folder.join(&figure.file);
    let media = match path.extension().and_then(|extension| extension.to_str()) {
        Some("png") => "image/png",
        Some("svg") => "image/svg+xml",
        _ => bail!("{}: figures are .png or .svg files", path.display()),
    };
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    Ok(Picture {
        uri: format!("data:{media};base64,{text}"),
        caption: figure.caption,
    })
}

/// Four significant digits, without an exponent where the number is of everyday size.
fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor();
    if !(-4.0..6.0).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let decimals = (3.0 - magnitude).max(0.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULTS: &str = r#"{"section": "foundations", "preset": "quick", "seed": 1, "rows": [
        {"system": "DDPM <b>", "dataset": "digits", "split": "test", "metric": "MMD", "value": 0.0123456,
         "better": "lower", "baseline": {"name": "noise", "value": 0.5}, "published": null,
         "seconds": 61.0, "note": ""},
        {"system": "DDIM", "dataset": "digits", "split": "test", "metric": "accuracy", "value": 0.5,
         "better": "higher", "baseline": {"name": "chance", "value": 0.6},
         "published": {"value": 3.17, "dataset": "CIFAR-10", "source": "Table 1"}, "seconds": null,
         "note": null},
        {"system": "EDM", "dataset": "digits", "split": "test", "metric": "MMD", "value": 0.01,
         "better": "lower", "baseline": null, "published": null, "seconds": 1.0}]}"#;

    #[test]
    fn numbers_keep_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (0.0123456, "0.01235"),
            (3.17, "3.17"),
            (-12.0, "-12"),
            (100.0, "100"),
            (123456.0, "123456"),
            (1.5e-9, "1.500e-9"),
            (2.5e7, "2.500e7"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn rows_are_grouped_and_the_best_is_marked() {
        let results: Results = serde_json::from_str(RESULTS).unwrap();
        let groups = group(results.rows);
        let marks: Vec<Vec<(&str, bool, Option<bool>)>> = groups
            .iter()
            .map(|g| {
                g.rows
                    .iter()
                    .map(|r| (r.row.system.as_str(), r.best, r.beats))
                    .collect()
            })
            .collect();
        assert_eq!(
            marks,
            [
                vec![("DDPM <b>", false, Some(true)), ("EDM", true, None)],
                vec![("DDIM", true, Some(false))]
            ]
        );
    }

    #[test]
    fn the_page_is_whole_and_refers_to_nothing_outside() {
        let folder = tempfile::tempdir().unwrap();
        let section = folder.path().join("foundations");
        std::fs::create_dir(&section).unwrap();
        assert!(write(folder.path(), &["foundations"]).unwrap().is_none());
        std::fs::write(section.join("results.json"), RESULTS).unwrap();
        std::fs::write(section.join("loss-curve.svg"), "<svg/>").unwrap();
        let page = write(folder.path(), &["foundations"]).unwrap().unwrap();
        let html = std::fs::read_to_string(page).unwrap();
        assert!(html.contains("DDPM &lt;b&gt;") && !html.contains("DDPM <b>"));
        assert!(html.contains("0.01235") && html.contains("CIFAR-10"));
        assert!(html.contains("data:image/svg+xml;base64,PHN2Zy8+"));
        assert!(html.contains("loss curve"));
        assert!(html.contains("prefers-color-scheme: dark"));
        for outside in ["http://", "https://", "<script", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn results_of_another_section_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        std::fs::write(&path, RESULTS).unwrap();
        assert!(
            read(&path, "images")
                .unwrap_err()
                .to_string()
                .contains("expected `images`")
        );
        std::fs::write(&path, RESULTS.replace("0.0123456", "\"NaN\"")).unwrap();
        assert!(read(&path, "foundations").is_err());
    }
}
