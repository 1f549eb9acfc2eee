//! Consistency models (Song, Dhariwal, Chen and Sutskever 2023; improved by Song and Dhariwal
//! 2023): one function that jumps from every point of a trajectory to the same end of it.

use super::teacher::{Ode, untracked};
use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::marginal;
use crate::grid::Grid;
use crate::sample::Boundary;
use crate::schedule::{Edm, Point};
use crate::tensor::{At, Coef, mean_per_item};
use candle_core::Tensor;
use diffusion_ops::rng::Key;
use serde::{Deserialize, Serialize};

/// How neighbouring levels are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LevelLaw {
    /// Each pair as often as the others.
    #[default]
    Uniform,
    /// `ln σ̂` normal, each pair as often as it falls between the two (Song and Dhariwal 2023,
    /// eq. 10: −1.1 and 2.0).
    LogNormal {
        /// Mean of `ln σ̂`.
        mean: f64,
        /// Deviation of `ln σ̂`.
        std: f64,
    },
}

/// Levels between which a consistency model is trained, noisiest first, the last being the `ε` at
/// which it is the identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    points: Vec<Point>,
    /// `P(pair ≤ i)`.
    cumulative: Vec<f64>,
}

impl Levels {
    /// These levels, noisiest first, none of them the data.
    ///
    /// # Errors
    /// `Config` when there are fewer than two, noise does not fall along them, or one has no signal or
    /// no noise.
    pub fn new(points: Vec<Point>, law: LevelLaw) -> Result<Self> {
        let falls = points
            .windows(2)
            .all(|w| w[0].sigma_hat() > w[1].sigma_hat());
        let inside = points.iter().all(|p| p.alpha > 0.0 && p.sigma > 0.0);
        if points.len() < 2 || !falls || !inside {
            return Err(Report::new("levels", format!("{} points", points.len()))
                .expected("at least two points with signal and noise, noisiest first")
                .remedy("leave out the data and a last step without signal")
                .config());
        }
        let mut weights: Vec<f64> = points
            .windows(2)
            .map(|w| match law {
                LevelLaw::Uniform => 1.0,
                LevelLaw::LogNormal { mean, std } => {
                    let cdf = |p: &Point| {
                        libm::erf((p.sigma_hat().ln() - mean) / (std * std::f64::consts::SQRT_2))
                    };
                    (cdf(&w[0]) - cdf(&w[1])).max(0.0)
                }
            })
            .collect();
        let total: f64 = weights.iter().sum();
        if !total.is_finite() || total <= 0.0 {
            return Err(Report::new("law of the levels", format!("{law:?}"))
                .expected("a law that reaches some of the levels")
                .config());
        }
        let mut so_far = 0.0;
        for weight in &mut weights {
            so_far += *weight / total;
            *weight = so_far;
        }
        Ok(Self {
            points,
            cumulative: weights,
        })
    }

    /// `n` levels of Karras et al. 2022 with ρ = 7, `α = 1`; 0.002 to 80 in the paper.
    ///
    /// # Errors
    /// As [`Levels::new`].
    pub fn edm(n: usize, sigma_min: f64, sigma_max: f64, law: LevelLaw) -> Result<Self> {
        let grid = Grid::Karras {
            sigma_min: Some(sigma_min),
            sigma_max: Some(sigma_max),
            rho: 7.0,
        };
        let mut points = grid.points(&Edm::default(), n)?;
        points.pop();
        Self::new(points, law)
    }

    /// The levels, noisiest first.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// One pair of neighbours an item, numbered from the noisiest, a function of the item's key alone.
    pub fn draw(&self, keys: impl IntoIterator<Item = Key>) -> Vec<usize> {
        let last = self.cumulative.len().saturating_sub(1);
        keys.into_iter()
            .map(|key| {
                let u = key.uniform(1).first().copied().unwrap_or(0.0);
                self.cumulative.partition_point(|c| *c <= u).min(last)
            })
            .collect()
    }

    /// The noisier and the cleaner point of each pair.
    fn pairs(&self, pairs: &[usize]) -> Result<(Vec<Point>, Vec<Point>)> {
        let mut ends = (Vec::new(), Vec::new());
        for i in pairs {
            match (self.points.get(*i), self.points.get(i + 1)) {
                (Some(noisy), Some(clean)) => {
                    ends.0.push(*noisy);
                    ends.1.push(*clean);
                }
                _ => {
                    return Err(Report::new("pair of levels", i)
                        .expected(format!("below {}", self.points.len() - 1))
                        .config());
                }
            }
        }
        Ok(ends)
    }
}

/// How far two jumps are apart, an item.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Distance {
    /// `‖a − b‖²/D`.
    L2,
    /// `√(‖a − b‖² + c²) − c` (Song and Dhariwal 2023).
    PseudoHuber {
        /// `c`; `0.00054 √D` when absent.
        c: Option<f64>,
    },
}

impl Default for Distance {
    fn default() -> Self {
        Distance::PseudoHuber { c: None }
    }
}

impl Distance {
    /// The distances, `[B]`, of two batches `[B, …]`.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn of(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let square = (a - b)?.sqr()?;
        match *self {
            Distance::L2 => mean_per_item(&square),
            Distance::PseudoHuber { c } => {
                let total = square.flatten_from(1)?.sum(1)?;
                let dim = square.elem_count() as f64 / total.elem_count().max(1) as f64;
                let c = c.unwrap_or(0.00054 * dim.sqrt());
                Ok(((total + c * c)?.sqrt()? - c)?)
            }
        }
    }
}

/// How much a pair of levels counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairWeight {
    /// 1.
    #[default]
    One,
    /// `1/(σ̂_{n+1} − σ̂_n)` (Song and Dhariwal 2023).
    InverseGap,
}

/// The losses of consistency models.
///
/// ```text
/// f_θ(x, t) = c_skip(t) x + c_out(t) F_θ(x, t),   f_θ(x, ε) = x
/// L = λ(n) d(f_θ(x_{n+1}, t_{n+1}), f_θ⁻(x̂_n, t_n)),   x_{n+1} = α x₀ + σ z at t_{n+1}
/// distillation:  x̂_n by one step of the teacher from x_{n+1}          (algorithm 2)
/// training:      x̂_n = α x₀ + σ z at t_n, with the same z             (algorithm 3)
/// ```
///
/// `θ⁻` is a moving average of `θ` or `θ` itself; no gradient flows through it. Samples are drawn by
/// [`crate::sample::Consistency`] with the same boundary.
#[derive(Clone, Debug, PartialEq)]
pub struct Consistency {
    /// Where it is trained.
    pub levels: Levels,
    /// How a jump is made of what the network says.
    pub boundary: Boundary,
    /// `d`.
    pub distance: Distance,
    /// `λ`.
    pub weight: PairWeight,
}

impl Consistency {
    /// Losses with the paper's boundary, `ε` being the last level's `σ̂`.
    pub fn new(levels: Levels, sigma_data: f64, distance: Distance) -> Self {
        let sigma_min = levels.points.last().map_or(0.0, Point::sigma_hat);
        Self {
            levels,
            boundary: Boundary::Edm {
                sigma_data,
                sigma_min,
            },
            distance,
            weight: PairWeight::One,
        }
    }

    /// The jump `f(x, t)` of a network, `[B, …]`.
    ///
    /// # Errors
    /// Whatever the network refuses.
    pub fn jump(
        &self,
        network: &dyn Denoiser,
        x: &Tensor,
        at: &[Point],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let at = At::Each(at);
        let said = network.predict(x, at, call)?;
        self.boundary.jump(&said, x, at)
    }

    /// Consistency distillation: the loss of every item, `[B]`, differentiable in the student's weights.
    ///
    /// # Shapes
    /// `x0` and `z` `[B, …]`, one pair of levels an item.
    ///
    /// # Errors
    /// Whatever the networks refuse.
    pub fn distil(
        &self,
        (teacher, ode): (&dyn Denoiser, Ode),
        (student, target): (&dyn Denoiser, &dyn Denoiser),
        (x0, z): (&Tensor, &Tensor),
        pairs: &[usize],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let (noisy, clean) = self.levels.pairs(pairs)?;
        let x = marginal(x0, z, At::Each(&noisy))?;
        let back = ode.step(teacher, &x, &noisy, &clean, call)?;
        self.between((student, target), (&x, &back), (&noisy, &clean), call)
    }

    /// Consistency training, without a teacher: the loss of every item, `[B]`.
    ///
    /// # Shapes
    /// As [`Consistency::distil`].
    ///
    /// # Errors
    /// Whatever the networks refuse.
    pub fn train(
        &self,
        (student, target): (&dyn Denoiser, &dyn Denoiser),
        (x0, z): (&Tensor, &Tensor),
        pairs: &[usize],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let (noisy, clean) = self.levels.pairs(pairs)?;
        let x = marginal(x0, z, At::Each(&noisy))?;
        let back = marginal(x0, z, At::Each(&clean))?;
        self.between((student, target), (&x, &back), (&noisy, &clean), call)
    }

    /// `λ d(f_θ(x, t), f_θ⁻(x̂, s))` for samples of one trajectory at two points each.
    fn between(
        &self,
        (student, target): (&dyn Denoiser, &dyn Denoiser),
        (x, back): (&Tensor, &Tensor),
        (noisy, clean): (&[Point], &[Point]),
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let there = self
            .jump(target, back, clean, &mut untracked(call))?
            .detach();
        let here = self.jump(student, x, noisy, call)?;
        let distance = self.distance.of(&here, &there)?;
        match self.weight {
            PairWeight::One => Ok(distance),
            PairWeight::InverseGap => Coef::Each(
                noisy
                    .iter()
                    .zip(clean)
                    .map(|(t, s)| 1.0 / (t.sigma_hat() - s.sigma_hat()))
                    .collect(),
            )
            .times(&distance),
        }
    }
}

/// How the number of levels and the moving average of the target change in training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Curriculum {
    /// Always the same (distillation: 18 or 40 levels, 0 to 0.95).
    Fixed {
        /// Number of levels.
        levels: usize,
        /// Decay of the target's average; 0 for the student itself.
        decay: f64,
    },
    /// `N(k) = ⌈√(k/K ((s₁+1)² − s₀²) + s₀²) − 1⌉ + 1`, `μ(k) = exp(s₀ ln μ₀/N(k))` (Song et al. 2023,
    /// section 5: 2, 150, 0.9).
    Growing {
        /// Fewest steps, `s₀`.
        first: usize,
        /// Most steps, `s₁`.
        last: usize,
        /// `μ₀`.
        decay: f64,
    },
    /// `N(k) = min(s₀ 2^⌊k/K'⌋, s₁) + 1`, `K' = ⌊K/(log₂⌊s₁/s₀⌋ + 1)⌋`, `μ = 0` (Song and Dhariwal
    /// 2023: 10, 1280).
    Doubling {
        /// Fewest steps, `s₀`.
        first: usize,
        /// Most steps, `s₁`.
        last: usize,
    },
}

impl Curriculum {
    /// The number of levels `N` at step `k` of `total`.
    pub fn levels(&self, k: u64, total: u64) -> usize {
        let total = total.max(1);
        match *self {
            Curriculum::Fixed { levels, .. } => levels,
            Curriculum::Growing { first, last, .. } => {
                let (s0, s1) = (first as f64, last as f64);
                let grown = (k as f64 / total as f64) * ((s1 + 1.0).powi(2) - s0 * s0) + s0 * s0;
                (grown.sqrt() - 1.0).ceil() as usize + 1
            }
            Curriculum::Doubling { first, last } => {
                let doublings = (last / first.max(1)).max(1).ilog2() + 1;
                let each = (total / u64::from(doublings)).max(1);
                let times = (k / each).min(u64::from(doublings)) as u32;
                first.saturating_mul(1 << times).min(last) + 1
            }
        }
    }

    /// The decay `μ` of the target's average at step `k` of `total`; 0 makes it the student itself.
    pub fn decay(&self, k: u64, total: u64) -> f64 {
        match *self {
            Curriculum::Fixed { decay, .. } => decay,
            Curriculum::Growing { first, decay, .. } => {
                (first as f64 * decay.ln() / self.levels(k, total) as f64).exp()
            }
            Curriculum::Doubling { .. } => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::Gaussian;
    use crate::predict::{Kind, Prediction};
    use crate::sample;
    use crate::tensor::gradient;
    use candle_core::{DType, Device};
    use diffusion_ops::rng::stream;

    const SD: f64 = 0.5;
    const LOW: f64 = 0.002;

    fn levels(n: usize) -> Levels {
        Levels::edm(n, LOW, 80.0, LevelLaw::Uniform).unwrap()
    }

    fn draw(batch: usize, label: u64) -> Tensor {
        let like = Tensor::zeros((batch, 2), DType::F64, &Device::Cpu).unwrap();
        CounterNoise::new(label, 0..batch as u64)
            .normal(&like)
            .unwrap()
    }

    fn with_call<T>(batch: u64, f: impl FnOnce(&mut Call<'_>) -> T) -> T {
        let mut noise = CounterNoise::new(0, 0..batch);
        f(&mut Call {
            noise: &mut noise,
            items: 0..batch,
            tracked: true,
        })
    }

    fn number(v: f64) -> Tensor {
        Tensor::new(v, &Device::Cpu).unwrap()
    }

    /// The exact consistency function of Gaussian data, `s` times its slope off; as the raw output `F`.
    fn exact<'a>(data: &'a Gaussian, s: &'a Tensor) -> impl Denoiser + 'a {
        from_fn(move |x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
            let points = at.points(x.dim(0)?);
            let end = Point::new(LOW, 1.0, LOW);
            let (mut rows, mut out) = (Vec::new(), Vec::new());
            for (i, p) in points.iter().enumerate() {
                let row = x.narrow(0, i, 1)?;
                let f = data.flow(&row, p, &end)?;
                let away = p.sigma - LOW;
                let skip = SD * SD / (away * away + SD * SD);
                let c = SD * away / p.sigma.hypot(SD);
                rows.push((f - row.affine(skip, 0.0)?)?);
                out.push(if c == 0.0 { 0.0 } else { 1.0 / c });
            }
            let value = Coef::Each(out).times(&Tensor::cat(&rows, 0)?)?;
            let kind = Kind::Edm {
                sigma_data: SD,
                negative: false,
            };
            Ok(Prediction::new(kind, value.broadcast_mul(s)?))
        })
    }

    #[test]
    fn the_jump_is_the_identity_at_the_last_level_whatever_the_network_says() {
        let loss = Consistency::new(levels(5), SD, Distance::L2);
        let x = draw(3, 1);
        let end = [loss.levels.points()[4]; 3];
        for kind in [Kind::X0, Kind::Epsilon, Kind::Velocity, Kind::Flow] {
            let wild = from_fn(|x: &Tensor, _, _| Ok(Prediction::new(kind, x.affine(3.0, 1.0)?)));
            let f = with_call(3, |c| loss.jump(&wild, &x, &end, c)).unwrap();
            assert_eq!(
                f.to_vec2::<f64>().unwrap(),
                x.to_vec2::<f64>().unwrap(),
                "{kind:?}"
            );
        }
    }

    /// Along an exact trajectory the exact function does not change; with a teacher's step the loss is
    /// that of the step, which falls with the distance of the levels; a wrong function costs.
    #[test]
    fn the_exact_function_is_consistent_along_a_trajectory() {
        let data = Gaussian::new(vec![0.1, -0.3], vec![0.4, 0.7]);
        let (x0, z) = (draw(8, 1), draw(8, 2));
        let one = number(1.0);
        let f = exact(&data, &one);
        let loss = Consistency::new(levels(12), SD, Distance::L2);
        let pairs: Vec<usize> = (0..8).collect();
        let (noisy, clean) = loss.levels.pairs(&pairs).unwrap();
        let x = marginal(&x0, &z, At::Each(&noisy)).unwrap();
        let rows: Vec<Tensor> = (0..8)
            .map(|i| {
                let row = x.narrow(0, i, 1).unwrap();
                data.flow(&row, &noisy[i], &clean[i]).unwrap()
            })
            .collect();
        let back = Tensor::cat(&rows, 0).unwrap();
        let exactly = with_call(8, |c| {
            loss.between((&f, &f), (&x, &back), (&noisy, &clean), c)
        })
        .unwrap();
        assert!(exactly.max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-24);
        let of = |n: usize, ode: Ode| {
            let loss = Consistency::new(levels(n), SD, Distance::L2);
            let pairs = loss
                .levels
                .draw((0..8).map(|i| Key::new(1, stream::TEST).item(i)));
            let losses = with_call(8, |c| {
                loss.distil((&data, ode), (&f, &f), (&x0, &z), &pairs, c)
            });
            losses
                .unwrap()
                .mean_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let (coarse, fine, euler) = (of(20, Ode::Heun), of(80, Ode::Heun), of(80, Ode::Euler));
        // Heun's local error is of the third order, so its square falls as n⁻⁶.
        assert!(fine < coarse / 1000.0, "{coarse} {fine}");
        assert!(euler > 10.0 * fine, "{euler} {fine}");
    }

    /// The gradient reaches the student and not the target, and is that of finite differences.
    #[test]
    fn the_gradient_is_the_students() {
        let data = Gaussian::new(vec![0.1, -0.3], vec![0.4, 0.7]);
        let (x0, z) = (draw(6, 1), draw(6, 2));
        let pairs = [0, 1, 2, 3, 4, 5];
        for distance in [Distance::L2, Distance::default()] {
            let loss = Consistency {
                weight: PairWeight::InverseGap,
                ..Consistency::new(levels(8), SD, distance)
            };
            for teacher in [true, false] {
                let value = |s: &Tensor, t: &Tensor| -> Result<Tensor> {
                    let (student, target) = (exact(&data, s), exact(&data, t));
                    let both: (&dyn Denoiser, &dyn Denoiser) = (&student, &target);
                    let losses = with_call(6, |c| match teacher {
                        true => loss.distil((&data, Ode::Heun), both, (&x0, &z), &pairs, c),
                        false => loss.train(both, (&x0, &z), &pairs, c),
                    })?;
                    Ok(losses.mean_all()?)
                };
                let s = number(0.8);
                let slope = gradient(&s, |s| value(s, &number(0.9))).unwrap();
                let slope = slope.to_scalar::<f64>().unwrap();
                let at = |v: f64| {
                    let loss = value(&number(v), &number(0.9)).unwrap();
                    loss.to_scalar::<f64>().unwrap()
                };
                let numeric = (at(0.8 + 1e-6) - at(0.8 - 1e-6)) / 2e-6;
                assert!((slope / numeric - 1.0).abs() < 1e-6, "{slope} {numeric}");
                assert!(gradient(&s, |t| value(&number(0.8), t)).is_err());
            }
        }
    }

    /// The function that the losses train is the one that the sampler jumps by.
    #[test]
    fn sampler_and_loss_jump_alike() {
        use sample::Step;
        let data = Gaussian::new(vec![0.1, -0.3], vec![0.4, 0.7]);
        let one = number(1.0);
        let f = exact(&data, &one);
        let loss = Consistency::new(levels(8), SD, Distance::L2);
        let (x, from) = (draw(3, 1), loss.levels.points()[2]);
        let sampler = sample::Consistency {
            boundary: loss.boundary,
            sigma_min: LOW,
            ..sample::Consistency::default()
        };
        let mut noise = CounterNoise::new(0, 0..3);
        let mut ctx = sample::Ctx::new(&f, &mut noise, 0..3);
        let end = Point::new(LOW, 1.0, LOW);
        let y = sampler.step(&x, &from, &end, &mut ctx, &mut ()).unwrap();
        let jump = with_call(3, |c| loss.jump(&f, &x, &[from; 3], c)).unwrap();
        let flow = data.flow(&x, &from, &end).unwrap();
        for (a, b) in [(&y, &jump), (&y, &flow)] {
            let d = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            assert!(d.to_scalar::<f64>().unwrap() < 1e-12);
        }
    }

    #[test]
    fn curricula_of_the_papers() {
        let song = Curriculum::Growing {
            first: 2,
            last: 150,
            decay: 0.9,
        };
        let n = |k| song.levels(k, 800);
        assert_eq!((n(0), n(800)), (2, 151));
        assert!((0..800).all(|k| n(k) <= n(k + 1)));
        assert!((song.decay(0, 800) - 0.9).abs() < 1e-12);
        assert!((song.decay(800, 800) - (2.0 * 0.9f64.ln() / 151.0).exp()).abs() < 1e-12);
        let improved = Curriculum::Doubling {
            first: 10,
            last: 1280,
        };
        // 8 parts of 100 steps: 10, 20, …, 1280.
        for (k, steps) in [
            (0, 10),
            (99, 10),
            (100, 20),
            (350, 80),
            (799, 1280),
            (800, 1280),
        ] {
            assert_eq!(improved.levels(k, 800), steps + 1, "{k}");
        }
        assert_eq!(improved.decay(5, 800), 0.0);
    }

    #[test]
    fn levels_are_drawn_by_their_law() {
        let keys = || (0..4000).map(|i| Key::new(3, stream::TEST).item(i));
        let law = LevelLaw::LogNormal {
            mean: -1.1,
            std: 2.0,
        };
        let levels = Levels::edm(6, LOW, 80.0, law).unwrap();
        let pairs = levels.draw(keys());
        let mut before = 0.0;
        for (i, c) in levels.cumulative.iter().enumerate() {
            let (share, found) = (c - before, pairs.iter().filter(|p| **p == i).count());
            before = *c;
            let error = 4.0 * (share * (1.0 - share) / 4000.0).sqrt();
            assert!(
                (found as f64 / 4000.0 - share).abs() < error,
                "pair {i}: {found}"
            );
        }
        assert!((before - 1.0).abs() < 1e-12);
        let cut = Levels::new(vec![Point::new(1.0, 0.0, 1.0), Point::data(0.0)], law);
        assert!(cut.is_err());
    }
}
