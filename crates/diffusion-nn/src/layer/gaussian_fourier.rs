//! Random Fourier features of a noise level.

use crate::error::Result;
use crate::store::Scope;
use candle_core::Tensor;
use diffusion_ops::init::Init;

/// Random Fourier features (Song et al. 2021, NCSN++). The frequencies are a buffer, `weight`
/// unless it is named otherwise.
///
/// ```text
/// y = [sin(2π w l), cos(2π w l)],   l = ln t or t,   w ~ N(0, scale²)
/// ```
#[derive(Clone, Debug)]
pub struct GaussianFourier {
    weight: Tensor,
    log: bool,
    flip_sin_to_cos: bool,
}

impl GaussianFourier {
    /// `size` frequencies of the standard deviation `scale`; with `log` the logarithm of the
    /// level is embedded, with `flip_sin_to_cos` the cosines come first.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(
        scope: &Scope,
        size: usize,
        scale: f64,
        log: bool,
        flip_sin_to_cos: bool,
    ) -> Result<Self> {
        Self::named(scope, "weight", size, scale, log, flip_sin_to_cos)
    }

    /// [`GaussianFourier::new`] with another name of the frequencies.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn named(
        scope: &Scope,
        name: &str,
        size: usize,
        scale: f64,
        log: bool,
        flip_sin_to_cos: bool,
    ) -> Result<Self> {
        let weight = scope.buffer(name, size, Init::Normal { std: scale })?;
        Ok(Self {
            weight,
            log,
            flip_sin_to_cos,
        })
    }

    /// `[B] -> [B, 2 size]`.
    ///
    /// # Errors
    /// If `x` is not a vector.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.weight.dtype())?;
        let x = if self.log { x.log()? } else { x };
        let turns = x
            .reshape((x.dims1()?, 1))?
            .broadcast_mul(&self.weight.unsqueeze(0)?)?;
        let phase = (turns * std::f64::consts::TAU)?;
        let (sin, cos) = (phase.sin()?, phase.cos()?);
        let both = if self.flip_sin_to_cos {
            [cos, sin]
        } else {
            [sin, cos]
        };
        Ok(Tensor::cat(&both, 1)?)
    }
}
