//! Which examples a step sees: a pure function of (seed, number of examples, position).
//!
//! ```text
//! item(p) = π_e(p mod n),   e = ⌊p / n⌋,   π_e = permutation of 0..n by Key(seed, ORDER, e)
//! ```
//!
//! Positions run on through the epochs: where the batch size does not divide the number of examples,
//! the last batch of an epoch is filled up from the beginning of the next, so that all batches have
//! the same size. The cursor of a run is its step count; resuming needs no replay.

use std::collections::BTreeMap;

use diffusion_ops::rng::{Key, stream};

use super::objective::StepCtx;
use crate::error::{Report, Result};

/// The order of examples, with the permutations of the last two epochs kept at hand.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    len: usize,
    batch: usize,
    accumulate: usize,
    epochs: BTreeMap<u64, Vec<usize>>,
}

impl Order {
    /// The order in which a run sees `len` examples.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) without examples, or with more than 2⁴⁰.
    pub fn new(seed: u64, len: usize, batch: usize, accumulate: usize) -> Result<Self> {
        if len == 0 || len as u64 >= 1 << 40 {
            return Err(Report::new("training data: examples", len)
                .expected("between 1 and 2⁴⁰")
                .remedy("check the data folder and the split")
                .input());
        }
        Ok(Self {
            seed,
            len,
            batch,
            accumulate,
            epochs: BTreeMap::new(),
        })
    }

    /// The examples that one optimiser step uses.
    pub fn examples_per_step(&self) -> u64 {
        self.batch as u64 * self.accumulate as u64
    }

    /// The example at a position.
    pub fn item(&mut self, position: u64) -> usize {
        let (epoch, at) = (position / self.len as u64, position % self.len as u64);
        let (seed, len) = (self.seed, self.len);
        // Two epochs can be in use at a seam; older ones are not needed again.
        while self.epochs.len() > 2 {
            self.epochs.pop_first();
        }
        let order = self
            .epochs
            .entry(epoch)
            .or_insert_with(|| Key::new(seed, stream::ORDER).item(epoch).permutation(len));
        order[at as usize]
    }

    /// The micro-batches of optimiser step `step`.
    pub fn step(&mut self, step: u64) -> Vec<StepCtx> {
        let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
        let first = step * self.examples_per_step();
        (0..self.accumulate as u64)
            .map(|micro| {
                let start = first + micro * self.batch as u64;
                let items: Vec<u64> = (start..start + self.batch as u64)
                    .map(|p| self.item(p) as u64)
                    .collect();
                let repeats = items
                    .iter()
                    .map(|&item| {
                        let count = seen.entry(item).or_insert(0);
                        *count += 1;
                        *count - 1
                    })
                    .collect();
                let epoch = start / self.len as u64;
                StepCtx {
                    seed: self.seed,
                    step,
                    micro,
                    epoch,
                    items,
                    repeats,
                    phase: 0,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_and_differs_from_the_one_before() {
        let mut order = Order::new(3, 10, 4, 1).unwrap();
        let items: Vec<u64> = (0..5)
            .flat_map(|s| order.step(s)[0].items.clone())
            .collect();
        for epoch in items.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<u64>>());
        }
        assert_ne!(items[..10], items[10..]);
    }

    #[test]
    fn resuming_anywhere_gives_the_same_order() {
        let mut whole = Order::new(3, 7, 3, 2).unwrap();
        let all: Vec<_> = (0..50).map(|s| whole.step(s)).collect();
        for (s, expected) in all.iter().enumerate() {
            assert_eq!(&Order::new(3, 7, 3, 2).unwrap().step(s as u64), expected);
        }
        // Splitting a step into micro-batches does not change which examples it sees.
        let merged: Vec<u64> = all[9].iter().flat_map(|c| c.items.clone()).collect();
        assert_eq!(merged, Order::new(3, 7, 6, 1).unwrap().step(9)[0].items);
    }

    #[test]
    fn threads_that_share_the_steps_see_the_order_of_one() {
        let mut whole = Order::new(3, 7, 3, 2).unwrap();
        let expected: Vec<_> = (0..200).map(|s| whole.step(s)).collect();
        for threads in [1, 4] {
            let part = |first: u64| {
                let mut order = Order::new(3, 7, 3, 2).unwrap();
                let steps = (first..200).step_by(threads as usize);
                steps.map(|s| (s, order.step(s))).collect::<Vec<_>>()
            };
            let mut found: Vec<_> = std::thread::scope(|scope| {
                let workers: Vec<_> = (0..threads).map(|t| scope.spawn(move || part(t))).collect();
                workers
                    .into_iter()
                    .flat_map(|w| w.join().unwrap())
                    .collect()
            });
            found.sort_by_key(|(s, _)| *s);
            let found: Vec<_> = found.into_iter().map(|(_, ctx)| ctx).collect();
            assert_eq!(found, expected, "{threads} threads");
        }
    }

    #[test]
    fn repeats_are_counted_within_a_step() {
        let mut order = Order::new(0, 2, 3, 2).unwrap();
        let step = order.step(0);
        let mut pairs: Vec<(u64, u64)> = step
            .iter()
            .flat_map(|c| c.items.iter().copied().zip(c.repeats.iter().copied()))
            .collect();
        pairs.sort_unstable();
        assert_eq!(pairs, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
        assert!(Order::new(0, 0, 1, 1).is_err());
    }
}
