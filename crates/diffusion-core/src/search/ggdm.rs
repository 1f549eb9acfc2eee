//! Learning the sampler itself (Watson, Chan, Ho and Norouzi 2022: DDSS and GGDM): the coefficients of
//! a sampler of `K` steps are trained through all of its steps, the network staying as it is.

use crate::distill::adversarial::softplus;
use crate::error::{Report, Result};
use crate::forward::posterior;
use crate::schedule::Point;
use candle_core::{DType, Device, Tensor, Var};
use diffusion_ops::{Part, checkpointed};
use std::collections::BTreeMap;

/// What is learnt beside the coefficients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// The weights of `x̂₀ = a x − b ε̂` at every step ("+PRED"); else they follow from the marginals.
    pub prediction: bool,
    /// The times that the network is told ("+TIME").
    pub times: bool,
}

/// A sampler of the generalised Gaussian family.
///
/// ```text
/// q(x_t | x_{>t}, x₀) = N(Σ_{u>t} μ_tu x_u + μ_t0 x₀, s_t² I)
/// x_t = Σ_{u>t} μ_tu x_u + μ_t0 x̂₀ + s_t z,   x̂₀ = (x − √v ε̂)/a of the state x before,   q(x | x₀) = N(a x₀, v I)
/// ```
///
/// States are numbered from the noisiest, 0, to the last before the data, `K − 1`; the data is what the
/// last prediction says. The nearest link, the link to `x₀` and the deviation are sigmoids of their
/// parameters, the links to earlier states hyperbolic tangents, so that DDPM, which has none of
/// these, lies at 0.
#[derive(Clone)]
pub struct Ggdm {
    steps: usize,
    first: Point,
    parameters: BTreeMap<String, Var>,
    times: Vec<f64>,
    extras: Extras,
}

/// `ln(p/(1 − p))`.
fn logit(p: f64) -> f64 {
    (p / (1.0 - p)).ln()
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

/// `ln(eˣ − 1)`: what softplus makes `x` of.
fn softplus_inverse(x: f64) -> f64 {
    x + (-(-x).exp()).ln_1p()
}

impl Ggdm {
    /// The sampler that is DDPM along these points, noisiest first, the last being the data.
    ///
    /// Its parameters are of this dtype: `near`, `data` and `std` `[K − 1]`, `far` `[(K−1)(K−2)/2]`, with
    /// [`Extras`] `scale` and `noise` `[K]` and `time` `[K]`.
    ///
    /// # Errors
    /// `Config` when there are fewer than three points, or a coefficient of DDPM along them is not within
    /// (0, 1), as for processes that do not preserve the variance.
    pub fn ddpm(points: &[Point], extras: Extras, dtype: DType, device: &Device) -> Result<Self> {
        let steps = points.len().saturating_sub(1);
        let (Some(first), true) = (points.first(), steps >= 2) else {
            return Err(Report::new("sampler", format!("{} points", points.len()))
                .expected("at least three: two steps and the data")
                .config());
        };
        let mut raw: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for pair in points.windows(2).take(steps - 1) {
            let p = posterior(&pair[0], &pair[1]);
            for (name, value) in [("near", p.x), ("data", p.x0), ("std", p.variance.sqrt())] {
                if !(value > 0.0 && value < 1.0) {
                    return Err(Report::new(format!("coefficient `{name}` of DDPM"), value)
                        .expected("a number within (0, 1)")
                        .remedy(
                            "use a process that preserves the variance, and a start with signal",
                        )
                        .config());
                }
                raw.entry(name).or_default().push(logit(value));
            }
        }
        raw.insert("far", vec![0.0; (steps - 1) * (steps - 2) / 2]);
        let asked = points.iter().take(steps);
        if extras.prediction {
            let scale = asked.clone().map(|p| softplus_inverse(1.0 / p.alpha - 1.0));
            raw.insert("scale", scale.collect());
            let noise = asked.clone().map(|p| softplus_inverse(p.sigma_hat()));
            raw.insert("noise", noise.collect());
        }
        // Times count from 1 here: the cleanest of a table is 0.
        let times: Vec<f64> = asked.map(|p| p.t).collect();
        if extras.times {
            let mut below = -1.0;
            let mut gaps = Vec::new();
            for t in times.iter().rev() {
                gaps.push((t - below).ln());
                below = *t;
            }
            raw.insert("time", gaps);
        }
        let mut parameters = BTreeMap::new();
        for (name, values) in raw {
            if values.iter().any(|v| !v.is_finite()) {
                return Err(
                    Report::new(format!("parameter `{name}`"), format!("{values:?}"))
                        .expected("finite numbers")
                        .remedy("use points whose times fall, with signal and noise")
                        .config(),
                );
            }
            if !values.is_empty() {
                let tensor = Tensor::new(values, device)?.to_dtype(dtype)?;
                parameters.insert(name.to_string(), Var::from_tensor(&tensor)?);
            }
        }
        Ok(Self {
            steps,
            first: *first,
            parameters,
            times,
            extras,
        })
    }

    /// What is trained, by name.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// The number of steps, `K`: as many draws of noise does a sample need.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Entry `i` of a parameter, `[1]`.
    fn entry(&self, name: &str, i: usize) -> Result<Tensor> {
        match self.parameters.get(name) {
            Some(values) => Ok(values.as_tensor().narrow(0, i, 1)?),
            None => Err(Report::new("sampler", format!("no parameter `{name}`"))
                .expected("a sampler that was made with it")
                .config()),
        }
    }

    /// `μ_ij` of state `i` and the states `j < i` before it, `[1]` each.
    fn links(&self, i: usize) -> Result<Vec<Tensor>> {
        let before = i.saturating_sub(1) * i.saturating_sub(2) / 2;
        let mut links = Vec::with_capacity(i);
        for j in 0..i.saturating_sub(1) {
            links.push(self.entry("far", before + j)?.tanh()?);
        }
        links.push(sigmoid(&self.entry("near", i - 1)?)?);
        Ok(links)
    }

    /// `(a, v)` of every state, `q(x | x₀) = N(a x₀, v I)`, `[1]` each (section 3.2).
    ///
    /// ```text
    /// c_u = μ_iu, v = s_i²;   for j = i − 1, …, 0:   v += c_j² s_j²,   c_u += c_j μ_ju for u < j and u = x₀
    /// ```
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn marginals(&self) -> Result<Vec<(Tensor, Tensor)>> {
        let like = self.entry("near", 0)?;
        let constant = |v: f64| -> Result<Tensor> {
            Ok(Tensor::full(v, 1, like.device())?.to_dtype(like.dtype())?)
        };
        // (links, link to x₀, variance) of every state.
        let mut states: Vec<(Vec<Tensor>, Tensor, Tensor)> = vec![(
            Vec::new(),
            constant(self.first.alpha)?,
            constant(self.first.sigma.powi(2))?,
        )];
        let mut marginals = vec![(states[0].1.clone(), states[0].2.clone())];
        for i in 1..self.steps {
            let links = self.links(i)?;
            let data = sigmoid(&self.entry("data", i - 1)?)?;
            let variance = sigmoid(&self.entry("std", i - 1)?)?.sqr()?;
            let (mut c, mut a, mut v) = (links.clone(), data.clone(), variance.clone());
            while let Some(weight) = c.pop() {
                let (own, to_data, noise) = &states[c.len()];
                v = (v + (weight.sqr()? * noise)?)?;
                a = (a + (&weight * to_data)?)?;
                for (c, link) in c.iter_mut().zip(own) {
                    *c = (&*c + (&weight * link)?)?;
                }
            }
            states.push((links, data, variance));
            marginals.push((a, v));
        }
        Ok(marginals)
    }

    /// The times that the network is told, noisiest first, `[1]` each.
    fn told(&self) -> Result<Vec<Tensor>> {
        let like = self.entry("near", 0)?;
        let Some(raw) = self.parameters.get("time").filter(|_| self.extras.times) else {
            let constant = |t: &f64| -> Result<Tensor> {
                Ok(Tensor::full(*t, 1, like.device())?.to_dtype(like.dtype())?)
            };
            return self.times.iter().map(constant).collect();
        };
        let raw = raw.as_tensor();
        let e = raw.broadcast_sub(&raw.detach().max(0)?)?.exp()?;
        let share = e.broadcast_div(&e.sum_all()?)?;
        let most = self.times.first().copied().unwrap_or(0.0) + 1.0;
        let mut so_far = share.narrow(0, 0, 1)?.zeros_like()?;
        let mut times = Vec::with_capacity(self.steps);
        for i in 0..self.steps {
            so_far = (so_far + share.narrow(0, i, 1)?)?;
            times.push(so_far.affine(most, -1.0)?);
        }
        times.reverse();
        Ok(times)
    }

    /// Samples, `[B, …]`, differentiable in the parameters.
    ///
    /// `epsilon` is the network: given `x`, `[B, …]`, and the time, `[1]`, its noise. With `again` its inner
    /// activations are not kept but computed once more in the backward pass, so that memory holds the
    /// states alone; gradients are then those of [`diffusion_ops::backward`].
    ///
    /// # Shapes
    /// `noise` has `K` standard normal tensors `[B, …]`, the first for the start.
    ///
    /// # Errors
    /// `Input` for another number of draws; whatever the network refuses.
    pub fn sample(&self, epsilon: &Part, noise: &[Tensor], again: bool) -> Result<Tensor> {
        if noise.len() != self.steps {
            return Err(Report::new("noise", format!("{} draws", noise.len()))
                .expected(format!("{}, one a step", self.steps))
                .input());
        }
        let (marginals, times) = (self.marginals()?, self.told()?);
        let mut states = vec![noise[0].affine(self.first.sigma, 0.0)?];
        for i in 0..self.steps {
            let x = &states[i];
            let said = match again {
                true => checkpointed(&[x, &times[i]], epsilon.clone())?,
                false => epsilon(&[x.clone(), times[i].clone()])?,
            };
            let x0 = if self.extras.prediction {
                let a = (softplus(&self.entry("scale", i)?)? + 1.0)?;
                let b = softplus(&self.entry("noise", i)?)?;
                (x.broadcast_mul(&a)? - said.broadcast_mul(&b)?)?
            } else {
                let (a, v) = &marginals[i];
                (x - said.broadcast_mul(&v.sqrt()?)?)?.broadcast_div(a)?
            };
            if i + 1 == self.steps {
                return Ok(x0);
            }
            let data = sigmoid(&self.entry("data", i)?)?;
            let std = sigmoid(&self.entry("std", i)?)?;
            let mut next = (x0.broadcast_mul(&data)? + noise[i + 1].broadcast_mul(&std)?)?;
            for (state, link) in states.iter().zip(self.links(i + 1)?) {
                next = (next + state.broadcast_mul(&link)?)?;
            }
            states.push(next);
        }
        Err(Report::new("sampler", "no steps")
            .expected("at least two")
            .config())
    }
}

/// The kernel inception distance with a linear kernel, up to what does not depend on the samples
/// (Watson et al. 2022, eq. 8).
///
/// ```text
/// L = 1/(n(n−1)) Σ_{i≠j} φ(x_i)·φ(x_j) − 2/(nm) Σ_{i,j} φ(x_i)·φ(y_j)
/// ```
///
/// # Shapes
/// Features of samples `[n, F]` and of data `[m, F]`; the result is a scalar.
///
/// # Errors
/// `Input` for fewer than two samples; when shapes differ.
pub fn kernel_loss(samples: &Tensor, data: &Tensor) -> Result<Tensor> {
    let n = samples.dim(0)? as f64;
    if n < 2.0 {
        return Err(Report::new("samples", n).expected("at least two").input());
    }
    let total = samples.sum(0)?;
    let own = samples.sqr()?.sum_all()?;
    let among = ((total.sqr()?.sum_all()? - own)? / (n * (n - 1.0)))?;
    let between = (total * data.mean(0)?.detach())?.sum_all()?;
    Ok((among - (between * (2.0 / n))?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::{Call, from_fn};
    use crate::noise::{CounterNoise, Noise};
    use crate::predict::{Kind, Prediction};
    use crate::sample::{Ancestral, Planned, prior, sample};
    use crate::schedule::{BetaSchedule, Schedule};
    use crate::tensor::At;
    use std::sync::Arc;

    const ALL: Extras = Extras {
        prediction: true,
        times: true,
    };

    /// `K` points of the linear table, quadratically spaced, and the data.
    fn points(k: usize) -> Vec<Point> {
        let table = BetaSchedule::ddpm(1000).table(1000).unwrap();
        let mut points: Vec<Point> = (1..=k)
            .rev()
            .map(|i| table.at((899 * i * i / (k * k)) as f64))
            .collect();
        points.push(Point::data(-1.0));
        points
    }

    /// A smooth network that looks at its time.
    fn network() -> Part {
        Arc::new(|inputs: &[Tensor]| {
            let (x, t) = (&inputs[0], &inputs[1]);
            let bend = x.affine(0.7, 0.1)?.tanh()?;
            bend.broadcast_mul(&t.affine(5e-4, 0.4)?)
        })
    }

    fn draws(k: usize, batch: usize) -> Vec<Tensor> {
        let like = Tensor::zeros((batch, 3), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(1, 0..batch as u64);
        (0..k).map(|_| noise.normal(&like).unwrap()).collect()
    }

    fn new(k: usize, extras: Extras) -> Ggdm {
        Ggdm::ddpm(&points(k), extras, DType::F64, &Device::Cpu).unwrap()
    }

    fn scalar(x: &Tensor) -> f64 {
        x.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0]
    }

    #[test]
    fn untrained_it_is_ddpm() {
        let k = 6;
        for extras in [Extras::default(), ALL] {
            let sampler = new(k, extras);
            for ((a, v), p) in sampler.marginals().unwrap().iter().zip(points(k)) {
                assert!((scalar(a) / p.alpha - 1.0).abs() < 1e-11);
                assert!((scalar(v) / p.sigma.powi(2) - 1.0).abs() < 1e-11);
            }
            for (told, p) in sampler.told().unwrap().iter().zip(points(k)) {
                assert!((scalar(told) - p.t).abs() < 1e-9);
            }
            let x = sampler.sample(&network(), &draws(k, 5), false).unwrap();
            let model = from_fn(|x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
                let At::All(p) = at else { unreachable!() };
                let t = Tensor::new(&[p.t], &Device::Cpu)?;
                let value = network()(&[x.clone(), t])?;
                Ok(Prediction::new(Kind::Epsilon, value))
            });
            let points = points(k);
            let mut noise = CounterNoise::new(1, 0..5);
            let start = prior(&draws(1, 5)[0], &points[0], &mut noise).unwrap();
            let solver = Planned::new(Ancestral::default(), &points);
            let y = sample(&solver, &model, start, &mut noise, 0..5).unwrap();
            let d = (x - y).unwrap().abs().unwrap().max_all().unwrap();
            assert!(scalar(&d) < 1e-9, "{extras:?}: {}", scalar(&d));
        }
    }

    /// The recursion gives the moments that samples of the chain have: by the covariance of all states.
    #[test]
    fn marginals_are_those_of_the_chain() {
        let sampler = new(5, Extras::default());
        for (i, name) in ["near", "data", "std", "far"].into_iter().enumerate() {
            let var = &sampler.parameters()[name];
            let n = var.dim(0).unwrap();
            let z = draws(1, n)[0].narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
            let moved = (var.as_tensor() + z.affine(0.3, 0.05 * i as f64).unwrap()).unwrap();
            var.set(&moved).unwrap();
        }
        let k = 5;
        let p = points(k)[0];
        let (mut a, mut cov) = (vec![p.alpha], vec![vec![p.sigma.powi(2)]]);
        for i in 1..k {
            let mu: Vec<f64> = sampler.links(i).unwrap().iter().map(scalar).collect();
            let at = |name| scalar(&sigmoid(&sampler.entry(name, i - 1).unwrap()).unwrap());
            a.push(at("data") + mu.iter().zip(&a).map(|(m, a)| m * a).sum::<f64>());
            let row: Vec<f64> = (0..i)
                .map(|u| (0..i).map(|j| mu[j] * cov[j][u]).sum())
                .collect();
            let own = at("std").powi(2) + mu.iter().zip(&row).map(|(m, c)| m * c).sum::<f64>();
            for (u, c) in row.iter().enumerate() {
                cov[u].push(*c);
            }
            cov.push([row, vec![own]].concat());
        }
        for (i, (mean, v)) in sampler.marginals().unwrap().iter().enumerate() {
            assert!((scalar(mean) - a[i]).abs() < 1e-12);
            assert!(
                (scalar(v) - cov[i][i]).abs() < 1e-12,
                "{i}: {} {}",
                scalar(v),
                cov[i][i]
            );
        }
    }

    /// Gradients through all steps against finite differences, with and without computing the network again.
    #[test]
    fn gradients_through_the_sampler() {
        let (k, batch) = (4, 6);
        let data = draws(1, 9)[0].affine(0.5, 0.3).unwrap();
        for (extras, again) in [(Extras::default(), false), (ALL, false), (ALL, true)] {
            let sampler = new(k, extras);
            let loss = || {
                let x = sampler.sample(&network(), &draws(k, batch), again).unwrap();
                kernel_loss(&x, &data).unwrap()
            };
            let grads = diffusion_ops::backward(&loss()).unwrap();
            for (name, var) in sampler.parameters() {
                let base = var.as_tensor().detach().to_vec1::<f64>().unwrap();
                let slope = grads.get(var.as_tensor());
                let slope = slope.unwrap_or_else(|| panic!("no gradient of {name}"));
                let slope = slope.to_vec1::<f64>().unwrap();
                let scale = slope.iter().fold(1e-3f64, |m, g| m.max(g.abs()));
                for i in 0..base.len() {
                    let at = |h: f64| {
                        let mut values = base.clone();
                        values[i] += h;
                        var.set(&Tensor::new(values, &Device::Cpu).unwrap())
                            .unwrap();
                        scalar(&loss())
                    };
                    let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                    let off = (slope[i] - numeric).abs() / scale;
                    assert!(off < 1e-5, "{name}[{i}], {again}: {} {numeric}", slope[i]);
                }
                var.set(&Tensor::new(base, &Device::Cpu).unwrap()).unwrap();
            }
        }
    }

    /// A few steps of descent on the loss lower it on noise that was not trained on.
    #[test]
    fn training_lowers_the_distance() {
        let (k, batch) = (4, 128);
        let sampler = new(k, Extras::default());
        let features = |x: &Tensor| Tensor::cat(&[x, &x.sqr().unwrap()], 1).unwrap();
        let data = features(&draws(1, 512)[0].affine(0.4, 0.2).unwrap());
        let loss = |label: u64| {
            let like = Tensor::zeros((batch, 3), DType::F64, &Device::Cpu).unwrap();
            let mut noise = CounterNoise::new(label, 0..batch as u64);
            let z: Vec<Tensor> = (0..k).map(|_| noise.normal(&like).unwrap()).collect();
            let x = sampler.sample(&network(), &z, false).unwrap();
            kernel_loss(&features(&x), &data).unwrap()
        };
        let before = scalar(&loss(99));
        for step in 0..20 {
            let grads = diffusion_ops::backward(&loss(step)).unwrap();
            let slopes: Vec<(&Var, &Tensor)> = sampler
                .parameters()
                .values()
                .filter_map(|v| Some((v, grads.get(v.as_tensor())?)))
                .collect();
            let norm: f64 = slopes
                .iter()
                .map(|(_, g)| scalar(&g.sqr().unwrap().sum_all().unwrap()))
                .sum::<f64>()
                .sqrt();
            for (var, slope) in slopes {
                let step = slope.affine(-0.05 / norm, 0.0).unwrap();
                var.set(&(var.as_tensor() + step).unwrap()).unwrap();
            }
        }
        let after = scalar(&loss(99));
        assert!(after < before, "{before} {after}");
    }

    #[test]
    fn the_kernel_loss_is_its_sums() {
        let (x, y) = (
            draws(1, 4)[0].clone(),
            draws(1, 5)[0].affine(2.0, 1.0).unwrap(),
        );
        let (a, b) = (x.to_vec2::<f64>().unwrap(), y.to_vec2::<f64>().unwrap());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut exact = 0.0;
        for i in 0..4 {
            for j in (0..4).filter(|j| *j != i) {
                exact += dot(&a[i], &a[j]) / 12.0;
            }
            exact -= b.iter().map(|y| dot(&a[i], y)).sum::<f64>() * 2.0 / 20.0;
        }
        assert!((scalar(&kernel_loss(&x, &y).unwrap()) - exact).abs() < 1e-12);
        assert!(kernel_loss(&x.narrow(0, 0, 1).unwrap(), &y).is_err());
        assert!(new(3, ALL).sample(&network(), &draws(2, 2), false).is_err());
        let ve = [
            Point::new(3.0, 1.0, 9.0),
            Point::new(2.0, 1.0, 3.0),
            Point::data(0.0),
        ];
        assert!(Ggdm::ddpm(&ve, ALL, DType::F64, &Device::Cpu).is_err());
        assert!(Ggdm::ddpm(&ve[1..], ALL, DType::F64, &Device::Cpu).is_err());
    }
}
