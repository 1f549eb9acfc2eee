//! The cosine schedule of Nichol and Dhariwal 2021 (Improved DDPM, eq. 17).

use std::f64::consts::FRAC_PI_2;

/// The signal that a cosine schedule leaves at `u = t/T` in `[0, 1]`, not yet divided by `h(0)`.
///
/// ```text
/// h(u) = cos²( (u + m)/(1 + m) · π/2 ),   ᾱ = h(u)/h(0),   m = 0.008
/// ```
pub fn cosine_signal(u: f64, offset: f64) -> f64 {
    ((u + offset) / (1.0 + offset) * FRAC_PI_2).cos().powi(2)
}

/// Betas of the cosine schedule: `β_i = min(1 − ᾱ((i+1)/T)/ᾱ(i/T), 0.999)`.
///
/// The cap keeps the last steps from destroying the signal at once.
pub fn cosine_betas(steps: usize) -> Vec<f64> {
    const OFFSET: f64 = 0.008;
    const CAP: f64 = 0.999;
    let t = |i: usize| i as f64 / steps as f64;
    (0..steps)
        .map(|i| (1.0 - cosine_signal(t(i + 1), OFFSET) / cosine_signal(t(i), OFFSET)).min(CAP))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_bar_follows_the_cosine_until_the_cap() {
        let betas = cosine_betas(1000);
        let mut alpha_bar = 1.0;
        for (i, beta) in betas.iter().enumerate() {
            alpha_bar *= 1.0 - beta;
            let u = (i + 1) as f64 / 1000.0;
            if *beta < 0.999 {
                let exact = cosine_signal(u, 0.008) / cosine_signal(0.0, 0.008);
                assert!(
                    (alpha_bar / exact - 1.0).abs() < 1e-9,
                    "step {i}: {alpha_bar} {exact}"
                );
            }
        }
        // A well known port divides integers here and gets ᾱ(500) = 1.
        let middle: f64 = betas[..500].iter().map(|b| 1.0 - b).product();
        assert!((middle - 0.4938).abs() < 2e-3, "{middle}");
        assert_eq!(betas[999], 0.999);
    }
}
