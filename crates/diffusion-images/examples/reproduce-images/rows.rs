//! Evaluations of several seeds, as rows of the results.

use crate::plan::Plan;
use diffusion_core::report::{Baseline, Better, Results, Row};
use diffusion_images::metric::Evaluation;

/// Everything that was measured of one system.
pub struct System {
    pub name: String,
    /// Where to look first for what it means.
    pub note: String,
    /// Network evaluations an image, 0 without a network.
    pub calls: usize,
    /// One a seed.
    pub runs: Vec<Run>,
}

/// A system with one seed.
pub struct Run {
    pub seed: u64,
    pub evaluation: Evaluation,
    pub seconds: f64,
}

/// The systems of a study in the order in which they were met.
#[derive(Default)]
pub struct Table {
    pub systems: Vec<System>,
}

/// A figure of an evaluation by name.
pub struct Metric {
    pub name: &'static str,
    pub better: Better,
    pub value: fn(&Evaluation) -> Option<f64>,
}

pub const FRECHET: &str = "Fréchet distance";
pub const COVERAGE: &str = "coverage";
pub const ACCURACY: &str = "labelled as asked";
pub const NEAREST: &str =
    "distance to the nearest training image, as a share of the held-out images'";

/// The figures of the page.
pub const METRICS: [Metric; 8] = [
    Metric {
        name: FRECHET,
        better: Better::Lower,
        value: |e| Some(e.frechet.value),
    },
    Metric {
        name: "kernel distance",
        better: Better::Lower,
        value: |e| Some(e.kernel.mean),
    },
    Metric {
        name: ACCURACY,
        better: Better::Higher,
        value: |e| e.accuracy.map(|a| a.value),
    },
    Metric {
        name: COVERAGE,
        better: Better::Higher,
        value: |e| Some(e.manifold.coverage),
    },
    Metric {
        name: "precision",
        better: Better::Higher,
        value: |e| Some(e.manifold.precision),
    },
    Metric {
        name: "recall",
        better: Better::Higher,
        value: |e| Some(e.manifold.recall),
    },
    Metric {
        name: "density",
        better: Better::Higher,
        value: |e| Some(e.manifold.density),
    },
    Metric {
        name: NEAREST,
        better: Better::Higher,
        value: |e| Some(e.memorisation.ratio),
    },
];

/// The figure of this name.
pub fn metric(name: &str) -> &'static Metric {
    METRICS
        .iter()
        .find(|m| m.name == name)
        .unwrap_or(&METRICS[0])
}

impl Table {
    /// Notes a run; systems are told apart by name.
    pub fn add(&mut self, name: &str, note: &str, calls: usize, run: Run) {
        let at = self.systems.iter().position(|s| s.name == name);
        let at = at.unwrap_or_else(|| {
            self.systems.push(System {
                name: name.into(),
                note: note.into(),
                calls,
                runs: Vec::new(),
            });
            self.systems.len() - 1
        });
        self.systems[at].runs.push(run);
    }

    /// The runs of another table after those of this one.
    pub fn merge(&mut self, other: Table) {
        for system in other.systems {
            for run in system.runs {
                self.add(&system.name, &system.note, system.calls, run);
            }
        }
    }

    /// Whether a system was measured with this seed.
    pub fn has(&self, name: &str, seed: u64) -> bool {
        self.get(name)
            .is_some_and(|s| s.runs.iter().any(|r| r.seed == seed))
    }

    pub fn get(&self, name: &str) -> Option<&System> {
        self.systems.iter().find(|s| s.name == name)
    }

    /// A row for each system and figure: the mean over the seeds, the values in the note.
    pub fn rows(&self, plan: &Plan, compare: &str, split: &str, results: &mut Results) {
        for metric in &METRICS {
            let beside = self.get(compare).and_then(|s| s.mean(metric));
            for system in &self.systems {
                let Some(value) = system.mean(metric) else {
                    continue;
                };
                let own = system.name == compare;
                results.rows.push(Row {
                    system: system.name.clone(),
                    dataset: plan.name.into(),
                    split: split.into(),
                    metric: metric.name.into(),
                    value,
                    better: metric.better,
                    baseline: beside.filter(|_| !own).map(|value| Baseline {
                        name: compare.into(),
                        value,
                    }),
                    published: None,
                    seconds: system.runs.iter().map(|r| r.seconds).sum(),
                    note: system.describe(metric),
                });
            }
        }
    }
}

impl System {
    /// The mean of a figure over the seeds.
    pub fn mean(&self, metric: &Metric) -> Option<f64> {
        let values = self.values(metric);
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }

    pub fn values(&self, metric: &Metric) -> Vec<f64> {
        let of = |run: &Run| (metric.value)(&run.evaluation);
        self.runs.iter().filter_map(of).collect()
    }

    fn describe(&self, metric: &Metric) -> String {
        let mut parts = Vec::new();
        if self.calls > 0 {
            parts.push(format!("{} network calls an image", self.calls));
        }
        if self.runs.len() > 1 {
            let values: Vec<String> = self
                .values(metric)
                .iter()
                .map(|v| format!("{v:.3}"))
                .collect();
            parts.push(format!("by seed {}", values.join(", ")));
        }
        let interval = self.runs.first().and_then(|run| match metric.name {
            FRECHET => Some(run.evaluation.frechet),
            ACCURACY => run.evaluation.accuracy,
            _ => None,
        });
        if let Some(f) = interval {
            parts.push(format!("95 % of the first [{:.3}, {:.3}]", f.low, f.high));
        }
        if !self.note.is_empty() {
            parts.push(self.note.clone());
        }
        parts.join("; ")
    }
}
