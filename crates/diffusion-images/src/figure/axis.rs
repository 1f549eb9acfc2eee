//! One axis of a figure: linear or logarithmic, with ticks at round numbers.

use diffusion_core::{Report, Result};
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// How values are spread along an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences take equal room.
    #[default]
    Linear,
    /// Equal ratios take equal room; only positive values can be shown.
    Log,
}

impl Scale {
    /// Whether a value has a place on such an axis.
    pub(super) fn shows(self, value: f64) -> bool {
        value.is_finite() && (self == Scale::Linear || value > 0.0)
    }

    fn forward(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Log => value.log10(),
        }
    }

    fn back(self, place: f64) -> f64 {
        match self {
            Scale::Linear => place,
            Scale::Log => 10f64.powf(place),
        }
    }
}

/// The range of an axis.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    /// An axis that holds all values that can be shown, with a little room at both ends.
    pub fn around(label: &str, scale: Scale, values: impl Iterator<Item = f64>) -> Result<Self> {
        let (low, high) = values
            .filter(|&v| scale.shows(v))
            .map(|v| scale.forward(v))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
        if low > high {
            return Err(Report::new(
                format!("figure, axis `{label}`"),
                "no value that can be shown",
            )
            .expected("at least one finite value, positive on a logarithmic axis")
            .remedy("check the numbers or use a linear axis")
            .input());
        }
        // A single value gets room in proportion to its size.
        let room = if high > low {
            0.04 * (high - low)
        } else {
            0.05 * high.abs().max(1.0)
        };
        Ok(Self {
            scale,
            low: low - room,
            high: high + room,
        })
    }

    /// The same axis that begins at 0, for bars.
    pub fn starting_at_zero(mut self) -> Self {
        if self.scale == Scale::Linear {
            self.low = 0.0;
        }
        self
    }

    fn ticks(&self, most: usize) -> Vec<f64> {
        let most = most.max(2) as f64;
        let decades = self.high - self.low;
        if self.scale == Scale::Log && decades >= 1.5 {
            let step = (decades / most).ceil().max(1.0);
            return multiples(self.low, self.high, step)
                .map(|p| 10f64.powf(p))
                .collect();
        }
        // Also for short logarithmic axes, where decades would give one tick or none.
        let (low, high) = (self.scale.back(self.low), self.scale.back(self.high));
        multiples(low, high, round_step((high - low) / most)).collect()
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|f| f * power >= least * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

fn multiples(low: f64, high: f64, step: f64) -> impl Iterator<Item = f64> {
    let first = (low / step).ceil();
    let count = ((high / step).floor() - first).clamp(-1.0, 1000.0) as i64;
    (0..=count).map(move |i| {
        let value = (first + i as f64) * step;
        // 0.30000000000000004 would be written in full.
        let digits = 10f64.powf((11.0 - step.abs().log10()).floor().clamp(-300.0, 300.0));
        let rounded = (value * digits).round() / digits;
        if rounded.is_finite() { rounded } else { value }
    })
}

/// Few characters: plain between 0.001 and 99999, powers of ten beyond.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || (1e-3..1e5).contains(&size) {
        let text = format!("{value:.6}");
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        let exponent = size.log10().floor();
        let mantissa = (value / 10f64.powf(exponent) * 1e4).round() / 1e4;
        format!("{mantissa}e{exponent}")
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        short(*value)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let place = (self.scale.forward(*value) - self.low) / (self.high - self.low);
        // Far outside the picture a value would overflow a pixel number.
        from + (place.clamp(-10.0, 10.0) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        self.ticks(hint.bold_points().min(8))
    }

    fn range(&self) -> Range<f64> {
        self.scale.back(self.low)..self.scale.back(self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(scale: Scale, values: &[f64]) -> Axis {
        Axis::around("x", scale, values.iter().copied()).unwrap()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(axis(Scale::Linear, &[0.0, 1.0]).ticks(5), [0.0, 0.5, 1.0]);
        assert_eq!(
            axis(Scale::Linear, &[0.1, 0.5]).ticks(6),
            [0.1, 0.2, 0.3, 0.4, 0.5]
        );
        assert_eq!(
            axis(Scale::Log, &[1e-3, 1.0]).ticks(8),
            [1e-3, 1e-2, 0.1, 1.0]
        );
        assert_eq!(
            axis(Scale::Log, &[1e-8, 1.0]).ticks(5),
            [1e-8, 1e-6, 1e-4, 1e-2, 1.0]
        );
        assert!(axis(Scale::Log, &[2.0, 5.0]).ticks(5).len() >= 3);
        assert!(axis(Scale::Linear, &[7.0]).ticks(5).contains(&7.0));
    }

    #[test]
    fn labels_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.25, "0.25"),
            (-3.0, "-3"),
            (50_000.0, "50000"),
            (1e-6, "1e-6"),
            (2e7, "2e7"),
            (-1.5e-4, "-1.5e-4"),
        ] {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn the_ends_map_inside_and_logs_map_ratios() {
        let linear = axis(Scale::Linear, &[0.0, 10.0]);
        assert_eq!(linear.map(&5.0, (0, 100)), 50);
        assert_eq!(linear.map(&5.0, (100, 0)), 50);
        assert!(linear.map(&0.0, (0, 1000)) > 0 && linear.map(&10.0, (0, 1000)) < 1000);
        let log = axis(Scale::Log, &[1e-4, 1.0]);
        assert_eq!(log.map(&1e-2, (0, 100)), 50);
        assert!(Axis::around("y", Scale::Log, [0.0, -1.0, f64::NAN].into_iter()).is_err());
    }
}
