//! Numbers of several seeds as rows, and what the papers order.

use crate::data::LEVELS;
use crate::study::*;
use crate::train::STEPS;
use diffusion_core::report::{Baseline, Better, Published, Results, Row};
use diffusion_images::likelihood::Baselines;

const DATASET: &str = "MNIST 8×8, 16 levels";

/// Everything measured.
pub struct Table {
    measured: Vec<Measured>,
    amount: Amount,
    /// On the images that the systems are measured on.
    pub same: Baselines,
    pub autoregressive: f64,
}

/// Values of the seeds, in their order.
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn list(values: &[f64]) -> String {
    let texts: Vec<String> = values.iter().map(|v| format!("{v:.3}")).collect();
    texts.join(", ")
}

/// What papers report for CIFAR-10.
fn published(system: &str, metric: &str) -> Option<Published> {
    let of = |value: f64, source: &str| Published {
        value,
        dataset: "CIFAR-10".into(),
        source: source.into(),
    };
    let analytic = |rows: &[f64], variance: &str| {
        let place = COUNTS
            .iter()
            .position(|count| metric == bound_metric(*count, variance));
        let value = place.and_then(|i| rows.get(i));
        value.map(|v| of(*v, "Bao et al. 2022, table 1, even or optimal steps"))
    };
    match system {
        SIMPLE => analytic(&[6.99, 6.11, 5.44, 4.86, 3.75], LARGE)
            .or_else(|| analytic(&[74.95, 24.98, 12.01, 7.08, 3.73], SMALL))
            .or_else(|| analytic(&[5.47, 4.79, 4.38, 4.07, 3.59], ANALYTIC))
            .or_else(|| analytic(&[4.11, 3.68, 3.61, 3.59], OPTIMAL)),
        HYBRID if metric == bound_metric(STEPS, LEARNED) => Some(of(
            3.17,
            "Nichol and Dhariwal 2021, 4000 steps, U-Net, 500k iterations",
        )),
        BOUND if metric == bound_metric(STEPS, LEARNED) => Some(of(
            2.94,
            "Nichol and Dhariwal 2021, 4000 steps, U-Net, 500k iterations",
        )),
        VDM if metric == CONTINUOUS => Some(of(
            2.65,
            "Kingma et al. 2021, without augmentation, 10M iterations",
        )),
        G2_IS if metric == FLOW => Some(of(
            2.83,
            "Song, Durkan, Murray and Ermon 2021, variational dequantisation",
        )),
        _ => None,
    }
}

impl Table {
    pub fn new(outcomes: &[Outcome], amount: Amount, same: Baselines, autoregressive: f64) -> Self {
        let measured = outcomes.iter().flat_map(|o| o.measured.iter().cloned());
        Self {
            measured: measured.collect(),
            amount,
            same,
            autoregressive,
        }
    }

    /// A value a seed.
    pub fn values(&self, system: &str, metric: &str) -> Vec<f64> {
        let own = |m: &&Measured| m.system == system && m.metric == metric;
        let mut rows: Vec<&Measured> = self.measured.iter().filter(own).collect();
        rows.sort_by_key(|m| m.seed);
        rows.iter().map(|m| m.bits.mean).collect()
    }

    /// The mean over the seeds.
    pub fn mean(&self, system: &str, metric: &str) -> Option<f64> {
        let values = self.values(system, metric);
        (!values.is_empty()).then(|| mean(&values))
    }

    fn row(&self, system: &str, metric: &str, value: f64) -> Row {
        Row {
            system: system.into(),
            dataset: DATASET.into(),
            split: format!("{} held-out images", self.amount.images),
            metric: metric.into(),
            value,
            better: Better::Lower,
            baseline: None,
            published: None,
            seconds: 0.0,
            note: String::new(),
        }
    }

    /// The baselines on the whole test set.
    pub fn baselines(
        &self,
        whole: &Baselines,
        autoregressive: f64,
        images: usize,
        results: &mut Results,
    ) {
        let bits = "bits/dim";
        let rows = [
            ("uniform", Some(whole.uniform), Some(self.same.uniform)),
            (
                "histogram of each pixel",
                Some(whole.histogram),
                Some(self.same.histogram),
            ),
            (
                "Gaussian, full covariance, dequantised",
                whole.gaussian,
                self.same.gaussian,
            ),
            (
                "logistic autoregression",
                Some(autoregressive),
                Some(self.autoregressive),
            ),
        ];
        for (name, whole, same) in rows {
            let (Some(value), Some(same)) = (whole, same) else {
                continue;
            };
            results.rows.push(Row {
                split: format!("all {images} held-out images"),
                note: format!("on the {} of the systems {same:.3}", self.amount.images),
                ..self.row(name, bits, value)
            });
        }
    }

    /// A row for each system and metric, in the order in which they were measured.
    pub fn rows(&self, results: &mut Results) {
        let mut seen: Vec<(&str, &str)> = Vec::new();
        for m in &self.measured {
            if seen.contains(&(m.system, &m.metric)) {
                continue;
            }
            seen.push((m.system, &m.metric));
            let values = self.values(m.system, &m.metric);
            let part = m.metric.contains("of which");
            let errors = match m.bits.error > 0.0 {
                true => format!(", ± {:.3} over the images", m.bits.error),
                false => String::new(),
            };
            results.rows.push(Row {
                baseline: (!part).then(|| Baseline {
                    name: "histogram of each pixel, the same images".into(),
                    value: self.same.histogram,
                }),
                published: published(m.system, &m.metric),
                seconds: m.seconds,
                note: format!("seeds: {}{errors}", list(&values)),
                ..self.row(m.system, &m.metric, mean(&values))
            });
        }
    }

    /// What papers order, with the number of seeds that agree.
    pub fn claims(&self, results: &mut Results) {
        let whole = |system, variance| (system, bound_metric(STEPS, variance));
        let metric = |system, metric: &str| (system, metric.to_string());
        let at = |system, count, variance| (system, bound_metric(count, variance));
        let mut claims = vec![
            (
                "VDM below L_hybrid below L_simple".to_string(),
                vec![
                    metric(VDM, CONTINUOUS),
                    whole(HYBRID, LEARNED),
                    whole(COSINE, LARGE),
                ],
            ),
            (
                "L_vlb below L_hybrid".into(),
                vec![whole(BOUND, LEARNED), whole(HYBRID, LEARNED)],
            ),
            (
                "the cosine table below the linear one, L_simple".into(),
                vec![whole(COSINE, LARGE), whole(SIMPLE, LARGE)],
            ),
            (
                "VDM: learned ends below fixed ones".into(),
                vec![metric(VDM, CONTINUOUS), metric(VDM_FIXED, CONTINUOUS)],
            ),
            (
                "VDM: with Fourier features below without".into(),
                vec![metric(VDM, CONTINUOUS), metric(VDM_PLAIN, CONTINUOUS)],
            ),
            (
                "VDM: L_∞ below L_1000 below L_100 below L_10".into(),
                vec![
                    metric(VDM, CONTINUOUS),
                    metric(VDM, &vdm_metric(1000)),
                    metric(VDM, &vdm_metric(100)),
                    metric(VDM, &vdm_metric(10)),
                ],
            ),
            (
                "VDM below the histogram of each pixel".into(),
                vec![metric(VDM, CONTINUOUS), metric("histogram", "")],
            ),
            (
                "the flow below the bound, one network".into(),
                vec![metric(SIMPLE, FLOW), whole(SIMPLE, LARGE)],
            ),
            (
                "weight g² with importance sampling below σ², by the flow".into(),
                vec![metric(G2_IS, FLOW), metric(SIGMA2, FLOW)],
            ),
            (
                "weight g² with importance sampling below σ², by the SDE's bound".into(),
                vec![metric(G2_IS, SDE), metric(SIGMA2, SDE)],
            ),
            (
                "importance sampling below uniform times, weight g², by the SDE's bound".into(),
                vec![metric(G2_IS, SDE), metric(G2, SDE)],
            ),
        ];
        for count in [10, 25, 50, 100] {
            claims.push((
                format!("K = {count}: analytic below fixed large below fixed small, linear"),
                vec![
                    at(SIMPLE, count, ANALYTIC),
                    at(SIMPLE, count, LARGE),
                    at(SIMPLE, count, SMALL),
                ],
            ));
            claims.push((
                format!("K = {count}: the optimal trajectory below even steps, linear"),
                vec![at(SIMPLE, count, OPTIMAL), at(SIMPLE, count, RESIDUAL)],
            ));
            claims.push((
                format!("K = {count}: learned below fixed large, one network"),
                vec![at(HYBRID, count, LEARNED), at(HYBRID, count, LARGE)],
            ));
        }
        for (name, order) in claims {
            if let Some(row) = self.claim(&name, &order) {
                results.rows.push(row);
            }
        }
    }

    /// How many seeds agree that these rise.
    fn claim(&self, name: &str, order: &[(&str, String)]) -> Option<Row> {
        let seeds = self.seeds();
        let columns: Vec<Vec<f64>> = order
            .iter()
            .map(|(system, metric)| match *system {
                "histogram" => vec![self.same.histogram; seeds],
                system => self.values(system, metric),
            })
            .collect();
        if columns.iter().any(|c| c.len() != seeds) {
            return None;
        }
        let agrees = |i: usize| columns.windows(2).all(|w| w[0][i] < w[1][i]);
        let count = (0..seeds).filter(|i| agrees(*i)).count();
        let verdict = match count {
            0 => "does not hold here",
            n if n == seeds => "holds",
            _ => "does not hold for every seed",
        };
        let means: Vec<String> = columns.iter().map(|c| format!("{:.3}", mean(c))).collect();
        Some(Row {
            better: Better::Higher,
            note: format!(
                "{verdict}; means {}; {LEVELS} levels, {} training steps",
                means.join(", "),
                self.amount.effort.steps
            ),
            ..self.row(
                &format!("claim: {name}"),
                &format!("seeds of {seeds} that agree"),
                count as f64,
            )
        })
    }

    /// The number of seeds of the systems that orderings are about.
    fn seeds(&self) -> usize {
        self.values(VDM, CONTINUOUS).len()
    }
}
