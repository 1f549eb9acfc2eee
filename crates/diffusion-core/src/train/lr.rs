//! Learning-rate schedules; pure functions of the step, as in `diffusers.optimization`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Report, Result};

/// How the learning rate changes over a run. `warmup` counts steps during which it rises from 0 in
/// a straight line.
///
/// ```text
/// lr(s) = base · s/warmup                     for s < warmup
///         base · f(p),  p = (s − warmup)/(steps − warmup)   from there on
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LrSchedule {
    /// `f = 1`, without warm-up.
    Constant {},
    /// `f = 1`.
    ConstantWithWarmup {
        /// Steps of warm-up.
        warmup: u64,
    },
    /// `f = max(0, 1 − p)`.
    Linear {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
    },
    /// `f = max(0, (1 + cos(2π · cycles · p))/2)`.
    Cosine {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// Periods of the cosine; 0.5 falls once.
        #[serde(default = "half")]
        cycles: f64,
    },
    /// `f = (1 + cos(π (cycles · p mod 1)))/2`, and 0 from p = 1 on.
    CosineWithRestarts {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// How often it falls.
        #[serde(default = "once")]
        cycles: u64,
    },
    /// `lr = (base − end)(1 − p)^power + end`, and `end` from p = 1 on.
    Polynomial {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// The last learning rate (not a factor).
        #[serde(default = "end")]
        end: f64,
        /// The exponent.
        #[serde(default = "unit")]
        power: f64,
    },
    /// `f = floor + (1 − floor)(1 + cos(π min(1, p)))/2`: never below `floor · base`.
    CosineToFloor {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// The last factor.
        #[serde(default)]
        floor: f64,
    },
}

fn half() -> f64 {
    0.5
}

fn once() -> u64 {
    1
}

fn end() -> f64 {
    1e-7
}

fn unit() -> f64 {
    1.0
}

impl Default for LrSchedule {
    fn default() -> Self {
        Self::ConstantWithWarmup { warmup: 0 }
    }
}

impl LrSchedule {
    /// The steps of warm-up.
    pub fn warmup(&self) -> u64 {
        match *self {
            Self::Constant {} => 0,
            Self::ConstantWithWarmup { warmup }
            | Self::Linear { warmup }
            | Self::Cosine { warmup, .. }
            | Self::CosineWithRestarts { warmup, .. }
            | Self::Polynomial { warmup, .. }
            | Self::CosineToFloor { warmup, .. } => warmup,
        }
    }

    /// Whether the learning rate depends on the length of the run.
    pub fn depends_on_steps(&self) -> bool {
        !matches!(self, Self::Constant {} | Self::ConstantWithWarmup { .. })
    }

    /// The learning rate of the optimiser step after `step` others, in a run of `steps`.
    pub fn rate(&self, base: f64, step: u64, steps: u64) -> f64 {
        let warmup = self.warmup();
        if step < warmup {
            return base * (step as f64 / warmup as f64);
        }
        let length = steps.saturating_sub(warmup).max(1) as f64;
        let p = (step - warmup) as f64 / length;
        match *self {
            Self::Constant {} | Self::ConstantWithWarmup { .. } => base,
            Self::Linear { .. } => base * ((steps as f64 - step as f64) / length).max(0.0),
            Self::Cosine { cycles, .. } => {
                base * (0.5 * (1.0 + (PI * cycles * 2.0 * p).cos())).max(0.0)
            }
            Self::CosineWithRestarts { .. } if p >= 1.0 => 0.0,
            Self::CosineWithRestarts { cycles, .. } => {
                base * (0.5 * (1.0 + (PI * ((cycles as f64 * p) % 1.0)).cos())).max(0.0)
            }
            Self::Polynomial { end, .. } if step > steps => end,
            Self::Polynomial { end, power, .. } => {
                (base - end) * (1.0 - p).max(0.0).powf(power) + end
            }
            Self::CosineToFloor { floor, .. } => {
                base * (floor + (1.0 - floor) * 0.5 * (1.0 + (PI * p.min(1.0)).cos()))
            }
        }
    }

    pub(super) fn check(&self, base: f64, steps: u64) -> Result<()> {
        let wrong = |field: &str, value: &dyn std::fmt::Display, expected: String| {
            Report::new(format_args!("train.schedule.{field}"), value)
                .expected(expected)
                .remedy("leave it out for the usual value")
                .config()
        };
        if self.depends_on_steps() && self.warmup() >= steps {
            return Err(wrong(
                "warmup",
                &self.warmup(),
                format!("fewer than train.steps = {steps}"),
            ));
        }
        match *self {
            Self::Cosine { cycles, .. } if !(cycles > 0.0 && cycles.is_finite()) => {
                Err(wrong("cycles", &cycles, "a positive number".into()))
            }
            Self::CosineWithRestarts { cycles: 0, .. } => {
                Err(wrong("cycles", &0, "at least 1".into()))
            }
            Self::Polynomial { end, .. } if !(0.0..base).contains(&end) => Err(wrong(
                "end",
                &end,
                format!("at least 0 and below train.lr = {base}"),
            )),
            Self::Polynomial { power, .. } if !(power > 0.0 && power.is_finite()) => {
                Err(wrong("power", &power, "a positive number".into()))
            }
            Self::CosineToFloor { floor, .. } if !(0.0..=1.0).contains(&floor) => {
                Err(wrong("floor", &floor, "a number in [0, 1]".into()))
            }
            _ => Ok(()),
        }
    }
}
