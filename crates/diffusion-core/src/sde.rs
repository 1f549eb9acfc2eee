//! The continuous view: forward SDE, its reversal, and the flow with the same marginals.
//!
//! ```text
//! forward            dx = f(t) x dt + g(t) dw                        (Song et al. 2021, eq. 5)
//! reverse            dx = [f x − g² ∇log p_t(x)] dt + g dw̄           (eq. 6)
//! probability flow   dx/dt = f x − ½ g² ∇log p_t(x)                  (eq. 13)
//! ```
//!
//! [`LinearSde`] is the view of processes that couple a position with a velocity.

mod discrete;
mod linear;
mod root;

pub use discrete::{Discretisation, Kernel};
pub use linear::{
    Block, BlockNetwork, Cld, LinearSde, Scalar, Velocity, combine_blocks, linear_prior,
};
pub use root::Root;

use crate::error::Result;
use crate::schedule::Rates;
use crate::tensor::lincomb;
use candle_core::Tensor;

/// Drift of the forward SDE, `f(t) x`.
///
/// # Errors
/// Those of the tensor library.
pub fn forward_drift(x: &Tensor, rates: &Rates) -> Result<Tensor> {
    Ok(x.affine(rates.d_log_alpha, 0.0)?)
}

/// Drift of the reverse-time SDE (Anderson 1982), `f x − g² s`; time runs backwards.
///
/// # Errors
/// When shapes differ.
pub fn reverse_drift(x: &Tensor, score: &Tensor, rates: &Rates) -> Result<Tensor> {
    lincomb(rates.d_log_alpha, x, -rates.g2, score)
}

/// Velocity of the probability flow, `f x − ½ g² s`.
///
/// # Errors
/// When shapes differ.
pub fn flow_velocity(x: &Tensor, score: &Tensor, rates: &Rates) -> Result<Tensor> {
    lincomb(rates.d_log_alpha, x, -0.5 * rates.g2, score)
}

/// Drift of the plug-in family of reverse processes, `f x − (1 − λ/2) g² s`; time runs backwards
/// (Huang, Lim and Courville 2021, section 5).
///
/// With the diffusion `√(1 − λ) g` every `λ ∈ [0, 1]` has the marginals of the forward process when
/// the score is exact: `λ = 0` is the reverse SDE, `λ = 1` the probability flow.
///
/// # Errors
/// When shapes differ.
pub fn plug_in_drift(x: &Tensor, score: &Tensor, rates: &Rates, lambda: f64) -> Result<Tensor> {
    lincomb(
        rates.d_log_alpha,
        x,
        -(1.0 - 0.5 * lambda) * rates.g2,
        score,
    )
}

/// One step of Euler and Maruyama backwards over `dt > 0`.
///
/// ```text
/// x' = x − (f x − g² s) dt + g √dt z
/// ```
///
/// # Errors
/// When shapes differ.
pub fn euler_maruyama(
    x: &Tensor,
    score: &Tensor,
    rates: &Rates,
    dt: f64,
    z: &Tensor,
) -> Result<Tensor> {
    let mean = lincomb(1.0, x, -dt, &reverse_drift(x, score, rates)?)?;
    lincomb(1.0, &mean, (rates.g2 * dt).sqrt(), z)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::Gaussian;
    use crate::schedule::{Schedule, SubVp, Ve, Vp};
    use candle_core::{DType, Device};

    /// The exact flow of Gaussian data satisfies dx/dt = f x − ½ g² s.
    #[test]
    fn the_flow_of_gaussian_data_solves_the_ode() {
        let oracle = Gaussian::new(vec![0.4], vec![0.6]);
        let schedules: [&dyn Schedule; 3] = [&Vp::default(), &SubVp::default(), &Ve::default()];
        for s in schedules {
            let x = Tensor::new(&[[1.3f64]], &Device::Cpu).unwrap();
            let (t, h) = (0.37, 1e-5);
            let move_to = |t1: f64| {
                oracle
                    .flow(&x, &s.at(t), &s.at(t1))
                    .unwrap()
                    .to_vec2::<f64>()
                    .unwrap()[0][0]
            };
            let numeric = (move_to(t + h) - move_to(t - h)) / (2.0 * h);
            let score = oracle.score(&x, &s.at(t)).unwrap();
            let exact = flow_velocity(&x, &score, &s.rates(t))
                .unwrap()
                .to_vec2::<f64>()
                .unwrap()[0][0];
            assert!((numeric / exact - 1.0).abs() < 1e-6, "{numeric} {exact}");
        }
    }

    /// The reverse SDE with the exact score brings the prior back to the data law.
    #[test]
    fn the_reverse_sde_recovers_mean_and_variance() {
        let (n, steps) = (4000, 400);
        let (oracle, vp) = (Gaussian::new(vec![0.5], vec![0.7]), Vp::default());
        let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(2, 0..1);
        let mut x = noise.normal(&like).unwrap().reshape((n, 1)).unwrap();
        let dt = (1.0 - 1e-3) / f64::from(steps);
        for k in 0..steps {
            let t = 1.0 - f64::from(k) * dt;
            let z = noise.normal(&like).unwrap().reshape((n, 1)).unwrap();
            x = euler_maruyama(
                &x,
                &oracle.score(&x, &vp.at(t)).unwrap(),
                &vp.rates(t),
                dt,
                &z,
            )
            .unwrap();
        }
        let v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mean = v.iter().sum::<f64>() / n as f64;
        let var = v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
        assert!((var / 0.49 - 1.0).abs() < 0.1, "{var}");
    }
}
