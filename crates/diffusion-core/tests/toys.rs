//! Small systems that keep the abstraction honest: if one of these stops compiling or being right,
//! the four nouns have become too narrow for a method of the survey.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use candle_core::{DType, Device, Tensor};
use diffusion_core::Result;
use diffusion_core::denoiser::{Denoiser, from_fn};
use diffusion_core::forward::marginal;
use diffusion_core::grid::Grid;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::oracle::{Gaussian, Mixture, order};
use diffusion_core::sample::{
    Ancestral, Constraint, Corrector, Ctx, Heun, Move, Observer, Order, Planned, Progress, Solver,
    Step, prior, sample,
};
use diffusion_core::schedule::{Point, Schedule, Vp};
use diffusion_core::sde::euler_maruyama;
use diffusion_core::tensor::{At, lincomb};

fn worst(a: &Tensor, b: &Tensor) -> f64 {
    (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar::<f64>()
        .unwrap()
}

/// Noise for `n` rows whose first dimension is one item: one draw for all.
fn normals(n: usize, d: usize, seed: u64) -> Tensor {
    let like = Tensor::zeros((1, n * d), DType::F64, &Device::Cpu).unwrap();
    CounterNoise::new(seed, 0..1)
        .normal(&like)
        .unwrap()
        .reshape((n, d))
        .unwrap()
}

/// A model over `n` rows run as one item of `n · d` values.
fn as_one_item<'a>(model: &'a dyn Denoiser, n: usize, d: usize) -> impl Denoiser + 'a {
    from_fn(move |x, at, call| {
        let mut said = model.predict(&x.reshape((n, d))?, at, call)?;
        said.value = said.value.reshape((1, n * d))?;
        Ok(said)
    })
}

// ---- 1. A multistep solver: two-step Adams and Bashforth in σ̂ with variable steps. ----

struct AdamsBashforth2;

impl Step for AdamsBashforth2 {
    type Memory = Option<(Tensor, f64)>;

    fn order(&self) -> Order {
        Order::Exactly(2)
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Self::Memory,
    ) -> Result<Tensor> {
        let slope = ctx.denoise(x, from)?.epsilon(x, At::All(*from))?;
        let h = to.sigma_hat() - from.sigma_hat();
        let used = match memory {
            Some((previous, h0)) => lincomb(1.0 + 0.5 * h / *h0, &slope, -0.5 * h / *h0, previous)?,
            None => slope.clone(),
        };
        *memory = Some((slope, h));
        lincomb(to.alpha / from.alpha, x, to.alpha * h, &used)
    }
}

#[test]
fn a_multistep_solver_has_its_order() {
    let oracle = Gaussian::new(vec![0.6], vec![0.8]);
    let start = Tensor::new(&[[-1.5], [0.2], [1.1f64]], &Device::Cpu).unwrap();
    let slope = order::measure(&[200, 400, 800], |n| {
        let mut points = Grid::UniformLogSnr.points(&Vp::default(), n + 1)?;
        points.pop();
        let exact = oracle.flow(&start, &points[0], &points[n])?;
        let mut noise = CounterNoise::new(0, 0..3);
        let x = sample(
            &Planned::new(AdamsBashforth2, &points),
            &oracle,
            start.clone(),
            &mut noise,
            0..3,
        )?;
        Ok(worst(&x, &exact))
    })
    .unwrap();
    assert!((slope - 2.0).abs() < 0.15, "{slope}");
}

// ---- 2. RePaint: a plan that goes back up, with a constraint on the known half. ----

struct KnownHalf {
    known: f64,
    n: usize,
}

impl Constraint for KnownHalf {
    fn apply(&self, x: Tensor, at: &Point, noise: &mut dyn Noise) -> Result<Tensor> {
        let x = x.reshape((self.n, 2))?;
        let clean = Tensor::full(self.known, (1, self.n), &Device::Cpu)?;
        let known = marginal(&clean, &noise.normal(&clean)?, At::All(*at))?.reshape((self.n, 1))?;
        Ok(Tensor::cat(&[known, x.narrow(1, 1, 1)?], 1)?.reshape((1, 2 * self.n))?)
    }
}

#[test]
fn a_repaint_plan_samples_the_conditional_law() {
    let n = 4000;
    // Two correlated modes: given the first coordinate near 2, the second is near −1.
    let data = Mixture::new(
        vec![0.5, 0.5],
        vec![vec![-2.0, 1.0], vec![2.0, -1.0]],
        vec![0.3, 0.3],
    )
    .unwrap();
    let points = Grid::UniformLogSnr.points(&Vp::default(), 120).unwrap();
    let mut moves = Vec::new();
    for (i, pair) in points.windows(2).enumerate() {
        moves.push(Move::Denoise(pair[0], pair[1]));
        if i % 4 == 3 && pair[1].sigma > 0.0 {
            // Jump two points up and come down again.
            moves.push(Move::Renoise(pair[1], points[i - 1]));
            moves.push(Move::Denoise(points[i - 1], pair[0]));
            moves.push(Move::Denoise(pair[0], pair[1]));
        }
    }
    let mut plan = Planned::with_moves(Ancestral::default(), moves);
    plan.constraint = Some(Box::new(KnownHalf { known: 2.0, n }));
    let x = normals(n, 2, 5).reshape((1, 2 * n)).unwrap();
    let mut noise = CounterNoise::new(6, 0..1);
    let x = sample(&plan, &as_one_item(&data, n, 2), x, &mut noise, 0..1).unwrap();
    let second = x
        .reshape((n, 2))
        .unwrap()
        .narrow(1, 1, 1)
        .unwrap()
        .flatten_all()
        .unwrap();
    let second = second.to_vec1::<f64>().unwrap();
    let mean = second.iter().sum::<f64>() / n as f64;
    let var = second.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
    assert!((mean + 1.0).abs() < 0.05, "{mean}");
    assert!((var / 0.09 - 1.0).abs() < 0.15, "{var}");
}

// ---- 3. An adaptive solver that picks its own points (Heun with Euler inside, in ln σ̂). ----

struct Adaptive {
    from: f64,
    to: f64,
    tolerance: f64,
}

impl Solver for Adaptive {
    fn solve(&self, mut x: Tensor, ctx: &mut Ctx<'_>, watch: &mut dyn Observer) -> Result<Tensor> {
        let point = |l: f64| Point::new(l.exp(), 1.0, l.exp());
        let (mut at, end, mut h, mut done) = (self.from.ln(), self.to.ln(), 0.1, 0);
        while at > end + 1e-12 {
            h = f64::min(h, at - end);
            let (here, there) = (point(at), point(at - h));
            let slope = ctx.denoise(&x, &here)?.epsilon(&x, At::All(here))?;
            let dt = there.sigma - here.sigma;
            let euler = lincomb(1.0, &x, dt, &slope)?;
            let slope2 = ctx
                .denoise(&euler, &there)?
                .epsilon(&euler, At::All(there))?;
            let heun = lincomb(1.0, &x, 0.5 * dt, &(slope + slope2)?)?;
            let error = worst(&heun, &euler) / self.tolerance;
            if error <= 1.0 {
                (x, at, done) = (heun, at - h, done + 1);
                let progress = Progress {
                    done,
                    total: done,
                    calls: ctx.calls,
                    at: there,
                    x: &x,
                };
                if watch.step(&progress).is_break() {
                    return Err(diffusion_core::Error::Interrupted);
                }
            }
            h *= (0.9 * error.max(1e-8).powf(-0.5)).clamp(0.2, 5.0);
        }
        Ok(x)
    }
}

#[test]
fn an_adaptive_solver_meets_its_tolerance() {
    let oracle = Gaussian::new(vec![0.6], vec![0.8]);
    let x = Tensor::new(&[[-15.0], [2.0], [11.0f64]], &Device::Cpu).unwrap();
    let exact = oracle
        .flow(
            &x,
            &Point::new(10.0, 1.0, 10.0),
            &Point::new(0.01, 1.0, 0.01),
        )
        .unwrap();
    let mut errors = Vec::new();
    for tolerance in [1e-2, 1e-4] {
        let mut noise = CounterNoise::new(0, 0..3);
        let solver = Adaptive {
            from: 10.0,
            to: 0.01,
            tolerance,
        };
        let y = sample(&solver, &oracle, x.clone(), &mut noise, 0..3).unwrap();
        errors.push(worst(&y, &exact));
    }
    assert!(errors[0] < 2e-2 && errors[1] < 2e-4, "{errors:?}");
}

// ---- 4. Predictor and corrector: Langevin moves between the steps. ----

struct Langevin {
    ratio: f64,
}

impl Corrector for Langevin {
    fn correct(&self, x: &Tensor, at: &Point, ctx: &mut Ctx<'_>) -> Result<Tensor> {
        let score = ctx.denoise(x, at)?.score(x, At::All(*at))?;
        let step = self.ratio * at.sigma.powi(2);
        let z = ctx.noise.normal(x)?;
        lincomb(
            1.0,
            &lincomb(1.0, x, step, &score)?,
            (2.0 * step).sqrt(),
            &z,
        )
    }
}

#[test]
fn a_corrector_improves_a_coarse_run() {
    let n = 20_000;
    let data = Gaussian::new(vec![0.4], vec![0.5]);
    let mut points = Grid::UniformLogSnr.points(&Vp::default(), 9).unwrap();
    points.pop();
    let exact = (points[8].alpha * 0.5).powi(2) + points[8].sigma.powi(2);
    let variance = |corrections: usize| {
        let moves = points
            .windows(2)
            .flat_map(|w| {
                std::iter::once(Move::Denoise(w[0], w[1]))
                    .chain(std::iter::repeat_n(Move::Correct(w[1]), corrections))
            })
            .collect();
        let mut plan = Planned::with_moves(Ancestral::default(), moves);
        plan.corrector = Some(Box::new(Langevin { ratio: 0.1 }));
        let mut noise = CounterNoise::new(6, 0..1);
        let x = normals(n, 1, 5).reshape((1, n)).unwrap();
        let x = sample(&plan, &as_one_item(&data, n, 1), x, &mut noise, 0..1).unwrap();
        let v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mean = v.iter().sum::<f64>() / n as f64;
        v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / n as f64
    };
    let (plain, corrected) = ((variance(0) - exact).abs(), (variance(20) - exact).abs());
    assert!(corrected < 0.6 * plain, "{plain} {corrected}");
}

// ---- 5. Two coupled SDEs: a pair (u, v) whose scores each depend on both (as GDSS). ----

#[test]
fn coupled_sdes_share_the_pure_update_rule() {
    let (n, steps) = (20_000, 300);
    let vp = Vp::default();
    // (u, v) jointly normal with covariance [[1, ρ], [ρ, 1]]; VP keeps unit variances and scales
    // the covariance of the data to ρ α².
    let rho = 0.8;
    let scores = |u: &Tensor, v: &Tensor, p: &Point| -> Result<(Tensor, Tensor)> {
        let r = rho * p.alpha.powi(2);
        let d = 1.0 - r * r;
        Ok((
            lincomb(-1.0 / d, u, r / d, v)?,
            lincomb(r / d, u, -1.0 / d, v)?,
        ))
    };
    let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
    let mut first = CounterNoise::new(7, 0..1);
    let mut second = first.child(1);
    let (mut u, mut v) = (first.normal(&like).unwrap(), second.normal(&like).unwrap());
    let dt = (1.0 - 1e-3) / f64::from(steps);
    for k in 0..steps {
        let t = 1.0 - f64::from(k) * dt;
        let (su, sv) = scores(&u, &v, &vp.at(t)).unwrap();
        let rates = vp.rates(t);
        u = euler_maruyama(&u, &su, &rates, dt, &first.normal(&like).unwrap()).unwrap();
        v = euler_maruyama(&v, &sv, &rates, dt, &second.normal(&like).unwrap()).unwrap();
    }
    let mean = |t: &Tensor| t.mean_all().unwrap().to_scalar::<f64>().unwrap();
    let covariance = mean(&(&u * &v).unwrap());
    assert!((covariance - rho).abs() < 0.05, "{covariance}");
    assert!((mean(&u.sqr().unwrap()) - 1.0).abs() < 0.05);
}

// ---- A conditional model is a closure that holds its condition. ----

#[test]
fn a_condition_is_a_captured_value() {
    let classes = [
        Gaussian::new(vec![-3.0], vec![0.2]),
        Gaussian::new(vec![3.0], vec![0.2]),
    ];
    let points = Grid::karras()
        .points(&diffusion_core::schedule::Edm::default(), 18)
        .unwrap();
    for (class, centre) in [(0usize, -3.0), (1, 3.0)] {
        let model = from_fn(|x, at, call| classes[class].predict(x, at, call));
        let mut noise = CounterNoise::new(1, 0..8);
        let like = Tensor::zeros((8, 1), DType::F64, &Device::Cpu).unwrap();
        let x = prior(&like, &points[0], &mut noise).unwrap();
        let x = sample(
            &Planned::new(Heun::default(), &points),
            &model,
            x,
            &mut noise,
            0..8,
        )
        .unwrap();
        assert!(worst(&x, &x.ones_like().unwrap().affine(centre, 0.0).unwrap()) < 1.0);
    }
}
