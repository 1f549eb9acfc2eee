//! What a user can choose about training.

use std::ops::Deref;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ema::EmaRule;
use super::guard::GuardConfig;
use super::lr::LrSchedule;
use super::optim::AdamWConfig;
use crate::checkpoint::Keep;
use crate::error::{Report, Result};

/// What happens when a checkpoint cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveFailure {
    /// End the run with an error.
    #[default]
    Stop,
    /// Report it and go on; the checkpoint before stands.
    Continue,
}

/// The configuration of a run. Everything has a usual value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Examples in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches whose gradients are averaged for one optimiser step.
    pub accumulate: usize,
    /// The learning rate that `schedule` changes.
    pub lr: f64,
    /// How the learning rate changes.
    pub schedule: LrSchedule,
    /// The constants of the optimiser.
    pub adamw: AdamWConfig,
    /// The largest norm of the gradient; longer ones are shortened. `"off"` for no bound.
    #[serde(with = "or_off")]
    pub clip_norm: Option<f64>,
    /// The moving average of the weights.
    pub ema: EmaRule,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Newest checkpoints that stay.
    pub keep_last: usize,
    /// Checkpoints whose step is a multiple of this stay too.
    pub keep_every: Option<u64>,
    /// As many checkpoints with the smallest mean loss since the one before stay too.
    pub keep_best: usize,
    /// What to do when a checkpoint cannot be written.
    pub save_failure: SaveFailure,
    /// Steps between log entries.
    pub log_every: u64,
    /// What to do about numbers that are not finite.
    pub guard: GuardConfig,
    /// The seed of everything random.
    pub seed: u64,
    /// Stop after so many minutes; the run can be resumed.
    pub max_minutes: Option<f64>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 16,
            accumulate: 1,
            lr: 1e-4,
            schedule: LrSchedule::default(),
            adamw: AdamWConfig::default(),
            clip_norm: Some(1.0),
            ema: EmaRule::default(),
            checkpoint_every: 1000,
            keep_last: 3,
            keep_every: None,
            keep_best: 0,
            save_failure: SaveFailure::default(),
            log_every: 10,
            guard: GuardConfig::default(),
            seed: 0,
            max_minutes: None,
        }
    }
}

impl TrainConfig {
    /// Reads a configuration from JSON; `at` names it in messages.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) naming the field.
    pub fn from_json(text: &str, at: &str) -> Result<Self> {
        serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text)).map_err(
            |e| {
                Report::new(format_args!("{at}: {}", e.path()), e.inner())
                    .remedy("correct the field, or leave it out for the usual value")
                    .config()
            },
        )
    }

    /// The configuration, once it is known to make sense.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) naming the first field that does not.
    pub fn check(self) -> Result<Checked> {
        let at_least_one = [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("accumulate", self.accumulate as u64),
            ("checkpoint_every", self.checkpoint_every),
            ("keep_last", self.keep_last as u64),
            ("keep_every", self.keep_every.unwrap_or(1)),
            ("log_every", self.log_every),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(wrong(field, &0, "at least 1"));
            }
        }
        // Positions in the data are counted in 64 bits.
        let positions = (self.batch_size as u64)
            .checked_mul(self.accumulate as u64)
            .and_then(|n| n.checked_mul(self.steps));
        if positions.is_none_or(|p| p >= 1 << 56) {
            return Err(wrong(
                "steps",
                &self.steps,
                "fewer than 2⁵⁶ examples in the whole run",
            ));
        }
        let positive = |v: f64| v > 0.0 && v.is_finite();
        if !positive(self.lr) {
            return Err(wrong("lr", &self.lr, "a positive number"));
        }
        let a = &self.adamw;
        for (field, value) in [("adamw.beta1", a.beta1), ("adamw.beta2", a.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(wrong(field, &value, "a number in [0, 1)"));
            }
        }
        if !positive(a.eps) {
            return Err(wrong("adamw.eps", &a.eps, "a positive number"));
        }
        if !(a.weight_decay >= 0.0 && self.lr * a.weight_decay < 1.0) {
            return Err(wrong("adamw.weight_decay", &a.weight_decay, "in [0, 1/lr)"));
        }
        if let Some(norm) = self.clip_norm.filter(|&n| !positive(n)) {
            return Err(wrong("clip_norm", &norm, "a positive number or \"off\""));
        }
        if let Some(minutes) = self.max_minutes.filter(|&m| !positive(m)) {
            return Err(wrong("max_minutes", &minutes, "a positive number"));
        }
        self.schedule.check(self.lr, self.steps)?;
        self.ema.check()?;
        self.guard.check()?;
        Ok(Checked(self))
    }
}

fn wrong(field: &str, value: &dyn std::fmt::Display, expected: &str) -> crate::Error {
    Report::new(format_args!("train.{field}"), value)
        .expected(expected)
        .remedy("leave it out for the usual value")
        .config()
}

/// A [`TrainConfig`] that makes sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked(TrainConfig);

impl Deref for Checked {
    type Target = TrainConfig;

    fn deref(&self) -> &TrainConfig {
        &self.0
    }
}

impl Checked {
    /// What decides the numbers of a run; the rest may change when it is resumed. `steps` is part of
    /// it only where the learning rate depends on it.
    pub(super) fn decisive(&self, identity: &str) -> Value {
        let steps = self.schedule.depends_on_steps().then_some(self.steps);
        json!({
            "steps": steps, "batch_size": self.batch_size, "accumulate": self.accumulate,
            "lr": self.lr, "schedule": self.schedule, "adamw": self.adamw,
            "clip_norm": self.clip_norm, "ema": self.ema, "guard": self.guard,
            "seed": self.seed, "identity": identity,
        })
    }

    pub(super) fn keep(&self) -> Keep {
        Keep {
            last: self.keep_last,
            every: self.keep_every,
            best: self.keep_best,
        }
    }

    pub(super) fn rate(&self, step: u64) -> f64 {
        self.schedule.rate(self.lr, step, self.steps)
    }
}

/// An optional number that formats without a null (TOML) can switch off.
mod or_off {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(value: &Option<f64>, s: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(number) => s.serialize_f64(*number),
            None => s.serialize_str("off"),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Text(String),
        }
        match Option::<Either>::deserialize(d)? {
            None => Ok(None),
            Some(Either::Number(number)) => Ok(Some(number)),
            Some(Either::Text(text)) if text == "off" => Ok(None),
            Some(Either::Text(text)) => Err(de::Error::custom(format!(
                "`{text}`; expected a number or \"off\""
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        let config = TrainConfig::from_json(json, "train.json");
        config.and_then(TrainConfig::check).unwrap_err().to_string()
    }

    #[test]
    fn every_field_survives_a_round_trip_and_defaults_are_sound() {
        let config = TrainConfig {
            clip_norm: None,
            keep_every: Some(7),
            ema: EmaRule::Off {},
            schedule: LrSchedule::CosineToFloor {
                warmup: 3,
                floor: 0.1,
            },
            ..TrainConfig::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(TrainConfig::from_json(&text, "x").unwrap(), config);
        assert_eq!(
            TrainConfig::from_json("{}", "x").unwrap(),
            TrainConfig::default()
        );
        TrainConfig::default().check().unwrap();
    }

    #[test]
    fn wrong_fields_are_named_with_value_expectation_and_remedy() {
        for (json, parts) in [
            (r#"{"lr": -1}"#, ["train.lr", "-1", "positive"]),
            (r#"{"stepz": 1}"#, ["train.json", "stepz", "steps"]),
            (r#"{"steps": 0}"#, ["train.steps", "0", "at least 1"]),
            (
                r#"{"batch_size": "many"}"#,
                ["train.json: batch_size", "many", "leave it out"],
            ),
            (
                r#"{"adamw": {"beta1": 1.0}}"#,
                ["train.adamw.beta1", "1", "[0, 1)"],
            ),
            (r#"{"clip_norm": "no"}"#, ["train.json", "no", "off"]),
            (r#"{"clip_norm": 0}"#, ["train.clip_norm", "0", "off"]),
            (
                r#"{"ema": {"kind": "plain", "decay": 1.5}}"#,
                ["train.ema.decay", "1.5", "[0, 1)"],
            ),
            (
                r#"{"ema": {"kind": "off", "decay": 0.5}}"#,
                ["train.json", "decay", "ema"],
            ),
            (
                r#"{"steps": 5, "schedule": {"kind": "linear", "warmup": 9}}"#,
                ["train.schedule.warmup", "9", "train.steps = 5"],
            ),
            (
                r#"{"guard": {"policy": {"kind": "skip", "max_fraction": 2}}}"#,
                ["train.guard.policy.max_fraction", "2", "[0, 1]"],
            ),
            (
                r#"{"max_minutes": 0}"#,
                ["train.max_minutes", "0", "positive"],
            ),
        ] {
            let error = error(json);
            for part in parts {
                assert!(error.contains(part), "{json}: `{error}` lacks `{part}`");
            }
        }
    }

    #[test]
    fn what_does_not_change_the_numbers_may_change() {
        let of = |c: TrainConfig| c.check().unwrap().decisive("m");
        let base = of(TrainConfig::default());
        assert_eq!(
            base,
            of(TrainConfig {
                steps: 9,
                keep_last: 1,
                ..TrainConfig::default()
            })
        );
        assert_ne!(
            base,
            of(TrainConfig {
                seed: 9,
                ..TrainConfig::default()
            })
        );
        let falling = |steps| {
            let schedule = LrSchedule::Linear { warmup: 0 };
            of(TrainConfig {
                steps,
                schedule,
                ..TrainConfig::default()
            })
        };
        assert_ne!(falling(5), falling(6));
    }
}
