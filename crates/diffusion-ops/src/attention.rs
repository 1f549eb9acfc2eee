//! Scaled dot-product attention.

use crate::softmax::softmax;
use candle_core::{Result, Tensor, bail};

/// Scaled dot-product attention (Vaswani et al. 2017, equation 1).
///
/// ```text
/// y = softmax(s Q Kᵀ + M) V,   s = 1/√d unless given
/// ```
///
/// where `M` is an additive mask (0 keeps, −∞ or a large negative number hides).
///
/// # Shapes
/// `q [B, h, N, d]`, `k [B, h, S, d]`, `v [B, h, S, e]`, `mask` anything that broadcasts to
/// `[B, h, N, S]`; the result is `[B, h, N, e]`.
///
/// # Errors
/// If the shapes don't fit each other.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    scale: Option<f64>,
) -> Result<Tensor> {
    let (b, h, _, d) = q.dims4()?;
    let (kb, kh, s, kd) = k.dims4()?;
    let (vb, vh, vs, _) = v.dims4()?;
    if (kb, kh, kd) != (b, h, d) || (vb, vh, vs) != (b, h, s) {
        bail!(
            "attention: q {:?}, k {:?} and v {:?} don't fit",
            q.dims(),
            k.dims(),
            v.dims()
        );
    }
    let scale = scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt());
    // Scaling the queries costs N·d products, scaling the scores N·S.
    let q = (q.contiguous()? * scale)?;
    let mut scores = q.matmul(&k.contiguous()?.t()?)?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    softmax(&scores, 3)?.matmul(&v.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_relative_error, normal};
    use candle_core::{D, Device};

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let inputs = [
            normal(1, (2, 3, 4, 5))?,
            normal(2, (2, 3, 6, 5))?,
            normal(3, (2, 3, 6, 2))?,
            normal(4, (1, 1, 4, 6))?,
        ];
        let e = max_relative_error(
            |t| attention(&t[0], &t[1], &t[2], Some(&t[3]), None),
            &inputs,
        )?;
        assert!(e < 1e-6, "{e:e}");
        let swapped = [
            normal(1, (2, 4, 3, 5))?,
            normal(2, (2, 6, 3, 5))?,
            normal(3, (2, 6, 3, 5))?,
        ];
        let e = max_relative_error(
            |t| {
                let t: Vec<Tensor> = t.iter().map(|t| t.transpose(1, 2)).collect::<Result<_>>()?;
                attention(&t[0], &t[1], &t[2], None, Some(0.3))
            },
            &swapped,
        )?;
        assert!(e < 1e-6, "{e:e}");
        Ok(())
    }

    #[test]
    fn equal_keys_average_and_a_mask_hides() -> Result<()> {
        let q = normal(1, (1, 1, 2, 3))?;
        let k = Tensor::zeros_like(&normal(1, (1, 1, 4, 3))?)?;
        let v = normal(2, (1, 1, 4, 3))?;
        let y = attention(&q, &k, &v, None, None)?;
        let mean = v.mean_keepdim(2)?;
        let gap = y
            .broadcast_sub(&mean)?
            .abs()?
            .flatten_all()?
            .max(D::Minus1)?;
        assert!(gap.to_scalar::<f64>()? < 1e-15);
        let hide = f64::NEG_INFINITY;
        let mask = Tensor::new(&[[[[hide, 0.0, hide, hide]]]], &Device::Cpu)?;
        let y = attention(&q, &k, &v, Some(&mask), None)?;
        assert_eq!(
            y.get(0)?.get(0)?.get(1)?.to_vec1::<f64>()?,
            v.get(0)?.get(0)?.get(1)?.to_vec1::<f64>()?
        );
        assert!(attention(&q, &k.narrow(3, 0, 2)?, &v, None, None).is_err());
        Ok(())
    }
}
