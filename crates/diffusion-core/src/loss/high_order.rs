//! High-order denoising score matching (Lu et al. 2022, "Maximum likelihood training for score-based
//! diffusion ODEs by high-order denoising score matching").
//!
//! The likelihood of the probability flow depends on the score `s`, its Jacobian `J` and `∇ tr J`. With
//! `x = α x₀ + σ z`, and `ŝ`, `Ĵ` the current estimates cut off from the gradient, `γ = z + σ ŝ`:
//!
//! ```text
//! order 1   ‖σ s + z‖²
//! order 2   ‖σ² J + I − γ γᵀ‖²_F   and   |σ² tr J + D − ‖γ‖²|²
//! order 3   ‖σ³ ∇ tr J + ‖γ‖² γ − (σ² tr Ĵ + D) γ − 2 (σ² Ĵ + I) γ‖²
//! ```
//!
//! With a probe `v` of signs (Hutchinson): `J → J v`, `I → v`, `γ γᵀ → (γ·v) γ`, `tr J → vᵀ J v`,
//! `D → v·v`, `‖γ‖² → (γ·v)²`.
//!
//! Gradients of gradients do not exist on the tape. Derivatives along a fixed direction are central
//! differences of network calls, through which the ordinary backward pass goes:
//!
//! ```text
//! J v ≈ (s(x + h v) − s(x − h v))/2h,   ∂²_v s ≈ (s(x + h v) − 2 s(x) + s(x − h v))/h²
//! ```
//!
//! `∂²_v s` is `∇(vᵀ J v)` where the Jacobian is symmetric, as that of a true score is; the same holds for
//! the exact form, whose sum over the axes is the Laplacian of `s` for `∇ tr J`. `h` is a part of `σ`.

use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::marginal;
use crate::schedule::Point;
use crate::tensor::{At, Coef, combine};
use candle_core::{Device, Tensor};

/// How many orders are matched.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Orders {
    /// The score.
    First,
    /// And its Jacobian.
    Second,
    /// And the gradient of its trace.
    Third,
}

/// The objective.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HighOrder {
    /// Up to which order.
    pub orders: Orders,
    /// The step of the differences in units of `σ`: 1e-2 in f32, 1e-3 in f64.
    pub step: f64,
}

/// The losses of the items, `[B]` each, scaled by the number of dimensions as in the authors' code: the
/// squared norms by `1/D`, the trace and the third order by `1/D²`.
#[derive(Clone, Debug)]
pub struct HighOrderLosses {
    /// Order 1.
    pub first: Tensor,
    /// Order 2, the Jacobian.
    pub second: Option<Tensor>,
    /// Order 2, its trace.
    pub trace: Option<Tensor>,
    /// Order 3.
    pub third: Option<Tensor>,
}

impl HighOrderLosses {
    /// The plain sum, `[B]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn total(&self) -> Result<Tensor> {
        let mut total = self.first.clone();
        for part in [&self.second, &self.trace, &self.third]
            .into_iter()
            .flatten()
        {
            total = (total + part)?;
        }
        Ok(total)
    }
}

/// What the network says around a point: everything that the losses need.
struct Local<'a> {
    denoiser: &'a dyn Denoiser,
    x: Tensor,
    points: &'a [Point],
    score: Tensor,
    h: Vec<f64>,
}

impl<'a> Local<'a> {
    fn new(
        denoiser: &'a dyn Denoiser,
        x: Tensor,
        points: &'a [Point],
        step: f64,
        call: &mut Call<'_>,
    ) -> Result<Self> {
        let at = At::Each(points);
        let score = denoiser.predict(&x, at, call)?.score(&x, at)?;
        Ok(Self {
            denoiser,
            x,
            points,
            score,
            h: points.iter().map(|p| step * p.sigma).collect(),
        })
    }

    /// `J v` and `∂²_v s` for a direction `v`.
    fn along(&self, v: &Tensor, call: &mut Call<'_>) -> Result<(Tensor, Tensor)> {
        let at = At::Each(self.points);
        let mut side = |sign: f64| -> Result<Tensor> {
            let h = Coef::Each(self.h.iter().map(|h| sign * h).collect());
            let x = combine(&Coef::All(1.0), &self.x, &h, v)?;
            self.denoiser.predict(&x, at, call)?.score(&x, at)
        };
        let (up, down) = (side(1.0)?, side(-1.0)?);
        let first: Vec<f64> = self.h.iter().map(|h| 0.5 / h).collect();
        let second: Vec<f64> = self.h.iter().map(|h| h.powi(-2)).collect();
        let slope = Coef::Each(first).times(&(&up - &down)?)?;
        let middle = combine(
            &Coef::All(1.0),
            &(up + down)?,
            &Coef::All(-2.0),
            &self.score,
        )?;
        Ok((slope, Coef::Each(second).times(&middle)?))
    }
}

impl HighOrder {
    /// The losses with one probe an item, `v` of signs shaped as `x0`: three network calls.
    ///
    /// # Errors
    /// `Config` when the step is not positive, and whatever the model refuses.
    pub fn sliced(
        &self,
        denoiser: &dyn Denoiser,
        x0: &Tensor,
        z: &Tensor,
        v: &Tensor,
        points: &[Point],
        call: &mut Call<'_>,
    ) -> Result<HighOrderLosses> {
        let (local, gamma, mut losses) = self.begin(denoiser, x0, z, points, call)?;
        if self.orders == Orders::First {
            return Ok(losses);
        }
        let (jv, vvs) = local.along(v, call)?;
        let d = dims(x0);
        let power = |k: i32| Coef::Each(points.iter().map(|p| p.sigma.powi(k)).collect());
        let along = dot(&gamma, v)?;
        // σ² J v + v − (γ·v) γ
        let jacobian = (power(2).times(&jv)? + v)?;
        let second = (&jacobian - scaled(&along, &gamma)?)?;
        let trace = (dot(&jacobian, v)? - along.sqr()?)?;
        if self.orders == Orders::Third {
            let (jacobian, trace) = (jacobian.detach(), dot(&jacobian, v)?.detach());
            let target = (scaled(&(along.sqr()? - trace)?, &gamma)?
                - scaled(&along.affine(2.0, 0.0)?, &jacobian)?)?;
            let third = (power(3).times(&vvs)? + target)?;
            losses.third = Some(mean_square(&third, d * d)?);
        }
        losses.second = Some(mean_square(&second, d)?);
        losses.trace = Some(trace.affine(1.0 / d, 0.0)?.sqr()?);
        Ok(losses)
    }

    /// The losses with the whole Jacobian: `2 D + 1` network calls, for few dimensions.
    ///
    /// # Errors
    /// As [`HighOrder::sliced`].
    pub fn exact(
        &self,
        denoiser: &dyn Denoiser,
        x0: &Tensor,
        z: &Tensor,
        points: &[Point],
        call: &mut Call<'_>,
    ) -> Result<HighOrderLosses> {
        let (local, gamma, mut losses) = self.begin(denoiser, x0, z, points, call)?;
        if self.orders == Orders::First {
            return Ok(losses);
        }
        let d = dims(x0);
        let power = |k: i32| Coef::Each(points.iter().map(|p| p.sigma.powi(k)).collect());
        let norm = dot(&gamma, &gamma)?;
        let mut frobenius = losses.first.zeros_like()?;
        let mut trace = frobenius.clone();
        let mut laplacian = gamma.zeros_like()?;
        let mut applied = gamma.zeros_like()?;
        for i in 0..d as usize {
            let e = axis(i, x0)?;
            let (column, bend) = local.along(&e, call)?;
            laplacian = (laplacian + bend)?;
            // Column i of σ² J + I.
            let column = (power(2).times(&column)? + &e)?;
            trace = (trace + dot(&column, &e)?)?;
            let part = dot(&gamma, &e)?;
            applied = (applied + scaled(&part, &column.detach())?)?;
            let residual = (column - scaled(&part, &gamma)?)?;
            frobenius = (frobenius + dot(&residual, &residual)?)?;
        }
        if self.orders == Orders::Third {
            let factor = (&norm - trace.detach())?;
            let target = (scaled(&factor, &gamma)? - applied.affine(2.0, 0.0)?)?;
            let third = (power(3).times(&laplacian)? + target)?;
            losses.third = Some(mean_square(&third, d * d)?);
        }
        losses.second = Some(frobenius.affine(1.0 / d, 0.0)?);
        losses.trace = Some((trace - norm)?.affine(1.0 / d, 0.0)?.sqr()?);
        Ok(losses)
    }

    /// The network at the noisy batch, `γ`, and the first order.
    fn begin<'a>(
        &self,
        denoiser: &'a dyn Denoiser,
        x0: &Tensor,
        z: &Tensor,
        points: &'a [Point],
        call: &mut Call<'_>,
    ) -> Result<(Local<'a>, Tensor, HighOrderLosses)> {
        if !(self.step > 0.0 && self.step.is_finite()) {
            return Err(Report::new("high_order: step", self.step)
                .expected("a positive number, about 1e-2")
                .config());
        }
        let x = marginal(x0, z, At::Each(points))?;
        let local = Local::new(denoiser, x, points, self.step, call)?;
        let sigma = Coef::Each(points.iter().map(|p| p.sigma).collect());
        let error = combine(&sigma, &local.score, &Coef::All(1.0), z)?;
        let losses = HighOrderLosses {
            first: mean_square(&error, dims(x0))?,
            second: None,
            trace: None,
            third: None,
        };
        Ok((local, error.detach(), losses))
    }
}

fn dims(x: &Tensor) -> f64 {
    x.dims().iter().skip(1).product::<usize>() as f64
}

/// `‖x‖²/n` of every item.
fn mean_square(x: &Tensor, n: f64) -> Result<Tensor> {
    Ok(x.sqr()?.flatten_from(1)?.sum(1)?.affine(1.0 / n, 0.0)?)
}

/// `a·b` of every item.
fn dot(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok((a * b)?.flatten_from(1)?.sum(1)?)
}

/// Every item times its number.
fn scaled(c: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; x.rank()];
    if let Some(batch) = shape.first_mut() {
        *batch = x.dim(0)?;
    }
    Ok(x.broadcast_mul(&c.reshape(shape)?)?)
}

/// The unit vector of a dimension for every item of a batch.
fn axis(i: usize, like: &Tensor) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    if let Some(batch) = shape.first_mut() {
        *batch = 1;
    }
    let mut e = vec![0.0; shape.iter().product()];
    if let Some(entry) = e.get_mut(i) {
        *entry = 1.0;
    }
    Ok(Tensor::from_vec(e, shape, &Device::Cpu)?
        .to_dtype(like.dtype())?
        .to_device(like.device())?
        .broadcast_as(like.shape())?
        .contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::{Gaussian, Mixture};
    use crate::predict::{Kind, Prediction};
    use candle_core::{DType, Var};

    const THIRD: HighOrder = HighOrder {
        orders: Orders::Third,
        step: 1e-3,
    };

    fn called<T>(n: usize, f: impl FnOnce(&mut Call<'_>) -> Result<T>) -> T {
        let mut noise = CounterNoise::new(3, 0..n as u64);
        f(&mut Call {
            noise: &mut noise,
            items: 0..n as u64,
            tracked: true,
        })
        .unwrap()
    }

    fn normal(n: usize, d: usize, seed: u64) -> Tensor {
        let like = Tensor::zeros((n, d), DType::F64, &Device::Cpu).unwrap();
        CounterNoise::new(seed, 0..n as u64).normal(&like).unwrap()
    }

    fn mean_and_error(x: &Tensor) -> (f64, f64) {
        let v = x.to_vec1::<f64>().unwrap();
        let n = v.len() as f64;
        let mean = v.iter().sum::<f64>() / n;
        let var = v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / n;
        (mean, 4.0 * (var / n).sqrt())
    }

    /// Floors at the exact score of N(0, c²) data: γ = z + σ s is normal with variance r = α² c²/S
    /// given x, and E‖γ γᵀ − r I‖²_F/D = (D + 1) r², E|‖γ‖² − D r|²/D² = 2 r²/D; at order 3 the
    /// target of ∇ tr J = 0 is ‖γ‖² γ − (D + 2) r γ, of mean square r³ (2 D² + 4 D)/D².
    #[test]
    fn the_floors_of_gaussian_data() {
        let (n, d, c) = (8000, 3, 0.7);
        let oracle = Gaussian::new(vec![0.0; d], vec![c; d]);
        let p = Point::new(0.5, 0.8, 0.6);
        let (x0, z) = (normal(n, d, 1).affine(c, 0.0).unwrap(), normal(n, d, 2));
        let points = vec![p; n];
        let losses = called(n, |call| THIRD.exact(&oracle, &x0, &z, &points, call));
        let s = (p.alpha * c).powi(2) + p.sigma.powi(2);
        let (r, d) = ((p.alpha * c).powi(2) / s, d as f64);
        for (name, loss, exact) in [
            ("first", Some(&losses.first), r),
            ("second", losses.second.as_ref(), (d + 1.0) * r * r),
            ("trace", losses.trace.as_ref(), 2.0 * r * r / d),
            (
                "third",
                losses.third.as_ref(),
                (2.0 * d * d + 4.0 * d) / (d * d) * r.powi(3),
            ),
        ] {
            let (mean, error) = mean_and_error(loss.unwrap());
            assert!(
                (mean - exact).abs() < error,
                "{name}: {mean} {exact} ± {error}"
            );
        }
    }

    /// The best linear score for the second order alone is the true one: J → −I/S.
    #[test]
    fn the_second_order_finds_the_slope() {
        let (n, d, c) = (4000, 2, 0.7);
        let p = Point::new(0.5, 0.8, 0.6);
        let s = (p.alpha * c).powi(2) + p.sigma.powi(2);
        let (x0, z) = (normal(n, d, 1).affine(c, 0.0).unwrap(), normal(n, d, 2));
        let points = vec![p; n];
        let v = normal(n, d, 4).sign().unwrap();
        // s = k x with the estimate inside γ at the truth: the gradient in k vanishes there, up to
        // the error of the sample, and the derivative has the slope of a parabola of height 2 σ⁴.
        let slope = |k: f64, sliced: bool| {
            let k = Var::new(&[[k]], &Device::Cpu).unwrap();
            let model = from_fn(|x: &Tensor, _: At<'_>, _: &mut Call<'_>| {
                let value = x.broadcast_mul(k.as_tensor())?;
                Ok(Prediction::new(Kind::Score, value))
            });
            let order = HighOrder {
                orders: Orders::Second,
                step: 1e-3,
            };
            let losses = called(n, |call| {
                if sliced {
                    order.sliced(&model, &x0, &z, &v, &points, call)
                } else {
                    order.exact(&model, &x0, &z, &points, call)
                }
            });
            let loss = losses.second.unwrap().mean_all().unwrap();
            let grads = diffusion_ops::backward(&loss).unwrap();
            let g = grads.get(k.as_tensor()).unwrap();
            g.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0]
        };
        for sliced in [false, true] {
            let at_truth = slope(-1.0 / s, sliced);
            // 2 σ² (σ² k + 1 − γ²) with γ² of mean r: four standard errors of its mean.
            let r = (p.alpha * c).powi(2) / s;
            let error = 4.0 * 2.0 * p.sigma.powi(2) * r * (2.0f64 / n as f64).sqrt();
            assert!(at_truth.abs() < error, "{sliced}: {at_truth} ± {error}");
            // A score half as steep: σ² k + 1 − γ² is ¼ σ²/S in the mean.
            let flat = 0.5 * (p.sigma.powi(4) / s);
            assert!((slope(-0.5 / s, sliced) - flat).abs() < 2.0 * error);
            assert!(flat > 2.0 * error);
        }
    }

    /// Probes average to what the whole Jacobian says, term by term of the residuals.
    #[test]
    fn differences_are_the_derivatives_of_the_score() {
        let oracle = Mixture::new(
            vec![0.4, 0.6],
            vec![vec![-1.0, 0.3], vec![0.8, -0.4]],
            vec![0.4, 0.6],
        )
        .unwrap();
        let points = [Point::new(0.5, 0.8, 0.6)];
        let x = Tensor::new(&[[0.2, 0.4f64]], &Device::Cpu).unwrap();
        let v = Tensor::new(&[[1.0, -1.0f64]], &Device::Cpu).unwrap();
        let (jv, vvs) = called(1, |call| {
            Local::new(&oracle, x.clone(), &points, 1e-3, call)?.along(&v, call)
        });
        // By the backward pass: the Jacobian of a score is symmetric, so vᵀ J = (J v)ᵀ.
        let vjp = |x: &Tensor| {
            crate::tensor::gradient(x, |x| {
                let p = &points[0];
                let at = At::All(*p);
                let mut noise = CounterNoise::new(0, 0..1);
                let mut call = Call {
                    noise: &mut noise,
                    items: 0..1,
                    tracked: true,
                };
                Ok((oracle.predict(x, at, &mut call)?.score(x, at)? * &v)?.sum_all()?)
            })
            .unwrap()
        };
        let gap = |a: &Tensor, b: &Tensor| {
            let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            gap.to_scalar::<f64>().unwrap()
        };
        assert!(gap(&jv, &vjp(&x)) < 1e-5);
        // And once more by differences of that.
        let h = 1e-4;
        let (up, down) = (
            vjp(&(&x + v.affine(h, 0.0).unwrap()).unwrap()),
            vjp(&(&x - v.affine(h, 0.0).unwrap()).unwrap()),
        );
        let second = (up - down).unwrap().affine(0.5 / h, 0.0).unwrap();
        assert!(gap(&vvs, &second) < 1e-4);
    }

    /// In one dimension the probe is the axis: both forms are one.
    #[test]
    fn sliced_and_exact_agree_in_one_dimension() {
        let oracle =
            Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![0.8]], vec![0.4, 0.6]).unwrap();
        let (x0, z) = (normal(50, 1, 1), normal(50, 1, 2));
        let points: Vec<Point> = (0..50)
            .map(|i| Point::from_log_snr(0.0, f64::from(i) / 10.0 - 2.5))
            .collect();
        let v = normal(50, 1, 3).sign().unwrap();
        let a = called(50, |c| THIRD.exact(&oracle, &x0, &z, &points, c)?.total());
        let b = called(50, |c| {
            THIRD.sliced(&oracle, &x0, &z, &v, &points, c)?.total()
        });
        let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        assert!(gap.to_scalar::<f64>().unwrap() < 1e-6);
        let bad = HighOrder { step: 0.0, ..THIRD };
        let mut noise = CounterNoise::new(3, 0..50);
        let mut call = Call {
            noise: &mut noise,
            items: 0..50,
            tracked: true,
        };
        assert!(bad.exact(&oracle, &x0, &z, &points, &mut call).is_err());
    }
}
