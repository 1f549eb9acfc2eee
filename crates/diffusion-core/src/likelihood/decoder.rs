//! The last term of the bound: the probability of the data given the least noisy latent.
//!
//! Data of K grey levels stand at `x = 2k/(K − 1) − 1` for the Gaussian decoders (Ho et al. 2020,
//! section 3.3) and at `x = (2k + 1)/K − 1` for VDM's (Kingma et al. 2021, section 3.3).

use super::gaussian::log_density;
use crate::error::{Report, Result};
use candle_core::{D, DType, Tensor};

/// Probabilities below this count as this.
const FLOOR: f64 = 1e-12;

/// `p(x₀ | x₁)` for a Gaussian with predicted mean and variance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoder {
    /// The Gaussian's mass in the bin of a grey level; the outermost bins are open.
    Discretised {
        /// The number of levels K.
        levels: usize,
    },
    /// The same with the distribution function approximated by a hyperbolic tangent, and with the
    /// bound's clamps as OpenAI's code has them.
    DiscretisedTanh {
        /// The number of levels K.
        levels: usize,
    },
    /// The Gaussian's density: for continuous data.
    Density,
}

impl Decoder {
    /// `log p` entry by entry, in nats.
    ///
    /// ```text
    /// log [ F((x + δ − μ)/s) − F((x − δ − μ)/s) ],   δ = 1/(K − 1),   F(−∞) = 0, F(∞) = 1
    /// ```
    ///
    /// # Shapes
    /// All alike; the result likewise.
    ///
    /// # Errors
    /// `Config` when there are fewer than two levels.
    pub fn log_prob(&self, x: &Tensor, mean: &Tensor, log_var: &Tensor) -> Result<Tensor> {
        let (levels, cdf): (usize, fn(&Tensor) -> Result<Tensor>) = match self {
            Decoder::Density => return log_density(x, mean, log_var),
            Decoder::Discretised { levels } => (*levels, normal_cdf),
            Decoder::DiscretisedTanh { levels } => (*levels, tanh_cdf),
        };
        if levels < 2 {
            return Err(Report::new("decoder levels", levels)
                .expected("at least 2")
                .config());
        }
        let half = 1.0 / (levels - 1) as f64;
        // Data stand exactly on the levels; a quarter of a bin tells the outermost from the rest.
        let edge = 1.0 - 0.255 * half;
        let centred = (x - mean)?;
        let inverse = log_var.affine(-0.5, 0.0)?.exp()?;
        let upper = cdf(&((&centred + half)? * &inverse)?)?;
        let lower = cdf(&((&centred - half)? * &inverse)?)?;
        let log = |p: &Tensor| -> Result<Tensor> { Ok(p.clamp(FLOOR, 1.0)?.log()?) };
        let inside = log(&(&upper - &lower)?)?;
        let lowest = log(&upper)?;
        let highest = log(&lower.affine(-1.0, 1.0)?)?;
        let rest = x.gt(edge)?.where_cond(&highest, &inside)?;
        Ok(x.lt(-edge)?.where_cond(&lowest, &rest)?)
    }
}

/// `Φ(z)`.
fn normal_cdf(z: &Tensor) -> Result<Tensor> {
    Ok(z.affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?
        .erf()?
        .affine(0.5, 0.5)?)
}

/// `½ (1 + tanh(√(2/π) (z + 0.044715 z³)))`, close to `Φ(z)`.
///
/// # Errors
/// Those of the tensor library.
pub fn tanh_cdf(z: &Tensor) -> Result<Tensor> {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let cubic = (z.sqr()? * z)?.affine(0.044715, 0.0)?;
    Ok((z + cubic)?.affine(root, 0.0)?.tanh()?.affine(0.5, 0.5)?)
}

/// The value of grey level `k` of `levels` for VDM: the middle of its bin, `(2k + 1)/K − 1`.
pub fn bin_middle(k: f64, levels: usize) -> f64 {
    (2.0 * k + 1.0) / levels as f64 - 1.0
}

/// VDM's decoder: `log p(k | z)` for every level, `[…, K]` for `z` `[…]`.
///
/// ```text
/// p(x_k | z₀) ∝ exp( −½ e^{−γ₀} (z₀/α₀ − x_k)² )
/// ```
///
/// It is `q(x | z₀)` for independent dimensions with uniform levels (Kingma et al. 2021, eq. 8).
///
/// # Shapes
/// `z` is `z₀/α₀`, of any shape; `gamma0` has one entry.
///
/// # Errors
/// `Config` when there are fewer than two levels.
pub fn categorical(z: &Tensor, gamma0: &Tensor, levels: usize) -> Result<Tensor> {
    if levels < 2 {
        return Err(Report::new("decoder levels", levels)
            .expected("at least 2")
            .config());
    }
    let middles: Vec<f64> = (0..levels).map(|k| bin_middle(k as f64, levels)).collect();
    let middles = Tensor::new(middles, &candle_core::Device::Cpu)?
        .to_dtype(z.dtype())?
        .to_device(z.device())?;
    let precision = gamma0.flatten_all()?.neg()?.exp()?.affine(-0.5, 0.0)?;
    let logits = z
        .unsqueeze(D::Minus1)?
        .broadcast_sub(&middles)?
        .sqr()?
        .broadcast_mul(&precision)?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let shifted = logits.broadcast_sub(&top)?;
    let total = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(shifted.broadcast_sub(&total)?)
}

/// `log p(k | z)` of the given levels, entry by entry, in nats; `k` holds whole numbers.
///
/// # Errors
/// `Input` when a level is outside `0..K`.
pub fn categorical_log_prob(
    k: &Tensor,
    z: &Tensor,
    gamma0: &Tensor,
    levels: usize,
) -> Result<Tensor> {
    let ks = k.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    if let Some(bad) = ks
        .iter()
        .find(|k| !(0.0..levels as f64 - 0.5).contains(&k.round()))
    {
        return Err(Report::new("grey level", bad)
            .expected(format!("0 to {}", levels - 1))
            .input());
    }
    let index: Vec<u32> = ks.iter().map(|k| k.round() as u32).collect();
    let index = Tensor::from_vec(index, k.shape(), &candle_core::Device::Cpu)?
        .to_device(z.device())?
        .unsqueeze(D::Minus1)?;
    let all = categorical(z, gamma0, levels)?;
    Ok(all.gather(&index, D::Minus1)?.squeeze(D::Minus1)?)
}

/// The most probable level of every value, u32 in the shape of `z`: a sample of VDM from its
/// cleanest latent.
///
/// # Shapes
/// As [`categorical`].
///
/// # Errors
/// As [`categorical`].
pub fn most_probable(z: &Tensor, gamma0: &Tensor, levels: usize) -> Result<Tensor> {
    Ok(categorical(z, gamma0, levels)?.argmax(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::gradcheck::gradcheck;
    use candle_core::Device;

    fn levels_of(k: usize) -> Tensor {
        let x: Vec<f64> = (0..k)
            .map(|i| 2.0 * i as f64 / (k - 1) as f64 - 1.0)
            .collect();
        Tensor::new(x, &Device::Cpu).unwrap()
    }

    /// Over all bins the probabilities add up to one, for any number of levels.
    #[test]
    fn sums_to_one_over_the_bins() {
        for k in [2usize, 5, 16, 256] {
            for (mean, log_var) in [(0.1, -3.0), (-0.97, -2.0), (0.4, 1.0)] {
                let x = levels_of(k);
                let full = |v: f64| x.zeros_like().unwrap().affine(0.0, v).unwrap();
                for decoder in [
                    Decoder::Discretised { levels: k },
                    Decoder::DiscretisedTanh { levels: k },
                ] {
                    let p = decoder.log_prob(&x, &full(mean), &full(log_var)).unwrap();
                    let total = p
                        .exp()
                        .unwrap()
                        .sum_all()
                        .unwrap()
                        .to_scalar::<f64>()
                        .unwrap();
                    assert!((total - 1.0).abs() < 1e-9, "{decoder:?}: {total}");
                }
            }
        }
    }

    #[test]
    fn the_categorical_decoder_is_bayes_rule() {
        let (k, gamma0) = (7, -3.0f64);
        let z = Tensor::new(&[0.2, -1.4f64], &Device::Cpu).unwrap();
        let g = Tensor::new(&[gamma0], &Device::Cpu).unwrap();
        let all = categorical(&z, &g, k).unwrap().to_vec2::<f64>().unwrap();
        for (z, row) in [0.2, -1.4].iter().zip(&all) {
            let like: Vec<f64> = (0..k)
                .map(|i| (-0.5 * (z - bin_middle(i as f64, k)).powi(2) / gamma0.exp()).exp())
                .collect();
            let total: f64 = like.iter().sum();
            for (ours, exact) in row.iter().zip(&like) {
                assert!((ours.exp() - exact / total).abs() < 1e-13);
            }
        }
        let index = Tensor::new(&[3.0, 0.0f64], &Device::Cpu).unwrap();
        let picked = categorical_log_prob(&index, &z, &g, k)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        assert_eq!(picked, [all[0][3], all[1][0]]);
        // 0.2 lies nearest to the middle of level 4, 2/7; −1.4 is below them all.
        let best = most_probable(&z, &g, k).unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(best, [4, 0]);
        let outside = Tensor::new(&[7.0, 0.0f64], &Device::Cpu).unwrap();
        assert!(categorical_log_prob(&outside, &z, &g, k).is_err());
    }

    /// A Gaussian much wider than a bin has the density times the width as its mass.
    #[test]
    fn a_wide_gaussian_has_density_times_width() {
        let x = Tensor::new(&[0.0f64, 2.0 / 255.0 * 20.5 - 20.5 / 255.0], &Device::Cpu).unwrap();
        let mean = x.affine(0.0, 0.3).unwrap();
        let l = x.affine(0.0, -1.0).unwrap();
        let mass = Decoder::Discretised { levels: 256 }
            .log_prob(&x, &mean, &l)
            .unwrap();
        let density = Decoder::Density.log_prob(&x, &mean, &l).unwrap();
        let gap = (mass - density).unwrap().to_vec1::<f64>().unwrap();
        assert!(
            gap.iter().all(|g| (g - (2.0f64 / 255.0).ln()).abs() < 1e-4),
            "{gap:?}"
        );
    }

    #[test]
    fn gradients_are_difference_quotients() {
        let x = Tensor::new(&[-1.0, 0.2, 1.0f64], &Device::Cpu).unwrap();
        let mean = Tensor::new(&[-0.9, 0.25, 0.8f64], &Device::Cpu).unwrap();
        let l = Tensor::new(&[-3.0, -2.5, -2.0f64], &Device::Cpu).unwrap();
        for decoder in [
            Decoder::Discretised { levels: 16 },
            Decoder::DiscretisedTanh { levels: 16 },
            Decoder::Density,
        ] {
            let of_mean = |m: &Tensor| Ok(decoder.log_prob(&x, m, &l)?.sum_all()?);
            let of_var = |l: &Tensor| Ok(decoder.log_prob(&x, &mean, l)?.sum_all()?);
            assert!(gradcheck(&mean, of_mean).unwrap() < 1e-6, "{decoder:?}");
            assert!(gradcheck(&l, of_var).unwrap() < 1e-6, "{decoder:?}");
        }
        let z = x.clone();
        let gamma = Tensor::new(&[-2.0f64], &Device::Cpu).unwrap();
        let k = Tensor::new(&[0.0, 9.0, 15.0f64], &Device::Cpu).unwrap();
        let of_gamma = |g: &Tensor| Ok(categorical_log_prob(&k, &z, g, 16)?.sum_all()?);
        let of_z = |z: &Tensor| Ok(categorical_log_prob(&k, z, &gamma, 16)?.sum_all()?);
        assert!(gradcheck(&gamma, of_gamma).unwrap() < 1e-6);
        assert!(gradcheck(&z, of_z).unwrap() < 1e-6);
    }
}
