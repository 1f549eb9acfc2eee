//! The kernel distance between two sets of features.

use super::features::Features;
use diffusion_core::{Report, Result};
use diffusion_ops::rng::{Key, stream};
use rayon::prelude::*;

/// A kernel distance: the mean over subsets and how far they scatter.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct KernelDistance {
    /// Mean of the unbiased estimates; may be a little below 0.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
}

/// The kernel distance (Bińkowski et al. 2018, "Demystifying MMD GANs", section 4): the squared
/// maximum mean discrepancy under a cubic kernel, on `subsets` random subsets of `size` vectors.
///
/// ```text
/// k(x, y) = (xᵀy / d + 1)³
/// MMD²    = mean_{i≠j} k(xᵢ, xⱼ) + mean_{i≠j} k(yᵢ, yⱼ) − 2 mean_{i,j} k(xᵢ, yⱼ)
/// ```
///
/// Unlike the Fréchet distance its expectation does not depend on the number of images. Subsets are
/// drawn without replacement; a `size` above either set is lowered to the smaller one.
///
/// # Errors
/// `Config` when the vectors differ in length, for sets of fewer than two vectors, or no subset.
pub fn kernel_distance(
    x: &Features,
    y: &Features,
    subsets: usize,
    size: usize,
    seed: u64,
) -> Result<KernelDistance> {
    x.must_match(y)?;
    let size = size.min(x.len()).min(y.len());
    if size < 2 || subsets == 0 {
        return Err(Report::new(
            "kernel distance",
            format!("{subsets} subsets of {size} images"),
        )
        .expected("at least one subset of at least 2 images")
        .config());
    }
    let pick = |n: usize, subset: usize, set: u64| {
        // The first `size` places of a shuffled order.
        let key = Key::new(seed, stream::EVALUATION)
            .item(set)
            .step(subset as u64);
        let draws = key.uniform(size);
        let mut order: Vec<usize> = (0..n).collect();
        for (i, u) in draws.into_iter().enumerate() {
            let j = i + ((u * (n - i) as f64) as usize).min(n - i - 1);
            order.swap(i, j);
        }
        order.truncate(size);
        order
    };
    let estimates: Vec<f64> = (0..subsets)
        .into_par_iter()
        .map(|s| {
            let (a, b) = (pick(x.len(), s, 0), pick(y.len(), s, 1));
            mmd(x, &a, y, &b)
        })
        .collect();
    let n = subsets as f64;
    let mean = estimates.iter().sum::<f64>() / n;
    let variance = estimates
        .iter()
        .map(|e| (e - mean) * (e - mean))
        .sum::<f64>()
        / n;
    Ok(KernelDistance {
        mean,
        std: variance.sqrt(),
    })
}

fn kernel(x: &[f64], y: &[f64]) -> f64 {
    let dot: f64 = x.iter().zip(y).map(|(a, b)| a * b).sum();
    (dot / x.len() as f64 + 1.0).powi(3)
}

/// The unbiased estimate from these vectors of both sets.
fn mmd(x: &Features, a: &[usize], y: &Features, b: &[usize]) -> f64 {
    let within = |f: &Features, items: &[usize]| {
        let mut sum = 0.0;
        for (i, p) in items.iter().enumerate() {
            for q in &items[..i] {
                sum += kernel(f.row(*p), f.row(*q));
            }
        }
        2.0 * sum / (items.len() * (items.len() - 1)) as f64
    };
    let mut across = 0.0;
    for p in a {
        for q in b {
            across += kernel(x.row(*p), y.row(*q));
        }
    }
    within(x, a) + within(y, b) - 2.0 * across / (a.len() * b.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(seed: u64, n: usize, d: usize, shift: f64) -> Features {
        let values = Key::new(seed, 0).normal(n * d);
        Features::new(values.into_iter().map(|v| v + shift).collect(), d).unwrap()
    }

    #[test]
    fn whole_sets_by_hand() {
        // One dimension: k(x, y) = (x y + 1)³.
        let x = Features::new(vec![0.0, 1.0], 1).unwrap();
        let y = Features::new(vec![2.0, -1.0], 1).unwrap();
        // within x: k(0,1) = 1; within y: k(2,-1) = -1; across: 1 + 1 + 27 + 0 over 4.
        let d = kernel_distance(&x, &y, 3, 100, 0).unwrap();
        assert!(
            (d.mean - (1.0 - 1.0 - 2.0 * 29.0 / 4.0)).abs() < 1e-12,
            "{d:?}"
        );
        assert!(d.std < 1e-12);
    }

    #[test]
    fn unbiased_for_equal_laws_and_far_for_others() {
        let (x, y, z) = (
            normal(1, 600, 8, 0.0),
            normal(2, 600, 8, 0.0),
            normal(3, 600, 8, 1.0),
        );
        let same = kernel_distance(&x, &y, 40, 100, 5).unwrap();
        // The subsets overlap little: the mean scatters by about std / √(600 / 100).
        assert!(same.mean.abs() < 3.0 * same.std / 6f64.sqrt(), "{same:?}");
        let far = kernel_distance(&x, &z, 40, 100, 5).unwrap();
        // E k over N(m₁, I) and N(m₂, I) in one known case: the gap is well above the scatter.
        assert!(far.mean > 10.0 * same.std, "{far:?} {same:?}");
        assert_eq!(far, kernel_distance(&x, &z, 40, 100, 5).unwrap());
        assert_ne!(far, kernel_distance(&x, &z, 40, 100, 6).unwrap());
    }

    #[test]
    fn impossible_requests_are_refused() {
        let (x, y) = (normal(1, 5, 2, 0.0), normal(1, 5, 3, 0.0));
        assert!(kernel_distance(&x, &y, 1, 5, 0).is_err());
        assert!(kernel_distance(&x, &x, 0, 5, 0).is_err());
        assert!(kernel_distance(&x, &x.select(&[0]).unwrap(), 1, 5, 0).is_err());
    }
}
