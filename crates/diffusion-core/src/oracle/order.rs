//! Measuring the order of convergence of a sampler.

use crate::error::Result;

/// The slope of `log error` against `log 1/n`: the order of a method.
///
/// `error(n)` is the global error with `n` steps; the least-squares slope over all given `n` is
/// returned.
///
/// # Errors
/// Whatever `error` refuses.
pub fn measure(steps: &[usize], mut error: impl FnMut(usize) -> Result<f64>) -> Result<f64> {
    let points = steps
        .iter()
        .map(|n| Ok(((*n as f64).recip().ln(), error(*n)?.ln())))
        .collect::<Result<Vec<_>>>()?;
    let n = points.len() as f64;
    let (mx, my) = (
        points.iter().map(|p| p.0).sum::<f64>() / n,
        points.iter().map(|p| p.1).sum::<f64>() / n,
    );
    let covariance: f64 = points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    let variance: f64 = points.iter().map(|p| (p.0 - mx).powi(2)).sum();
    Ok(covariance / variance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovers_a_known_power() {
        let slope = measure(&[10, 20, 40], |n| Ok(3.0 * (n as f64).powf(-2.5))).unwrap();
        assert!((slope - 2.5).abs() < 1e-12);
    }
}
