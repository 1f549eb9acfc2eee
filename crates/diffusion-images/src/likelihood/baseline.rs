//! What a density model of images has to beat, in bits per dimension.
//!
//! ```text
//! uniform      log₂ K
//! histogram    −1/D Σ_d log₂ (n_d(k_d) + 1)/(n + K)
//! Gaussian     E_u[ −log₂ N(k + u; μ, C) ]/D,   C = Cov(k) + I/12,   u ~ U(0, 1)^D
//! ```
//!
//! `n_d(k)` counts the training images whose value `d` has the level `k`. The Gaussian is fitted to
//! dequantised levels, whose noise adds `1/12` to each variance; its expectation over `u` is exact. As
//! of every density on dequantised levels, what it gives is a bound (Theis et al. 2016).

use candle_core::{DType, Tensor};
use diffusion_core::likelihood::bits_per_dim;
use diffusion_core::{Report, Result};
use serde::Serialize;

/// Dimensions beyond which the covariance is not fitted: its factor takes `D³/3` multiplications.
pub const MOST_DIMENSIONS: usize = 1024;

/// Variance of the uniform noise of a bin of width 1.
const NOISE: f64 = 1.0 / 12.0;

/// The baselines of a data set, bits per dimension of the held-out images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Baselines {
    /// Every level as probable as any other.
    pub uniform: f64,
    /// Independent values with the frequencies of the training images, one added to each count.
    pub histogram: f64,
    /// A Gaussian with a full covariance; `None` above [`MOST_DIMENSIONS`].
    pub gaussian: Option<f64>,
}

/// Fits the baselines to the levels of training images and measures held-out ones.
///
/// # Shapes
/// `train` and `test` `[N, …]`, whole numbers below `levels`.
///
/// # Errors
/// `Input` when a level is not below `levels` or the shapes of the images differ.
pub fn baselines(train: &Tensor, test: &Tensor, levels: usize) -> Result<Baselines> {
    let (train, test) = (rows(train, levels)?, rows(test, levels)?);
    let dims = train.first().map_or(0, Vec::len);
    if dims == 0 || test.is_empty() || test.iter().any(|row| row.len() != dims) {
        return Err(Report::new("held-out images", "of another size")
            .expected(format!("{dims} values, as the training images have"))
            .input());
    }
    Ok(Baselines {
        uniform: (levels as f64).log2(),
        histogram: histogram(&train, &test, levels),
        gaussian: (dims <= MOST_DIMENSIONS).then(|| gaussian(&train, &test)),
    })
}

fn rows(k: &Tensor, levels: usize) -> Result<Vec<Vec<f64>>> {
    let rows = k.flatten_from(1)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let outside = |v: &&f64| !(0.0..levels as f64).contains(*v) || v.fract() != 0.0;
    match rows.iter().flatten().find(outside) {
        Some(bad) => Err(Report::new("grey level", bad)
            .expected(format!("a whole number from 0 to {}", levels - 1))
            .input()),
        None => Ok(rows),
    }
}

fn histogram(train: &[Vec<f64>], test: &[Vec<f64>], levels: usize) -> f64 {
    let dims = train[0].len();
    let mut counts = vec![1.0f64; dims * levels];
    for row in train {
        for (d, k) in row.iter().enumerate() {
            counts[d * levels + *k as usize] += 1.0;
        }
    }
    let total = (train.len() + levels) as f64;
    let bits = |row: &Vec<f64>| -> f64 {
        let each = row.iter().enumerate();
        each.map(|(d, k)| -(counts[d * levels + *k as usize] / total).log2())
            .sum()
    };
    test.iter().map(bits).sum::<f64>() / (test.len() * dims) as f64
}

fn gaussian(train: &[Vec<f64>], test: &[Vec<f64>]) -> f64 {
    let (n, dims) = (train.len() as f64, train[0].len());
    let mut mean = vec![0.0; dims];
    for row in train {
        row.iter().zip(&mut mean).for_each(|(k, m)| *m += k / n);
    }
    let mut factor = vec![vec![0.0; dims]; dims];
    for row in train {
        let centred: Vec<f64> = row.iter().zip(&mean).map(|(k, m)| k - m).collect();
        for (i, line) in factor.iter_mut().enumerate() {
            let scale = centred[i] / n;
            if scale != 0.0 {
                let upto = line.iter_mut().zip(&centred).take(i + 1);
                upto.for_each(|(c, x)| *c += scale * x);
            }
        }
    }
    for (i, line) in factor.iter_mut().enumerate() {
        line[i] += NOISE;
    }
    let log_det = cholesky(&mut factor);
    // tr C⁻¹ = ‖L⁻¹‖², column by column.
    let spread: f64 = (0..dims)
        .map(|i| {
            let mut unit = vec![0.0; dims];
            unit[i] = 1.0;
            squared_norm(solved(&factor, unit))
        })
        .sum();
    let quadratic = |row: &Vec<f64>| {
        let middle = row.iter().zip(&mean).map(|(k, m)| k + 0.5 - (m + 0.5));
        squared_norm(solved(&factor, middle.collect()))
    };
    let average = test.iter().map(quadratic).sum::<f64>() / test.len() as f64;
    let constant = dims as f64 * std::f64::consts::TAU.ln() + log_det;
    bits_per_dim(0.5 * (constant + average + NOISE * spread), dims)
}

/// Replaces the lower half of `C` by `L` with `L Lᵀ = C`; the answer is `ln det C`.
fn cholesky(c: &mut [Vec<f64>]) -> f64 {
    let mut log_det = 0.0;
    for i in 0..c.len() {
        let (above, rest) = c.split_at_mut(i);
        let row = &mut rest[0];
        for (j, known) in above.iter().enumerate() {
            let so_far: f64 = row[..j].iter().zip(&known[..j]).map(|(a, b)| a * b).sum();
            row[j] = (row[j] - so_far) / known[j];
        }
        let own: f64 = row[..i].iter().map(|a| a * a).sum();
        // Positive but for rounding: the noise alone adds 1/12 to every eigenvalue.
        row[i] = (row[i] - own).max(1e-12).sqrt();
        log_det += 2.0 * row[i].ln();
    }
    log_det
}

/// `L⁻¹ b`.
fn solved(l: &[Vec<f64>], mut b: Vec<f64>) -> Vec<f64> {
    for (i, row) in l.iter().enumerate() {
        let so_far: f64 = row[..i].iter().zip(&b[..i]).map(|(a, x)| a * x).sum();
        b[i] = (b[i] - so_far) / row[i];
    }
    b
}

fn squared_norm(x: Vec<f64>) -> f64 {
    x.iter().map(|x| x * x).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use diffusion_core::likelihood::gaussian::log_density;
    use diffusion_ops::rng::{Key, stream};

    fn tensor(rows: &[[f64; 2]]) -> Tensor {
        Tensor::from_vec(rows.concat(), (rows.len(), 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn counts_get_one_more_each() {
        let train = tensor(&[[0.0, 2.0], [0.0, 1.0]]);
        let ours = baselines(&train, &tensor(&[[0.0, 2.0]]), 3).unwrap();
        // (2 + 1)/5 for the first value, (1 + 1)/5 for the second.
        let exact = -0.5 * ((3.0f64 / 5.0).log2() + (2.0f64 / 5.0).log2());
        assert!((ours.histogram - exact).abs() < 1e-12);
        assert_eq!(ours.uniform, 3f64.log2());
        // On the images it was fitted to, without smoothing, it is an entropy: never above uniform.
        assert!(ours.histogram < ours.uniform);
    }

    /// The expectation over the noise is that of many draws of it.
    #[test]
    fn the_gaussian_is_the_mean_over_dequantised_draws() {
        let train: Vec<[f64; 2]> = (0..40)
            .map(|i| [f64::from(i % 4), f64::from((i * i) % 4)])
            .collect();
        let test = tensor(&[[1.0, 3.0]]);
        let ours = baselines(&tensor(&train), &test, 4)
            .unwrap()
            .gaussian
            .unwrap();
        let n = train.len() as f64;
        let mean = |d: usize| train.iter().map(|r| r[d]).sum::<f64>() / n;
        let cov = |a: usize, b: usize| {
            let sum: f64 = train
                .iter()
                .map(|r| (r[a] - mean(a)) * (r[b] - mean(b)))
                .sum();
            sum / n + if a == b { NOISE } else { 0.0 }
        };
        // N(x, y) = N(x) N(y | x).
        let slope = cov(0, 1) / cov(0, 0);
        let left = cov(1, 1) - slope * cov(0, 1);
        let draws = 40_000;
        let u = Key::new(3, stream::TEST).uniform(2 * draws);
        let normal = |x: f64, m: f64, v: f64| {
            let t = |v: f64| Tensor::new(&[v], &Device::Cpu).unwrap();
            log_density(&t(x), &t(m), &t(v.ln()))
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()[0]
        };
        let check = normal(0.4, 0.1, 0.3);
        let fast = |x: f64, m: f64, v: f64| {
            -0.5 * ((x - m).powi(2) / v + (std::f64::consts::TAU * v).ln())
        };
        assert!((check - fast(0.4, 0.1, 0.3)).abs() < 1e-12);
        let values: Vec<f64> = u
            .chunks(2)
            .map(|u| {
                let (x, y) = (1.0 + u[0] - 0.5, 3.0 + u[1] - 0.5);
                let log =
                    fast(x, mean(0), cov(0, 0)) + fast(y, mean(1) + slope * (x - mean(0)), left);
                bits_per_dim(-log, 2)
            })
            .collect();
        let m = values.iter().sum::<f64>() / draws as f64;
        let v = values.iter().map(|x| (x - m).powi(2)).sum::<f64>() / draws as f64;
        let error = 4.0 * (v / draws as f64).sqrt();
        assert!((m - ours).abs() < error, "{m} {ours} ± {error}");
    }

    #[test]
    fn refuses_what_is_no_level() {
        let good = tensor(&[[0.0, 1.0]]);
        assert!(baselines(&good, &tensor(&[[0.0, 2.0]]), 2).is_err());
        assert!(baselines(&tensor(&[[0.5, 1.0]]), &good, 2).is_err());
    }
}
