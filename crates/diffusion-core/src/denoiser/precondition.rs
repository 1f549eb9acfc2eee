//! Networks behind scalings of their input and output, and the levels that they know.

use super::{Call, Denoiser};
use crate::error::Result;
use crate::predict::Prediction;
use crate::tensor::{At, per_item};
use candle_core::{DType, Tensor};

/// The four scalings at a noise level (Karras et al. 2022, eq. 7 and table 1).
///
/// ```text
/// D(x; σ) = skip x + out F(input x; noise)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalings {
    /// `c_skip`.
    pub skip: f64,
    /// `c_out`.
    pub out: f64,
    /// `c_in`.
    pub input: f64,
    /// `c_noise`, what the network is told.
    pub noise: f64,
}

/// How a network stands in front of a denoiser.
pub trait Preconditioner {
    /// The scalings at `σ̂ = σ/α`.
    fn scalings(&self, sigma_hat: f64) -> Scalings;

    /// What the raw output `F`, shaped as `x`, says.
    ///
    /// # Errors
    /// Those of the tensor library.
    fn read(&self, raw: Tensor) -> Result<Prediction>;

    /// The nearest level that the network knows.
    fn round_sigma(&self, sigma_hat: f64) -> f64 {
        sigma_hat
    }

    /// The smallest and the largest level that the network knows.
    fn span(&self) -> (f64, f64);
}

/// A network `F` behind a preconditioner. With `σ̂ = σ/α` and `x/α` in place of `σ` and `x` it serves
/// every schedule.
pub struct Preconditioned<P, F> {
    /// The scalings.
    pub preconditioner: P,
    /// The function: scaled input `[B, …]` and `c_noise` `[B]` to `F`, shaped as the input.
    pub f: F,
    /// The dtype of the network's weights.
    pub dtype: DType,
}

impl<P, F> Denoiser for Preconditioned<P, F>
where
    P: Preconditioner,
    F: Fn(&Tensor, &Tensor) -> Result<Tensor>,
{
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        let scalings = |sigma_hat| self.preconditioner.scalings(sigma_hat);
        let input = at
            .coef(|p| scalings(p.sigma_hat()).input / p.alpha)
            .times(x)?
            .to_dtype(self.dtype)?;
        let told: Vec<f64> = at
            .points(x.dim(0)?)
            .iter()
            .map(|p| scalings(p.sigma_hat()).noise)
            .collect();
        let told = per_item(&told, &input)?.flatten_all()?;
        let raw = (self.f)(&input, &told)?.to_dtype(x.dtype())?;
        let raw = if call.tracked { raw } else { raw.detach() };
        self.preconditioner.read(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::{IddpmPrecond, VePrecond, VpPrecond};
    use crate::noise::CounterNoise;
    use crate::schedule::Point;
    use candle_core::Device;

    fn run(p: &dyn Preconditioner, sigma: f64, alpha: f64) -> (f64, f64) {
        struct By<'a>(&'a dyn Preconditioner);
        impl Preconditioner for By<'_> {
            fn scalings(&self, s: f64) -> Scalings {
                self.0.scalings(s)
            }
            fn read(&self, raw: Tensor) -> Result<Prediction> {
                self.0.read(raw)
            }
            fn span(&self) -> (f64, f64) {
                self.0.span()
            }
        }
        // Some network that depends on both arguments.
        let f = |x: &Tensor, c: &Tensor| -> Result<Tensor> {
            Ok(x.broadcast_mul(&(c.reshape((1, 1))? * 0.3)?)?
                .affine(1.0, 0.7)?)
        };
        let x = Tensor::new(&[[1.3 * alpha]], &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(0, 0..1);
        let mut call = Call {
            noise: &mut noise,
            items: 0..1,
            tracked: false,
        };
        let at = At::All(Point::new(0.0, alpha, alpha * sigma));
        let denoiser = Preconditioned {
            preconditioner: By(p),
            f,
            dtype: DType::F64,
        };
        let said = denoiser.predict(&x, at, &mut call).unwrap();
        let x0 = said.x0(&x, at).unwrap().flatten_all().unwrap();
        let c = p.scalings(sigma);
        let raw = c.input * 1.3 * c.noise * 0.3 + 0.7;
        (x0.to_vec1::<f64>().unwrap()[0], c.skip * 1.3 + c.out * raw)
    }

    /// What is read from the raw output is D of the four scalings, in every frame.
    #[test]
    fn the_denoiser_is_what_the_scalings_say() {
        let all: [&dyn Preconditioner; 3] = [
            &VpPrecond::default(),
            &VePrecond::default(),
            &IddpmPrecond::new(1000, 0.001, 0.008).unwrap(),
        ];
        for p in all {
            for sigma in [0.03, 0.5, 4.0, 60.0] {
                for alpha in [1.0, 0.4] {
                    let (ours, scalings) = run(p, sigma, alpha);
                    assert!((ours - scalings).abs() < 1e-11 * scalings.abs().max(1.0));
                }
            }
        }
    }
}
