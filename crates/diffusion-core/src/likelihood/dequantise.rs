//! From densities to probabilities of grey levels (Theis et al. 2016; Ho et al. 2019, Flow++).
//!
//! ```text
//! log P(k) ≥ E_{u ~ q(u|k)} [ log p(k + u) − log q(u|k) ],   u ∈ [0, 1)^D
//! ```
//!
//! With `q` uniform the second term vanishes; a learned `q` closes the gap.

use crate::error::Result;
use crate::noise::Noise;
use candle_core::Tensor;

/// Noise that fills the bins of grey levels.
pub trait Dequantiser {
    /// `u` in `(0, 1)`, `[B, …]`, and `log q(u | k)` in nats, `[B]`, for levels `k` `[B, …]`.
    ///
    /// # Errors
    /// Whatever the model or the noise refuses.
    fn draw(&self, k: &Tensor, noise: &mut dyn Noise) -> Result<(Tensor, Tensor)>;
}

impl<F: Fn(&Tensor, &mut dyn Noise) -> Result<(Tensor, Tensor)>> Dequantiser for F {
    fn draw(&self, k: &Tensor, noise: &mut dyn Noise) -> Result<(Tensor, Tensor)> {
        self(k, noise)
    }
}

/// Uniform noise: `u ~ U(0, 1)`, `log q = 0`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uniform;

impl Dequantiser for Uniform {
    fn draw(&self, k: &Tensor, noise: &mut dyn Noise) -> Result<(Tensor, Tensor)> {
        // The distribution function of a normal draw is uniform.
        let u = noise
            .normal(k)?
            .affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?
            .erf()?
            .affine(0.5, 0.5)?;
        Ok((u, k.flatten_from(1)?.sum(1)?.zeros_like()?))
    }
}

/// Levels with noise on the scale of the models, `2 (k + u)/K − 1`, `[B, …]`.
///
/// # Errors
/// When shapes differ.
pub fn to_unit(k: &Tensor, u: &Tensor, levels: usize) -> Result<Tensor> {
    Ok((k + u)?.affine(2.0 / levels as f64, -1.0)?)
}

/// Bits a dimension of a level, given those of the density on a scale where a bin has this width.
///
/// ```text
/// bits(level) = bits(density) − log₂ width        (width 2/256: 7 more bits)
/// ```
pub fn level_bits(density_bits: f64, width: f64) -> f64 {
    density_bits - width.log2()
}

/// The bound of `log P(k)` in nats, `[B]`, from `draws` draws of the noise: their mean, or with
/// `importance` the logarithm of their mean weight, which is never looser.
///
/// ```text
/// mean:        1/m Σ_i [ log p(x_i) + D ln(2/K) − log q(u_i|k) ]
/// importance:  log 1/m Σ_i exp[ log p(x_i) + D ln(2/K) − log q(u_i|k) ]
/// ```
///
/// # Shapes
/// `k` `[B, …]` whole numbers below `levels`; `log_density` takes `x` `[B, …]` on the scale
/// `[−1, 1]` to `log p(x)`, `[B]`, in nats.
///
/// # Errors
/// Whatever the density, the dequantiser or the noise refuses.
pub fn log_prob_of_levels(
    k: &Tensor,
    levels: usize,
    dequantiser: &dyn Dequantiser,
    log_density: &dyn Fn(&Tensor) -> Result<Tensor>,
    (draws, importance): (usize, bool),
    noise: &mut dyn Noise,
) -> Result<Tensor> {
    let dims = k.elem_count() / k.dim(0)?.max(1);
    let jacobian = dims as f64 * (2.0 / levels as f64).ln();
    let logs = (0..draws.max(1))
        .map(|_| {
            let (u, log_q) = dequantiser.draw(k, noise)?;
            Ok(((log_density(&to_unit(k, &u, levels)?)? - log_q)? + jacobian)?)
        })
        .collect::<Result<Vec<_>>>()?;
    let logs = Tensor::stack(&logs, 0)?;
    if importance {
        super::importance::log_mean_exp(&logs)
    } else {
        Ok(logs.mean(0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::schedule::Point;
    use candle_core::{DType, Device};

    const N: usize = 2000;

    #[test]
    fn uniform_noise_fills_the_bin() {
        let k = Tensor::zeros((1, N), DType::F64, &Device::Cpu).unwrap();
        let (u, log_q) = Uniform.draw(&k, &mut CounterNoise::new(1, 0..1)).unwrap();
        let u = u.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert!(u.iter().all(|u| (0.0..=1.0).contains(u)));
        let n = N as f64;
        let mean = u.iter().sum::<f64>() / n;
        let square = u.iter().map(|u| u * u).sum::<f64>() / n;
        assert!((mean - 0.5).abs() < 4.0 * (1.0 / 12.0 / n).sqrt());
        assert!((square - 1.0 / 3.0).abs() < 4.0 * (4.0 / 45.0 / n).sqrt());
        assert_eq!(log_q.to_vec1::<f64>().unwrap(), [0.0]);
    }

    /// The bound stays below the mass of the bin, importance weights bring it closer, and the
    /// posterior of the noise closes the gap with a single draw.
    #[test]
    fn bounds_the_mass_of_a_bin() {
        let levels = 4;
        let oracle = Gaussian::new(vec![0.1], vec![0.25]);
        let density = |x: &Tensor| oracle.log_density(x, &Point::data(0.0));
        let k = Tensor::full(2.0, (N, 1), &Device::Cpu).unwrap();
        let edge = |k: f64| (2.0 * k / 4.0 - 1.0 - 0.1) / 0.25;
        let cdf = |z: f64| {
            let z = Tensor::new(z / 2f64.sqrt(), &Device::Cpu).unwrap();
            0.5 * (1.0 + z.erf().unwrap().to_scalar::<f64>().unwrap())
        };
        let exact = (cdf(edge(3.0)) - cdf(edge(2.0))).ln();
        let run = |q: &dyn Dequantiser, how: (usize, bool)| {
            let mut noise = CounterNoise::new(3, 0..N as u64);
            let all = log_prob_of_levels(&k, levels, q, &density, how, &mut noise).unwrap();
            let all = all.to_vec1::<f64>().unwrap();
            let mean = all.iter().sum::<f64>() / N as f64;
            let var = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / N as f64;
            (mean, 4.0 * (var / N as f64).sqrt())
        };
        let (single, e1) = run(&Uniform, (1, false));
        let (many, e2) = run(&Uniform, (8, true));
        assert!(single < exact - e1, "{single} {exact}");
        assert!(
            many > single + e1 && many < exact + e2,
            "{single} {many} {exact}"
        );
        // q(u | k) = p(k + u)/P(k), by inverting the distribution function numerically.
        let posterior = |k: &Tensor, noise: &mut dyn Noise| -> Result<(Tensor, Tensor)> {
            let (v, _) = Uniform.draw(k, noise)?;
            let (low, mass) = (cdf(edge(2.0)), exact.exp());
            let u: Vec<f64> = v
                .flatten_all()?
                .to_vec1::<f64>()?
                .iter()
                .map(|v| crate::schedule::bisect(0.0, 1.0, low + v * mass, |u| cdf(edge(2.0 + u))))
                .collect();
            let u = Tensor::from_vec(u, k.shape(), &Device::Cpu)?;
            let x = to_unit(k, &u, levels)?;
            let log_q = (density(&x)? + (0.5f64.ln() - exact))?;
            Ok((u, log_q))
        };
        let few = Tensor::full(2.0, (20, 1), &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(3, 0..20);
        let closed = log_prob_of_levels(&few, levels, &posterior, &density, (1, false), &mut noise);
        for value in closed.unwrap().to_vec1::<f64>().unwrap() {
            assert!((value - exact).abs() < 1e-9, "{value} {exact}");
        }
    }

    #[test]
    fn a_bin_of_two_over_256_costs_seven_bits() {
        assert_eq!(level_bits(1.0, 2.0 / 256.0), 8.0);
    }
}
