//! gDDIM (Zhang, Tao and Chen 2022, "gDDIM: Generalized denoising diffusion implicit models").

use crate::error::{Report, Result};
use crate::noise::Noise;
use crate::ode::DormandPrince;
use crate::quadrature::{gauss_points, halvings, lagrange};
use crate::sde::{Block, BlockNetwork, LinearSde, Root, combine_blocks};
use crate::tensor::all_finite;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The exponential multistep sampler of linear diffusions, for networks that say `ε` with the score
/// `−R⁻ᵀ ε`.
///
/// ```text
/// u_t = Ψ(t, s) u_s + Σ_j C_j ε_j,   C_j = ∫_s^t ½ Ψ(t, τ) G Gᵀ R_τ⁻ᵀ L_j(τ) dτ
/// ```
///
/// with the Lagrange basis `L_j` in time on the present point and up to `order − 1` earlier ones. The
/// corrector's basis has the point reached too, which makes the order one higher and asks the network
/// once more a step. Order 1 is `u_t = Ψ u_s + (R_t − Ψ R_s) ε`, exact for data that are one point.
/// For the process of a schedule it is DDIM, and higher orders are DEIS in time.
///
/// `lambda` makes it the reverse SDE `du = (F u + ½(1 + λ²) G Gᵀ R⁻ᵀ ε) dt + λ G dw`, solved exactly
/// for the data that the noise points at:
///
/// ```text
/// u_t = Ψ u_s + (R_t S − Ψ R_s) ε + R_t (I − S Sᵀ)^{1/2} z
/// dS/dτ = ½ λ² R⁻¹ G Gᵀ R⁻ᵀ S,   S_s = I
/// ```
///
/// In the paper's letters `Ψ̂(t, s) = R_t S R_s⁻¹` and `P = R_t (I − S Sᵀ) R_tᵀ`. On the process of
/// a schedule `λ = 1` is DDIM with `η = 1`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gddim {
    /// Points that the predictor's polynomial goes through: 1 to 3.
    pub order: usize,
    /// Whether every step is corrected.
    pub corrector: bool,
    /// How stochastic: 0 for the probability flow, 1 for the reverse SDE. Of order 1 only.
    pub lambda: f64,
}

impl Default for Gddim {
    fn default() -> Self {
        Self {
            order: 2,
            corrector: false,
            lambda: 0.0,
        }
    }
}

/// The matrices of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// `Ψ`, of the state.
    pub keep: Block,
    /// `C_j` of the predictor, the latest noise first.
    pub predict: Vec<Block>,
    /// `C_j` of the corrector, the noise at the end of the step first; empty without one.
    pub correct: Vec<Block>,
    /// Of standard normal noise.
    pub noise: Option<Block>,
}

/// A run whose matrices are known, made by [`Gddim::plan`].
///
/// Sampling data that are one point, whose network is known exactly:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use diffusion_core::{noise::CounterNoise, oracle::BlockMixture};
/// use diffusion_core::sample::{Gddim, power_times};
/// use diffusion_core::sde::{Cld, Root, linear_prior};
///
/// # fn main() -> diffusion_core::Result<()> {
/// let root = Root::new(Cld::default())?;
/// let network = BlockMixture::new(&root, &[(1.0, 2.0, 0.0)])?;
/// let plan = Gddim::default().plan(&root, &power_times((1e-3, 1.0), 20, 2.0))?;
/// let mut noise = CounterNoise::new(0, 0..4);
/// let like = Tensor::zeros((4, 2, 3), DType::F64, &Device::Cpu)?;
/// let u = linear_prior(root.sde(), &like, &mut noise)?;
/// let x = plan.sample(&network, &u, &mut noise)?.narrow(1, 0, 1)?;
/// for value in x.flatten_all()?.to_vec1::<f64>()? {
///     assert!((value - 2.0).abs() < 0.05);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct GddimPlan {
    width: usize,
    times: Vec<f64>,
    updates: Vec<Update>,
}

/// Times from the noise to the data, evenly spaced in `t^{1/power}` (the authors' choice is 2).
pub fn power_times((end, start): (f64, f64), steps: usize, power: f64) -> Vec<f64> {
    let root = |t: f64| t.powf(power.recip());
    let at = |i: usize| {
        let part = i as f64 / steps.max(1) as f64;
        (root(start) + part * (root(end) - root(start))).powf(power)
    };
    let inner = (1..steps).map(at);
    std::iter::once(start).chain(inner).chain([end]).collect()
}

impl Gddim {
    /// The matrices of a run along decreasing times.
    ///
    /// # Errors
    /// `Config` when the settings contradict each other or the times do not decrease within the
    /// span of the process.
    pub fn plan<S: LinearSde>(&self, root: &Root<S>, times: &[f64]) -> Result<GddimPlan> {
        self.check(root, times)?;
        let updates = (0..times.len() - 1).map(|i| {
            let (from, to) = (times[i], times[i + 1]);
            // Latest first, as the noises will be held.
            let known = (i + 1).min(self.order);
            let nodes: Vec<f64> = times[i + 1 - known..=i].iter().rev().copied().collect();
            let mut update = Update {
                keep: root.sde().transition(from, to),
                predict: weights(root, (from, to), &nodes)?,
                correct: vec![],
                noise: None,
            };
            if self.corrector {
                let nodes = [&[to], nodes.as_slice()].concat();
                update.correct = weights(root, (from, to), &nodes)?;
            }
            if self.lambda > 0.0 {
                let (shrink, end) = (self.shrink(root, (from, to))?, root.at(to)?);
                let left = Block::IDENTITY - shrink * shrink.transpose();
                update.predict = vec![end * shrink - update.keep * root.at(from)?];
                update.noise = Some(end * left.cholesky());
            }
            let blocks = update
                .predict
                .iter()
                .chain(&update.correct)
                .chain(&update.noise);
            if blocks.chain([&update.keep]).all(|block| block.is_finite()) {
                return Ok(update);
            }
            Err(Report::new(
                format!("gDDIM from t = {from} to {to}"),
                "coefficients that are not finite",
            )
            .remedy("check the constants of the process, or end at a noisier time")
            .numeric())
        });
        Ok(GddimPlan {
            width: root.sde().width(),
            times: times.to_vec(),
            updates: updates.collect::<Result<_>>()?,
        })
    }

    fn check<S: LinearSde>(&self, root: &Root<S>, times: &[f64]) -> Result<()> {
        let refuse = |at: &str, found: String, expected: String| {
            Err(Report::new(format!("gDDIM: {at}"), found)
                .expected(expected)
                .config())
        };
        if !(1..=3).contains(&self.order) {
            return refuse("order", self.order.to_string(), "1, 2 or 3".into());
        }
        if !(self.lambda >= 0.0 && self.lambda.is_finite()) {
            let expected = "a number that is not negative".into();
            return refuse("lambda", self.lambda.to_string(), expected);
        }
        if self.lambda > 0.0 && (self.order > 1 || self.corrector) {
            let found = format!("lambda {} at order {}", self.lambda, self.order);
            return refuse("stochastic sampling", found, "order 1, no corrector".into());
        }
        let (start, end) = root.sde().span();
        let inside = times.iter().all(|t| (start..=end).contains(t));
        if times.len() < 2 || !inside || times.windows(2).any(|w| w[0] <= w[1]) {
            let expected = format!("two or more that decrease, between {end} and {start}");
            return refuse("times", format!("{times:?}"), expected);
        }
        Ok(())
    }

    /// `S` at the end of a step.
    fn shrink<S: LinearSde>(&self, root: &Root<S>, (from, to): (f64, f64)) -> Result<Block> {
        let mut rate = |t: &[f64], y: &[f64]| {
            // The last stage of a step may miss its end by rounding.
            let t = t.first().map_or(to, |t| t.clamp(to, from));
            let whitened = root.at(t)?.inverse() * root.push(t)? * self.lambda.powi(2);
            let slope = whitened * Block([[y[0], y[1]], [y[2], y[3]]]);
            Ok(slope.0.concat())
        };
        let solver = DormandPrince {
            rtol: 1e-11,
            atol: 1e-13,
            ..DormandPrince::default()
        };
        let identity = Block::IDENTITY.0.concat();
        let y = solver.solve(&mut rate, 1, &identity, (from, to))?.y;
        Ok(Block([[y[0], y[1]], [y[2], y[3]]]))
    }
}

/// `C_j` for every node.
fn weights<S: LinearSde>(
    root: &Root<S>,
    (from, to): (f64, f64),
    nodes: &[f64],
) -> Result<Vec<Block>> {
    if nodes.len() == 1 {
        let psi = root.sde().transition(from, to);
        return Ok(vec![root.at(to)? - psi * root.at(from)?]);
    }
    let mut sums = vec![Block::ZERO; nodes.len()];
    for piece in halvings(to, from).windows(2) {
        for (t, weight) in gauss_points(piece[1], piece[0]) {
            let kernel = root.sde().transition(t, to) * root.push(t)? * weight;
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = *sum + kernel * lagrange(nodes, j, t);
            }
        }
    }
    Ok(sums)
}

impl GddimPlan {
    /// The matrices, step by step.
    pub fn updates(&self) -> &[Update] {
        &self.updates
    }

    /// The state at the last time, given the state `u` at the first; `[B, width, …]` both.
    ///
    /// # Errors
    /// `Config` when a shape is wrong, `Numeric` when the state leaves the finite numbers; whatever
    /// the network refuses.
    pub fn sample(
        &self,
        network: &dyn BlockNetwork,
        u: &Tensor,
        noise: &mut dyn Noise,
    ) -> Result<Tensor> {
        let mut u = u.clone();
        self.of_width("state", &u)?;
        let mut held: Vec<Tensor> = vec![];
        for (i, update) in self.updates.iter().enumerate() {
            held.insert(0, self.ask(network, &u, i)?);
            held.truncate(update.predict.len());
            let mut next = step(update.keep, &u, &update.predict, &held)?;
            if let Some(block) = update.noise {
                let z = noise.normal(&u)?;
                next = combine_blocks(&[(&[Block::IDENTITY], &next), (&[block], &z)])?;
            }
            if !update.correct.is_empty() {
                let mut held = held.clone();
                held.insert(0, self.ask(network, &next, i + 1)?);
                next = step(update.keep, &u, &update.correct, &held)?;
            }
            u = next.detach();
            if !all_finite(&u)? {
                return Err(Report::new(
                    format!("gDDIM, step {} of {}", i + 1, self.updates.len()),
                    format!("NaN or infinity at t = {}", self.times[i + 1]),
                )
                .remedy("check the model's weights")
                .numeric());
            }
        }
        Ok(u)
    }

    fn ask(&self, network: &dyn BlockNetwork, u: &Tensor, i: usize) -> Result<Tensor> {
        let epsilon = network.epsilon(u, &vec![self.times[i]; u.dim(0)?])?;
        if epsilon.dims() == u.dims() {
            return Ok(epsilon.detach());
        }
        Err(
            Report::new("noise of a network", format!("{:?}", epsilon.dims()))
                .expected(format!("{:?}, as the state", u.dims()))
                .config(),
        )
    }

    fn of_width(&self, what: &str, u: &Tensor) -> Result<()> {
        if u.rank() >= 2 && u.dims()[1] == self.width {
            return Ok(());
        }
        Err(
            Report::new(format!("gDDIM: {what}"), format!("{:?}", u.dims()))
                .expected(format!("[batch, {}, …]", self.width))
                .config(),
        )
    }
}

/// `Ψ u + Σ_j C_j ε_j` over as many noises as there are matrices.
fn step(keep: Block, u: &Tensor, blocks: &[Block], noises: &[Tensor]) -> Result<Tensor> {
    let keep = [keep];
    let mut terms: Vec<(&[Block], &Tensor)> = vec![(&keep, u)];
    terms.extend(blocks.chunks(1).zip(noises));
    combine_blocks(&terms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::{CounterNoise, RecordedNoise};
    use crate::oracle::{BlockMixture, order};
    use crate::predict::{Kind, Prediction};
    use crate::sample::{Basis, Ddim, Deis, Planned, Solver, sample};
    use crate::schedule::{Point, Schedule, Vp};
    use crate::sde::{Cld, Scalar, Velocity};
    use crate::tensor::At;
    use candle_core::{DType, Device};
    use std::sync::Arc;

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        gap.to_scalar().unwrap()
    }

    fn gap(a: Block, b: Block) -> f64 {
        (a - b).0.concat().iter().fold(0.0, |m, v| m.max(v.abs()))
    }

    fn normal(shape: (usize, usize, usize), seed: u64) -> Tensor {
        let like = Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(seed, 0..shape.0 as u64);
        noise.normal(&like).unwrap()
    }

    fn solve<S: LinearSde>(
        rule: Gddim,
        root: &Root<S>,
        times: &[f64],
        network: &dyn BlockNetwork,
        u: &Tensor,
    ) -> Tensor {
        let mut noise = CounterNoise::new(7, 0..u.dim(0).unwrap() as u64);
        let plan = rule.plan(root, times).unwrap();
        plan.sample(network, u, &mut noise).unwrap()
    }

    fn of_order(order: usize) -> Gddim {
        Gddim {
            order,
            ..Gddim::default()
        }
    }

    /// Data that are one point: one step is exact, five are, and with Cholesky's factor as the root
    /// none is.
    #[test]
    fn one_step_is_exact_for_a_point_and_only_with_the_right_root() {
        for velocity in [Velocity::Marginalised, Velocity::Drawn] {
            let sde = Cld {
                velocity,
                ..Cld::default()
            };
            let root = Root::new(sde).unwrap();
            let oracle = BlockMixture::new(&root, &[(1.0, 0.7, 0.0)]).unwrap();
            let epsilon = normal((2, 2, 3), 1);
            let u0 = sde.lift(
                &Tensor::full(0.7, (2, 3), &Device::Cpu).unwrap(),
                &mut RecordedNoise::new([Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap()]),
            );
            let u0 = u0.unwrap();
            let exact = |root: Block, t: f64| {
                combine_blocks(&[(&[sde.mean(t)], &u0), (&[root], &epsilon)]).unwrap()
            };
            let start = exact(root.at(1.0).unwrap(), 1.0);
            for end in [0.0, 1e-3, 0.3] {
                for (steps, order, corrector) in [(1, 1, false), (5, 1, false), (5, 3, true)] {
                    let rule = Gddim {
                        order,
                        corrector,
                        lambda: 0.0,
                    };
                    let times = power_times((end, 1.0), steps, 2.0);
                    let u = solve(rule, &root, &times, &oracle, &start);
                    let error = worst(&u, &exact(root.at(end).unwrap(), end));
                    // Higher orders are as exact, but backwards Ψ grows to 10⁴, and rounding with it.
                    let tolerance = if order == 1 { 1e-10 } else { 1e-6 };
                    let what = format!("{velocity:?}, {steps} steps of order {order} to {end}");
                    assert!(error < tolerance, "{what}: {error:e}");
                }
            }
            // The same step for networks that say ε with the score −L⁻ᵀ ε.
            let (from, to) = (1.0, 1e-3);
            let mut c = Block::ZERO;
            for piece in halvings(to, from).windows(2) {
                for (t, w) in gauss_points(piece[1], piece[0]) {
                    let factor = sde.covariance(t).cholesky().inverse().transpose();
                    c = c + sde.transition(t, to) * sde.diffusion(t) * factor * (0.5 * w);
                }
            }
            let cholesky = |t: f64| sde.covariance(t).cholesky();
            let (keep, c) = ([sde.transition(from, to)], [c]);
            let start = exact(cholesky(from), from);
            let u = combine_blocks(&[(&keep, &start), (&c, &epsilon)]).unwrap();
            let error = worst(&u, &exact(cholesky(to), to));
            println!("{velocity:?}: one step with Cholesky's factor is off by {error:.2}");
            assert!(error > 0.1, "{velocity:?}: {error}");
        }
    }

    /// The coefficients of any order add up to those of order 1.
    #[test]
    fn the_integrals_add_up_to_their_closed_form() {
        let root = Root::new(Cld::default()).unwrap();
        let times = [0.9, 0.5, 0.2, 0.004, 0.0];
        let plans = [1, 2, 3].map(|order| {
            let rule = Gddim {
                corrector: true,
                ..of_order(order)
            };
            rule.plan(&root, &times).unwrap()
        });
        let sum = |blocks: &[Block]| blocks.iter().fold(Block::ZERO, |a, b| a + *b);
        for i in 0..4 {
            let closed = plans[0].updates()[i].predict[0];
            for plan in &plans {
                let update = &plan.updates()[i];
                assert!(gap(sum(&update.predict), closed) < 1e-8);
                assert!(gap(sum(&update.correct), closed) < 1e-8);
            }
            assert_eq!(plans[2].updates()[i].predict.len(), (i + 1).min(3));
            assert_eq!(plans[2].updates()[i].correct.len(), (i + 1).min(3) + 1);
        }
    }

    /// Numbers of a script that knows neither closed forms nor angles: classical Runge and Kutta on
    /// `dR/dt = F R + ½ G Gᵀ R⁻ᵀ` from `R_0`, a power series for Ψ, Simpson's rule.
    #[test]
    fn an_independent_integration_gives_the_same() {
        let root = Root::new(Cld::default()).unwrap();
        for (t, r) in [
            (
                0.01,
                [
                    [-0.0260320323690136, 0.0121351619905866],
                    [-0.272895696155976, -0.032621325228935],
                ],
            ),
            (
                0.5,
                [
                    [-0.584152045342609, 0.803260322757241],
                    [-0.405809972966737, -0.288533915534847],
                ],
            ),
            (
                1.0,
                [
                    [0.99661959793979, -0.0820569773387574],
                    [0.0410356135432076, 0.49831009868554],
                ],
            ),
        ] {
            assert!(gap(root.at(t).unwrap(), Block(r)) < 1e-11, "{t}");
        }
        let plan = of_order(2).plan(&root, &[0.8, 0.5, 0.2]).unwrap();
        let theirs = [
            [
                [-35.9701469884867, -1.16411164212181],
                [28.440908607412, -1.98661425710557],
            ],
            [
                [6.24151759420387, -1.92865115170364],
                [-5.25194412511515, 2.57082340595855],
            ],
        ];
        for (ours, theirs) in plan.updates()[1].predict.iter().zip(theirs) {
            assert!(gap(*ours, Block(theirs)) < 1e-9, "{ours:?} {theirs:?}");
        }
    }

    /// On the process of a schedule: DDIM, DEIS in time, and DDIM with η = 1.
    #[test]
    fn of_a_schedule_it_is_ddim_and_deis() {
        let vp = Vp::default();
        let root = Root::new(Scalar(vp)).unwrap();
        let times = [1.0, 0.8, 0.55, 0.3, 0.1, 0.02, 1e-3];
        let points: Vec<Point> = times.iter().map(|t| vp.at(*t)).collect();
        // No exact network, so that nothing cancels.
        let say = |u: &Tensor, t: f64| Ok(u.affine(1.3, t)?.tanh()?);
        let network = |u: &Tensor, times: &[f64]| say(u, times[0]);
        let denoiser = from_fn(|x: &Tensor, at: At<'_>, _| {
            let At::All(p) = at else { panic!("one point") };
            Ok(Prediction::new(Kind::Epsilon, say(x, p.t)?))
        });
        let u = normal((3, 1, 2), 2);
        // Step for step: runs of 1, 2, … steps.
        let compare = |along: &dyn Fn(&[Point]) -> Box<dyn Solver>, rule: Gddim| {
            (2..=times.len()).fold(0.0, |most: f64, n| {
                let ours = solve(rule, &root, &times[..n], &network, &u);
                let mut noise = CounterNoise::new(7, 0..3);
                let solver = along(&points[..n]);
                let theirs = sample(&*solver, &denoiser, u.clone(), &mut noise, 0..3).unwrap();
                most.max(worst(&ours, &theirs))
            })
        };
        let ddim = compare(
            &|points| Box::new(Planned::new(Ddim::default(), points)),
            of_order(1),
        );
        assert!(ddim < 1e-13, "{ddim:e}");
        let stochastic = Gddim {
            order: 1,
            corrector: false,
            lambda: 1.0,
        };
        let eta = Ddim {
            eta: 1.0,
            ..Ddim::default()
        };
        let eta = compare(&|points| Box::new(Planned::new(eta, points)), stochastic);
        assert!(eta < 1e-8, "{eta:e}");
        for order in [2, 3] {
            let deis = Deis {
                order,
                basis: Basis::Time,
                lower_order_final: false,
                schedule: Some(Arc::new(vp)),
            };
            let gap = compare(
                &|points| Box::new(Planned::new(deis.clone(), points)),
                of_order(order),
            );
            println!("VP: DDIM {ddim:.1e}, η = 1 {eta:.1e}, DEIS of order {order} {gap:.1e}");
            // DEIS takes one piece of 16 points, which is not exact near the data.
            assert!(gap < 1e-6, "{order}: {gap:e}");
        }
    }

    /// The closed form for scalars, and the paper's two equations for pairs.
    #[test]
    fn the_stochastic_step_is_the_papers() {
        let vp = Vp::default();
        let root = Root::new(Scalar(vp)).unwrap();
        let (s, t) = (vp.at(0.7), vp.at(0.2));
        for lambda in [0.3, 1.0, 1.7] {
            let rule = Gddim {
                order: 1,
                corrector: false,
                lambda,
            };
            let plan = rule.plan(&root, &[0.7, 0.2]).unwrap();
            let ratio = (t.sigma_hat() / s.sigma_hat()).powf(2.0 * lambda * lambda);
            let noise = t.sigma * (1.0 - ratio).sqrt();
            let ours = plan.updates()[0].noise.unwrap().0[0][0];
            assert!((ours - noise).abs() < 1e-9, "{ours} {noise}");
        }
        let sde = Cld::default();
        let root = Root::new(sde).unwrap();
        let (from, to, lambda) = (0.6, 0.05, 0.8);
        let rule = Gddim {
            order: 1,
            corrector: false,
            lambda,
        };
        let plan = rule.plan(&root, &[from, to]).unwrap();
        let update = &plan.updates()[0];
        let mut rate = |t: &[f64], y: &[f64]| {
            let psi = Block([[y[0], y[1]], [y[2], y[3]]]);
            let p = Block([[y[4], y[5]], [y[6], y[7]]]);
            let (g, l2) = (sde.diffusion(t[0]), lambda * lambda);
            let pull = g * sde.covariance(t[0]).inverse() * (0.5 * (1.0 + l2));
            let f = sde.drift(t[0]) + pull;
            // Time runs backwards, so that the noise adds with a minus.
            let spread = f * p + p * f.transpose() - g * l2;
            Ok([(f * psi).0.concat(), spread.0.concat()].concat())
        };
        let start = [Block::IDENTITY.0.concat(), vec![0.0; 4]].concat();
        let solver = DormandPrince {
            rtol: 1e-12,
            atol: 1e-14,
            ..DormandPrince::default()
        };
        let y = solver.solve(&mut rate, 1, &start, (from, to)).unwrap().y;
        let psi = Block([[y[0], y[1]], [y[2], y[3]]]);
        let p = Block([[y[4], y[5]], [y[6], y[7]]]);
        let c = (psi - update.keep) * root.at(from).unwrap();
        assert!(gap(update.predict[0], c) < 1e-8);
        let noise = update.noise.unwrap();
        assert!(gap(noise * noise.transpose(), p) < 1e-9);
    }

    /// A grid whose first step grows from nothing: the low orders of the beginning do not count.
    fn graded(steps: usize) -> Vec<f64> {
        let even: Vec<f64> = (0..=steps)
            .map(|i| 1.0 - 0.9 * i as f64 / steps as f64)
            .collect();
        let first = 0.9 / steps as f64;
        let growing = (1..=14).rev().map(|k| 1.0 - first * 0.5f64.powi(k));
        std::iter::once(1.0)
            .chain(growing)
            .chain(even[1..].to_vec())
            .collect()
    }

    #[test]
    fn orders_are_measured_on_gaussian_data() {
        let root = Root::new(Cld::default()).unwrap();
        let oracle = BlockMixture::new(&root, &[(1.0, 0.4, 0.5)]).unwrap();
        let scale = [root.sde().prior().cholesky()];
        let u = combine_blocks(&[(&scale, &normal((1, 2, 4), 3))]).unwrap();
        let exact = oracle.flow(&u, 1.0, 0.1).unwrap();
        for (order, corrector) in [
            (1, false),
            (2, false),
            (3, false),
            (1, true),
            (2, true),
            (3, true),
        ] {
            let rule = Gddim {
                order,
                corrector,
                lambda: 0.0,
            };
            let mut last = 0.0;
            let slope = order::measure(&[400, 800, 1600], |n| {
                last = worst(&solve(rule, &root, &graded(n), &oracle, &u), &exact);
                Ok(last)
            });
            let slope = slope.unwrap();
            println!("gDDIM {order}, corrector {corrector}: {slope:.3}, {last:.1e} at 1600 steps");
            let wrong = (slope - (order + usize::from(corrector)) as f64).abs();
            assert!(wrong < 0.12, "{order} {corrector}: {slope}");
        }
    }

    /// A mixture has no closed-form flow: the reference is a fine run.
    #[test]
    fn higher_orders_and_the_corrector_pay_on_a_mixture() {
        let root = Root::new(Cld::default()).unwrap();
        let parts = [(0.4, -1.0, 0.3), (0.6, 1.2, 0.4)];
        let oracle = BlockMixture::new(&root, &parts).unwrap();
        let scale = [root.sde().prior().cholesky()];
        let u = combine_blocks(&[(&scale, &normal((1, 2, 20), 3))]).unwrap();
        let run = |order: usize, corrector: bool, steps: usize| {
            let rule = Gddim {
                corrector,
                ..of_order(order)
            };
            let times = power_times((1e-3, 1.0), steps, 2.0);
            solve(rule, &root, &times, &oracle, &u)
        };
        let exact = run(3, true, 2000);
        let mut last = f64::INFINITY;
        for order in [1, 2, 3] {
            let error = |corrector, steps| worst(&run(order, corrector, steps), &exact);
            let (plain, corrected) = (error(false, 200), error(true, 100));
            println!("200 calls of order {order}: {plain:.1e}, corrected {corrected:.1e}");
            assert!(plain < 0.3 * last, "{order}: {plain} after {last}");
            assert!(corrected < 0.6 * plain, "{order}: {corrected} and {plain}");
            last = plain;
        }
    }

    /// Mean and covariance of many draws at the end, against the exact ones, in standard errors.
    fn off(u: &Tensor, mean: [f64; 2], cov: Block) -> f64 {
        let rows = u.squeeze(0).unwrap().to_vec2::<f64>().unwrap();
        let n = rows[0].len() as f64;
        let centred: Vec<Vec<f64>> = (0..2)
            .map(|j| rows[j].iter().map(|v| v - mean[j]).collect())
            .collect();
        let average = |v: &[f64]| v.iter().sum::<f64>() / n;
        let mut most: f64 = 0.0;
        for i in 0..2 {
            let error = (cov.0[i][i] / n).sqrt();
            most = most.max((average(&centred[i]) / error).abs());
            for j in 0..=i {
                let products: Vec<f64> = centred[i]
                    .iter()
                    .zip(&centred[j])
                    .map(|(a, b)| a * b)
                    .collect();
                // Isserlis: var(ab) = c_aa c_bb + c_ab².
                let c = cov.0;
                let error = ((c[i][i] * c[j][j] + c[i][j].powi(2)) / n).sqrt();
                most = most.max(((average(&products) - c[i][j]) / error).abs());
            }
        }
        most
    }

    /// The law of the samples, for every λ: in three steps for a point, in many for Gaussian data.
    #[test]
    fn stochastic_samples_keep_mean_and_covariance() {
        let n = 2000;
        let root = Root::new(Cld::default()).unwrap();
        let sde = root.sde();
        for (std, steps) in [(0.0, 3), (0.5, 1500)] {
            let oracle = BlockMixture::new(&root, &[(1.0, 0.4, std)]).unwrap();
            let spread = |t: f64| {
                let psi = sde.mean(t);
                psi * Block::diagonal(std * std, 0.0) * psi.transpose() + sde.covariance(t)
            };
            let mean = |t: f64| [0.4 * sde.mean(t).0[0][0], 0.4 * sde.mean(t).0[1][0]];
            for lambda in [0.0, 0.5, 1.0] {
                let rule = Gddim {
                    order: 1,
                    corrector: false,
                    lambda,
                };
                // From the exact law at the beginning, so that the prior is no part of the error.
                let z = normal((1, 2, n), 4);
                let shift = Tensor::new(&mean(1.0), &Device::Cpu).unwrap();
                let u = combine_blocks(&[(&[spread(1.0).cholesky()], &z)]).unwrap();
                let u = u.broadcast_add(&shift.reshape((1, 2, 1)).unwrap()).unwrap();
                let end = 1e-3;
                let times = power_times((end, 1.0), steps, 2.0);
                let u = solve(rule, &root, &times, &oracle, &u);
                let error = off(&u, mean(end), spread(end));
                println!("λ = {lambda}, c = {std}, {steps} steps: {error:.2} standard errors");
                assert!(error < 4.0, "λ = {lambda}, c = {std}: {error}");
            }
        }
    }

    #[test]
    fn refuses_with_one_clear_error() {
        let root = Root::new(Cld::default()).unwrap();
        let says = |rule: Gddim, times: &[f64], part: &str| {
            let error = rule.plan(&root, times).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says(of_order(0), &[1.0, 0.5], "order: 0");
        says(of_order(4), &[1.0, 0.5], "order: 4");
        for times in [
            &[1.0][..],
            &[0.5, 1.0],
            &[0.5, 0.5],
            &[1.2, 0.5],
            &[1.0, -0.1],
            &[1.0, f64::NAN],
        ] {
            says(of_order(1), times, "times");
        }
        for lambda in [f64::NAN, -0.5, f64::INFINITY] {
            let rule = Gddim {
                lambda,
                ..of_order(1)
            };
            says(rule, &[1.0, 0.5], "lambda");
        }
        let rule = Gddim {
            lambda: 0.5,
            ..of_order(2)
        };
        says(rule, &[1.0, 0.5], "stochastic");
        let plan = of_order(2).plan(&root, &[1.0, 0.5, 0.1]).unwrap();
        let fails = |network: &dyn BlockNetwork, u: &Tensor, part: &str| {
            let mut noise = CounterNoise::new(0, 0..2);
            let error = plan.sample(network, u, &mut noise).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let echo = |u: &Tensor, _: &[f64]| Ok(u.clone());
        let short = |u: &Tensor, _: &[f64]| Ok(u.narrow(1, 0, 1)?);
        let nan = |u: &Tensor, _: &[f64]| Ok(u.affine(f64::NAN, 0.0)?);
        let u = normal((2, 2, 3), 1);
        fails(&echo, &normal((2, 1, 3), 1), "[2, 1, 3]");
        fails(&echo, &u.flatten_all().unwrap(), "[12]");
        fails(&short, &u, "[2, 1, 3]");
        fails(&nan, &u, "step 1 of 2");
    }
}
