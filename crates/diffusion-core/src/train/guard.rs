//! What happens when numbers leave the finite, or the usual.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::error::{Report, Result};

/// What to do when a loss, a gradient or a weight is not finite. Nothing has been updated with it by
/// then.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Policy {
    /// End the run with an error; the last checkpoint stands.
    #[default]
    Stop,
    /// Leave out the update of the phase and the later phases of the step. Weights that are not
    /// finite end the run: leaving out an update does not mend them.
    Skip {
        /// End the run when more steps than this fail one after the other.
        #[serde(default = "three")]
        max_in_row: u64,
        /// End the run when more than this part of all its steps (and more than `max_in_row`) fail.
        #[serde(default = "one_in_a_thousand")]
        max_fraction: f64,
    },
    /// Go back to the last checkpoint, and leave out the failed step when it comes again. Spikes
    /// count as failures. Needs a run folder.
    Rollback {
        /// End the run when it goes back more often than this without a new checkpoint.
        #[serde(default = "three")]
        max_in_row: u64,
    },
}

fn three() -> u64 {
    3
}

fn one_in_a_thousand() -> f64 {
    0.001
}

/// When a step counts as a spike.
///
/// ```text
/// loss > median + mads · max(MAD, |median|/100)     over the last `window` losses
/// ‖g‖₂ > grad_factor · EMA(‖g‖₂)                   decay 0.99
/// ```
///
/// where MAD is the median distance from the median. Both rules wait until they have seen
/// `min(window, 100)` steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpikeRule {
    /// Losses that the median is taken of.
    pub window: usize,
    /// Distance from the median.
    pub mads: f64,
    /// Ratio to the average gradient norm.
    pub grad_factor: f64,
}

impl Default for SpikeRule {
    fn default() -> Self {
        Self {
            window: 200,
            mads: 10.0,
            grad_factor: 20.0,
        }
    }
}

/// Policy and spike rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// What to do about numbers that are not finite.
    pub policy: Policy,
    /// What counts as unusual.
    pub spike: SpikeRule,
}

impl GuardConfig {
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |field: &str, value: &dyn std::fmt::Display, expected: &str| {
            Err(Report::new(format_args!("train.guard.{field}"), value)
                .expected(expected)
                .remedy("leave it out for the usual value")
                .config())
        };
        match self.policy {
            Policy::Skip { max_fraction, .. } if !(0.0..=1.0).contains(&max_fraction) => {
                return wrong("policy.max_fraction", &max_fraction, "a number in [0, 1]");
            }
            _ => {}
        }
        let s = &self.spike;
        if !(10..=100_000).contains(&s.window) {
            return wrong("spike.window", &s.window, "between 10 and 100000");
        }
        if s.mads.is_nan() || s.mads <= 0.0 {
            return wrong("spike.mads", &s.mads, "a positive number");
        }
        if s.grad_factor.is_nan() || s.grad_factor <= 1.0 {
            return wrong("spike.grad_factor", &s.grad_factor, "a number above 1");
        }
        Ok(())
    }
}

/// A step whose update must not be made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    /// The whole story: what, where, which examples.
    pub why: String,
    /// Whether leaving out the update is enough.
    pub weights_are_sound: bool,
}

/// The statistics that the spike rule goes by.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Guard {
    pub(super) losses: VecDeque<f64>,
    pub(super) grad_norm: f64,
    pub(super) seen: u64,
}

impl Guard {
    /// Takes note of a step, and says why it is a spike if it is one.
    pub fn observe(&mut self, rule: &SpikeRule, loss: f64, grad_norm: f64) -> Option<String> {
        let ready = self.seen >= rule.window.min(100) as u64;
        let spike = if ready {
            self.judge(rule, loss, grad_norm)
        } else {
            None
        };
        self.losses.push_back(loss);
        while self.losses.len() > rule.window {
            self.losses.pop_front();
        }
        // A spike must not raise the bar for the next one by more than it takes to get used to it.
        let norm = if ready {
            grad_norm.min(rule.grad_factor * self.grad_norm)
        } else {
            grad_norm
        };
        self.seen += 1;
        // The plain mean at first, then the moving average: no bias towards the start.
        let rate = (1.0 / self.seen as f64).max(0.01);
        self.grad_norm += rate * (norm - self.grad_norm);
        spike
    }

    fn judge(&self, rule: &SpikeRule, loss: f64, grad_norm: f64) -> Option<String> {
        let middle = median(self.losses.iter().copied());
        let mad = median(self.losses.iter().map(|l| (l - middle).abs()));
        let most = middle + rule.mads * mad.max(middle.abs() / 100.0);
        if loss > most {
            return Some(format!(
                "loss {loss:e} with a median of {middle:e} and a MAD of {mad:e}"
            ));
        }
        let most = rule.grad_factor * self.grad_norm;
        (grad_norm > most).then(|| {
            format!(
                "gradient norm {grad_norm:e} with an average of {:e}",
                self.grad_norm
            )
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    if n == 0 {
        0.0
    } else {
        0.5 * (sorted[(n - 1) / 2] + sorted[n / 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_ops::rng::{Key, stream};

    #[test]
    fn clean_steps_raise_no_alarm_and_spikes_do() {
        // 10⁴ losses as noisy as those of a diffusion model: log-normal, 20% spread, falling.
        let z = Key::new(1, stream::TEST).normal(20_000);
        let mut guard = Guard::default();
        let rule = SpikeRule::default();
        let mut alarms = 0;
        for i in 0..10_000 {
            let level = 0.1 + (-(i as f64) / 500.0).exp();
            let loss = level * (0.2 * z[2 * i]).exp();
            let norm = level * (0.5 * z[2 * i + 1]).exp();
            alarms += usize::from(guard.observe(&rule, loss, norm).is_some());
        }
        assert!(alarms <= 1, "{alarms} false alarms");
        let before = guard.clone();
        assert!(guard.observe(&rule, 1.0, 0.1).unwrap().contains("median"));
        guard = before;
        assert!(
            guard
                .observe(&rule, 0.1, 5.0)
                .unwrap()
                .contains("gradient norm")
        );
    }

    #[test]
    fn a_constant_loss_is_no_reason_for_alarm() {
        let mut guard = Guard::default();
        let rule = SpikeRule {
            window: 10,
            ..SpikeRule::default()
        };
        for _ in 0..20 {
            assert_eq!(guard.observe(&rule, 1.0, 1.0), None);
        }
        assert_eq!(guard.observe(&rule, 1.05, 1.0), None);
        assert!(guard.observe(&rule, 1.2, 1.0).is_some());
    }
}
