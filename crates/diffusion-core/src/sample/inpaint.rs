//! Inpainting: what is known is pasted over the sample after every move, with the noise that belongs
//! there (Song et al. 2021, section 5 and appendix I.2).

use super::Constraint;
use crate::error::Result;
use crate::forward::marginal;
use crate::noise::Noise;
use crate::schedule::Point;
use crate::tensor::At;
use candle_core::Tensor;

/// The constraint.
///
/// ```text
/// x ← m ⊙ (α_t y + σ_t z) + (1 − m) ⊙ x
/// ```
#[derive(Clone)]
pub struct Inpaint {
    known: Tensor,
    mask: Tensor,
}

impl Inpaint {
    /// `known` `[B, …]` and `mask`, 1 where it is known and 0 where it is not, which broadcasts
    /// against it.
    ///
    /// # Errors
    /// When the mask does not broadcast.
    pub fn new(known: Tensor, mask: &Tensor) -> Result<Self> {
        let mask = mask.broadcast_as(known.shape())?.contiguous()?;
        Ok(Self { known, mask })
    }
}

impl Constraint for Inpaint {
    fn apply(&self, x: Tensor, at: &Point, noise: &mut dyn Noise) -> Result<Tensor> {
        let known = self.known.to_dtype(x.dtype())?;
        let mask = self.mask.to_dtype(x.dtype())?;
        // Drawn at the data too, so that draws stay in step with the moves.
        let z = noise.normal(&known)?;
        let pasted = (&mask * marginal(&known, &z, At::All(*at))?)?;
        Ok((pasted + (mask.affine(-1.0, 1.0)? * x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use candle_core::Device;

    #[test]
    fn the_known_part_is_exact_at_the_data_and_the_rest_untouched() {
        let known = Tensor::new(&[[1.0, 2.0, 3.0f64]], &Device::Cpu).unwrap();
        let mask = Tensor::new(&[1.0, 0.0, 1.0f64], &Device::Cpu).unwrap();
        let paste = Inpaint::new(known, &mask).unwrap();
        let x = Tensor::new(&[[7.0, 8.0, 9.0f64]], &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(1, 0..1);
        let y = paste
            .apply(x.clone(), &Point::data(0.0), &mut noise)
            .unwrap();
        assert_eq!(y.to_vec2::<f64>().unwrap(), [[1.0, 8.0, 3.0]]);
        let y = paste
            .apply(x, &Point::new(0.5, 0.6, 0.8), &mut noise)
            .unwrap();
        let y = y.to_vec2::<f64>().unwrap();
        assert!(y[0][1] == 8.0 && y[0][0] != 1.0 && (y[0][0] - 0.6).abs() < 0.8 * 5.0);
    }
}
