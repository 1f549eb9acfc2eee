//! How faithful samples are, and how much of the data they cover.

use super::features::Features;
use diffusion_core::{Report, Result};
use rayon::prelude::*;

/// Precision and recall, density and coverage.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Manifold {
    /// The share of samples inside the neighbourhood of a real image.
    pub precision: f64,
    /// The share of real images inside the neighbourhood of a sample.
    pub recall: f64,
    /// How many neighbourhoods of real images a sample lies in, over `k`; may exceed 1.
    pub density: f64,
    /// The share of real images with a sample in their neighbourhood.
    pub coverage: f64,
}

/// The neighbours of precision and recall (Kynkäänniemi et al. 2019, section 3).
pub const PRECISION_NEIGHBOURS: usize = 3;
/// The neighbours of density and coverage (Naeem et al. 2020, section 4.2).
pub const COVERAGE_NEIGHBOURS: usize = 5;

/// Precision, recall (Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing
/// generative models", equation 2), density and coverage (Naeem et al. 2020, "Reliable fidelity and
/// diversity metrics for generative models", equations 3 and 4).
///
/// ```text
/// B_k(a)    = ball around a that reaches its k-th nearest neighbour in its own set
/// precision = share of samples s with s ∈ B₃(r) for some real r
/// recall    = share of real r with r ∈ B₃(s) for some sample s
/// density   = 1/(5 n) Σ_s |{r : s ∈ B₅(r)}|
/// coverage  = share of real r with s ∈ B₅(r) for some sample s
/// ```
///
/// # Errors
/// `Config` when the vectors differ in length, or a set is not larger than 5.
pub fn manifold(real: &Features, samples: &Features) -> Result<Manifold> {
    real.must_match(samples)?;
    let k = COVERAGE_NEIGHBOURS;
    for (what, set) in [("real images", real), ("samples", samples)] {
        if set.len() <= k {
            return Err(Report::new(what, set.len())
                .expected(format!("more than {k}"))
                .config());
        }
    }
    let around_real = real.nearest(real, k, true);
    let around_samples = samples.nearest(samples, PRECISION_NEIGHBOURS, true);
    let reach = |near: &[(f64, usize)], k: usize| near[k - 1].0;
    // For each sample: inside a ball of precision, and inside how many of density.
    let inside: Vec<(bool, usize)> = (0..samples.len())
        .into_par_iter()
        .map(|s| {
            let mut in_three = false;
            let mut in_five = 0;
            for (r, near) in real.rows().zip(&around_real) {
                let d = super::features::squared_distance(samples.row(s), r);
                in_three |= d <= reach(near, PRECISION_NEIGHBOURS);
                in_five += usize::from(d <= reach(near, k));
            }
            (in_three, in_five)
        })
        .collect();
    // For each real image: inside a sample's ball, and whether a sample is in its own.
    let reached: Vec<(bool, bool)> = (0..real.len())
        .into_par_iter()
        .map(|r| {
            let own = reach(&around_real[r], k);
            let mut recalled = false;
            let mut covered = false;
            for (s, near) in samples.rows().zip(&around_samples) {
                let d = super::features::squared_distance(real.row(r), s);
                recalled |= d <= reach(near, PRECISION_NEIGHBOURS);
                covered |= d <= own;
            }
            (recalled, covered)
        })
        .collect();
    let (n, m) = (samples.len() as f64, real.len() as f64);
    let share = |count: usize, of: f64| count as f64 / of;
    Ok(Manifold {
        precision: share(inside.iter().filter(|s| s.0).count(), n),
        recall: share(reached.iter().filter(|r| r.0).count(), m),
        density: inside.iter().map(|s| s.1).sum::<usize>() as f64 / (k as f64 * n),
        coverage: share(reached.iter().filter(|r| r.1).count(), m),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_ops::rng::Key;

    fn line(values: &[f64]) -> Features {
        Features::new(values.to_vec(), 1).unwrap()
    }

    #[test]
    fn points_on_a_line_by_hand() {
        // Real images at 0..=6, so that every ball is known: B₃(3) reaches 2, B₅(3) reaches 3.
        let real = line(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        // Samples: five far away from everything and each other, one at 3.
        let samples = line(&[3.0, 100.0, 200.0, 300.0, 400.0, 500.0]);
        let m = manifold(&real, &samples).unwrap();
        assert_eq!(m.precision, 1.0 / 6.0);
        // B₅ radii of 0..=6 are 5, 4, 3, 3, 3, 4, 5: the sample at 3 lies in all seven.
        assert!((m.density - 7.0 / 30.0).abs() < 1e-15);
        assert_eq!(m.coverage, 1.0);
        // B₃ of the sample at 3 reaches 297, which holds all real images.
        assert_eq!(m.recall, 1.0);
    }

    #[test]
    fn the_same_law_and_a_collapsed_one() {
        let normal = |seed: u64, n: usize, scale: f64| {
            let values = Key::new(seed, 0).normal(n * 2);
            Features::new(values.into_iter().map(|v| scale * v).collect(), 2).unwrap()
        };
        let real = normal(1, 400, 1.0);
        let same = manifold(&real, &normal(2, 400, 1.0)).unwrap();
        // E[coverage] = 1 − C(n-1, k)-like ratio ≈ 1 − 2⁻⁵ (Naeem et al., equation 10), density 1.
        assert!(
            (same.coverage - (1.0 - 0.5f64.powi(5))).abs() < 0.04,
            "{same:?}"
        );
        assert!((same.density - 1.0).abs() < 0.1, "{same:?}");
        assert!(same.precision > 0.85 && same.recall > 0.85, "{same:?}");
        let narrow = manifold(&real, &normal(3, 400, 0.1)).unwrap();
        assert!(narrow.precision > 0.99 && narrow.recall < 0.1, "{narrow:?}");
        assert!(narrow.coverage < 0.2, "{narrow:?}");
        let wide = manifold(&real, &normal(4, 400, 10.0)).unwrap();
        assert!(wide.precision < 0.2 && wide.recall > 0.9, "{wide:?}");
    }

    #[test]
    fn small_sets_are_refused() {
        let five = line(&[0.0, 1.0, 2.0, 3.0, 4.0]);
        let six = line(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert!(manifold(&five, &six).is_err() && manifold(&six, &five).is_err());
        assert!(manifold(&six, &six).is_ok());
    }
}
