//! Counter-based random numbers: a value is a pure function of where it stands.
//!
//! ```text
//! block(seed, stream, item, step) = ChaCha8(key = seed ‖ stream ‖ item ‖ step)
//! ```
//!
//! There is no state to save and none to share: item `i` of a batch sees the same numbers whatever
//! the batch size, the number of threads, or the point from which a run was resumed. The transform
//! to normal values uses the `libm` crate, not the platform's, so that the numbers are the same
//! bytes on every machine.

use crate::normal::{self, unit};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// Where a block of random numbers stands.
///
/// Two different keys give independent streams; the same key always gives the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The user's seed.
    pub seed: u64,
    /// What the numbers are for (initialisation, data order, sampling noise, ...): see [`stream`].
    pub stream: u64,
    /// Which element of the data set or of the set of samples.
    pub item: u64,
    /// Which draw for that element.
    pub step: u64,
}

/// Names of the streams that the workspace uses. Changing one changes every later number.
pub mod stream {
    /// Network initialisation.
    pub const INIT: u64 = 1;
    /// Order of the training examples.
    pub const ORDER: u64 = 2;
    /// Noise that is added to training examples.
    pub const TRAIN_NOISE: u64 = 3;
    /// Diffusion times drawn in training.
    pub const TRAIN_TIME: u64 = 4;
    /// Dropout of activations and of conditions.
    pub const DROPOUT: u64 = 5;
    /// Noise of a sampler, the initial sample included.
    pub const SAMPLE: u64 = 6;
    /// Data augmentation.
    pub const AUGMENT: u64 = 7;
    /// Splits of a data set.
    pub const SPLIT: u64 = 8;
    /// Brownian paths.
    pub const BROWNIAN: u64 = 9;
    /// Subsets and resampling of evaluations.
    pub const EVALUATION: u64 = 10;
    /// Everything that only tests draw.
    pub const TEST: u64 = 1000;
}

impl Key {
    /// The key of the first draw of the first item.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self {
            seed,
            stream,
            item: 0,
            step: 0,
        }
    }

    /// The same place for another item.
    pub fn item(self, item: u64) -> Self {
        Self { item, ..self }
    }

    /// The same place for another draw.
    pub fn step(self, step: u64) -> Self {
        Self { step, ..self }
    }

    fn rng(self) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        for (slot, word) in
            key.chunks_exact_mut(8)
                .zip([self.seed, self.stream, self.item, self.step])
        {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }

    /// `n` raw 64-bit words.
    pub fn words(self, n: usize) -> Vec<u64> {
        let mut rng = self.rng();
        (0..n).map(|_| rng.next_u64()).collect()
    }

    /// One uniform integer in `0..bound` (`bound > 0`), without modulo bias (Lemire 2019).
    pub fn below(self, bound: u64) -> u64 {
        let mut rng = self.rng();
        below(&mut rng, bound)
    }

    /// `n` uniform values in `[0, 1)` with 53 random bits each.
    pub fn uniform(self, n: usize) -> Vec<f64> {
        let mut rng = self.rng();
        (0..n).map(|_| unit(rng.next_u64())).collect()
    }

    /// `n` independent standard normal values (Box and Muller 1958).
    ///
    /// ```text
    /// r = √(−2 ln(1 − u₁)),  (z₁, z₂) = (r cos 2πu₂, r sin 2πu₂)
    /// ```
    pub fn normal(self, n: usize) -> Vec<f64> {
        let mut out = vec![0.0; n];
        self.fill_normal(&mut out);
        out
    }

    /// [`Key::normal`] into a slice.
    pub fn fill_normal(self, out: &mut [f64]) {
        normal::fill(self.rng(), out, |z| z);
    }

    /// [`Key::normal`] into a slice of `f32`: the same values, each rounded once.
    pub fn fill_normal_f32(self, out: &mut [f32]) {
        normal::fill(self.rng(), out, |z| z as f32);
    }

    /// A uniformly random permutation of `0..n` (Fisher and Yates).
    pub fn permutation(self, n: usize) -> Vec<usize> {
        let mut rng = self.rng();
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, below(&mut rng, i as u64 + 1) as usize);
        }
        order
    }
}

fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let bound = bound.max(1);
    // Reject the low words that would make some results more likely than others.
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let wide = u128::from(rng.next_u64()) * u128::from(bound);
        if wide as u64 >= threshold {
            return (wide >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_values_never_change() {
        // A change here changes every model and every sample: it needs a new major version.
        let key = Key {
            seed: 1,
            stream: 2,
            item: 3,
            step: 4,
        };
        let words = key.words(2);
        let normal = key.normal(3);
        // A thousand normal values, folded into one number by FNV-1a over their bits.
        let folded = key
            .normal(1000)
            .iter()
            .flat_map(|z| z.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        let golden = include_str!("rng_golden.txt");
        let ours = format!(
            "{:016x} {:016x}\n{:016x} {:016x} {:016x}\n{folded:016x}\n",
            words[0],
            words[1],
            normal[0].to_bits(),
            normal[1].to_bits(),
            normal[2].to_bits()
        );
        assert_eq!(ours, golden);
    }

    #[test]
    fn a_longer_draw_begins_with_the_shorter_one() {
        let key = Key::new(7, stream::TEST);
        assert_eq!(key.normal(1001)[..1000], key.normal(1000)[..]);
        assert_ne!(key.normal(4), key.item(1).normal(4));
        assert_ne!(key.normal(4), key.step(1).normal(4));
    }

    #[test]
    fn normal_moments_and_tails() {
        let z = Key::new(11, stream::TEST).normal(200_000);
        let n = z.len() as f64;
        let moment = |k: i32| z.iter().map(|v| v.powi(k)).sum::<f64>() / n;
        // Standard errors of the first four moments of a normal law: √(1, 2, 15, 96)/√n.
        for (k, expected, var) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let error: f64 = moment(k) - expected;
            assert!(
                error.abs() < 4.0 * f64::sqrt(var / n),
                "moment {k} off by {error}"
            );
        }
        let beyond_two = z.iter().filter(|v| v.abs() > 2.0).count() as f64 / n;
        assert!((beyond_two - 0.0455).abs() < 0.002);
    }

    #[test]
    fn permutations_are_permutations_and_unbiased() {
        let mut counts = [0usize; 6];
        for item in 0..6000 {
            let p = Key::new(3, stream::TEST).item(item).permutation(3);
            let mut sorted = p.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2]);
            counts[p[0] * 2 + usize::from(p[1] > p[2])] += 1;
        }
        for c in counts {
            assert!(
                (c as f64 - 1000.0).abs() < 4.0 * f64::sqrt(1000.0 * 5.0 / 6.0),
                "{counts:?}"
            );
        }
    }

    #[test]
    fn below_stays_below() {
        for bound in [1, 2, 3, 10, u64::MAX] {
            for item in 0..100 {
                assert!(Key::new(0, stream::TEST).item(item).below(bound) < bound);
            }
        }
    }
}
