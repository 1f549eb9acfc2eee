//! Betas on a logistic curve (the schedule of GeoDiff, Xu et al. 2022).

use super::linear::linspace;

/// Sigmoid betas.
///
/// ```text
/// β_i = β_start + (β_end − β_start) / (1 + e^{−z_i}),   z_i from −6 to 6 in T even steps
/// ```
pub fn sigmoid_betas(start: f64, end: f64, steps: usize) -> Vec<f64> {
    linspace(-6.0, 6.0, steps)
        .into_iter()
        .map(|z| start + (end - start) / (1.0 + (-z).exp()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symmetric_about_the_middle() {
        let betas = sigmoid_betas(1e-4, 0.02, 1001);
        assert!((betas[500] - 0.5 * (1e-4 + 0.02)).abs() < 1e-15);
        for i in 0..=500 {
            assert!((betas[i] + betas[1000 - i] - 0.0201).abs() < 1e-15);
        }
    }
}
