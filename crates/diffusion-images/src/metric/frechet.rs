//! The Fréchet distance between two sets of features.

use super::features::Features;
use super::symmetric::{Symmetric, eigenvalues, factor};
use diffusion_core::{Report, Result};

/// Mean and covariance of a set of features.
#[derive(Clone, Debug)]
pub struct Moments {
    mean: Vec<f64>,
    covariance: Symmetric,
}

impl Moments {
    /// ```text
    /// μ = (1/n) Σᵢ xᵢ        Σ = 1/(n − 1) Σᵢ (xᵢ − μ)(xᵢ − μ)ᵀ
    /// ```
    ///
    /// # Errors
    /// `Config` for fewer than two vectors.
    pub fn of(features: &Features) -> Result<Self> {
        let (n, d) = (features.len(), features.size());
        if n < 2 {
            return Err(Report::new("features", format!("{n} image"))
                .expected("at least 2 images, for a covariance")
                .config());
        }
        let mut mean = vec![0.0; d];
        for row in features.rows() {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
        }
        mean.iter_mut().for_each(|m| *m /= n as f64);
        let mut covariance = Symmetric::zeros(d);
        let mut centred = vec![0.0; d];
        for row in features.rows() {
            for ((c, x), m) in centred.iter_mut().zip(row).zip(&mean) {
                *c = x - m;
            }
            covariance.add_outer(&centred, 1.0 / (n as f64 - 1.0));
        }
        Ok(Self { mean, covariance })
    }
}

/// The Fréchet distance between the Gaussians of these moments (Heusel et al. 2017, "GANs trained by
/// a two time-scale update rule converge to a local Nash equilibrium", equation 6; Dowson and Landau
/// 1982).
///
/// ```text
/// d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 Σᵢ √λᵢ,    λᵢ the eigenvalues of Lᵀ Σ₂ L,  L Lᵀ = Σ₁
/// ```
///
/// where the λᵢ are those of Σ₁ Σ₂. With the features of an Inception network this is called FID. Its
/// estimate from few images is biased upwards, so that only figures from the same numbers of images
/// compare.
///
/// # Errors
/// `Config` when the vectors differ in length.
pub fn frechet(a: &Moments, b: &Moments) -> Result<f64> {
    if a.mean.len() != b.mean.len() {
        return Err(
            Report::new("features", format!("{} numbers each", b.mean.len()))
                .expected(format!("{}, as in the other set", a.mean.len()))
                .config(),
        );
    }
    let gap: f64 = a
        .mean
        .iter()
        .zip(&b.mean)
        .map(|(x, y)| (x - y) * (x - y))
        .sum();
    let columns = factor(&a.covariance);
    let inner = b.covariance.between(&columns);
    let shared: f64 = eigenvalues(inner).iter().map(|v| v.max(0.0).sqrt()).sum();
    Ok((gap + a.covariance.trace() + b.covariance.trace() - 2.0 * shared).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_ops::rng::Key;

    fn normal(seed: u64, n: usize, d: usize) -> Vec<f64> {
        Key::new(seed, 0).normal(n * d)
    }

    #[test]
    fn a_set_against_itself_is_at_distance_zero() {
        for d in [1, 5, 64] {
            let x = Features::new(normal(1, 300, d), d).unwrap();
            let moments = Moments::of(&x).unwrap();
            let distance = frechet(&moments, &moments).unwrap();
            assert!(distance <= 1e-6, "{distance:e}");
            // Rank-deficient covariances, too.
            let few = Moments::of(&x.select(&[0, 1, 2]).unwrap()).unwrap();
            assert!(frechet(&few, &few).unwrap() <= 1e-6);
        }
    }

    #[test]
    fn one_dimension_has_a_closed_form() {
        // (μ₁ − μ₂)² + (σ₁ − σ₂)²
        let a = Features::new(vec![0.0, 2.0, 4.0], 1).unwrap();
        let b = Features::new(vec![7.0, 8.0, 9.0], 1).unwrap();
        let d = frechet(&Moments::of(&a).unwrap(), &Moments::of(&b).unwrap()).unwrap();
        assert!((d - (36.0 + 1.0)).abs() < 1e-12, "{d}");
    }

    #[test]
    fn commuting_and_rotated_covariances() {
        // B = A R D with a rotation of the axes: the distance is that of the axes, by hand.
        let moments = |mean: [f64; 2], s: [[f64; 2]; 2]| Moments {
            mean: mean.to_vec(),
            covariance: Symmetric::from_fn(2, |i, j| s[i][j]),
        };
        let a = moments([0.0, 0.0], [[4.0, 0.0], [0.0, 1.0]]);
        let b = moments([1.0, 2.0], [[9.0, 0.0], [0.0, 16.0]]);
        let d = frechet(&a, &b).unwrap();
        assert!((d - (5.0 + 1.0 + 9.0)).abs() < 1e-12, "{d}");
        // Turned by 45 degrees: tr √(Σ₁^½ Σ₂ Σ₁^½) = √(tr M + 2 √det M) for 2×2 matrices.
        let c = moments([0.0, 0.0], [[12.5, -3.5], [-3.5, 12.5]]);
        let (trace, det) = (4.0 * 12.5 + 12.5, 4.0 * (12.5 * 12.5 - 3.5 * 3.5));
        let shared = f64::sqrt(trace + 2.0 * f64::sqrt(det));
        let expected = 5.0 + 25.0 - 2.0 * shared;
        let d = frechet(&a, &c).unwrap();
        assert!((d - expected).abs() < 1e-12, "{d} {expected}");
        assert!((frechet(&c, &a).unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn moving_and_scaling_a_set_by_hand() {
        let x = normal(3, 500, 6);
        let moved: Vec<f64> = x.iter().map(|v| 2.0 * v + 0.5).collect();
        let (a, b) = (
            Moments::of(&Features::new(x, 6).unwrap()).unwrap(),
            Moments::of(&Features::new(moved, 6).unwrap()).unwrap(),
        );
        // √(Σ · 4Σ) = 2Σ, so d² = ‖μ + 0.5‖² + tr Σ.
        let gap: f64 = a.mean.iter().map(|m| (m + 0.5) * (m + 0.5)).sum();
        let trace: f64 = (0..6).map(|i| a.covariance.at(i, i)).sum();
        let d = frechet(&a, &b).unwrap();
        assert!((d - gap - trace).abs() < 1e-9, "{d} {}", gap + trace);
    }

    #[test]
    fn too_few_images_and_other_features_are_refused() {
        let one = Features::new(vec![1.0, 2.0], 2).unwrap();
        assert!(
            Moments::of(&one)
                .unwrap_err()
                .to_string()
                .contains("at least 2")
        );
        let a = Moments::of(&Features::new(vec![1.0; 4], 2).unwrap()).unwrap();
        let b = Moments::of(&Features::new(vec![1.0; 4], 1).unwrap()).unwrap();
        assert!(frechet(&a, &b).is_err());
    }
}
