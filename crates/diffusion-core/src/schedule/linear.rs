//! Betas that are linear in the step, or whose square roots are.

/// Linear betas, both ends included (Ho et al. 2020, section 4).
///
/// ```text
/// β_i = β_start + i/(T−1) · (β_end − β_start),   i = 0..T−1
/// ```
pub fn linear_betas(start: f64, end: f64, steps: usize) -> Vec<f64> {
    linspace(start, end, steps)
}

/// Betas whose square roots are linear (Rombach et al. 2022, the latent diffusion schedule).
///
/// ```text
/// β_i = (√β_start + i/(T−1) · (√β_end − √β_start))²
/// ```
pub fn scaled_linear_betas(start: f64, end: f64, steps: usize) -> Vec<f64> {
    linspace(start.sqrt(), end.sqrt(), steps)
        .into_iter()
        .map(|b| b * b)
        .collect()
}

/// `n` evenly spaced values from `start` to `end`, both included and exact.
pub fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = if n > 1 {
        (end - start) / (n - 1) as f64
    } else {
        0.0
    };
    let mut values: Vec<f64> = (0..n).map(|i| start + i as f64 * step).collect();
    if let (2.., Some(last)) = (n, values.last_mut()) {
        *last = end;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ddpm_schedule_ends_where_the_paper_says() {
        let alpha_bar: f64 = linear_betas(1e-4, 0.02, 1000)
            .iter()
            .map(|b| 1.0 - b)
            .product();
        assert!((alpha_bar - 4.04e-5).abs() < 0.005e-5, "{alpha_bar}");
        assert!((alpha_bar / (1.0 - alpha_bar)).ln() + 10.1 < 0.02);
    }

    #[test]
    fn ends_are_included() {
        let betas = scaled_linear_betas(0.00085, 0.012, 1000);
        assert!((betas[0] - 0.00085).abs() < 1e-15 && (betas[999] - 0.012).abs() < 1e-15);
        assert_eq!(linspace(3.0, 9.0, 1), [3.0]);
    }
}
