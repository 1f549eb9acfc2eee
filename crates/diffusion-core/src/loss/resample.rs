//! Importance sampling of the training step (Nichol and Dhariwal 2021, section 3.3).

use crate::error::{Report, Result};
use candle_core::{Device, Tensor};
use diffusion_ops::rng::Key;
use std::collections::BTreeMap;

/// Draws steps in proportion to the root of the second moment of their recent losses.
///
/// ```text
/// p_t ∝ √E[L_t²] over the last n losses,   mixed with a uniform share;   weight 1/(T p_t)
/// ```
///
/// Until every step has its `n` losses the draw is uniform.
#[derive(Clone, Debug, PartialEq)]
pub struct SecondMoment {
    history: usize,
    uniform: f64,
    losses: Vec<Vec<f64>>,
}

impl SecondMoment {
    /// A sampler of `steps` steps that remembers `history` losses of each (10 in the paper) and
    /// draws uniformly with probability `uniform` (0.001).
    ///
    /// # Errors
    /// `Config` for no steps, no history or a share outside `[0, 1]`.
    pub fn new(steps: usize, history: usize, uniform: f64) -> Result<Self> {
        if steps == 0 || history == 0 || !(0.0..=1.0).contains(&uniform) {
            let found = format!("{steps} steps, history {history}, uniform share {uniform}");
            return Err(Report::new("resampler", found)
                .expected("at least one step, a history, and a share in [0, 1]")
                .config());
        }
        Ok(Self {
            history,
            uniform,
            losses: vec![Vec::new(); steps],
        })
    }

    /// Whether every step has been seen often enough.
    pub fn warmed_up(&self) -> bool {
        self.losses.iter().all(|l| l.len() == self.history)
    }

    /// Unnormalised weights of the steps: all 1 before the warm-up, probabilities after it.
    pub fn weights(&self) -> Vec<f64> {
        let steps = self.losses.len() as f64;
        if !self.warmed_up() {
            return vec![1.0; self.losses.len()];
        }
        let root = |l: &Vec<f64>| (l.iter().map(|v| v * v).sum::<f64>() / l.len() as f64).sqrt();
        let roots: Vec<f64> = self.losses.iter().map(root).collect();
        let total: f64 = roots.iter().sum();
        let share = |r: f64| if total > 0.0 { r / total } else { 1.0 / steps };
        roots
            .into_iter()
            .map(|r| share(r) * (1.0 - self.uniform) + self.uniform / steps)
            .collect()
    }

    /// The loss weight `1/(T p_t)` of every step: it keeps the expectation that of uniform steps.
    pub fn importance(&self) -> Vec<f64> {
        let weights = self.weights();
        let total: f64 = weights.iter().sum();
        let steps = weights.len() as f64;
        weights.into_iter().map(|w| total / (steps * w)).collect()
    }

    /// A step an item with its loss weight, each a function of its key alone.
    pub fn draw(&self, keys: impl IntoIterator<Item = Key>) -> Vec<(usize, f64)> {
        let (weights, importance) = (self.weights(), self.importance());
        let total: f64 = weights.iter().sum();
        keys.into_iter()
            .map(|key| {
                let mut left = key.uniform(1)[0] * total;
                let last = weights.len() - 1;
                let t = weights
                    .iter()
                    .position(|w| {
                        left -= w;
                        left < 0.0
                    })
                    .unwrap_or(last);
                (t, importance[t])
            })
            .collect()
    }

    /// Notes the losses of a batch, in order.
    ///
    /// # Errors
    /// `Input` for a step outside the table or a loss that is no number.
    pub fn update(&mut self, steps: &[usize], losses: &[f64]) -> Result<()> {
        let count = self.losses.len();
        for (t, loss) in steps.iter().zip(losses) {
            let Some(seen) = self.losses.get_mut(*t).filter(|_| loss.is_finite()) else {
                return Err(Report::new("resampler", format!("loss {loss} of step {t}"))
                    .expected(format!("a number, and a step below {count}"))
                    .input());
            };
            if seen.len() == self.history {
                seen.remove(0);
            }
            seen.push(*loss);
        }
        Ok(())
    }

    /// The losses seen, for a checkpoint: `losses [T, n]` padded with zeros and `counts [T]`.
    ///
    /// # Errors
    /// Those of tensor creation.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let row = |l: &Vec<f64>| {
            (0..self.history)
                .map(|i| l.get(i).copied().unwrap_or(0.0))
                .collect()
        };
        let rows: Vec<Vec<f64>> = self.losses.iter().map(row).collect();
        let counts: Vec<f64> = self.losses.iter().map(|l| l.len() as f64).collect();
        Ok(BTreeMap::from([
            ("losses".into(), Tensor::new(rows, &Device::Cpu)?),
            ("counts".into(), Tensor::new(counts, &Device::Cpu)?),
        ]))
    }

    /// Takes the losses of a checkpoint: a run goes on bit for bit.
    ///
    /// # Errors
    /// `Checkpoint` when the tensors are those of another sampler.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let other = |found: String| {
            Report::new("resampler state", found)
                .expected(format!("losses [{}, {}]", self.losses.len(), self.history))
                .checkpoint()
        };
        let (Some(losses), Some(counts)) = (state.get("losses"), state.get("counts")) else {
            return Err(other("tensors are missing".into()));
        };
        if losses.dims() != [self.losses.len(), self.history]
            || counts.dims() != [self.losses.len()]
        {
            return Err(other(format!("losses {:?}", losses.dims())));
        }
        let (rows, counts) = (losses.to_vec2::<f64>()?, counts.to_vec1::<f64>()?);
        self.losses = rows
            .into_iter()
            .zip(counts)
            .map(|(row, n)| row.into_iter().take(n as usize).collect())
            .collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_ops::rng::stream;

    fn keys(n: u64) -> impl Iterator<Item = Key> {
        (0..n).map(|i| Key::new(1, stream::TEST).item(i))
    }

    fn warm() -> SecondMoment {
        let mut s = SecondMoment::new(4, 2, 0.1).unwrap();
        for round in 0..3 {
            assert_eq!(s.warmed_up(), round > 1);
            s.update(&[0, 1, 2, 3], &[1.0, 2.0, 0.5, 4.5 + f64::from(round)])
                .unwrap();
        }
        s
    }

    #[test]
    fn the_weighted_mean_is_that_of_uniform_steps() {
        let s = warm();
        let p = s.weights();
        let root = (0.5f64 * (5.5f64.powi(2) + 6.5f64.powi(2))).sqrt();
        assert!((p[3] - (0.9 * root / (3.5 + root) + 0.025)).abs() < 1e-12);
        let expectation: f64 = p.iter().zip(s.importance()).map(|(p, w)| p * w).sum();
        assert!((expectation - 1.0).abs() < 1e-12);
        let n = 8000u64;
        let mut counts = [0.0; 4];
        for (t, w) in s.draw(keys(n)) {
            counts[t] += 1.0;
            assert_eq!(w, s.importance()[t]);
        }
        for (c, p) in counts.iter().zip(&p) {
            let error = 4.0 * (p * (1.0 - p) / n as f64).sqrt();
            assert!((c / n as f64 - p).abs() < error);
        }
    }

    #[test]
    fn a_restored_sampler_goes_on_alike() {
        let s = warm();
        let mut other = SecondMoment::new(4, 2, 0.1).unwrap();
        other.restore(&s.state().unwrap()).unwrap();
        assert_eq!(other, s);
        assert_eq!(other.draw(keys(20)), s.draw(keys(20)));
        let mut half = SecondMoment::new(4, 2, 0.1).unwrap();
        half.update(&[1], &[3.0]).unwrap();
        other.restore(&half.state().unwrap()).unwrap();
        assert_eq!(other, half);
        assert!(
            SecondMoment::new(5, 2, 0.1)
                .unwrap()
                .restore(&s.state().unwrap())
                .is_err()
        );
        assert!(other.update(&[4], &[1.0]).is_err());
        assert!(other.update(&[0], &[f64::NAN]).is_err());
        assert!(SecondMoment::new(0, 2, 0.1).is_err());
    }
}
