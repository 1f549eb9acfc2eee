//! One pass over the values of a parameter, in a fixed order on one thread: the same bits always.

use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result as Candle, Tensor};

use crate::checkpoint::on_cpu;
use crate::error::Result;

/// Σ v², in f64 and in a fixed order.
pub(super) fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    // Eight running sums, so that the loop is not one long chain of additions.
    fn sum<T: Copy>(values: &[T], wide: impl Fn(T) -> f64) -> f64 {
        let mut sums = [0.0f64; 8];
        let (chunks, rest) = values.as_chunks::<8>();
        for chunk in chunks {
            for (s, &v) in sums.iter_mut().zip(chunk) {
                let v = wide(v);
                *s += v * v;
            }
        }
        let rest: f64 = rest.iter().map(|&v| wide(v).powi(2)).sum();
        sums.iter().sum::<f64>() + rest
    }
    if !tensor.device().is_cpu() {
        return Ok(tensor
            .to_dtype(DType::F64)?
            .sqr()?
            .sum_all()?
            .to_scalar::<f64>()?);
    }
    on_cpu(tensor, |storage, begin, end| match storage {
        CpuStorage::F32(v) => sum(&v[begin..end], f64::from),
        CpuStorage::F64(v) => sum(&v[begin..end], |v| v),
        CpuStorage::F16(v) => sum(&v[begin..end], f64::from),
        CpuStorage::BF16(v) => sum(&v[begin..end], f64::from),
        _ => 0.0,
    })
}

/// Whether the one-pass kernels apply; otherwise the same formulas run as tensor operations.
pub(super) fn in_place(tensor: &Tensor) -> bool {
    tensor.device().is_cpu()
        && matches!(tensor.dtype(), DType::F32 | DType::F64)
        && tensor.is_contiguous()
}

fn range(layout: &Layout) -> Candle<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(begin..end),
        None => candle_core::bail!("an update in place needs contiguous tensors"),
    }
}

/// `a ← keep · a + add · bᵖ` with p = 1 or 2, in the element type of the tensors.
pub(super) struct Blend {
    pub keep: f64,
    pub add: f64,
    /// Applied to `b` before the power: the clip factor.
    pub scale: f64,
    pub squared: bool,
}

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "moment"
    }

    fn cpu_fwd(&self, a: &mut CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Candle<()> {
        let (ra, rb) = (range(la)?, range(lb)?);
        macro_rules! run {
            ($a:expr, $b:expr, $t:ty) => {{
                let (keep, add, scale) = (self.keep as $t, self.add as $t, self.scale as $t);
                let pairs = $a[ra].iter_mut().zip(&$b[rb]);
                if self.squared {
                    pairs.for_each(|(a, &b)| *a = keep * *a + add * (b * scale) * (b * scale));
                } else {
                    pairs.for_each(|(a, &b)| *a = keep * *a + add * (b * scale));
                }
            }};
        }
        match (a, b) {
            (CpuStorage::F32(a), CpuStorage::F32(b)) => run!(a, b, f32),
            (CpuStorage::F64(a), CpuStorage::F64(b)) => run!(a, b, f64),
            _ => candle_core::bail!("a gradient and its moment differ in element type"),
        }
        Ok(())
    }
}

/// `p ← decay · p − rate · m / (√v · root + eps)`.
pub(super) struct Descend {
    pub decay: f64,
    pub rate: f64,
    pub root: f64,
    pub eps: f64,
}

impl InplaceOp3 for Descend {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        lp: &Layout,
        m: &CpuStorage,
        lm: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Candle<()> {
        let (rp, rm, rv) = (range(lp)?, range(lm)?, range(lv)?);
        macro_rules! run {
            ($p:expr, $m:expr, $v:expr, $t:ty) => {{
                let (decay, rate) = (self.decay as $t, self.rate as $t);
                let (root, eps) = (self.root as $t, self.eps as $t);
                for ((p, &m), &v) in $p[rp].iter_mut().zip(&$m[rm]).zip(&$v[rv]) {
                    *p = decay * *p - rate * m / (v.sqrt() * root + eps);
                }
            }};
        }
        match (p, m, v) {
            (CpuStorage::F32(p), CpuStorage::F32(m), CpuStorage::F32(v)) => run!(p, m, v, f32),
            (CpuStorage::F64(p), CpuStorage::F64(m), CpuStorage::F64(v)) => run!(p, m, v, f64),
            _ => candle_core::bail!("a parameter and its moments differ in element type"),
        }
        Ok(())
    }
}

/// `s ← s − pull · (s − p)`.
pub(super) struct Pull(pub f64);

impl InplaceOp2 for Pull {
    fn name(&self) -> &'static str {
        "ema"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, ls: &Layout, p: &CpuStorage, lp: &Layout) -> Candle<()> {
        let (rs, rp) = (range(ls)?, range(lp)?);
        macro_rules! run {
            ($s:expr, $p:expr, $t:ty) => {{
                let pull = self.0 as $t;
                $s[rs]
                    .iter_mut()
                    .zip(&$p[rp])
                    .for_each(|(s, &p)| *s -= pull * (*s - p));
            }};
        }
        match (s, p) {
            (CpuStorage::F32(s), CpuStorage::F32(p)) => run!(s, p, f32),
            (CpuStorage::F64(s), CpuStorage::F64(p)) => run!(s, p, f64),
            _ => candle_core::bail!("a parameter and its average differ in element type"),
        }
        Ok(())
    }
}
