//! How training times are drawn.

use crate::schedule::{Point, Schedule};
use diffusion_ops::rng::Key;
use serde::{Deserialize, Serialize};

/// The law of the training time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TimeLaw {
    /// Uniform over the indices of a table (DDPM), or over the span of a continuous schedule.
    #[default]
    Uniform,
    /// `ln σ̂ ~ N(mean, std²)` (Karras et al. 2022: −1.2 and 1.2 for data of deviation 0.5; keep
    /// `mean − ln s_d = −0.5` for other data).
    LogNormal {
        /// Mean of `ln σ̂`.
        mean: f64,
        /// Deviation of `ln σ̂`.
        std: f64,
    },
}

impl TimeLaw {
    /// The point that stands at this place of a random stream.
    pub fn draw(&self, schedule: &dyn Schedule, key: Key) -> Point {
        match *self {
            TimeLaw::Uniform => match schedule.steps() {
                Some(steps) => schedule.at(key.below(steps as u64) as f64),
                None => {
                    let (low, high) = schedule.span();
                    schedule.at(low + (high - low) * key.uniform(1)[0])
                }
            },
            TimeLaw::LogNormal { mean, std } => {
                schedule.at_log_snr(-2.0 * (mean + std * key.normal(1)[0]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{BetaSchedule, Edm, Vp};
    use diffusion_ops::rng::stream;

    fn draws(law: TimeLaw, schedule: &dyn Schedule) -> Vec<Point> {
        (0..8000)
            .map(|i| law.draw(schedule, Key::new(1, stream::TEST).item(i)))
            .collect()
    }

    #[test]
    fn every_index_of_a_table_is_drawn_about_as_often() {
        let table = BetaSchedule::Cosine.table(10).unwrap();
        let mut counts = [0usize; 10];
        for p in draws(TimeLaw::Uniform, &table) {
            counts[p.t as usize] += 1;
        }
        assert!(
            counts
                .iter()
                .all(|c| (*c as f64 - 800.0).abs() < 4.0 * 800f64.sqrt()),
            "{counts:?}"
        );
    }

    #[test]
    fn continuous_times_fill_the_span() {
        let times: Vec<f64> = draws(TimeLaw::Uniform, &Vp::default())
            .iter()
            .map(|p| p.t)
            .collect();
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        assert!(times.iter().all(|t| (1e-3..=1.0).contains(t)));
        assert!((mean - 0.5005).abs() < 4.0 * (1.0f64 / 12.0 / 8000.0).sqrt());
    }

    #[test]
    fn log_normal_levels() {
        let logs: Vec<f64> = draws(
            TimeLaw::LogNormal {
                mean: -1.2,
                std: 1.2,
            },
            &Edm::default(),
        )
        .iter()
        .map(|p| p.sigma.ln())
        .collect();
        let n = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / n;
        let var = logs.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n;
        assert!((mean + 1.2).abs() < 4.0 * 1.2 / n.sqrt());
        assert!((var / 1.44 - 1.0).abs() < 4.0 * (2.0 / n).sqrt());
    }
}
