//! VDM's learned noise schedules (Kingma et al. 2021, section 3.2 and appendix H).
//!
//! ```text
//! α_t² = sigmoid(−γ(t)),   σ_t² = sigmoid(γ(t)),   γ = −ln SNR rising in t ∈ [0, 1]
//! ```

use super::{Point, Rates, Schedule, bisect};
use crate::error::{Report, Result};
use candle_core::{DType, Tensor};

/// A schedule whose parameters are trained.
pub trait LearnedSchedule {
    /// `γ(t)` and `γ'(t)`, `[B]` each, for times `[B]`; differentiable in the parameters.
    ///
    /// # Errors
    /// Those of the tensor library.
    fn gamma(&self, t: &Tensor) -> Result<(Tensor, Tensor)>;

    /// The schedule as it stands, for samplers.
    ///
    /// # Errors
    /// `Numeric` when `γ` does not rise.
    fn freeze(&self) -> Result<Frozen>;
}

/// `γ` linear in time between fixed ends: nothing is learned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearGamma {
    /// `γ(0)`, −13.3 for 256 grey levels.
    pub min: f64,
    /// `γ(1)`, 5.
    pub max: f64,
}

impl LearnedSchedule for LinearGamma {
    fn gamma(&self, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let slope = self.max - self.min;
        Ok((t.affine(slope, self.min)?, t.affine(0.0, slope)?))
    }

    fn freeze(&self) -> Result<Frozen> {
        Frozen::new(self.min, self.max - self.min, 1.0, Vec::new())
    }
}

/// `γ(t) = b + |w| t` with both numbers learned.
#[derive(Clone, Debug)]
pub struct ScalarGamma {
    /// The slope, `[1]`.
    pub w: Tensor,
    /// `γ(0)`, `[1]`.
    pub b: Tensor,
}

impl LearnedSchedule for ScalarGamma {
    fn gamma(&self, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let slope = self.w.abs()?.broadcast_as(t.shape())?;
        let gamma = (&slope * t)?.broadcast_add(&self.b)?;
        Ok((gamma, slope.contiguous()?))
    }

    fn freeze(&self) -> Result<Frozen> {
        Frozen::new(number(&self.b)?, number(&self.w)?.abs(), 1.0, Vec::new())
    }
}

/// A monotone network with one hidden layer beside a straight line.
///
/// ```text
/// γ̃(t) = b₁ + |w₁| t + 1/F Σ_i |w₃ᵢ| (2 sigmoid(uᵢ) − 1),   uᵢ = |w₂ᵢ| 2(t − ½) + b₂ᵢ
/// γ̃'(t) = |w₁| + 1/F Σ_i |w₃ᵢ| |w₂ᵢ| (1 − tanh²(uᵢ/2))
/// ```
///
/// With `ends` the network decides the shape alone,
/// `γ = γ₀ + (γ₁ − γ₀)(γ̃(t) − γ̃(0))/(γ̃(1) − γ̃(0))` (appendix H); the public code has none.
#[derive(Clone, Debug)]
pub struct MonotoneGamma {
    /// `w₁`, `[1, 1]`; begins as `γ_max − γ_min`.
    pub l1_kernel: Tensor,
    /// `b₁`, `[1]`; begins as `γ_min`.
    pub l1_bias: Tensor,
    /// `w₂`, `[1, F]`; F is 1024 in the paper.
    pub l2_kernel: Tensor,
    /// `b₂`, `[F]`.
    pub l2_bias: Tensor,
    /// `w₃`, `[F, 1]`.
    pub l3_kernel: Tensor,
    /// `γ₀` and `γ₁`, `[1]` each.
    pub ends: Option<(Tensor, Tensor)>,
}

impl MonotoneGamma {
    /// The schedule whose interior does not learn: for the bound, which trains the ends.
    pub fn learning_ends(&self) -> Self {
        Self {
            l1_kernel: self.l1_kernel.detach(),
            l1_bias: self.l1_bias.detach(),
            l2_kernel: self.l2_kernel.detach(),
            l2_bias: self.l2_bias.detach(),
            l3_kernel: self.l3_kernel.detach(),
            ends: self.ends.clone(),
        }
    }

    /// The schedule whose ends do not learn: for the variance, which trains the interior.
    pub fn learning_interior(&self) -> Self {
        let detached = |(a, b): &(Tensor, Tensor)| (a.detach(), b.detach());
        Self {
            ends: self.ends.as_ref().map(detached),
            ..self.clone()
        }
    }

    /// `γ̃` and its derivative, `[B]` each.
    fn free(&self, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let t = t.unsqueeze(1)?;
        let features = self.l2_bias.dim(0)? as f64;
        let (w1, w2) = (self.l1_kernel.abs()?, self.l2_kernel.abs()?);
        let w3 = self.l3_kernel.abs()?.affine(1.0 / features, 0.0)?;
        let u = t
            .affine(2.0, -1.0)?
            .matmul(&w2)?
            .broadcast_add(&self.l2_bias)?;
        // 2 sigmoid(u) − 1, without overflow at either end.
        let h = u.affine(0.5, 0.0)?.tanh()?;
        let gamma = (t.matmul(&w1)?.broadcast_add(&self.l1_bias)? + h.matmul(&w3)?)?;
        let steep = h.sqr()?.affine(-1.0, 1.0)?.broadcast_mul(&w2)?;
        let slope = steep.matmul(&w3)?.broadcast_add(&w1)?;
        Ok((gamma.squeeze(1)?, slope.squeeze(1)?))
    }
}

impl LearnedSchedule for MonotoneGamma {
    fn gamma(&self, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let (gamma, slope) = self.free(t)?;
        let Some((g0, g1)) = &self.ends else {
            return Ok((gamma, slope));
        };
        let ends = Tensor::new(&[0.0, 1.0], t.device())?.to_dtype(t.dtype())?;
        let (outer, _) = self.free(&ends)?;
        let (low, high) = (outer.narrow(0, 0, 1)?, outer.narrow(0, 1, 1)?);
        let stretch = ((g1 - g0)? / (high - &low)?)?;
        let gamma = gamma.broadcast_sub(&low)?.broadcast_mul(&stretch)?;
        Ok((gamma.broadcast_add(g0)?, slope.broadcast_mul(&stretch)?))
    }

    fn freeze(&self) -> Result<Frozen> {
        let [w2, b2, w3] = [&self.l2_kernel, &self.l2_bias, &self.l3_kernel].map(numbers);
        let (w2, b2, w3) = (w2?, b2?, w3?);
        let features = b2.len() as f64;
        let bumps = w2
            .iter()
            .zip(&b2)
            .zip(&w3)
            .map(|((w2, b2), w3)| [w2.abs(), *b2, w3.abs() / features])
            .collect();
        let (b1, w1) = (number(&self.l1_bias)?, number(&self.l1_kernel)?.abs());
        let free = Frozen::new(b1, w1, 1.0, bumps)?;
        let Some((g0, g1)) = &self.ends else {
            return Ok(free);
        };
        let (low, high) = (free.gamma(0.0).0, free.gamma(1.0).0);
        let stretch = (number(g1)? - number(g0)?) / (high - low);
        let shift = number(g0)? / stretch - low;
        Frozen::new(free.bias + shift, free.slope, stretch, free.bumps)
    }
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn number(t: &Tensor) -> Result<f64> {
    let values = numbers(t)?;
    values.first().copied().ok_or_else(|| {
        Report::new("schedule parameter", "an empty tensor")
            .expected("one number")
            .config()
    })
}

/// A learned schedule in f64, as a [`Schedule`] over `[0, 1]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Frozen {
    bias: f64,
    slope: f64,
    stretch: f64,
    /// `[|w₂|, b₂, |w₃|/F]` of every feature.
    bumps: Vec<[f64; 3]>,
}

impl Frozen {
    fn new(bias: f64, slope: f64, stretch: f64, bumps: Vec<[f64; 3]>) -> Result<Self> {
        let ours = Self {
            bias,
            slope,
            stretch,
            bumps,
        };
        let (low, high) = (ours.gamma(0.0).0, ours.gamma(1.0).0);
        if high.is_nan() || high <= low {
            return Err(Report::new("gamma", format!("{low} at 0, {high} at 1"))
                .expected("numbers that rise")
                .remedy("begin with gamma_min = -13.3 and gamma_max = 5")
                .numeric());
        }
        Ok(ours)
    }

    /// `γ(t)` and `γ'(t)`.
    pub fn gamma(&self, t: f64) -> (f64, f64) {
        let start = (self.bias + self.slope * t, self.slope);
        let add = |(value, slope): (f64, f64), [w2, b2, w3]: &[f64; 3]| {
            let h = (0.5 * (w2 * (2.0 * t - 1.0) + b2)).tanh();
            (value + w3 * h, slope + w3 * w2 * (1.0 - h * h))
        };
        let (value, slope) = self.bumps.iter().fold(start, add);
        (self.stretch * value, self.stretch * slope)
    }
}

impl Schedule for Frozen {
    fn at(&self, t: f64) -> Point {
        Point::from_log_snr(t, -self.gamma(t).0)
    }

    fn rates(&self, t: f64) -> Rates {
        // d ln α/dt = −½ σ² γ', and g² = −2 d ln α/dt under VP.
        let g2 = self.at(t).sigma.powi(2) * self.gamma(t).1;
        Rates {
            d_log_alpha: -0.5 * g2,
            g2,
        }
    }

    fn at_log_snr(&self, l: f64) -> Point {
        let t = bisect(0.0, 1.0, -l, |t| self.gamma(t).0);
        self.at(t)
    }

    fn span(&self) -> (f64, f64) {
        (0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::gradcheck::gradcheck;
    use candle_core::Device;
    use diffusion_ops::rng::{Key, stream};

    fn draw(item: u64, shape: &[usize], scale: f64) -> Tensor {
        let n = shape.iter().product();
        let z = Key::new(3, stream::TEST).item(item).normal(n);
        let z: Vec<f64> = z.iter().map(|z| z * scale).collect();
        Tensor::from_vec(z, shape, &Device::Cpu).unwrap()
    }

    fn monotone(ends: bool) -> MonotoneGamma {
        let one = |v: f64| Tensor::new(&[v], &Device::Cpu).unwrap();
        MonotoneGamma {
            l1_kernel: one(6.0).unsqueeze(0).unwrap(),
            l1_bias: one(-4.0),
            l2_kernel: draw(1, &[1, 8], 3.0),
            l2_bias: draw(2, &[8], 2.0),
            l3_kernel: draw(3, &[8, 1], 9.0),
            ends: ends.then(|| (one(-7.0), one(5.0))),
        }
    }

    fn all() -> Vec<Box<dyn LearnedSchedule>> {
        let one = |v: f64| Tensor::new(&[v], &Device::Cpu).unwrap();
        vec![
            Box::new(LinearGamma {
                min: -7.0,
                max: 5.0,
            }),
            Box::new(ScalarGamma {
                w: one(-12.0),
                b: one(-7.0),
            }),
            Box::new(monotone(false)),
            Box::new(monotone(true)),
        ]
    }

    #[test]
    fn rises_with_its_derivative_and_freezes_to_itself() {
        let times: Vec<f64> = (0..=20).map(|i| f64::from(i) / 20.0).collect();
        let t = Tensor::new(times.clone(), &Device::Cpu).unwrap();
        for (i, schedule) in all().iter().enumerate() {
            let (gamma, slope) = schedule.gamma(&t).unwrap();
            let (gamma, slope) = (numbers(&gamma).unwrap(), numbers(&slope).unwrap());
            assert!(gamma.windows(2).all(|w| w[1] > w[0]), "{i}");
            let frozen = schedule.freeze().unwrap();
            for ((t, g), s) in times.iter().zip(&gamma).zip(&slope) {
                let ours = frozen.gamma(*t);
                assert!(
                    (ours.0 - g).abs() < 1e-11 && (ours.1 - s).abs() < 1e-10,
                    "{i} at {t}"
                );
                let h = 1e-6;
                let quotient = (frozen.gamma(t + h).0 - frozen.gamma(t - h).0) / (2.0 * h);
                assert!((quotient - s).abs() < 1e-6 * s.abs(), "{i} at {t}");
                let p = frozen.at(*t);
                assert!((frozen.at_log_snr(p.log_snr()).t - t).abs() < 1e-9);
                let h = 1e-5;
                let ln = |t: f64| frozen.at(t).alpha.ln();
                let rate = frozen.rates(*t);
                let quotient = (ln(t + h) - ln(t - h)) / (2.0 * h);
                assert!((quotient - rate.d_log_alpha).abs() < 1e-6 * rate.g2.max(1.0));
            }
        }
        let (g, _) = monotone(true).gamma(&t).unwrap();
        let g = numbers(&g).unwrap();
        assert!((g[0] + 7.0).abs() < 1e-12 && (g[20] - 5.0).abs() < 1e-12);
        let falling = LinearGamma { min: 1.0, max: 0.0 };
        assert!(falling.freeze().is_err());
    }

    #[test]
    fn gradients_are_difference_quotients_and_stop_where_told() {
        let t = Tensor::new(&[0.1, 0.7f64], &Device::Cpu).unwrap();
        let of = |g: &MonotoneGamma| -> Result<Tensor> {
            let (gamma, slope) = g.gamma(&t)?;
            Ok((gamma.sqr()?.sum_all()? + slope.sum_all()?)?)
        };
        let whole = monotone(true);
        let kernel = |k: &Tensor| MonotoneGamma {
            l2_kernel: k.clone(),
            ..whole.clone()
        };
        let end = |e: &Tensor| MonotoneGamma {
            ends: Some((whole.l1_bias.clone(), e.clone())),
            ..whole.clone()
        };
        let (k, e) = (
            &whole.l2_kernel,
            Tensor::new(&[4.0f64], &Device::Cpu).unwrap(),
        );
        assert!(gradcheck(k, |k| of(&kernel(k))).unwrap() < 1e-6);
        assert!(gradcheck(&e, |e| of(&end(e))).unwrap() < 1e-6);
        let slope = |f: &dyn Fn(&Tensor) -> Result<Tensor>, x: &Tensor| {
            crate::tensor::gradient(x, |x| f(x)).is_ok()
        };
        assert!(!slope(&|k| of(&kernel(k).learning_ends()), k));
        assert!(slope(&|k| of(&kernel(k).learning_interior()), k));
        assert!(slope(&|e| of(&end(e).learning_ends()), &e));
        assert!(!slope(&|e| of(&end(e).learning_interior()), &e));
    }
}
