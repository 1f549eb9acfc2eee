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
    /// `p(t) ∝ g²/σ²`, which is a uniform log-SNR: with [`Weight::Simple`](super::Weight) the
    /// likelihood-weighted loss up to the factor `Z/2 = ½ ∫ g²/σ² dt`, at far less variance than uniform
    /// times with that weight (Song, Durkan, Murray and Ermon 2021, section 5.1).
    ///
    /// The inverses are those of the schedules: in closed form for VP, sub-VP and VE.
    Likelihood,
    /// [`TimeLaw::Likelihood`] on `[ε, T]` with `p(ε) ∝ ε^{−k}`, one `ε` a batch (Kim et al. 2022, "Soft
    /// truncation"): the items of a batch are those whose keys differ in their item alone.
    SoftTruncation {
        /// `k`: larger spends more on small times; 1 to 2 in the paper.
        k: f64,
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
            TimeLaw::Likelihood => by_log_snr(schedule, schedule.span().0, key),
            TimeLaw::SoftTruncation { k } => {
                let (low, high) = schedule.span();
                // The largest item is nobody's.
                let u = unit(key.item(u64::MAX));
                by_log_snr(schedule, power_law(low, high, k, u), key)
            }
        }
    }
}

fn unit(key: Key) -> f64 {
    key.uniform(1).first().copied().unwrap_or(0.5)
}

/// A point whose log-SNR is uniform between that of `low` and that of the noisiest time.
fn by_log_snr(schedule: &dyn Schedule, low: f64, key: Key) -> Point {
    let (a, b) = (
        schedule.at(low).log_snr(),
        schedule.at(schedule.span().1).log_snr(),
    );
    schedule.at_log_snr(a + unit(key) * (b - a))
}

/// The value of `[low, high]`, `low > 0`, below which the law `∝ ε^{−k}` has the share `u`.
fn power_law(low: f64, high: f64, k: f64, u: f64) -> f64 {
    // Where the law would not be finite it starts a hair above 0.
    let low = low.max(1e-5 * high);
    if (k - 1.0).abs() < 1e-9 {
        return low * (high / low).powf(u);
    }
    let (a, b) = (low.powf(1.0 - k), high.powf(1.0 - k));
    (a + u * (b - a)).powf(1.0 / (1.0 - k))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{BetaSchedule, Edm, SubVp, Ve, Vp};
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

    /// `H(t) = ∫ g²/σ² dt` of the paper, in closed form for VP and sub-VP, gives uniform numbers.
    #[test]
    fn likelihood_times_follow_the_papers_law() {
        let vp = Vp {
            t_min: 1e-5,
            ..Vp::default()
        };
        let h_vp = |t: f64| vp.integral(t).exp_m1().ln();
        let h_sub = |t: f64| 2.0 * (-(-vp.integral(t)).exp_m1()).ln() + vp.integral(t);
        let ve = |t: f64| t;
        type Law<'a> = &'a dyn Fn(f64) -> f64;
        let cases: [(&dyn Schedule, Law<'_>); 3] =
            [(&vp, &h_vp), (&SubVp(vp), &h_sub), (&Ve::default(), &ve)];
        for (schedule, h) in cases {
            let (low, high) = schedule.span();
            let shares: Vec<f64> = draws(TimeLaw::Likelihood, schedule)
                .iter()
                .map(|p| (h(p.t) - h(low)) / (h(high) - h(low)))
                .collect();
            let n = shares.len() as f64;
            let moment = |k: i32| shares.iter().map(|u| u.powi(k)).sum::<f64>() / n;
            assert!((moment(1) - 0.5).abs() < 4.0 * (1.0 / 12.0 / n).sqrt());
            assert!((moment(2) - 1.0 / 3.0).abs() < 4.0 * (4.0 / 45.0 / n).sqrt());
            // And the draw is the inverse at its own uniform number, to rounding.
            let u = Key::new(1, stream::TEST).item(7).uniform(1)[0];
            assert!((shares[7] - u).abs() < 1e-9, "{} {u}", shares[7]);
        }
    }

    #[test]
    fn soft_truncation_cuts_a_batch_at_one_time() {
        let vp = Vp::default();
        let law = TimeLaw::SoftTruncation { k: 1.0 };
        let mut logs = Vec::new();
        for step in 0..300 {
            let key = |item| Key::new(1, stream::TEST).item(item).step(step);
            let least = (0..60)
                .map(|i| law.draw(&vp, key(i)).t)
                .fold(f64::INFINITY, f64::min);
            let cut = power_law(1e-3, 1.0, 1.0, key(u64::MAX).uniform(1)[0]);
            assert!(least >= cut * (1.0 - 1e-9), "{least} {cut}");
            logs.push(cut.ln() / 1e-3f64.ln());
        }
        // For k = 1 the logarithm of the cut is uniform.
        let mean = logs.iter().sum::<f64>() / 300.0;
        assert!(
            (mean - 0.5).abs() < 4.0 * (1.0f64 / 12.0 / 300.0).sqrt(),
            "{mean}"
        );
        // The law of any k: its share below a value is the share that it was asked for.
        for k in [0.0, 0.8, 1.2, 2.0] {
            let e = power_law(0.01, 1.0, k, 0.3);
            let mass = |a: f64, b: f64| {
                let n = 20_000;
                let step = (b - a) / f64::from(n);
                (0..n)
                    .map(|i| (a + (f64::from(i) + 0.5) * step).powf(-k) * step)
                    .sum::<f64>()
            };
            assert!((mass(0.01, e) / mass(0.01, 1.0) - 0.3).abs() < 1e-5, "{k}");
        }
    }

    /// The likelihood-weighted loss is the same under both laws, at a smaller variance under its own.
    #[test]
    fn importance_sampling_changes_the_variance_alone() {
        use crate::loss::Weight;
        use crate::predict::Kind;
        let vp = Vp::default();
        let (low, high) = vp.span();
        let z = vp.at(low).log_snr() - vp.at(high).log_snr();
        // An error of ε that grows with the signal, as trained networks have it.
        let error = |p: &Point| 0.3 + p.alpha;
        let moments = |values: Vec<f64>| {
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            (mean, var / n)
        };
        let own = draws(TimeLaw::Likelihood, &vp);
        let (own, own_var) = moments(own.iter().map(|p| z * error(p)).collect());
        let uniform = draws(TimeLaw::Uniform, &vp);
        let weight = |p: &Point| Weight::Likelihood.under(&vp, Kind::Epsilon, p);
        let (mean, var) = moments(
            uniform
                .iter()
                .map(|p| (high - low) * weight(p) * error(p))
                .collect(),
        );
        let bound = 4.0 * (own_var + var).sqrt();
        assert!((own - mean).abs() < bound, "{own} {mean} ± {bound}");
        assert!(own_var < 0.1 * var, "{own_var} {var}");
    }
}
