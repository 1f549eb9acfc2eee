//! How far a measured figure could be off.

use super::memorise::quantile;
use diffusion_core::{Report, Result};
use diffusion_ops::rng::{Key, stream};
use rayon::prelude::*;

/// A figure with a 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Figure {
    /// The figure.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// The share `hits / n` with Wilson's interval (1927), which stays inside `[0, 1]` and is honest for
/// shares near its ends.
///
/// ```text
/// (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),    z = 1.96
/// ```
///
/// # Errors
/// `Config` without trials, or for more hits than trials.
pub fn share(hits: usize, n: usize) -> Result<Figure> {
    if n == 0 || hits > n {
        return Err(Report::new("share", format!("{hits} of {n}"))
            .expected("at most all of at least one")
            .config());
    }
    const Z: f64 = 1.959_963_984_540_054;
    let (n, value) = (n as f64, hits as f64 / n as f64);
    let centre = value + Z * Z / (2.0 * n);
    let half = Z * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt();
    let below = 1.0 + Z * Z / n;
    Ok(Figure {
        value,
        low: ((centre - half) / below).max(0.0),
        high: ((centre + half) / below).min(1.0),
    })
}

/// A statistic of `n` items with its percentile bootstrap interval (Efron 1979): the 2.5 % and 97.5 %
/// quantiles of the statistic over `rounds` draws of `n` items with replacement.
///
/// `statistic` gets indices below `n`; the value itself is that of all items in order.
///
/// # Errors
/// `Config` without items or with fewer than 20 rounds; those of the statistic.
pub fn bootstrap(
    n: usize,
    rounds: usize,
    seed: u64,
    statistic: impl Fn(&[usize]) -> Result<f64> + Sync,
) -> Result<Figure> {
    if n == 0 || rounds < 20 {
        return Err(
            Report::new("bootstrap", format!("{n} items, {rounds} rounds"))
                .expected("at least one item and 20 rounds")
                .config(),
        );
    }
    let all: Vec<usize> = (0..n).collect();
    let mut values = (0..rounds)
        .into_par_iter()
        .map(|round| {
            let key = Key::new(seed, stream::EVALUATION)
                .item(u64::MAX)
                .step(round as u64);
            let items: Vec<usize> = key
                .uniform(n)
                .into_iter()
                .map(|u| ((u * n as f64) as usize).min(n - 1))
                .collect();
            statistic(&items)
        })
        .collect::<Result<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    let value = statistic(&all)?;
    // Repeated items bias some statistics (a Fréchet distance upwards); the spread is what is asked for.
    let centre = value - values.iter().sum::<f64>() / rounds as f64;
    Ok(Figure {
        value,
        low: centre + quantile(&values, 0.025),
        high: centre + quantile(&values, 0.975),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_against_published_values() {
        // 81 of 263 (Newcombe 1998, table I): 0.2553 to 0.3662; 0 of 20: 0 to 0.1611.
        let f = share(81, 263).unwrap();
        assert!(
            (f.low - 0.2553).abs() < 5e-5 && (f.high - 0.3662).abs() < 5e-5,
            "{f:?}"
        );
        let f = share(0, 20).unwrap();
        assert!(f.low == 0.0 && (f.high - 0.1611).abs() < 5e-5, "{f:?}");
        assert!(share(1, 0).is_err() && share(3, 2).is_err());
    }

    #[test]
    fn the_interval_of_a_mean_is_that_of_its_standard_error() {
        let x: Vec<f64> = Key::new(4, 0).normal(400);
        let mean =
            |items: &[usize]| Ok(items.iter().map(|i| x[*i]).sum::<f64>() / items.len() as f64);
        let f = bootstrap(x.len(), 1000, 7, mean).unwrap();
        let variance = x.iter().map(|v| (v - f.value) * (v - f.value)).sum::<f64>() / 400.0;
        let half = 1.96 * (variance / 400.0).sqrt();
        assert!(
            ((f.high - f.low) / (2.0 * half) - 1.0).abs() < 0.1,
            "{f:?} {half}"
        );
        assert!(f.low < f.value && f.value < f.high);
        assert_eq!(f, bootstrap(x.len(), 1000, 7, mean).unwrap());
        assert!(bootstrap(0, 100, 0, mean).is_err() && bootstrap(4, 2, 0, mean).is_err());
    }
}
