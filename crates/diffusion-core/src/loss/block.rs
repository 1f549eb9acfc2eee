//! The loss of gDDIM's networks (Zhang, Tao and Chen 2022, "gDDIM: Generalized denoising
//! diffusion implicit models").

use crate::error::{Report, Result};
use crate::sde::{Block, BlockNetwork, LinearSde, Root, combine_blocks};
use crate::tensor::{Coef, mean_per_item};
use candle_core::Tensor;

/// States with noise, `u_t = Ψ(t, 0) u_0 + R_t ε`.
///
/// # Shapes
/// `u0` and `epsilon` `[B, width, …]`, one time an item.
///
/// # Errors
/// `Config` when a time is outside the span of the process or there is not one an item.
pub fn perturb_blocks<S: LinearSde>(
    root: &Root<S>,
    u0: &Tensor,
    epsilon: &Tensor,
    times: &[f64],
) -> Result<Tensor> {
    if u0.rank() < 2
        || u0.dims() != epsilon.dims()
        || u0.dims()[..2] != [times.len(), root.sde().width()]
    {
        return Err(Report::new(
            "states with noise",
            format!(
                "{:?} and {:?} at {} times",
                u0.dims(),
                epsilon.dims(),
                times.len()
            ),
        )
        .expected(format!("[times, {}, …] both", root.sde().width()))
        .config());
    }
    let roots = times
        .iter()
        .map(|t| root.at(*t))
        .collect::<Result<Vec<_>>>()?;
    let means: Vec<Block> = times.iter().map(|t| root.sde().mean(*t)).collect();
    combine_blocks(&[(&means, u0), (&roots, epsilon)])
}

/// The loss of every item, `[B]`, differentiable in the network's weights.
///
/// ```text
/// loss_i = w(t_i) · mean over coordinates of (ε̂(u_{t_i}, t_i) − ε_i)²
/// ```
///
/// With [`Velocity::Marginalised`](crate::sde::Velocity) this is hybrid score matching.
///
/// # Shapes
/// `u0`, of [`LinearSde::lift`], and `epsilon` `[B, width, …]`, one time an item.
///
/// # Errors
/// As [`perturb_blocks`]; `Config` when a weight is no number; whatever the network refuses.
pub fn block_losses<S: LinearSde>(
    root: &Root<S>,
    network: &dyn BlockNetwork,
    u0: &Tensor,
    epsilon: &Tensor,
    times: &[f64],
    weight: impl Fn(f64) -> f64,
) -> Result<Tensor> {
    let u = perturb_blocks(root, u0, epsilon, times)?;
    let weights: Vec<f64> = times.iter().map(|t| weight(*t)).collect();
    if let Some((w, t)) = weights.iter().zip(times).find(|(w, _)| !w.is_finite()) {
        return Err(Report::new("loss weight", format!("{w} at t = {t}"))
            .expected("a finite weight")
            .config());
    }
    let error = (network.epsilon(&u, times)? - epsilon)?.sqr()?;
    Coef::Each(weights).times(&mean_per_item(&error)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::BlockMixture;
    use crate::schedule::Vp;
    use crate::sde::{Cld, Scalar, Velocity};
    use crate::tensor::gradient;
    use candle_core::{DType, Device};

    /// Data `N(2, 0.5²)` with noise and times, `n` items of 3 coordinates.
    fn draws<S: LinearSde>(sde: &S, n: usize) -> (Tensor, Tensor, Vec<f64>) {
        let like = Tensor::zeros((n, 3), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(5, 0..n as u64);
        let x0 = noise.normal(&like).unwrap().affine(0.5, 2.0).unwrap();
        let u0 = sde.lift(&x0, &mut noise).unwrap();
        let epsilon = noise.normal(&u0).unwrap();
        let times = (0..n).map(|i| 0.01 + 0.99 * (i as f64 + 0.5) / n as f64);
        (u0, epsilon, times.collect())
    }

    /// At the exact ε the loss is what is left of the noise when u is known,
    /// `tr(I − Rᵀ S⁻¹ R)` over the coordinates.
    fn left<S: LinearSde>(root: &Root<S>, t: f64) -> f64 {
        let (psi, r) = (root.sde().mean(t), root.at(t).unwrap());
        let width = root.sde().width();
        let start = match width {
            1 => Block::diagonal(0.25, 0.25),
            _ => Block::diagonal(0.25, 0.0),
        };
        let s = psi * start * psi.transpose() + root.sde().covariance(t);
        let known = r.transpose() * s.inverse() * r;
        (0..width).map(|i| 1.0 - known.0[i][i]).sum::<f64>() / width as f64
    }

    fn is_least<S: LinearSde>(sde: S, name: &str) {
        let n = 4000;
        let root = Root::new(sde).unwrap();
        let oracle = BlockMixture::new(&root, &[(1.0, 2.0, 0.5)]).unwrap();
        let (u0, epsilon, times) = draws(root.sde(), n);
        let losses = block_losses(&root, &oracle, &u0, &epsilon, &times, |_| 1.0).unwrap();
        let losses = losses.to_vec1::<f64>().unwrap();
        let excess: Vec<f64> = losses
            .iter()
            .zip(&times)
            .map(|(l, t)| l - left(&root, *t))
            .collect();
        let mean = excess.iter().sum::<f64>() / n as f64;
        let square = excess.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / n as f64;
        let error = (square / n as f64).sqrt();
        println!(
            "{name}: {:+.2} standard errors over the least loss",
            mean / error
        );
        assert!(mean.abs() < 4.0 * error, "{name}: {mean} ± {error}");
        // No shift does better: the slope is 0 within what sampling allows.
        let width = root.sde().width();
        let loss = |shift: &Tensor| {
            let network =
                |u: &Tensor, times: &[f64]| Ok(oracle.epsilon(u, times)?.broadcast_add(shift)?);
            let losses = block_losses(&root, &network, &u0, &epsilon, &times, |t| 1.0 + t)?;
            Ok(losses.mean_all()?)
        };
        let zero = Tensor::zeros((1, width, 1), DType::F64, &Device::Cpu).unwrap();
        let slope = gradient(&zero, loss).unwrap().flatten_all().unwrap();
        // 2/width mean of (1 + t)(ε̂ − ε), of variance at most 4 each.
        let bound = 4.0 * 2.0 / width as f64 * 2.0 / (3.0 * n as f64).sqrt();
        for g in slope.to_vec1::<f64>().unwrap() {
            assert!(g.abs() < bound, "{name}: {g} over {bound}");
        }
        let at = |v: f64| {
            let moved = loss(&zero.affine(1.0, v).unwrap()).unwrap();
            moved.to_scalar::<f64>().unwrap()
        };
        assert!(at(0.3) > at(0.0) + 0.05 && at(-0.3) > at(0.0) + 0.05);
    }

    #[test]
    fn the_exact_noise_is_the_minimum() {
        is_least(Cld::default(), "velocity marginalised");
        is_least(Scalar(Vp::default()), "VP");
    }

    #[test]
    fn every_item_stands_at_its_own_time() {
        let root = Root::new(Cld::default()).unwrap();
        let (u0, epsilon, times) = draws(root.sde(), 5);
        let u = perturb_blocks(&root, &u0, &epsilon, &times).unwrap();
        let values = |t: &Tensor| t.to_vec3::<f64>().unwrap();
        let (u, u0, epsilon) = (values(&u), values(&u0), values(&epsilon));
        for (i, t) in times.iter().enumerate() {
            let (psi, r) = (root.sde().transition(0.0, *t).0, root.at(*t).unwrap().0);
            for (row, d) in (0..2).flat_map(|row| (0..3).map(move |d| (row, d))) {
                let exact: f64 = (0..2)
                    .map(|j| psi[row][j] * u0[i][j][d] + r[row][j] * epsilon[i][j][d])
                    .sum();
                assert!((u[i][row][d] - exact).abs() < 1e-14);
            }
        }
    }

    /// With the velocity drawn the exact ε is another, but the noise enters as before.
    #[test]
    fn a_drawn_velocity_is_no_part_of_the_noise() {
        let n = 4000;
        let drawn = Cld {
            velocity: Velocity::Drawn,
            ..Cld::default()
        };
        let root = Root::new(drawn).unwrap();
        let (u0, epsilon, _) = draws(&drawn, n);
        let t = 0.05;
        let u = perturb_blocks(&root, &u0, &epsilon, &vec![t; n]).unwrap();
        let v = u.narrow(1, 1, 1).unwrap().flatten_all().unwrap();
        let v = v.to_vec1::<f64>().unwrap();
        // The marginal of the velocity is that of the process whose velocity is marginalised.
        let psi = drawn.mean(t);
        let mean = psi.0[1][0] * 2.0;
        let whole = Cld::default().covariance(t).0[1][1] + (psi.0[1][0] * 0.5).powi(2);
        let var = v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / v.len() as f64;
        let error = whole * (2.0 / v.len() as f64).sqrt();
        assert!((var - whole).abs() < 4.0 * error, "{var} {whole}");
    }

    #[test]
    fn refuses_with_one_clear_error() {
        let root = Root::new(Cld::default()).unwrap();
        let (u0, epsilon, times) = draws(root.sde(), 4);
        let echo = |u: &Tensor, _: &[f64]| Ok(u.clone());
        let says = |times: &[f64], epsilon: &Tensor, weight: f64, part: &str| {
            let result = block_losses(&root, &echo, &u0, epsilon, times, |_| weight);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says(&times[..3], &epsilon, 1.0, "3 times");
        says(&times, &epsilon.narrow(1, 0, 1).unwrap(), 1.0, "[4, 1, 3]");
        says(&[0.1, 0.2, 1.3, 0.4], &epsilon, 1.0, "1.3");
        says(&[0.1, 0.2, f64::NAN, 0.4], &epsilon, 1.0, "NaN");
        says(&times, &epsilon, f64::INFINITY, "loss weight");
    }
}
