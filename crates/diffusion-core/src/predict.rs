//! What a network says, read as any of the six things it may mean.
//!
//! With `x = α x₀ + σ ε`, knowing `x` and one of these fixes all the others (Salimans and Ho 2022,
//! appendix D; the general form for `α² + σ² ≠ 1` is used here throughout):
//!
//! ```text
//! kind      definition              x₀                              ε
//! epsilon   ε                       (x − σ ε)/α                     ε
//! x0        x₀                      x₀                              (x − α x₀)/σ
//! velocity  v = α ε − σ x₀          (α x − σ v)/(α² + σ²)           (σ x + α v)/(α² + σ²)
//! flow      u = ε − x₀              (x − σ u)/(α + σ)               (x + α u)/(α + σ)
//! score     s = −ε/σ                (x + σ² s)/α  (Tweedie)         −σ s
//! edm       F, see [`Kind::Edm`]    c_skip x/α + c_out F            (x − α x₀)/σ
//! ```

use crate::error::{Report, Result};
use crate::schedule::Point;
use crate::tensor::{At, combine};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// What the value of a [`Prediction`] is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The noise `ε`.
    Epsilon,
    /// The data `x₀`.
    X0,
    /// `v = α ε − σ x₀`.
    Velocity,
    /// `u = ε − x₀`, the velocity of rectified flow.
    Flow,
    /// `∇ log p_t(x)`.
    Score,
    /// The raw output `F` of an EDM-preconditioned network (Karras et al. 2022, eq. 7), with
    /// `ŝ = σ/α`:
    ///
    /// ```text
    /// x₀ = c_skip x/α + c_out F,   c_skip = s_d²/(ŝ² + s_d²),   c_out = ± ŝ s_d/√(ŝ² + s_d²)
    /// ```
    Edm {
        /// Standard deviation of the data, `s_d`.
        sigma_data: f64,
        /// Whether `c_out` is negative: `F` is then a velocity, and with `s_d = 1` exactly the
        /// `v` of a variance-preserving network seen from a variance-exploding frame.
        negative: bool,
    },
}

/// A network's belief about a noisy batch.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// What `value` is.
    pub kind: Kind,
    /// The value, shaped as `x`.
    pub value: Tensor,
    /// A corrected `x₀` (clipped, thresholded) that replaces the one that follows from `value`.
    pub x0: Option<Tensor>,
    /// The network's mixing weight between the two log-variances of a learned reverse variance,
    /// in `[−1, 1]`.
    pub var_mix: Option<Tensor>,
}

impl Prediction {
    /// A prediction with nothing corrected.
    pub fn new(kind: Kind, value: Tensor) -> Self {
        Self {
            kind,
            value,
            x0: None,
            var_mix: None,
        }
    }

    /// The data, `[B, …]`; the corrected one where there is one.
    ///
    /// # Errors
    /// `Numeric` when the kind cannot give it at this point (noise known, but no signal in `x`).
    pub fn x0(&self, x: &Tensor, at: At<'_>) -> Result<Tensor> {
        match &self.x0 {
            Some(x0) => Ok(x0.clone()),
            None => self.raw_x0(x, at),
        }
    }

    /// The data as it follows from `value`, whatever was corrected.
    ///
    /// # Errors
    /// As [`Prediction::x0`].
    pub fn raw_x0(&self, x: &Tensor, at: At<'_>) -> Result<Tensor> {
        let rule: fn(&Point) -> (f64, f64) = match self.kind {
            Kind::X0 => return Ok(self.value.clone()),
            Kind::Epsilon => |p| (1.0 / p.alpha, -p.sigma / p.alpha),
            Kind::Score => |p| (1.0 / p.alpha, p.sigma * p.sigma / p.alpha),
            Kind::Velocity => |p| {
                let n = p.alpha * p.alpha + p.sigma * p.sigma;
                (p.alpha / n, -p.sigma / n)
            },
            Kind::Flow => |p| (1.0 / (p.alpha + p.sigma), -p.sigma / (p.alpha + p.sigma)),
            Kind::Edm {
                sigma_data,
                negative,
            } => {
                let sign = if negative { -1.0 } else { 1.0 };
                return combine(
                    &at.coef(|p| edm_skip(p.sigma_hat(), sigma_data) / p.alpha),
                    x,
                    &at.coef(|p| sign * edm_out(p.sigma_hat(), sigma_data)),
                    &self.value,
                );
            }
        };
        if matches!(self.kind, Kind::Epsilon | Kind::Score) && at.any(|p| p.alpha == 0.0) {
            return Err(self.undefined("x₀", "alpha = 0", "a velocity or x0 prediction"));
        }
        combine(
            &at.coef(|p| rule(p).0),
            x,
            &at.coef(|p| rule(p).1),
            &self.value,
        )
    }

    /// The noise as it follows from `value`, `[B, …]`.
    ///
    /// # Errors
    /// `Numeric` when the kind cannot give it at this point (data known, but no noise in `x`).
    pub fn epsilon(&self, x: &Tensor, at: At<'_>) -> Result<Tensor> {
        match self.kind {
            Kind::Epsilon => Ok(self.value.clone()),
            Kind::Score => at.coef(|p| -p.sigma).times(&self.value),
            Kind::Velocity => {
                let norm = |p: &Point| p.alpha * p.alpha + p.sigma * p.sigma;
                combine(
                    &at.coef(|p| p.sigma / norm(p)),
                    x,
                    &at.coef(|p| p.alpha / norm(p)),
                    &self.value,
                )
            }
            Kind::Flow => combine(
                &at.coef(|p| 1.0 / (p.alpha + p.sigma)),
                x,
                &at.coef(|p| p.alpha / (p.alpha + p.sigma)),
                &self.value,
            ),
            Kind::X0 | Kind::Edm { .. } => {
                if at.any(|p| p.sigma == 0.0) {
                    return Err(self.undefined("epsilon", "sigma = 0", "a point with noise in it"));
                }
                epsilon_from_x0(x, &self.raw_x0(x, at)?, at)
            }
        }
    }

    /// The noise that makes `x` out of [`Prediction::x0`], so that a corrected `x₀` counts.
    ///
    /// # Errors
    /// As [`Prediction::epsilon`].
    pub fn epsilon_of_x0(&self, x: &Tensor, at: At<'_>) -> Result<Tensor> {
        match &self.x0 {
            Some(_) if at.any(|p| p.sigma == 0.0) => {
                Err(self.undefined("epsilon", "sigma = 0", "a point with noise in it"))
            }
            Some(x0) => epsilon_from_x0(x, x0, at),
            None => self.epsilon(x, at),
        }
    }

    /// `c₀ x̂₀ + c_ε ε̂`, with the noise that makes `x` out of a corrected `x̂₀`, where there is one.
    ///
    /// In one pass over the data where both beliefs are combinations of `x` and `value`; samplers
    /// that step along a straight line need no more.
    ///
    /// # Errors
    /// As [`Prediction::x0`] and [`Prediction::epsilon`].
    pub fn along(&self, x: &Tensor, p: &Point, c0: f64, c_epsilon: f64) -> Result<Tensor> {
        match self.linear(p) {
            Some([a, b, c, d]) => Ok(diffusion_ops::combine(&[
                (c0 * a + c_epsilon * c, x),
                (c0 * b + c_epsilon * d, &self.value),
            ])?),
            None => {
                let at = At::All(*p);
                let x0 = self.x0(x, at)?;
                if c_epsilon == 0.0 {
                    return crate::tensor::lincomb(c0, &x0, 0.0, &x0);
                }
                crate::tensor::lincomb(c0, &x0, c_epsilon, &self.epsilon_of_x0(x, at)?)
            }
        }
    }

    /// `[a, b, c, d]` with `x̂₀ = a x + b value` and `ε̂ = c x + d value`, where both are defined and
    /// `x̂₀` was not corrected.
    pub(crate) fn linear(&self, p: &Point) -> Option<[f64; 4]> {
        let (alpha, sigma) = (p.alpha, p.sigma);
        if alpha == 0.0 || sigma == 0.0 || self.x0.is_some() {
            return None;
        }
        let from_x0 = |a: f64, b: f64| [a, b, (1.0 - alpha * a) / sigma, -alpha * b / sigma];
        Some(match self.kind {
            Kind::Epsilon => [1.0 / alpha, -sigma / alpha, 0.0, 1.0],
            Kind::Score => [1.0 / alpha, sigma * sigma / alpha, 0.0, -sigma],
            Kind::X0 => from_x0(0.0, 1.0),
            Kind::Velocity => {
                let n = alpha * alpha + sigma * sigma;
                [alpha / n, -sigma / n, sigma / n, alpha / n]
            }
            Kind::Flow => {
                let n = alpha + sigma;
                [1.0 / n, -sigma / n, 1.0 / n, alpha / n]
            }
            Kind::Edm {
                sigma_data,
                negative,
            } => {
                let sign = if negative { -1.0 } else { 1.0 };
                from_x0(
                    edm_skip(p.sigma_hat(), sigma_data) / alpha,
                    sign * edm_out(p.sigma_hat(), sigma_data),
                )
            }
        })
    }

    /// The score `−ε/σ`.
    ///
    /// # Errors
    /// As [`Prediction::epsilon`].
    pub fn score(&self, x: &Tensor, at: At<'_>) -> Result<Tensor> {
        if self.kind == Kind::Score && self.x0.is_none() {
            return Ok(self.value.clone());
        }
        if at.any(|p| p.sigma == 0.0) {
            return Err(self.undefined("the score", "sigma = 0", "a point with noise in it"));
        }
        at.coef(|p| -1.0 / p.sigma)
            .times(&self.epsilon_of_x0(x, at)?)
    }

    /// The same belief as a value of another kind; corrections of `x₀` are kept.
    ///
    /// # Errors
    /// `Numeric` when the kinds cannot be converted at this point.
    pub fn into_kind(self, kind: Kind, x: &Tensor, at: At<'_>) -> Result<Self> {
        if kind == self.kind {
            return Ok(self);
        }
        let value = match kind {
            Kind::Epsilon => self.epsilon(x, at)?,
            Kind::X0 => self.raw_x0(x, at)?,
            Kind::Score => {
                if at.any(|p| p.sigma == 0.0) {
                    return Err(self.undefined(
                        "the score",
                        "sigma = 0",
                        "a point with noise in it",
                    ));
                }
                at.coef(|p| -1.0 / p.sigma).times(&self.epsilon(x, at)?)?
            }
            // With both parts known the target needs no division; where only one is
            // defined (an end of the process) the other one has weight zero.
            Kind::Velocity | Kind::Flow | Kind::Edm { .. } => {
                let x0 = self.raw_x0(x, at)?;
                let epsilon = match self.epsilon(x, at) {
                    Ok(epsilon) => epsilon,
                    Err(_) if kind == Kind::Velocity => x0.zeros_like()?,
                    Err(error) => return Err(error),
                };
                target(kind, &x0, &epsilon, at)?
            }
        };
        Ok(Self {
            kind,
            value,
            ..self
        })
    }

    fn undefined(&self, what: &str, found: &str, expected: &str) -> crate::error::Error {
        Report::new(
            format!("{what} from a prediction of {:?}", self.kind),
            found,
        )
        .expected(expected)
        .remedy("use a grid that avoids this end, or another prediction kind")
        .numeric()
    }
}

fn epsilon_from_x0(x: &Tensor, x0: &Tensor, at: At<'_>) -> Result<Tensor> {
    combine(
        &at.coef(|p| 1.0 / p.sigma),
        x,
        &at.coef(|p| -p.alpha / p.sigma),
        x0,
    )
}

/// `c_skip = s_d²/(σ̂² + s_d²)`.
pub fn edm_skip(sigma_hat: f64, sigma_data: f64) -> f64 {
    sigma_data.powi(2) / (sigma_hat.powi(2) + sigma_data.powi(2))
}

/// `c_out = σ̂ s_d/√(σ̂² + s_d²)`.
pub fn edm_out(sigma_hat: f64, sigma_data: f64) -> f64 {
    sigma_hat * sigma_data / sigma_hat.hypot(sigma_data)
}

/// What a network of this kind should say: the training target for known `x₀` and `ε`.
///
/// # Errors
/// When shapes differ, or the kind is undefined at a point without noise.
pub fn target(kind: Kind, x0: &Tensor, epsilon: &Tensor, at: At<'_>) -> Result<Tensor> {
    match kind {
        Kind::Epsilon => Ok(epsilon.clone()),
        Kind::X0 => Ok(x0.clone()),
        Kind::Velocity => combine(&at.coef(|p| p.alpha), epsilon, &at.coef(|p| -p.sigma), x0),
        Kind::Flow => Ok((epsilon - x0)?),
        Kind::Score => at.coef(|p| -1.0 / p.sigma).times(epsilon),
        Kind::Edm {
            sigma_data,
            negative,
        } => {
            // F = (x₀ − c_skip (x₀ + σ̂ ε))/c_out, with the cancellation in 1 − c_skip done by hand:
            // F = (σ̂ x₀ − s_d² ε)/(s_d √(σ̂² + s_d²)).
            let sign = if negative { -1.0 } else { 1.0 };
            let root = |p: &Point| p.sigma_hat().hypot(sigma_data);
            combine(
                &at.coef(|p| sign * p.sigma_hat() / (sigma_data * root(p))),
                x0,
                &at.coef(|p| -sign * sigma_data / root(p)),
                epsilon,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use diffusion_ops::rng::{Key, stream};
    use proptest::prelude::*;

    const KINDS: [Kind; 7] = [
        Kind::Epsilon,
        Kind::X0,
        Kind::Velocity,
        Kind::Flow,
        Kind::Score,
        Kind::Edm {
            sigma_data: 0.5,
            negative: false,
        },
        Kind::Edm {
            sigma_data: 1.0,
            negative: true,
        },
    ];

    fn pair(seed: u64, dtype: DType) -> (Tensor, Tensor) {
        let draw = |item| {
            let z = Key::new(seed, stream::TEST).item(item).normal(12);
            Tensor::from_vec(z, (2, 6), &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap()
        };
        (draw(0), draw(1))
    }

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Every kind gives back x₀ and ε over 16 decades of SNR, in f32 and f64.
        #[test]
        fn every_kind_gives_back_both_parts(
            seed in 0u64..1000, log10_snr in -8.0f64..8.0, kind in 0usize..7, ve in any::<bool>(), single in any::<bool>()
        ) {
            let mut p = Point::from_log_snr(0.0, log10_snr * 10f64.ln());
            if ve { p = Point::new(0.0, 1.0, p.sigma_hat()); }
            let (dtype, eps) = if single { (DType::F32, f64::from(f32::EPSILON)) } else { (DType::F64, f64::EPSILON) };
            let (x0, epsilon) = pair(seed, dtype);
            let at = At::All(p);
            let x = combine(&at.coef(|p| p.alpha), &x0, &at.coef(|p| p.sigma), &epsilon).unwrap();
            let said = Prediction::new(KINDS[kind], target(KINDS[kind], &x0, &epsilon, at).unwrap());
            let bound = 16.0 * eps * 4.0 * 1f64.max(p.sigma / p.alpha).max(p.alpha / p.sigma);
            let e0 = worst(&said.x0(&x, at).unwrap(), &x0);
            prop_assert!(e0 <= bound, "{:?} x0 off by {e0}, bound {bound}", KINDS[kind]);
            let e1 = worst(&said.epsilon(&x, at).unwrap(), &epsilon);
            prop_assert!(e1 <= bound, "{:?} eps off by {e1}, bound {bound}", KINDS[kind]);
            // And a second conversion through every other kind.
            for other in KINDS {
                let scale = match other {
                    Kind::Score => 1.0 / p.sigma,
                    Kind::Velocity => p.sigma,
                    _ => 1.0,
                };
                let there = said.clone().into_kind(other, &x, at).unwrap();
                let exact = target(other, &x0, &epsilon, at).unwrap();
                let e = worst(&there.value, &exact);
                prop_assert!(e <= 4.0 * bound * scale.max(1.0), "{:?} -> {other:?} off by {e}", KINDS[kind]);
            }
        }
    }

    /// The one pass is the two beliefs, for every kind, corrected or not.
    #[test]
    fn along_a_line_both_beliefs_are_one_combination() {
        let (x0, epsilon) = pair(4, DType::F64);
        for p in [Point::from_log_snr(0.0, 0.7), Point::new(0.0, 1.0, 3.0)] {
            let at = At::All(p);
            let x = combine(&at.coef(|p| p.alpha), &x0, &at.coef(|p| p.sigma), &epsilon).unwrap();
            for kind in KINDS {
                let mut said = Prediction::new(kind, target(kind, &x0, &epsilon, at).unwrap());
                let two = |said: &Prediction| {
                    let (a, b) = (
                        said.x0(&x, at).unwrap(),
                        said.epsilon_of_x0(&x, at).unwrap(),
                    );
                    crate::tensor::lincomb(0.3, &a, -1.7, &b).unwrap()
                };
                let one = said.along(&x, &p, 0.3, -1.7).unwrap();
                assert!(worst(&one, &two(&said)) < 1e-13, "{kind:?}");
                said.x0 = Some(x0.clamp(-0.5, 0.5).unwrap());
                let one = said.along(&x, &p, 0.3, -1.7).unwrap();
                assert!(worst(&one, &two(&said)) < 1e-13, "{kind:?}, corrected");
            }
        }
    }

    #[test]
    fn zero_terminal_snr_has_no_nan() {
        let (x0, epsilon) = pair(1, DType::F64);
        let at = At::All(Point::new(999.0, 0.0, 1.0));
        let v = Prediction::new(
            Kind::Velocity,
            target(Kind::Velocity, &x0, &epsilon, at).unwrap(),
        );
        assert!(worst(&v.x0(&epsilon, at).unwrap(), &x0) < 1e-15);
        assert!(worst(&v.epsilon(&epsilon, at).unwrap(), &epsilon) < 1e-15);
        let e = Prediction::new(Kind::Epsilon, epsilon.clone());
        assert!(
            e.x0(&epsilon, at)
                .unwrap_err()
                .to_string()
                .contains("alpha = 0")
        );
    }

    #[test]
    fn a_corrected_x0_moves_the_rederived_noise_only() {
        let (x0, epsilon) = pair(2, DType::F64);
        let at = At::All(Point::from_log_snr(0.0, 0.3));
        let x = combine(&at.coef(|p| p.alpha), &x0, &at.coef(|p| p.sigma), &epsilon).unwrap();
        let mut said = Prediction::new(Kind::Epsilon, epsilon.clone());
        said.x0 = Some(x0.clamp(-0.5, 0.5).unwrap());
        assert_eq!(worst(&said.epsilon(&x, at).unwrap(), &epsilon), 0.0);
        let rederived = said.epsilon_of_x0(&x, at).unwrap();
        let again = combine(
            &at.coef(|p| p.alpha),
            &said.x0(&x, at).unwrap(),
            &at.coef(|p| p.sigma),
            &rederived,
        );
        assert!(worst(&again.unwrap(), &x) < 1e-14);
    }

    #[test]
    fn the_score_of_a_normal_law() {
        // x₀ ~ N(0, 1) under VP stays N(0, 1): the score is −x and ε* = σ x.
        let (x, _) = pair(3, DType::F64);
        let at = At::All(Point::from_log_snr(0.0, -0.7));
        let said = Prediction::new(Kind::Epsilon, at.coef(|p| p.sigma).times(&x).unwrap());
        assert!(worst(&said.score(&x, at).unwrap(), &x.neg().unwrap()) < 1e-14);
    }
}
