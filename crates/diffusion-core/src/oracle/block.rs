//! Mixtures under linear diffusions.

use crate::error::{Report, Result};
use crate::noise::Noise;
use crate::sde::{Block, BlockNetwork, LinearSde, Root, combine_blocks};
use crate::tensor::per_item;
use candle_core::{Device, Tensor};

/// Every coordinate of the data is drawn from one mixture of normal laws, the velocity is 0 or part
/// of the noise.
///
/// ```text
/// x_0 ~ Σ_k w_k N(m_k, c_k²),   μ_k = Ψ(t, 0) (m_k, 0),   S_k = Ψ diag(c_k², 0) Ψᵀ + Σ_t
/// ε* = Rᵀ Σ_k r_k S_k⁻¹ (u − μ_k),   r_k ∝ w_k N(u; μ_k, S_k)
/// ```
///
/// One part is Gaussian data, and with `c = 0` a point.
#[derive(Clone, Debug)]
pub struct BlockMixture<'a, S> {
    root: &'a Root<S>,
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    weight: f64,
    mean: f64,
    std: f64,
}

impl<'a, S: LinearSde> BlockMixture<'a, S> {
    /// The mixture of these `(w, m, c)`; the weights are normalised.
    ///
    /// # Errors
    /// `Config` when there are none, a weight is not positive, or a number is not finite.
    pub fn new(root: &'a Root<S>, parts: &[(f64, f64, f64)]) -> Result<Self> {
        let sound = |(w, m, c): &(f64, f64, f64)| {
            *w > 0.0 && w.is_finite() && m.is_finite() && *c >= 0.0 && c.is_finite()
        };
        if parts.is_empty() || !parts.iter().all(sound) {
            return Err(Report::new("mixture", format!("{parts:?}"))
                .expected("positive weights, means, and deviations that are not negative")
                .config());
        }
        let total: f64 = parts.iter().map(|p| p.0).sum();
        let parts = parts.iter().map(|(weight, mean, std)| Part {
            weight: weight / total,
            mean: *mean,
            std: *std,
        });
        Ok(Self {
            root,
            parts: parts.collect(),
        })
    }

    /// `S` of a part.
    fn spread(&self, part: &Part, t: f64) -> Block {
        Widened {
            sde: self.root.sde(),
            variance: part.std.powi(2),
        }
        .covariance(t)
    }

    /// `u − μ` of a part.
    fn centred(&self, part: &Part, u: &Tensor, times: &[f64]) -> Result<Tensor> {
        let width = self.root.sde().width();
        let means: Vec<f64> = times
            .iter()
            .flat_map(|t| {
                let [[a, _], [c, _]] = self.root.sde().mean(*t).0;
                [a, c].into_iter().take(width).map(|v| part.mean * v)
            })
            .collect();
        let mut shape = vec![1; u.rank()];
        shape[..2].copy_from_slice(&[times.len(), width]);
        let means = Tensor::from_vec(means, shape, &Device::Cpu)?
            .to_dtype(u.dtype())?
            .to_device(u.device())?;
        Ok(u.broadcast_sub(&means)?)
    }

    /// The exact probability flow of the first part's data, from one time to another.
    ///
    /// ```text
    /// u_t = μ_t + W_t W_s⁻¹ (u_s − μ_s),   W Wᵀ = S
    /// ```
    ///
    /// where `W` is the [`Root`] of a process that begins with the spread of the data.
    ///
    /// # Errors
    /// `Config` when a time is outside the span.
    pub fn flow(&self, u: &Tensor, from: f64, to: f64) -> Result<Tensor> {
        let Some(part) = self.parts.first() else {
            return Ok(u.clone());
        };
        let widened = Root::new(Widened {
            sde: self.root.sde(),
            variance: part.std.powi(2),
        })?;
        let moved = widened.at(to)? * widened.at(from)?.inverse();
        let batch = u.dim(0)?;
        let centred = self.centred(part, u, &vec![from; batch])?;
        let moved = combine_blocks(&[(&[moved], &centred)])?;
        // u + μ is u − (−μ).
        let mirrored = Part {
            mean: -part.mean,
            ..*part
        };
        self.centred(&mirrored, &moved, &vec![to; batch])
    }
}

impl<S: LinearSde> BlockNetwork for BlockMixture<'_, S> {
    fn epsilon(&self, u: &Tensor, times: &[f64]) -> Result<Tensor> {
        let roots = times
            .iter()
            .map(|t| Ok(self.root.at(*t)?.transpose()))
            .collect::<Result<Vec<_>>>()?;
        let (mut logits, mut pulls) = (vec![], vec![]);
        for part in &self.parts {
            let spreads: Vec<Block> = times.iter().map(|t| self.spread(part, *t)).collect();
            let inverses: Vec<Block> = spreads.iter().map(|s| s.inverse()).collect();
            let centred = self.centred(part, u, times)?;
            let pull = combine_blocks(&[(&inverses, &centred)])?;
            let norms: Vec<f64> = spreads
                .iter()
                .map(|s| match self.root.sde().width() {
                    1 => s.0[0][0],
                    _ => s.det(),
                })
                .map(|det| part.weight.ln() - 0.5 * det.ln())
                .collect();
            let square = (centred * &pull)?.sum_keepdim(1)?.affine(-0.5, 0.0)?;
            logits.push(square.broadcast_add(&per_item(&norms, &square)?)?);
            pulls.push(pull);
        }
        // Responsibilities along a new last dimension.
        let logits = Tensor::stack(&logits, u.rank())?;
        let shifted = logits
            .broadcast_sub(&logits.max_keepdim(u.rank())?)?
            .exp()?;
        let shares = shifted.broadcast_div(&shifted.sum_keepdim(u.rank())?)?;
        let pulls = Tensor::stack(&pulls, u.rank())?;
        let pull = pulls.broadcast_mul(&shares)?.sum(u.rank())?;
        combine_blocks(&[(&roots, &pull)])
    }
}

/// A process whose position has another variance at time 0.
struct Widened<'a, S> {
    sde: &'a S,
    variance: f64,
}

impl<S: LinearSde> LinearSde for Widened<'_, S> {
    fn width(&self) -> usize {
        self.sde.width()
    }

    fn span(&self) -> (f64, f64) {
        self.sde.span()
    }

    fn drift(&self, t: f64) -> Block {
        self.sde.drift(t)
    }

    fn diffusion(&self, t: f64) -> Block {
        self.sde.diffusion(t)
    }

    fn transition(&self, from: f64, to: f64) -> Block {
        self.sde.transition(from, to)
    }

    fn covariance(&self, t: f64) -> Block {
        let psi = self.sde.mean(t);
        let start = match self.sde.width() {
            1 => Block::diagonal(self.variance, self.variance),
            _ => Block::diagonal(self.variance, 0.0),
        };
        psi * start * psi.transpose() + self.sde.covariance(t)
    }

    fn prior(&self) -> Block {
        self.sde.prior()
    }

    fn lift(&self, x0: &Tensor, noise: &mut dyn Noise) -> Result<Tensor> {
        self.sde.lift(x0, noise)
    }

    fn mean(&self, t: f64) -> Block {
        self.sde.mean(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ode::DormandPrince;
    use crate::sde::Cld;

    fn state(values: &[[f64; 3]; 2]) -> Tensor {
        Tensor::new(values, &Device::Cpu)
            .unwrap()
            .unsqueeze(0)
            .unwrap()
    }

    fn numbers(t: &Tensor) -> Vec<f64> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// ε = −Rᵀ ∇ log p, the density written down with plain numbers.
    #[test]
    fn epsilon_is_the_score_in_the_basis_of_the_root() {
        let root = Root::new(Cld::default()).unwrap();
        let parts = [(0.4, -1.0, 0.3), (0.6, 1.2, 0.0)];
        let oracle = BlockMixture::new(&root, &parts).unwrap();
        let log_density = |x: f64, v: f64, t: f64| {
            let part = |(w, m, c): &(f64, f64, f64)| {
                let psi = root.sde().mean(t);
                let start = Block::diagonal(c * c, 0.0);
                let s = psi * start * psi.transpose() + root.sde().covariance(t);
                let (a, b) = (x - psi.0[0][0] * m, v - psi.0[1][0] * m);
                let [[p, q], [_, r]] = s.inverse().0;
                w * (-0.5 * (p * a * a + 2.0 * q * a * b + r * b * b)).exp() / s.det().sqrt()
            };
            parts.iter().map(part).sum::<f64>().ln()
        };
        let (u, h) = ([[0.1, -0.7, 0.9], [0.3, 0.0, -0.2]], 1e-5);
        for t in [0.05, 0.3, 1.0] {
            let r = root.at(t).unwrap();
            let ours = numbers(&oracle.epsilon(&state(&u), &[t]).unwrap());
            for i in 0..3 {
                let (x, v) = (u[0][i], u[1][i]);
                let sx = (log_density(x + h, v, t) - log_density(x - h, v, t)) / (2.0 * h);
                let sv = (log_density(x, v + h, t) - log_density(x, v - h, t)) / (2.0 * h);
                for j in 0..2 {
                    let exact = -(r.0[0][j] * sx + r.0[1][j] * sv);
                    let found = ours[3 * j + i];
                    assert!(
                        (exact - found).abs() < 1e-5 * exact.abs().max(1.0),
                        "{exact} {found}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_flow_solves_its_ode() {
        let root = Root::new(Cld::default()).unwrap();
        let oracle = BlockMixture::new(&root, &[(1.0, 0.4, 0.6)]).unwrap();
        let u = state(&[[0.1, -0.7, 0.9], [0.3, 0.0, -0.2]]);
        let mut rate = |t: &[f64], y: &[f64]| {
            let t = t[0].clamp(0.0, 1.0);
            let u = Tensor::from_vec(y.to_vec(), (1, 2, 3), &Device::Cpu)?;
            let epsilon = oracle.epsilon(&u, &[t])?;
            let (drift, push) = ([root.sde().drift(t)], [root.push(t)?]);
            Ok(numbers(&combine_blocks(&[
                (&drift, &u),
                (&push, &epsilon),
            ])?))
        };
        let solver = DormandPrince {
            rtol: 1e-11,
            atol: 1e-13,
            ..DormandPrince::default()
        };
        let y = solver
            .solve(&mut rate, 1, &numbers(&u), (1.0, 0.01))
            .unwrap()
            .y;
        let ours = numbers(&oracle.flow(&u, 1.0, 0.01).unwrap());
        for (ours, theirs) in ours.iter().zip(y) {
            assert!((ours - theirs).abs() < 1e-9, "{ours} {theirs}");
        }
    }

    #[test]
    fn refuses_what_is_no_mixture() {
        let root = Root::new(Cld::default()).unwrap();
        for parts in [vec![], vec![(0.0, 0.0, 1.0)], vec![(1.0, f64::NAN, 1.0)]] {
            assert!(BlockMixture::new(&root, &parts).is_err());
        }
    }
}
