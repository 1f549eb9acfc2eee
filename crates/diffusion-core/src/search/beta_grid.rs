//! A search over short noise schedules whose betas are one digit times a power of ten (Chen et al.
//! 2021, WaveGrad, section 4.4).
//!
//! The network must know the noise level itself, so that any list of betas works when sampling.

use crate::error::{Report, Result};

/// The candidates `β_i = m_i · 10^{e_i}`, `m_i` in 1 to 9, betas rising.
///
/// A grid of `n` betas has `9^n` candidates, most of which do not rise. Where more remain than wanted,
/// evenly spaced ones are tried.
#[derive(Clone, Debug, PartialEq)]
pub struct BetaGrid {
    scales: Vec<f64>,
    most: usize,
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The best betas, rising: the first belongs to the cleanest step.
    pub betas: Vec<f64>,
    /// Their score.
    pub score: f64,
    /// Schedules that were scored.
    pub tried: usize,
}

impl BetaGrid {
    /// `n` betas, the powers of ten between `low` and `high` evenly spaced: 10⁻⁶ and 10⁻¹ in the paper,
    /// 10⁻⁶ and 10⁻² in public code. At most `most` candidates are scored.
    ///
    /// # Errors
    /// `Config` for no betas, more than 10, bounds that do not rise, or betas that reach 1.
    pub fn new(n: usize, low: f64, high: f64, most: usize) -> Result<Self> {
        // Written so that NaN fails.
        let bounds = low > 0.0 && low <= high && high < 1.0;
        if !(1..=10).contains(&n) || !bounds || most == 0 {
            return Err(Report::new(
                "search over betas",
                format!("{n} betas from {low} to {high}, at most {most} candidates"),
            )
            .expected("1 to 10 betas between bounds above 0 and below 1, and a candidate to try")
            .config());
        }
        let (a, b) = (low.ln(), high.ln());
        let scales = (0..n)
            .map(|i| (a + (b - a) * i as f64 / (n - 1).max(1) as f64).exp())
            .collect();
        Ok(Self { scales, most })
    }

    /// How many candidates rise and stay below 1.
    pub fn count(&self) -> usize {
        self.all().count()
    }

    /// The candidates that are scored, in the order of their digits, the last one running fastest.
    pub fn candidates(&self) -> Vec<Vec<f64>> {
        let count = self.count();
        if count <= self.most {
            return self.all().collect();
        }
        // The k-th wanted is the ⌊k count/most⌋-th of all.
        let mut wanted = (0..self.most).map(|k| k * count / self.most).peekable();
        self.all()
            .enumerate()
            .filter(|(i, _)| wanted.next_if_eq(i).is_some())
            .map(|(_, betas)| betas)
            .collect()
    }

    /// Every candidate, whatever the bound.
    fn all(&self) -> impl Iterator<Item = Vec<f64>> + '_ {
        let mut digits = vec![1u8; self.scales.len()];
        let mut over = false;
        std::iter::from_fn(move || {
            while !over {
                let betas = self.betas(&digits);
                match betas.windows(2).position(|w| w[0] >= w[1]) {
                    // The digits after the pair that falls do not matter: the next digit of its second.
                    Some(i) => over = !advance(&mut digits, i + 1),
                    None => {
                        let last = digits.len() - 1;
                        over = !advance(&mut digits, last);
                        if betas.iter().all(|b| *b < 1.0) {
                            return Some(betas);
                        }
                    }
                }
            }
            None
        })
    }

    fn betas(&self, digits: &[u8]) -> Vec<f64> {
        let pairs = digits.iter().zip(&self.scales);
        pairs.map(|(m, scale)| f64::from(*m) * scale).collect()
    }

    /// Scores the candidates and keeps the one with the least score, the first of equals.
    ///
    /// # Errors
    /// `Numeric` when no score is a number; whatever the score refuses.
    pub fn search(&self, mut score: impl FnMut(&[f64]) -> Result<f64>) -> Result<Found> {
        let mut best: Option<Found> = None;
        let mut tried = 0;
        for betas in self.candidates() {
            let value = score(&betas)?;
            tried += 1;
            let better = best.as_ref().is_none_or(|b| value < b.score);
            if better && !value.is_nan() {
                best = Some(Found {
                    betas,
                    score: value,
                    tried,
                });
            }
        }
        match best {
            Some(best) => Ok(Found { tried, ..best }),
            None => Err(
                Report::new("search over betas", format!("{tried} scores, all NaN"))
                    .expected("a number for some candidate")
                    .remedy("check the model and the score")
                    .numeric(),
            ),
        }
    }
}

/// Counts up at a digit, those after it from 1; whether there is a next.
fn advance(digits: &mut [u8], at: usize) -> bool {
    for i in (0..=at).rev() {
        if let Some(rest) = digits.get_mut(i + 1..) {
            rest.fill(1);
        }
        match digits.get_mut(i) {
            Some(digit) if *digit < 9 => {
                *digit += 1;
                return true;
            }
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against every list of digits, one after the other.
    #[test]
    fn the_candidates_are_those_that_rise() {
        for (n, low, high) in [
            (3, 1e-3, 1e-1),
            (3, 1e-3, 2e-3),
            (2, 0.05, 0.3),
            (1, 0.2, 0.2),
        ] {
            let grid = BetaGrid::new(n, low, high, usize::MAX).unwrap();
            let mut brute = Vec::new();
            for code in 0..9usize.pow(n as u32) {
                let digits: Vec<u8> = (0..n as u32)
                    .rev()
                    .map(|i| (code / 9usize.pow(i) % 9 + 1) as u8)
                    .collect();
                let betas = grid.betas(&digits);
                if betas.windows(2).all(|w| w[0] < w[1]) && betas.iter().all(|b| *b < 1.0) {
                    brute.push(betas);
                }
            }
            assert!(!brute.is_empty());
            assert_eq!(grid.candidates(), brute, "{n} {low} {high}");
        }
    }

    #[test]
    fn the_search_finds_the_least_and_keeps_to_its_bound() {
        let aim = [3e-3, 2e-2, 0.5f64];
        let score = |betas: &[f64]| -> Result<f64> {
            let pairs = betas.iter().zip(aim);
            Ok(pairs.map(|(a, b)| (a.ln() - b.ln()).powi(2)).sum())
        };
        let grid = BetaGrid::new(3, 1e-3, 1e-1, usize::MAX).unwrap();
        let found = grid.search(score).unwrap();
        for (a, b) in found.betas.iter().zip(aim) {
            assert!((a / b - 1.0).abs() < 1e-12);
        }
        assert!(found.score < 1e-20 && found.tried == grid.count());
        let few = BetaGrid::new(3, 1e-3, 1e-1, 50).unwrap();
        let coarse = few.search(score).unwrap();
        assert_eq!(coarse.tried, 50);
        assert!(coarse.score >= found.score);
        assert!(coarse.betas.windows(2).all(|w| w[0] < w[1]));
        assert!(grid.search(|_| Ok(f64::NAN)).is_err());
        // NaN does not win.
        let mut first = true;
        let found = few.search(|b| {
            Ok(if std::mem::take(&mut first) {
                f64::NAN
            } else {
                b[0]
            })
        });
        assert!(found.unwrap().score.is_finite());
        for wrong in [
            (0, 1e-6, 0.1),
            (11, 1e-6, 0.1),
            (3, 0.1, 1e-3),
            (3, 0.1, 1.0),
        ] {
            assert!(
                BetaGrid::new(wrong.0, wrong.1, wrong.2, 9).is_err(),
                "{wrong:?}"
            );
        }
    }
}
