//! How likely a model holds data to be, in nats and in bits per dimension.
//!
//! | file | what |
//! |---|---|
//! | [`gaussian`] | divergences and densities of diagonal Gaussians |
//! | [`decoder`] | `p(x₀ | x₁)` over grey levels, or as a density |
//! | [`vlb`] | the variational bound, term by term |
//! | [`importance`] | the importance-weighted bound |
//! | [`dequantise`] | from densities to probabilities of grey levels |
//! | [`divergence`] | `div s`, exactly or by random probes |
//! | [`ode`] | `log p` by the probability flow |
//! | [`score_flow`] | the bound of score-based SDEs, with the truncation at the end of the process |

pub mod decoder;
pub mod dequantise;
pub mod divergence;
pub mod gaussian;
pub mod importance;
pub mod ode;
pub mod score_flow;
pub mod vlb;

pub use decoder::Decoder;
pub use divergence::{Divergence, Probe};
pub use ode::{OdeLikelihood, OdeSolution};
pub use score_flow::ScoreFlow;
pub use vlb::{Bound, Vlb};

use crate::error::Result;
use candle_core::{DType, Tensor};

/// `log N(x; 0, std² I)` of every item in nats, `[B]`: the prior of a process.
///
/// ```text
/// −D/2 ln(2π std²) − ‖x‖²/(2 std²)
/// ```
///
/// # Errors
/// Those of the tensor library.
pub fn normal_log_density(x: &Tensor, std: f64) -> Result<Tensor> {
    let x = x.to_dtype(DType::F64)?.flatten_from(1)?;
    let constant = -0.5 * x.dim(1)? as f64 * (std::f64::consts::TAU * std * std).ln();
    Ok(x.sqr()?.sum(1)?.affine(-0.5 / (std * std), constant)?)
}

/// Nats of a whole item as bits per dimension: `nats/(D ln 2)`.
///
/// For a density of scaled data add [`bits_offset`], what the scaling costs.
pub fn bits_per_dim(nats: f64, dims: usize) -> f64 {
    nats / (dims as f64 * std::f64::consts::LN_2)
}

/// What the scaling of `levels` grey levels to an interval costs in bits per dimension,
/// `log₂(levels/width)`: 7 for 256 levels on `[−1, 1]`, 8 on `[0, 1]`.
///
/// With uniform noise of one level added, the density is a bound on the probability of the levels
/// (Theis et al. 2016).
pub fn bits_offset(levels: usize, width: f64) -> f64 {
    (levels as f64 / width).log2()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Gaussian;
    use crate::schedule::Point;
    use candle_core::Device;

    #[test]
    fn the_prior_is_the_normal_law() {
        let x = Tensor::new(&[[0.2, 1.0], [-0.7, 0.1f64]], &Device::Cpu).unwrap();
        let ours = normal_log_density(&x, 2.5)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let law = Gaussian::new(vec![0.0; 2], vec![2.5; 2]);
        let exact = law.log_density(&x, &Point::data(0.0)).unwrap();
        for (a, b) in ours.iter().zip(exact.to_vec1::<f64>().unwrap()) {
            assert!((a - b).abs() < 1e-13);
        }
    }

    /// A uniform law over K levels has log₂ K bits, whatever the interval it is scaled to.
    #[test]
    fn bits_do_not_depend_on_the_scaling() {
        for (levels, width) in [(256usize, 2.0f64), (256, 1.0), (16, 2.0)] {
            let density = 3.0 * -width.ln();
            let bits = bits_per_dim(-density, 3) + bits_offset(levels, width);
            assert!((bits - (levels as f64).log2()).abs() < 1e-12);
        }
        assert_eq!((bits_offset(256, 2.0), bits_offset(256, 1.0)), (7.0, 8.0));
    }
}
