//! The moving average of the weights, which is what one samples with.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Tensor, Var};
use diffusion_ops::{ema_step, updates_in_place};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Report, Result};

/// How fast the average follows; as the `EMAModel` of diffusers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum EmaRule {
    /// No average.
    Off {},
    /// `(1 + k) / (10 + k)` until `decay` is reached.
    Plain {
        /// The largest decay.
        #[serde(default = "largest")]
        decay: f64,
        /// Steps during which the average is a copy of the weights.
        #[serde(default)]
        update_after_step: u64,
        /// The smallest decay after that.
        #[serde(default)]
        min_decay: f64,
    },
    /// The same decay at every update, or `(1 + n)/(10 + n)` at the n-th until `decay` is reached;
    /// as the average of the score SDE code.
    Constant {
        /// The largest decay.
        #[serde(default = "largest")]
        decay: f64,
        /// Whether the first updates follow the number of updates.
        #[serde(default)]
        use_num_updates: bool,
    },
    /// `1 − (1 + k/inv_gamma)^(−power)` until `decay` is reached.
    Warmup {
        /// The largest decay.
        #[serde(default = "largest")]
        decay: f64,
        /// The larger, the slower the start.
        #[serde(default = "one")]
        inv_gamma: f64,
        /// 2/3 for a million steps and more, 3/4 for fewer.
        #[serde(default = "two_thirds")]
        power: f64,
        /// Steps during which the average is a copy of the weights.
        #[serde(default)]
        update_after_step: u64,
        /// The smallest decay after that.
        #[serde(default)]
        min_decay: f64,
    },
}

fn largest() -> f64 {
    0.9999
}

fn one() -> f64 {
    1.0
}

fn two_thirds() -> f64 {
    2.0 / 3.0
}

impl Default for EmaRule {
    fn default() -> Self {
        Self::Plain {
            decay: largest(),
            update_after_step: 0,
            min_decay: 0.0,
        }
    }
}

impl EmaRule {
    /// The decay used at the `step`-th update, counted from 1.
    ///
    /// ```text
    /// k = max(0, step − update_after_step − 1)
    /// decay = 0                                                     if k = 0
    ///         clamp((1 + k)/(10 + k),           min_decay, decay)   plain
    ///         clamp(1 − (1 + k/inv_gamma)^−power, min_decay, decay) warm-up
    /// decay = decay, or min(decay, (1 + step)/(10 + step))          constant
    /// ```
    pub fn decay(&self, step: u64) -> f64 {
        let (after, most, least) = match *self {
            Self::Off {} => return 0.0,
            Self::Constant {
                decay,
                use_num_updates,
            } => {
                let n = step as f64;
                let counted = (1.0 + n) / (10.0 + n);
                return if use_num_updates {
                    counted.min(decay)
                } else {
                    decay
                };
            }
            Self::Plain {
                decay,
                update_after_step,
                min_decay,
            }
            | Self::Warmup {
                decay,
                update_after_step,
                min_decay,
                ..
            } => (update_after_step, decay, min_decay),
        };
        let k = step.saturating_sub(after).saturating_sub(1) as f64;
        if k == 0.0 {
            return 0.0;
        }
        let value = match *self {
            Self::Warmup {
                inv_gamma, power, ..
            } => 1.0 - (1.0 + k / inv_gamma).powf(-power),
            _ => (1.0 + k) / (10.0 + k),
        };
        value.min(most).max(least)
    }

    pub(super) fn check(&self) -> Result<()> {
        let field = |name: &str, value: f64, ok: bool, expected: &str| -> Result<()> {
            if ok {
                return Ok(());
            }
            Err(Report::new(format_args!("train.ema.{name}"), value)
                .expected(expected)
                .remedy("leave it out for the usual value")
                .config())
        };
        match *self {
            Self::Off {} => Ok(()),
            Self::Constant { decay, .. } => field(
                "decay",
                decay,
                (0.0..1.0).contains(&decay),
                "a number in [0, 1)",
            ),
            Self::Plain {
                decay, min_decay, ..
            }
            | Self::Warmup {
                decay, min_decay, ..
            } => {
                field(
                    "decay",
                    decay,
                    (0.0..1.0).contains(&decay),
                    "a number in [0, 1)",
                )?;
                let ok = (0.0..=decay).contains(&min_decay);
                field("min_decay", min_decay, ok, "a number between 0 and decay")?;
                if let Self::Warmup {
                    inv_gamma, power, ..
                } = *self
                {
                    let positive = |v: f64| v > 0.0 && v.is_finite();
                    field(
                        "inv_gamma",
                        inv_gamma,
                        positive(inv_gamma),
                        "a positive number",
                    )?;
                    field("power", power, positive(power), "a positive number")?;
                }
                Ok(())
            }
        }
    }
}

/// The averaged weights. They own their memory: no parameter can change them.
#[derive(Clone, Debug)]
pub struct Ema {
    rule: EmaRule,
    count: u64,
    shadow: BTreeMap<String, Tensor>,
}

impl Ema {
    /// An average that starts as a copy of the parameters; `None` when the rule is
    /// [`EmaRule::Off`].
    ///
    /// # Errors
    ///
    /// Those of the copies.
    pub fn new(rule: EmaRule, params: &BTreeMap<String, Var>) -> Result<Option<Self>> {
        if rule == (EmaRule::Off {}) {
            return Ok(None);
        }
        Ok(Some(Self {
            rule,
            count: 0,
            shadow: copies(params.iter().map(|(n, v)| (n, &**v)))?,
        }))
    }

    /// One update.
    ///
    /// ```text
    /// s ← s − (1 − decay(count)) (s − θ)
    /// ```
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn update(&mut self, params: &BTreeMap<String, Var>) -> Result<()> {
        self.begin().finish(params)
    }

    /// Starts an update, part of which the optimiser may make.
    pub(super) fn begin(&mut self) -> Pull<'_> {
        self.count += 1;
        Pull {
            pull: 1.0 - self.rule.decay(self.count),
            shadow: &mut self.shadow,
            taken: BTreeSet::new(),
        }
    }

    /// Updates done.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// A copy of the averaged weights.
    ///
    /// # Errors
    ///
    /// Those of the copies.
    pub fn weights(&self) -> Result<BTreeMap<String, Tensor>> {
        copies(self.shadow.iter())
    }

    /// The averaged weights themselves; the next update changes them.
    pub(super) fn shadow(&self) -> &BTreeMap<String, Tensor> {
        &self.shadow
    }

    /// Takes back a state.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] when names, shapes or element types differ from the present ones.
    pub fn restore(&mut self, count: u64, weights: &BTreeMap<String, Tensor>) -> Result<()> {
        same_layout("ema", weights, self.shadow.iter())?;
        let mut shadow = BTreeMap::new();
        for (name, tensor) in weights {
            let device = self.shadow[name].device();
            shadow.insert(name.clone(), tensor.to_device(device)?.copy()?.detach());
        }
        self.shadow = shadow;
        self.count = count;
        Ok(())
    }
}

/// One update of an [`Ema`] under way.
pub(super) struct Pull<'a> {
    pull: f64,
    shadow: &'a mut BTreeMap<String, Tensor>,
    /// What the optimiser has updated.
    taken: BTreeSet<String>,
}

impl Pull<'_> {
    /// `1 − decay`.
    pub fn pull(&self) -> f64 {
        self.pull
    }

    /// The average of a parameter, for whoever updates it in its place.
    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        let shadow = self.shadow.get(name).filter(|s| updates_in_place(s))?;
        self.taken.insert(name.to_string());
        Some(shadow.clone())
    }

    /// Updates what has not been taken.
    pub fn finish(self, params: &BTreeMap<String, Var>) -> Result<()> {
        let mut pairs = Vec::new();
        for (name, shadow) in self.shadow.iter_mut() {
            let Some(var) = params.get(name).filter(|_| !self.taken.contains(name)) else {
                continue;
            };
            if updates_in_place(shadow) && updates_in_place(var) {
                pairs.push((&*shadow, var.as_tensor()));
            } else {
                let gap = (&*shadow - var.as_tensor().detach())?;
                *shadow = (&*shadow - (gap * self.pull)?)?.detach();
            }
        }
        Ok(ema_step(&pairs, self.pull)?)
    }
}

/// Deep copies without a graph.
pub(super) fn copies<'a>(
    tensors: impl Iterator<Item = (&'a String, &'a Tensor)>,
) -> Result<BTreeMap<String, Tensor>> {
    tensors
        .map(|(n, t)| Ok((n.clone(), t.detach().force_contiguous()?.detach())))
        .collect()
}

/// Refuses saved tensors that differ from the present ones in name, shape or element type.
pub(super) fn same_layout<'a>(
    group: &str,
    saved: &BTreeMap<String, Tensor>,
    present: impl Iterator<Item = (&'a String, &'a Tensor)>,
) -> Result<()> {
    let present: BTreeMap<&String, &Tensor> = present.collect();
    let misfit = |name: &String, found: String, expected: String| -> Error {
        Report::new(format_args!("checkpoint: {group}: `{name}`"), found)
            .expected(expected)
            .remedy("resume with the model configuration that wrote the checkpoint")
            .checkpoint()
    };
    let show = |t: &Tensor| format!("{:?} {:?}", t.dtype(), t.dims());
    for (name, tensor) in &present {
        match saved.get(*name) {
            None => return Err(misfit(name, "missing".into(), show(tensor))),
            Some(s) if s.shape() != tensor.shape() || s.dtype() != tensor.dtype() => {
                return Err(misfit(name, show(s), show(tensor)));
            }
            Some(_) => {}
        }
    }
    match saved.keys().find(|name| !present.contains_key(name)) {
        Some(name) => Err(misfit(name, "unexpected".into(), "no such tensor".into())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_updates_follow_their_number() {
        let rule = |use_num_updates| EmaRule::Constant {
            decay: 0.9,
            use_num_updates,
        };
        for (n, counted) in [
            (1, 2.0 / 11.0),
            (2, 0.25),
            (79, 80.0 / 89.0),
            (80, 0.9),
            (500, 0.9),
        ] {
            assert_eq!(rule(true).decay(n), counted, "{n}");
            assert_eq!(rule(false).decay(n), 0.9);
        }
        let too_much = EmaRule::Constant {
            decay: 1.0,
            use_num_updates: true,
        };
        assert!(too_much.check().is_err());
        assert!(rule(true).check().is_ok());
    }
}
