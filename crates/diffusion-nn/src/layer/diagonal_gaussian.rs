//! The posterior of an autoencoder: a normal law with its own mean and variance an element.

use crate::error::{Error, Result};
use candle_core::Tensor;

/// `N(mean, exp(logvar))`, element by element (Kingma and Welling 2014).
#[derive(Clone, Debug)]
pub struct DiagonalGaussian {
    /// The mean, `[B, C, …]`; also the mode.
    pub mean: Tensor,
    /// The logarithm of the variance, in `[−30, 20]`.
    pub logvar: Tensor,
}

impl DiagonalGaussian {
    /// From an encoder's output `[B, 2C, …]`: means, then log-variances, which are clamped.
    ///
    /// # Errors
    /// `Input` when the number of channels is odd.
    pub fn new(moments: &Tensor) -> Result<Self> {
        let channels = moments.dim(1)?;
        if !channels.is_multiple_of(2) {
            return Err(Error::Input {
                name: "moments",
                found: format!("{channels} channels"),
                expected: "an even number: means and log-variances".into(),
            });
        }
        let half = channels / 2;
        Ok(Self {
            mean: moments.narrow(1, 0, half)?.contiguous()?,
            logvar: moments
                .narrow(1, half, half)?
                .contiguous()?
                .clamp(-30.0, 20.0)?,
        })
    }

    /// The standard deviation.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn std(&self) -> Result<Tensor> {
        Ok(self.logvar.affine(0.5, 0.0)?.exp()?)
    }

    /// The variance.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn var(&self) -> Result<Tensor> {
        Ok(self.logvar.exp()?)
    }

    /// The sample that standard normal noise `z` stands for.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn sample(&self, z: &Tensor) -> Result<Tensor> {
        Ok((&self.mean + (self.std()? * z)?)?)
    }

    /// `KL(self ‖ N(0, I))` in nats, `[B]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn kl(&self) -> Result<Tensor> {
        let terms = ((self.mean.sqr()? + self.var()?)? - &self.logvar)?.affine(0.5, -0.5)?;
        Ok(terms.flatten_from(1)?.sum(1)?)
    }

    /// `−log p(x)` in nats, `[B]`.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn nll(&self, x: &Tensor) -> Result<Tensor> {
        let terms = ((x - &self.mean)?.sqr()?.div(&self.var()?)? + &self.logvar)?
            .affine(0.5, 0.5 * std::f64::consts::TAU.ln())?;
        Ok(terms.flatten_from(1)?.sum(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn divergence_and_likelihood_by_hand() {
        let moments = Tensor::new(&[[[0.5f64], [2f64.ln()]]], &Device::Cpu).unwrap();
        let p = DiagonalGaussian::new(&moments).unwrap();
        let kl = p.kl().unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((kl - 0.5 * (0.25 + 2.0 - 2f64.ln() - 1.0)).abs() < 1e-12);
        let x = Tensor::new(&[[[1.5f64]]], &Device::Cpu).unwrap();
        let nll = p.nll(&x).unwrap().to_vec1::<f64>().unwrap()[0];
        let exact = 0.5 * ((std::f64::consts::TAU * 2.0).ln() + 1.0 / 2.0);
        assert!((nll - exact).abs() < 1e-12, "{nll} {exact}");
        assert!(DiagonalGaussian::new(&x).is_err());
    }
}
