//! What was measured of a case, and the tables of it.

use std::collections::BTreeMap;

use serde::Serialize;

/// One line of a table. What was not measured is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    pub domain: String,
    pub case: String,
    pub threads: usize,
    /// Median milliseconds of a call.
    pub ours_ms: f64,
    /// Median absolute deviation of them.
    pub ours_mad_ms: f64,
    pub peer_ms: Option<f64>,
    /// Median of the ratios (ours to the peer's) of the pairs.
    pub ratio: Option<f64>,
    /// Memory that a training step takes at its peak.
    pub ours_peak_mb: Option<f64>,
    pub peer_peak_mb: Option<f64>,
    pub memory_ratio: Option<f64>,
    /// Largest difference of the results, relative to their size.
    pub max_abs_difference: Option<f64>,
    /// `cpu` or `wall`.
    pub clock: Option<&'static str>,
    pub pairs: Option<usize>,
    /// Our wall time on one thread divided by that on these threads.
    pub speedup: Option<f64>,
    /// The peer's fastest eager way of doing the work.
    pub peer_way: Option<String>,
    /// Other ways of the peer: compiled, bf16.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub others: BTreeMap<String, Other>,
}

/// Another way of the peer to do the work.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Other {
    pub peer_ms: f64,
    pub ratio: f64,
}

/// The table of our own medians.
pub fn medians(rows: &[Row]) -> String {
    let width = width(rows);
    let mut lines = vec![format!(
        "{:<10} {:<width$} {:>7} {:>12} {:>10}",
        "domain", "case", "threads", "median ms", "± MAD"
    )];
    for row in rows {
        lines.push(format!(
            "{:<10} {:<width$} {:>7} {:>12.4} {:>10.4}",
            row.domain, row.case, row.threads, row.ours_ms, row.ours_mad_ms
        ));
    }
    lines.join("\n")
}

/// The table of the comparison; columns without a number are left out.
pub fn comparison(rows: &[Row]) -> String {
    let width = width(rows);
    let memory = rows.iter().any(|row| row.memory_ratio.is_some());
    let speedup = rows.iter().any(|row| row.speedup.is_some());
    let mut others: Vec<&String> = rows.iter().flat_map(|row| row.others.keys()).collect();
    others.sort();
    others.dedup();
    let mut head = format!(
        "{:<width$} {:>7} {:>5} {:>10} {:>10} {:>6} {:>8}",
        "case", "threads", "clock", "ours ms", "peer ms", "ratio", "max diff"
    );
    if memory {
        head += &format!(" {:>8} {:>8} {:>6}", "ours MB", "peer MB", "memory");
    }
    if speedup {
        head += &format!(" {:>7}", "speedup");
    }
    for other in &others {
        head += &format!(" {other:>10} {:>6}", "ratio");
    }
    head += "  peer's way";
    let mut lines = vec![head];
    for row in rows {
        let mut line = format!(
            "{:<width$} {:>7} {:>5} {:>10.3} {} {} {}",
            row.case,
            row.threads,
            row.clock.unwrap_or("-"),
            row.ours_ms,
            number(row.peer_ms, 10, 3),
            number(row.ratio, 6, 2),
            difference(row.max_abs_difference),
        );
        if memory {
            let columns = [
                number(row.ours_peak_mb, 8, 1),
                number(row.peer_peak_mb, 8, 1),
                number(row.memory_ratio, 6, 2),
            ];
            line += &format!(" {}", columns.join(" "));
        }
        if speedup {
            line += &format!(" {}", number(row.speedup, 7, 2));
        }
        for other in &others {
            let found = row.others.get(*other);
            line += &format!(
                " {} {}",
                number(found.map(|other| other.peer_ms), 10, 3),
                number(found.map(|other| other.ratio), 6, 2)
            );
        }
        line += &format!("  {}", row.peer_way.as_deref().unwrap_or("-"));
        lines.push(line);
    }
    lines.join("\n")
}

fn width(rows: &[Row]) -> usize {
    let longest = rows.iter().map(|row| row.case.chars().count()).max();
    longest.unwrap_or(0).max(4)
}

fn number(value: Option<f64>, width: usize, digits: usize) -> String {
    value.map_or_else(
        || format!("{:>width$}", "-"),
        |value| format!("{value:>width$.digits$}"),
    )
}

fn difference(value: Option<f64>) -> String {
    value.map_or_else(|| format!("{:>8}", "-"), |value| format!("{value:>8.1e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            domain: "ops".into(),
            case: "ops/silu/f".into(),
            threads: 2,
            ours_ms: 1.5,
            peer_ms: Some(3.0),
            ratio: Some(0.5),
            max_abs_difference: Some(2.5e-7),
            clock: Some("wall"),
            pairs: Some(15),
            peer_way: Some("eager".into()),
            ..Row::default()
        }
    }

    #[test]
    fn columns_without_numbers_are_left_out() {
        let text = comparison(&[row()]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("max diff  peer's way"), "{text}");
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(
            words,
            [
                "ops/silu/f",
                "2",
                "wall",
                "1.500",
                "3.000",
                "0.50",
                "2.5e-7",
                "eager"
            ]
        );
    }

    #[test]
    fn all_columns_stand_under_their_heads() {
        let mut full = row();
        full.case = "images/unet/train".into();
        (full.ours_peak_mb, full.peer_peak_mb) = (Some(50.0), Some(100.0));
        (full.memory_ratio, full.speedup) = (Some(0.5), Some(1.9));
        let other = Other {
            peer_ms: 2.0,
            ratio: 0.75,
        };
        full.others.insert("bf16".into(), other);
        let text = comparison(&[row(), full]);
        let lines: Vec<&str> = text.lines().collect();
        for (head, value) in [("memory", "0.50"), ("speedup", "1.90"), ("bf16", "2.000")] {
            let end = lines[0].find(head).unwrap() + head.len();
            assert!(lines[2][..end].ends_with(value), "{text}");
            assert!(lines[1][..end].ends_with('-'), "{text}");
        }
    }
}
