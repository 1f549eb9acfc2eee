//! The square root of a covariance that moves with the probability flow (Zhang, Tao and Chen 2022,
//! "gDDIM: Generalized denoising diffusion implicit models").

use super::linear::{Block, LinearSde};
use crate::error::{Report, Result};
use crate::quadrature::{gauss_legendre, halvings};

/// `R_t` of a linear diffusion.
///
/// ```text
/// dR/dt = (F + ½ G Gᵀ Σ⁻¹) R,   R Rᵀ = Σ
/// ```
///
/// Along the probability flow of data that is one point `R⁻¹(u − Ψ u_0)` stands still, and with
/// another root it turns: with Cholesky's `L` it is `R = L Q`, `Q` a rotation whose angle is an
/// integral,
///
/// ```text
/// θ(t) = −∫ [L⁻¹ (F L + ½ G Gᵀ L⁻ᵀ)]₁₂ dτ
/// ```
///
/// so that `R Rᵀ = Σ` holds to rounding at every time. `R = L` at the beginning of the span: any
/// other choice is another basis of the noise. For scalars `R = σ`.
#[derive(Clone, Debug)]
pub struct Root<S> {
    sde: S,
    /// Times with the angles there, from the beginning of the span.
    knots: Vec<(f64, f64)>,
}

impl<S: LinearSde> Root<S> {
    /// The root along the span of a process.
    ///
    /// # Errors
    /// `Config` when the span is none, or a covariance is not positive definite in it.
    pub fn new(sde: S) -> Result<Self> {
        let (start, end) = sde.span();
        if !(start >= 0.0 && end > start && end.is_finite()) {
            return Err(
                Report::new("span of a linear diffusion", format!("{start} to {end}"))
                    .expected("0 ≤ start < end")
                    .config(),
            );
        }
        let mut knots = Vec::new();
        let mut angle = 0.0;
        let mut last = start;
        for t in halvings(start, end) {
            regular(&sde, t)?;
            if sde.width() > 1 {
                angle += gauss_legendre(last, t, |t| turn(&sde, t));
            }
            knots.push((t, angle));
            last = t;
        }
        Ok(Self { sde, knots })
    }

    /// The process.
    pub fn sde(&self) -> &S {
        &self.sde
    }

    /// `R_t`.
    ///
    /// # Errors
    /// `Config` when `t` is outside the span.
    pub fn at(&self, t: f64) -> Result<Block> {
        let (start, end) = self.sde.span();
        if !(start..=end).contains(&t) {
            return Err(Report::new("time of a linear diffusion", t)
                .expected(format!("between {start} and {end}"))
                .config());
        }
        let cholesky = self.sde.covariance(t).cholesky();
        if self.sde.width() == 1 {
            return Ok(cholesky);
        }
        let known = self.knots.partition_point(|(knot, _)| *knot <= t);
        let (knot, angle) = self
            .knots
            .get(known.wrapping_sub(1))
            .copied()
            .unwrap_or((start, 0.0));
        let angle = angle + gauss_legendre(knot, t, |t| turn(&self.sde, t));
        Ok(cholesky * Block::rotation(angle))
    }

    /// `½ G Gᵀ R⁻ᵀ` at `t`: what the noise adds to the probability flow.
    ///
    /// # Errors
    /// As [`Root::at`].
    pub fn push(&self, t: f64) -> Result<Block> {
        Ok(self.sde.diffusion(t) * self.at(t)?.inverse().transpose() * 0.5)
    }
}

/// `dθ/dt`.
fn turn(sde: &impl LinearSde, t: f64) -> f64 {
    let cholesky = sde.covariance(t).cholesky();
    let inverse = cholesky.inverse();
    let moved = sde.drift(t) * cholesky + sde.diffusion(t) * inverse.transpose() * 0.5;
    -(inverse * moved).0[0][1]
}

/// Refuses a covariance without a root.
fn regular(sde: &impl LinearSde, t: f64) -> Result<()> {
    let covariance = sde.covariance(t);
    let definite = covariance.0[0][0] > 0.0 && covariance.det() > 0.0;
    // A scalar at the data has no noise, and 0 is its root.
    if covariance.is_finite() && (definite || sde.width() == 1) {
        return Ok(());
    }
    let [[a, b], [c, d]] = covariance.0;
    Err(Report::new(
        format!("covariance of a linear diffusion at t = {t}"),
        format!("[[{a}, {b}], [{c}, {d}]]"),
    )
    .expected("a positive definite matrix of numbers")
    .remedy("check the constants of the process, give it a variance at time 0, or start later")
    .config())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ode::DormandPrince;
    use crate::schedule::{Schedule, Vp};
    use crate::sde::{Cld, Scalar, Velocity};

    fn gap(a: Block, b: Block) -> f64 {
        (a - b).0.concat().iter().fold(0.0, |m, v| m.max(v.abs()))
    }

    /// Both lines of its definition; the first by Dormand and Prince's method from the beginning.
    #[test]
    fn it_is_a_root_and_solves_its_ode() {
        let tight = Cld {
            numerical: 1e-9,
            beta_slope: 2.0,
            ..Cld::default()
        };
        let drawn = Cld {
            velocity: Velocity::Drawn,
            ..Cld::default()
        };
        let solver = DormandPrince {
            rtol: 1e-12,
            atol: 1e-14,
            ..DormandPrince::default()
        };
        for sde in [Cld::default(), tight, drawn] {
            let root = Root::new(sde).unwrap();
            let mut rate = |t: &[f64], y: &[f64]| {
                let (r, t) = (Block([[y[0], y[1]], [y[2], y[3]]]), t[0]);
                // Written with Σ⁻¹ here, with R⁻ᵀ there.
                let pull = sde.diffusion(t) * sde.covariance(t).inverse() * 0.5;
                Ok(((sde.drift(t) + pull) * r).0.concat())
            };
            let (mut worst, mut square): (f64, f64) = (0.0, 0.0);
            for t in [1e-5, 1e-3, 0.03, 0.5, 1.0] {
                let start = root.at(0.0).unwrap().0.concat();
                let y = solver.solve(&mut rate, 1, &start, (0.0, t)).unwrap().y;
                let r = root.at(t).unwrap();
                worst = worst.max(gap(r, Block([[y[0], y[1]], [y[2], y[3]]])));
                square = square.max(gap(r * r.transpose(), sde.covariance(t)));
            }
            println!("{sde:?}: R off by {worst:.1e}, R Rᵀ by {square:.1e}");
            assert!(worst < 1e-8 && square < 1e-15, "{worst:e} {square:e}");
            // Cholesky's factor is another root.
            let cholesky = sde.covariance(0.3).cholesky();
            assert!(gap(root.at(0.3).unwrap(), cholesky) > 0.1);
        }
    }

    #[test]
    fn of_a_schedule_it_is_sigma() {
        let root = Root::new(Scalar(Vp::default())).unwrap();
        for t in [1e-3, 0.2, 1.0] {
            let r = root.at(t).unwrap().0[0][0];
            assert!((r - Vp::default().at(t).sigma).abs() < 1e-16);
        }
    }

    #[test]
    fn refuses_what_has_no_root() {
        let broken = [
            Cld {
                beta: f64::NAN,
                ..Cld::default()
            },
            Cld {
                mass: -1.0,
                ..Cld::default()
            },
            Cld {
                numerical: 0.0,
                ..Cld::default()
            },
        ];
        for sde in broken {
            let error = Root::new(sde).unwrap_err().to_string();
            assert!(error.contains("positive definite"), "{error}");
        }
        let late = Cld {
            t_min: 2.0,
            ..Cld::default()
        };
        assert!(Root::new(late).unwrap_err().to_string().contains("2 to 1"));
        let root = Root::new(Cld::default()).unwrap();
        for t in [-0.1, 1.1, f64::NAN] {
            let error = root.at(t).unwrap_err().to_string();
            assert!(error.contains("between 0 and 1"), "{error}");
        }
    }
}
