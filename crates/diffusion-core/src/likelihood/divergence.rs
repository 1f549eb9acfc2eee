//! The divergence of a score, `div s = Σ_i ∂s_i/∂x_i`, through vector-Jacobian products.
//!
//! ```text
//! exactly        Σ_i e_iᵀ J e_i              one product a dimension
//! Hutchinson     vᵀ J v,  E[v vᵀ] = I        one product (Hutchinson 1990; Grathwohl et al. 2019)
//! ```

use crate::denoiser::{Call, Denoiser};
use crate::error::Result;
use crate::noise::Noise;
use crate::tensor::{At, gradient};
use candle_core::{DType, Device, Tensor};

/// How the divergence is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// One vector-Jacobian product a dimension: for few dimensions.
    Exact,
    /// A probe of signs, of the smaller variance.
    #[default]
    Rademacher,
    /// A normal probe.
    Gaussian,
}

/// A probe, drawn once and kept over a trajectory.
#[derive(Clone, Debug)]
pub enum Probe {
    /// None: exactly.
    Exact,
    /// `v`, shaped as the batch.
    Vector(Tensor),
}

impl Divergence {
    /// A probe for a batch like this.
    ///
    /// # Errors
    /// Those of the noise source.
    pub fn probe(self, like: &Tensor, noise: &mut dyn Noise) -> Result<Probe> {
        Ok(match self {
            Divergence::Exact => Probe::Exact,
            Divergence::Gaussian => Probe::Vector(noise.normal(like)?),
            Divergence::Rademacher => {
                let negative = noise.normal(like)?.lt(0.0)?.to_dtype(like.dtype())?;
                Probe::Vector(negative.affine(-2.0, 1.0)?)
            }
        })
    }
}

impl Probe {
    /// What the probe takes for the trace of the identity, `v·v` or exactly `D`, an entry for each of
    /// the `rows` items.
    ///
    /// # Errors
    /// When the probe has another shape.
    pub fn identity(&self, rows: usize, dims: usize) -> Result<Vec<f64>> {
        match self {
            Probe::Exact => Ok(vec![dims as f64; rows]),
            Probe::Vector(v) => {
                let v = v.to_dtype(DType::F64)?.flatten_from(1)?;
                Ok(v.sqr()?.sum(1)?.to_vec1()?)
            }
        }
    }
}

/// The score at `x` and its divergence, `[B, …]` and `[B]` (f64).
///
/// The denoiser is called with gradients on; items must not depend on each other.
///
/// # Errors
/// Whatever the model refuses, and `Config` when its score does not depend on `x`.
pub fn score_and_divergence(
    denoiser: &dyn Denoiser,
    x: &Tensor,
    at: At<'_>,
    probe: &Probe,
    call: &mut Call<'_>,
) -> Result<(Tensor, Tensor)> {
    let dims: usize = x.dims().iter().skip(1).product();
    let mut score = None;
    let mut product = |v: &Tensor| -> Result<Tensor> {
        let vjp = gradient(x, |x| {
            let mut call = Call {
                noise: call.noise,
                items: call.items.clone(),
                tracked: true,
            };
            let s = denoiser.predict(x, at, &mut call)?.score(x, at)?;
            let scalar = (&s * v)?.sum_all()?;
            score = Some(s.detach());
            Ok(scalar)
        })?;
        Ok((vjp * v)?.flatten_from(1)?.to_dtype(DType::F64)?.sum(1)?)
    };
    let divergence = match probe {
        Probe::Vector(v) => product(&v.to_dtype(x.dtype())?)?,
        Probe::Exact => {
            let mut sum = Tensor::zeros(x.dim(0)?, DType::F64, x.device())?;
            for i in 0..dims {
                let mut basis = vec![0.0; dims];
                basis[i] = 1.0;
                let shape: Vec<usize> =
                    [1].iter().chain(x.dims().iter().skip(1)).copied().collect();
                let v = Tensor::from_vec(basis, shape, &Device::Cpu)?
                    .to_dtype(x.dtype())?
                    .to_device(x.device())?
                    .broadcast_as(x.shape())?
                    .contiguous()?;
                sum = (sum + product(&v)?)?;
            }
            sum
        }
    };
    match score {
        Some(score) => Ok((score, divergence)),
        None => Ok((x.zeros_like()?, divergence)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::{Gaussian, Mixture};
    use crate::schedule::Point;

    fn run(denoiser: &dyn Denoiser, x: &Tensor, p: Point, probe: &Probe) -> (Tensor, Vec<f64>) {
        let n = x.dim(0).unwrap() as u64;
        let mut noise = CounterNoise::new(0, 0..n);
        let mut call = Call {
            noise: &mut noise,
            items: 0..n,
            tracked: true,
        };
        let (s, d) = score_and_divergence(denoiser, x, At::All(p), probe, &mut call).unwrap();
        (s, d.to_vec1().unwrap())
    }

    #[test]
    fn exact_on_gaussian_data() {
        let oracle = Gaussian::new(vec![0.5, -1.0, 0.0], vec![0.3, 2.0, 1.0]);
        let p = Point::from_log_snr(0.0, 0.9);
        let x = Tensor::new(&[[0.2, 1.0, 0.3], [-0.7, 0.1, 2.0f64]], &Device::Cpu).unwrap();
        let (score, div) = run(&oracle, &x, p, &Probe::Exact);
        let exact: f64 = [0.3, 2.0, 1.0]
            .iter()
            .map(|c: &f64| -1.0 / ((p.alpha * c).powi(2) + p.sigma.powi(2)))
            .sum();
        assert!(div.iter().all(|d| (d - exact).abs() < 1e-10), "{div:?}");
        let gap = (score - oracle.score(&x, &p).unwrap()).unwrap();
        assert!(
            gap.abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
                < 1e-10
        );
    }

    #[test]
    fn probes_are_unbiased() {
        // A thousand copies of one item, each with its own probe.
        let n = 1000;
        let oracle = Mixture::new(
            vec![0.3, 0.7],
            vec![vec![-1.0, 0.0, 0.4], vec![0.5, 1.0, -0.2]],
            vec![0.4, 0.6],
        )
        .unwrap();
        let p = Point::from_log_snr(0.0, 0.4);
        let one = Tensor::new(&[[0.2, 0.5, -0.1f64]], &Device::Cpu).unwrap();
        let exact = run(&oracle, &one, p, &Probe::Exact).1[0];
        let x = one.broadcast_as((n, 3)).unwrap().contiguous().unwrap();
        for kind in [Divergence::Rademacher, Divergence::Gaussian] {
            let mut noise = CounterNoise::new(8, 0..n as u64);
            let probe = kind.probe(&x, &mut noise).unwrap();
            let estimates = run(&oracle, &x, p, &probe).1;
            let mean = estimates.iter().sum::<f64>() / n as f64;
            let var = estimates.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / n as f64;
            assert!(var > 0.0);
            let error = 4.0 * (var / n as f64).sqrt();
            assert!(
                (mean - exact).abs() < error,
                "{kind:?}: {mean} {exact} ± {error}"
            );
        }
        assert!(matches!(
            Divergence::Exact.probe(&one, &mut CounterNoise::new(0, 0..1)),
            Ok(Probe::Exact)
        ));
    }

    /// Gradients reach the input of a network in f32 behind a state in f64.
    #[test]
    fn through_a_network_of_another_type() {
        use crate::denoiser::{Network, TimeCode};
        use crate::predict::Kind;
        let network = Network::new(Kind::Score, TimeCode::Index, |x: &Tensor, _: &Tensor| {
            Ok(x.sqr()?.affine(-0.5, 0.0)?)
        });
        let x = Tensor::new(&[[0.5, 1.0], [2.0, -1.0f64]], &Device::Cpu).unwrap();
        let (score, div) = run(&network, &x, Point::new(0.5, 0.6, 0.8), &Probe::Exact);
        assert_eq!(score.dtype(), DType::F64);
        assert_eq!(div, [-1.5, -1.0]);
    }
}
