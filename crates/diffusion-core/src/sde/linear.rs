//! Diffusions that are linear in blocks of two coordinates: a position with its velocity.
//!
//! ```text
//! du = F(t) u dt + G(t) dw
//! u_t | u_0 ~ N(Ψ(t, 0) u_0, Σ_t),   dΨ/dt = F Ψ,   dΣ/dt = F Σ + Σ Fᵀ + G Gᵀ
//! ```
//!
//! The matrices act on every pair alike, so that a state is a tensor `[B, 2, …]`. A process of
//! scalars has states `[B, 1, …]`, and the second rows of its matrices stand for a copy of the first.

use crate::error::{Report, Result};
use crate::noise::Noise;
use crate::schedule::Schedule;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::ops::{Add, Mul, Sub};

/// A matrix that acts on pairs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block(pub [[f64; 2]; 2]);

impl Block {
    /// The identity.
    pub const IDENTITY: Self = Self::diagonal(1.0, 1.0);
    /// Nothing.
    pub const ZERO: Self = Self::diagonal(0.0, 0.0);

    /// The diagonal matrix with these entries.
    pub const fn diagonal(a: f64, b: f64) -> Self {
        Self([[a, 0.0], [0.0, b]])
    }

    /// The rotation by an angle.
    pub fn rotation(angle: f64) -> Self {
        let (sin, cos) = angle.sin_cos();
        Self([[cos, -sin], [sin, cos]])
    }

    /// `Aᵀ`.
    pub fn transpose(self) -> Self {
        let [[a, b], [c, d]] = self.0;
        Self([[a, c], [b, d]])
    }

    /// `det A`.
    pub fn det(self) -> f64 {
        let [[a, b], [c, d]] = self.0;
        a * d - b * c
    }

    /// `A⁻¹`; not finite when there is none.
    pub fn inverse(self) -> Self {
        let [[a, b], [c, d]] = self.0;
        Self([[d, -b], [-c, a]]) * self.det().recip()
    }

    /// The lower triangular `L` with `L Lᵀ = A`, for a covariance; what rounding makes negative
    /// counts as 0.
    pub fn cholesky(self) -> Self {
        let [[a, b], [_, d]] = self.0;
        let first = a.max(0.0).sqrt();
        let below = if first > 0.0 { b / first } else { 0.0 };
        Self([[first, 0.0], [below, (d - below * below).max(0.0).sqrt()]])
    }

    /// Whether every entry is a number.
    pub fn is_finite(self) -> bool {
        self.0.iter().flatten().all(|v| v.is_finite())
    }
}

impl Mul for Block {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        let (a, b) = (self.0, other.0);
        let entry = |i: usize, j: usize| a[i][0] * b[0][j] + a[i][1] * b[1][j];
        Self([[entry(0, 0), entry(0, 1)], [entry(1, 0), entry(1, 1)]])
    }
}

impl Mul<f64> for Block {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self(self.0.map(|row| row.map(|v| v * factor)))
    }
}

impl Add for Block {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let ([[a, b], [c, d]], [[e, f], [g, h]]) = (self.0, other.0);
        Self([[a + e, b + f], [c + g, d + h]])
    }
}

impl Sub for Block {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + other * -1.0
    }
}

/// `Σ_k A_k u_k`, the matrices acting on the second dimension.
///
/// # Shapes
/// `u_k` `[B, 1 or 2, …]`; `A_k` one matrix for the whole batch, or one an item.
///
/// # Errors
/// When shapes differ, or the number of matrices is neither 1 nor the batch size.
pub fn combine_blocks(terms: &[(&[Block], &Tensor)]) -> Result<Tensor> {
    let Some((_, first)) = terms.first() else {
        return Err(Report::new("blocks", "no terms").config());
    };
    let (batch, width) = (first.dim(0)?, state_width(first)?);
    let mut rows = Vec::with_capacity(width);
    for i in 0..width {
        let mut parts = Vec::with_capacity(terms.len() * width);
        for (blocks, u) in terms {
            for j in 0..width {
                let weights: Vec<f64> = match blocks {
                    [one] => vec![one.0[i][j]; batch],
                    each => each.iter().map(|block| block.0[i][j]).collect(),
                };
                parts.push((weights, u.narrow(1, j, 1)?));
            }
        }
        let parts: Vec<(&[f64], &Tensor)> = parts.iter().map(|(w, u)| (w.as_slice(), u)).collect();
        rows.push(diffusion_ops::combine_each(&parts)?);
    }
    Ok(Tensor::cat(&rows, 1)?)
}

/// How many coordinates are coupled in a state.
fn state_width(u: &Tensor) -> Result<usize> {
    match u.dims() {
        [_, width @ 1..=2, ..] => Ok(*width),
        dims => Err(
            Report::new("state of a linear diffusion", format!("{dims:?}"))
                .expected("[batch, 1 or 2, …]")
                .config(),
        ),
    }
}

/// A diffusion that is linear in blocks; see the module.
pub trait LinearSde {
    /// Coordinates that are coupled: 2, or 1 for a process of scalars.
    fn width(&self) -> usize;

    /// Times between which the process is used, the data's first.
    fn span(&self) -> (f64, f64);

    /// `F(t)`.
    fn drift(&self, t: f64) -> Block;

    /// `G Gᵀ` at `t`.
    fn diffusion(&self, t: f64) -> Block;

    /// `Ψ(to, from)`, in either direction of time.
    fn transition(&self, from: f64, to: f64) -> Block;

    /// `Σ_t`, the covariance of `u_t` given `u_0`.
    fn covariance(&self, t: f64) -> Block;

    /// The covariance of the law that sampling starts from, a diagonal.
    fn prior(&self) -> Block;

    /// The state `u_0` of data `[B, …]`, as `[B, width, …]`.
    ///
    /// # Errors
    /// Those of the noise source.
    fn lift(&self, x0: &Tensor, noise: &mut dyn Noise) -> Result<Tensor>;

    /// `Ψ(t, 0)`.
    fn mean(&self, t: f64) -> Block {
        self.transition(0.0, t)
    }
}

impl<S: LinearSde + ?Sized> LinearSde for &S {
    fn width(&self) -> usize {
        (**self).width()
    }

    fn span(&self) -> (f64, f64) {
        (**self).span()
    }

    fn drift(&self, t: f64) -> Block {
        (**self).drift(t)
    }

    fn diffusion(&self, t: f64) -> Block {
        (**self).diffusion(t)
    }

    fn transition(&self, from: f64, to: f64) -> Block {
        (**self).transition(from, to)
    }

    fn covariance(&self, t: f64) -> Block {
        (**self).covariance(t)
    }

    fn prior(&self) -> Block {
        (**self).prior()
    }

    fn lift(&self, x0: &Tensor, noise: &mut dyn Noise) -> Result<Tensor> {
        (**self).lift(x0, noise)
    }

    fn mean(&self, t: f64) -> Block {
        (**self).mean(t)
    }
}

/// A draw of the prior for states shaped as `like`, `[B, width, …]`.
///
/// # Errors
/// When `like` is no state; those of the noise source.
pub fn linear_prior(sde: &dyn LinearSde, like: &Tensor, noise: &mut dyn Noise) -> Result<Tensor> {
    combine_blocks(&[(&[sde.prior().cholesky()], &noise.normal(like)?)])
}

/// What a network says about the noise in a state.
pub trait BlockNetwork {
    /// `ε̂` of `u`, `[B, width, …]` both, item `i` standing at time `times[i]`.
    ///
    /// # Errors
    /// Whatever the network refuses.
    fn epsilon(&self, u: &Tensor, times: &[f64]) -> Result<Tensor>;
}

impl<F: Fn(&Tensor, &[f64]) -> Result<Tensor>> BlockNetwork for F {
    fn epsilon(&self, u: &Tensor, times: &[f64]) -> Result<Tensor> {
        self(u, times)
    }
}

/// What becomes of the velocity at time 0, `v_0 ~ N(0, γ M I)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Velocity {
    /// It is part of the noise (hybrid score matching).
    #[default]
    Marginalised,
    /// It is drawn, and the noise is what comes after it (denoising score matching).
    Drawn,
}

/// Critically damped Langevin diffusion (Dockhorn, Vahdat and Kreis 2021, "Score-Based
/// Generative Modeling with Critically-Damped Langevin Diffusion").
///
/// ```text
/// dx = M⁻¹ v β dt,   dv = −(x + Γ M⁻¹ v) β dt + √(2 Γ β) dw,   Γ² = 4 M
/// b = ∫β,  ω = M^{−1/2},  z = 2ωb,  p = 1 − e^{−z}(1 + z + ½z²)
/// Ψ = e^{−ωb} [[1 + ωb, ω²b], [−b, 1 − ωb]]
/// Σ_t = Ψ Σ_0 Ψᵀ + [[p, √M ½z²e^{−z}], [·, M(2z e^{−z} + p)]]
/// ```
///
/// The damping makes `F` have one eigenvalue, hence the closed forms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cld {
    /// `β(0)`.
    pub beta: f64,
    /// `dβ/dt`.
    pub beta_slope: f64,
    /// `M`.
    pub mass: f64,
    /// `γ`: the variance of the velocity at time 0 in units of `M`.
    pub gamma: f64,
    /// A variance of both coordinates at time 0, which keeps `Σ_0` regular.
    pub numerical: f64,
    /// Whether the velocity at time 0 is noise.
    pub velocity: Velocity,
    /// Least noisy time.
    pub t_min: f64,
}

impl Default for Cld {
    fn default() -> Self {
        Self {
            beta: 4.0,
            beta_slope: 0.0,
            mass: 0.25,
            gamma: 0.04,
            numerical: 1e-6,
            velocity: Velocity::Marginalised,
            t_min: 0.0,
        }
    }
}

impl Cld {
    /// `β(t)`.
    pub fn beta(&self, t: f64) -> f64 {
        self.beta + self.beta_slope * t
    }

    /// `Γ = 2 √M`.
    pub fn friction(&self) -> f64 {
        2.0 * self.mass.sqrt()
    }

    /// `Σ_0`.
    pub fn start(&self) -> Block {
        let drawn = match self.velocity {
            Velocity::Marginalised => self.gamma * self.mass,
            Velocity::Drawn => 0.0,
        };
        Block::diagonal(self.numerical, drawn + self.numerical)
    }

    fn integral(&self, t: f64) -> f64 {
        self.beta * t + 0.5 * self.beta_slope * t * t
    }
}

/// `1 − e^{−z}(1 + z + ½z²)`, to full relative precision also where it is near 0.
fn past_two(z: f64) -> f64 {
    if z > 2.0 {
        return 1.0 - (-z).exp() * (1.0 + z + 0.5 * z * z);
    }
    let (mut term, mut sum) = (z.powi(3) / 6.0, 0.0);
    for k in 4..40 {
        sum += term;
        term *= z / f64::from(k);
    }
    (-z).exp() * sum
}

impl LinearSde for Cld {
    fn width(&self) -> usize {
        2
    }

    fn span(&self) -> (f64, f64) {
        (self.t_min, 1.0)
    }

    fn drift(&self, t: f64) -> Block {
        let inverse = self.mass.recip();
        Block([[0.0, inverse], [-1.0, -self.friction() * inverse]]) * self.beta(t)
    }

    fn diffusion(&self, t: f64) -> Block {
        Block::diagonal(0.0, 2.0 * self.friction() * self.beta(t))
    }

    fn transition(&self, from: f64, to: f64) -> Block {
        let b = self.integral(to) - self.integral(from);
        let omega = self.mass.sqrt().recip();
        let w = omega * b;
        Block([[1.0 + w, omega * w], [-b, 1.0 - w]]) * (-w).exp()
    }

    fn covariance(&self, t: f64) -> Block {
        let z = 2.0 * self.integral(t) / self.mass.sqrt();
        let (p, e) = (past_two(z), (-z).exp());
        let cross = self.mass.sqrt() * 0.5 * z * z * e;
        let noise = Block([[p, cross], [cross, self.mass * (2.0 * z * e + p)]]);
        let psi = self.mean(t);
        psi * self.start() * psi.transpose() + noise
    }

    fn prior(&self) -> Block {
        Block::diagonal(1.0, self.mass)
    }

    fn lift(&self, x0: &Tensor, noise: &mut dyn Noise) -> Result<Tensor> {
        let v0 = match self.velocity {
            Velocity::Marginalised => x0.zeros_like()?,
            Velocity::Drawn => {
                let std = (self.gamma * self.mass).sqrt();
                noise.normal(x0)?.affine(std, 0.0)?
            }
        };
        Ok(Tensor::stack(&[x0, &v0], 1)?)
    }
}

/// The process of a schedule as a linear diffusion: `F = d ln α/dt`, `G² = g²`, `Ψ = α_t/α_s`,
/// `Σ = σ²`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scalar<S>(pub S);

impl<S: Schedule> LinearSde for Scalar<S> {
    fn width(&self) -> usize {
        1
    }

    fn span(&self) -> (f64, f64) {
        self.0.span()
    }

    fn drift(&self, t: f64) -> Block {
        Block::IDENTITY * self.0.rates(t).d_log_alpha
    }

    fn diffusion(&self, t: f64) -> Block {
        Block::IDENTITY * self.0.rates(t).g2
    }

    fn transition(&self, from: f64, to: f64) -> Block {
        Block::IDENTITY * (self.0.at(to).alpha / self.0.at(from).alpha)
    }

    fn covariance(&self, t: f64) -> Block {
        Block::IDENTITY * self.0.at(t).sigma.powi(2)
    }

    fn prior(&self) -> Block {
        self.covariance(self.span().1)
    }

    fn lift(&self, x0: &Tensor, _: &mut dyn Noise) -> Result<Tensor> {
        Ok(x0.unsqueeze(1)?)
    }

    fn mean(&self, t: f64) -> Block {
        Block::IDENTITY * self.0.at(t).alpha
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::ode::DormandPrince;
    use crate::schedule::Vp;
    use candle_core::Device;

    fn gap(a: Block, b: Block) -> f64 {
        (a - b).0.concat().iter().fold(0.0, |m, v| m.max(v.abs()))
    }

    fn processes() -> [Cld; 3] {
        [
            Cld::default(),
            Cld {
                beta: 1.5,
                beta_slope: 3.0,
                mass: 0.7,
                gamma: 0.3,
                ..Cld::default()
            },
            Cld {
                velocity: Velocity::Drawn,
                ..Cld::default()
            },
        ]
    }

    #[test]
    fn transitions_compose_and_solve_their_ode() {
        for sde in processes() {
            let psi = |s, t| sde.transition(s, t);
            assert!(gap(psi(0.2, 0.9), psi(0.5, 0.9) * psi(0.2, 0.5)) < 1e-14);
            assert!(gap(psi(0.9, 0.2) * psi(0.2, 0.9), Block::IDENTITY) < 1e-13);
            let h = 1e-5;
            let slope = (psi(0.1, 0.4 + h) - psi(0.1, 0.4 - h)) * (0.5 / h);
            assert!(gap(slope, sde.drift(0.4) * psi(0.1, 0.4)) < 1e-7);
        }
        let vp = Scalar(Vp::default());
        let psi = |s, t| vp.transition(s, t);
        assert!(gap(psi(0.2, 0.9), psi(0.5, 0.9) * psi(0.2, 0.5)) < 1e-15);
    }

    /// dΣ/dt = F Σ + Σ Fᵀ + G Gᵀ, by Dormand and Prince's method.
    #[test]
    fn covariances_solve_lyapunovs_equation() {
        let solver = DormandPrince {
            rtol: 1e-12,
            atol: 1e-15,
            ..DormandPrince::default()
        };
        let check = |sde: &dyn LinearSde, name: &str| {
            let mut worst: f64 = 0.0;
            for t in [1e-4, 0.01, 0.3, 1.0] {
                let mut rate = |t: &[f64], y: &[f64]| {
                    let sigma = Block([[y[0], y[1]], [y[2], y[3]]]);
                    let moved = sde.drift(t[0]) * sigma;
                    Ok((moved + moved.transpose() + sde.diffusion(t[0])).0.concat())
                };
                let start = sde.covariance(0.0).0.concat();
                let y = solver.solve(&mut rate, 1, &start, (0.0, t)).unwrap().y;
                let ours = sde.covariance(t).0.concat();
                for (ours, theirs) in ours.iter().zip(y) {
                    let error = (ours - theirs).abs() / theirs.abs().max(1e-12);
                    assert!(error < 1e-9, "{name} at {t}: {ours} {theirs}");
                    worst = worst.max(error);
                }
            }
            println!("{name}: covariance off by {worst:.1e} of itself");
        };
        for sde in processes() {
            check(
                &sde,
                &format!("{:?} with slope {}", sde.velocity, sde.beta_slope),
            );
        }
        check(&Scalar(Vp::default()), "VP");
    }

    #[test]
    fn the_tail_keeps_its_digits() {
        assert!((past_two(2.0) - past_two(2.0 + 1e-15)).abs() < 1e-14);
        assert!((past_two(1e-5) / (1e-15 / 6.0 * (1.0 - 0.75e-5)) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn matrices_act_on_pairs() {
        let u = Tensor::new(
            &[[[1f64, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]],
            &Device::Cpu,
        );
        let u = u.unwrap();
        let swap = Block([[0.0, 1.0], [1.0, 0.0]]);
        let each = [swap, Block::diagonal(2.0, -1.0)];
        let out = combine_blocks(&[(&each, &u), (&[Block::IDENTITY], &u)]).unwrap();
        assert_eq!(
            out.to_vec3::<f64>().unwrap(),
            [[[4.0, 6.0], [4.0, 6.0]], [[15.0, 18.0], [0.0, 0.0]]]
        );
        let three = [swap; 3];
        assert!(combine_blocks(&[(&three, &u)]).is_err());
        let wide = Tensor::zeros((1, 3, 2), candle_core::DType::F64, &Device::Cpu).unwrap();
        let error = combine_blocks(&[(&[swap], &wide)]).unwrap_err().to_string();
        assert!(error.contains("[1, 3, 2]"), "{error}");
    }

    #[test]
    fn data_are_lifted_and_the_prior_is_drawn() {
        let n = 20_000;
        let x = Tensor::full(0.5, (1, n), &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(1, 0..1);
        let std = |u: &Tensor, j| {
            let v = u
                .narrow(1, j, 1)
                .unwrap()
                .sqr()
                .unwrap()
                .mean_all()
                .unwrap();
            v.to_scalar::<f64>().unwrap().sqrt()
        };
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 4.0 * (0.5 / n as f64).sqrt();
        let plain = Cld::default();
        let u = plain.lift(&x, &mut noise).unwrap();
        assert_eq!(
            (u.dims(), std(&u, 0), std(&u, 1)),
            (&[1, 2, n][..], 0.5, 0.0)
        );
        let drawn = Cld {
            velocity: Velocity::Drawn,
            ..plain
        };
        let u = drawn.lift(&x, &mut noise).unwrap();
        assert!(near(std(&u, 1), 0.1), "{}", std(&u, 1));
        let u = linear_prior(&plain, &u, &mut noise).unwrap();
        assert!(near(std(&u, 0), 1.0) && near(std(&u, 1), 0.5));
        // The process reaches its prior.
        assert!(gap(plain.covariance(1.0), plain.prior()) < 1e-4);
    }
}
