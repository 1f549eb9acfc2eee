//! Samplers against the oracles: declared orders, exactness identities, laws of the samples.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::grid::Grid;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::oracle::{Gaussian, Mixture, order};
use diffusion_core::sample::{
    Ancestral, Belief, Churn, Consistency, Ctx, Ddim, Direction, DpmMultistep, Euler, Heun, Named,
    Order, Planned, SAMPLERS, SamplerConfig, Solver, Step, Tcd, Variance, prior, sample,
};
use diffusion_core::schedule::{BetaSchedule, Edm, Point, Schedule, SubVp, Ve, Vp};
use diffusion_core::tensor::At;
use std::sync::Arc;

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

fn batch(rows: &[f64]) -> Tensor {
    Tensor::new(rows, &Device::Cpu)
        .unwrap()
        .unsqueeze(1)
        .unwrap()
}

/// Runs a step over points, from given values.
fn run<S: Step>(step: S, model: &dyn Denoiser, points: &[Point], x: &Tensor) -> Tensor {
    let n = x.dim(0).unwrap() as u64;
    let mut noise = CounterNoise::new(1, 0..n);
    sample(
        &Planned::new(step, points),
        model,
        x.clone(),
        &mut noise,
        0..n,
    )
    .unwrap()
}

/// Points without the jump to the data, evenly spaced in λ: where orders are defined.
fn smooth(schedule: &dyn Schedule, n: usize) -> Vec<Point> {
    let mut points = Grid::UniformLogSnr.points(schedule, n + 1).unwrap();
    points.pop();
    points
}

/// A sampler along points, on a schedule.
type Along<'a> = &'a dyn Fn(&[Point]) -> Box<dyn Solver>;

fn solve(solver: &dyn Solver, model: &dyn Denoiser, x: &Tensor) -> Tensor {
    let n = x.dim(0).unwrap() as u64;
    sample(
        solver,
        model,
        x.clone(),
        &mut CounterNoise::new(1, 0..n),
        0..n,
    )
    .unwrap()
}

/// Evenly spaced in λ, but for a first step that grows from nothing by doublings: multistep methods
/// begin with low orders, whose error is then no part of the slope.
fn graded(schedule: &dyn Schedule, n: usize) -> Vec<Point> {
    let even = smooth(schedule, n);
    let (first, second) = (even[0].log_snr(), even[1].log_snr());
    let mut points = vec![even[0]];
    for k in (1..=14).rev() {
        let part = 0.5f64.powi(k);
        points.push(schedule.at_log_snr(first + part * (second - first)));
    }
    points.extend(&even[1..]);
    points
}

/// The slope of the error on a mixture, whose flow is a fine run's.
fn measured(along: Along<'_>, schedule: &dyn Schedule, x: &Tensor, exact: &Tensor) -> f64 {
    order::measure(&[200, 400, 800], |n| {
        let points = graded(schedule, n);
        Ok(worst(&solve(&*along(&points), &two_modes(), x), exact))
    })
    .unwrap()
}

fn two_modes() -> Mixture {
    Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4]).unwrap()
}

/// The one table of orders: every named sampler, on every kind of schedule.
#[test]
fn declared_orders_hold() {
    let ve = Ve {
        sigma_min: 0.01,
        sigma_max: 10.0,
    };
    let edm = Edm {
        sigma_min: 0.01,
        sigma_max: 10.0,
    };
    let schedules: [(&str, Arc<dyn Schedule + Send + Sync>); 4] = [
        ("vp", Arc::new(Vp::default())),
        ("sub-vp", Arc::new(SubVp::default())),
        ("ve", Arc::new(ve)),
        ("edm", Arc::new(edm)),
    ];
    let start = batch(&[-1.3, 0.4, 0.9]);
    let fine = SamplerConfig::named("unipc-3").unwrap();
    let fine = fine.without_cautious_end();
    let reference: Vec<(Tensor, Tensor)> = schedules
        .iter()
        .map(|(_, schedule)| {
            let points = graded(&**schedule, 6000);
            let x = start.affine(points[0].sigma, 0.0).unwrap();
            let solver = fine.solver(&points, None);
            let exact = solve(&*solver, &two_modes(), &x);
            (x, exact)
        })
        .collect();
    let mut wrong = Vec::new();
    for Named { name, config, .. } in SAMPLERS {
        let config = config().without_cautious_end();
        let declared = config.order();
        if declared == Order::Unstated {
            continue;
        }
        for ((place, schedule), (x, exact)) in schedules.iter().zip(&reference) {
            // Straight paths are another variable than these schedules have: see the test below.
            if *name == "flow-heun" {
                continue;
            }
            let slope = measured(
                &|points| config.solver(points, Some(schedule.clone())),
                &**schedule,
                x,
                exact,
            );
            println!("{name:<20} {place:<7} {declared:?} {slope:.3}");
            let holds = match declared {
                Order::Exactly(n) => (slope - f64::from(n)).abs() < if n < 3 { 0.15 } else { 0.3 },
                Order::AtLeast(n) => slope > f64::from(n) - if n < 3 { 0.15 } else { 0.3 },
                Order::Unstated => true,
            };
            if !holds {
                wrong.push(format!(
                    "{name} on {place}: {declared:?}, measured {slope:.3}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Straight paths `x = (1 − σ) x₀ + σ ε`, whose velocity is integrated over σ.
#[test]
fn orders_hold_on_straight_paths() {
    let straight = |n: usize| -> Vec<Point> {
        (0..=n)
            .map(|i| 0.98 + (0.02 - 0.98) * i as f64 / n as f64)
            .map(|sigma| Point::new(sigma, 1.0 - sigma, sigma))
            .collect()
    };
    let x = batch(&[-1.3, 0.4, 0.9]);
    let exact = run(Heun::default(), &two_modes(), &straight(20_000), &x);
    for (name, sampler, order) in [
        ("flow-heun", SamplerConfig::named("flow-heun").unwrap(), 2.0),
        ("euler", SamplerConfig::named("euler").unwrap(), 1.0),
        (
            "dpmpp-2m",
            SamplerConfig::named("dpmpp-2m")
                .unwrap()
                .without_cautious_end(),
            2.0,
        ),
    ] {
        let slope = order::measure(&[200, 400, 800], |n| {
            let points = straight(n);
            let solver = sampler.solver(&points, None);
            Ok(worst(&solve(&*solver, &two_modes(), &x), &exact))
        })
        .unwrap();
        assert!((slope - order).abs() < 0.15, "{name}: {slope:.3}");
    }
}

/// The mixture has no closed-form flow: a fine Heun run serves as the reference.
#[test]
fn orders_hold_on_a_mixture() {
    let oracle = Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4]).unwrap();
    let vp = Vp::default();
    let x = batch(&[-1.3, 0.4, 0.9]);
    let exact = run(Heun::default(), &oracle, &smooth(&vp, 20_000), &x);
    let slope = |step: &dyn Fn(&[Point]) -> Tensor| {
        order::measure(&[100, 200, 400, 800], |n| {
            Ok(worst(&step(&smooth(&vp, n)), &exact))
        })
        .unwrap()
    };
    let ddim = slope(&|p| run(Ddim::default(), &oracle, p, &x));
    let heun = slope(&|p| run(Heun::default(), &oracle, p, &x));
    let two_m = DpmMultistep::plain(Belief::X0, 2);
    let dpm = slope(&|p| run(two_m, &oracle, p, &x));
    assert!((ddim - 1.0).abs() < 0.15, "ddim {ddim:.3}");
    assert!((heun - 2.0).abs() < 0.15, "heun {heun:.3}");
    assert!((dpm - 2.0).abs() < 0.2, "2M {dpm:.3}");
}

#[test]
fn identities_between_samplers() {
    let oracle = Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4]).unwrap();
    let points = Grid::Trailing
        .points(&BetaSchedule::ddpm(1000).table(1000).unwrap(), 12)
        .unwrap();
    let x = batch(&[-1.3, 0.4, 0.9]);
    // DDIM(0) is Euler in (x/α, σ/α), and DPM-Solver++ of order 1.
    let ddim = run(Ddim::default(), &oracle, &points, &x);
    assert!(worst(&ddim, &run(Euler::default(), &oracle, &points, &x)) < 1e-12);
    let first = DpmMultistep::plain(Belief::X0, 1);
    assert!(worst(&ddim, &run(first, &oracle, &points, &x)) < 1e-12);
    // The first step of 2M is a step of DDIM.
    let two_m = DpmMultistep::plain(Belief::X0, 2);
    assert!(
        worst(
            &run(two_m, &oracle, &points[..2], &x),
            &run(Ddim::default(), &oracle, &points[..2], &x)
        ) < 1e-12
    );
    // DDIM(1) is DDPM with the small variance, draw for draw.
    let one = Ddim {
        eta: 1.0,
        direction: Direction::Rederived,
    };
    assert!(
        worst(
            &run(one, &oracle, &points, &x),
            &run(Ancestral::default(), &oracle, &points, &x)
        ) < 1e-12
    );
}

/// A VP run and a VE run of the same noise levels are the same run, scaled by α.
#[test]
fn vp_and_ve_are_conjugate() {
    let oracle = Mixture::new(vec![0.4, 0.6], vec![vec![-1.0], vec![1.2]], vec![0.3, 0.4]).unwrap();
    let vp = smooth(&Vp::default(), 20);
    let ve: Vec<Point> = vp
        .iter()
        .map(|p| Point::new(p.t, 1.0, p.sigma_hat()))
        .collect();
    let x = batch(&[-1.3, 0.4, 0.9]);
    for step in [true, false] {
        let go = |points: &[Point], x: &Tensor| {
            if step {
                run(Heun::default(), &oracle, points, x)
            } else {
                run(DpmMultistep::default(), &oracle, points, x)
            }
        };
        let a = go(&vp, &x).affine(1.0 / vp[20].alpha, 0.0).unwrap();
        let b = go(&ve, &x.affine(1.0 / vp[0].alpha, 0.0).unwrap());
        assert!(worst(&a, &b) < 1e-12, "{}", worst(&a, &b));
    }
}

fn moments(x: &Tensor) -> (f64, f64) {
    let v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let mean = v.iter().sum::<f64>() / v.len() as f64;
    (
        mean,
        v.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / v.len() as f64,
    )
}

/// Every sampler without a stated order, on the mixture: mean and variance within four standard errors
/// of the exact ones.
#[test]
fn samplers_without_an_order_converge_in_law() {
    let n = 8000;
    let schedule = Arc::new(Vp {
        t_min: 1e-4,
        ..Vp::default()
    });
    let points = Grid::UniformLogSnr.points(&*schedule, 250).unwrap();
    let mut wrong = Vec::new();
    for Named { name, config, .. } in SAMPLERS {
        let config = config();
        // Jumps and returns keep the law only where the network is a map along the flow: see
        // `jumps_along_the_flow_keep_the_law`.
        if config.order() != Order::Unstated || ["consistency", "tcd"].contains(name) {
            continue;
        }
        let solver = config.solver(&points, Some(schedule.clone()));
        let x = draw_with(&*solver, &two_modes(), &points, n);
        let (z, z_var) = standard_errors(&x, n);
        println!("{name:<20} mean {z:+.2} variance {z_var:+.2} standard errors");
        if z.abs() > 4.0 || z_var.abs() > 4.0 {
            wrong.push(format!("{name}: mean {z:+.2}, variance {z_var:+.2}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// How far mean and variance of samples are from those of [`two_modes`], in standard errors.
fn standard_errors(x: &Tensor, n: usize) -> (f64, f64) {
    let (w, m, c) = ([0.4, 0.6], [-1.0, 1.2], [0.3, 0.4]);
    let mean: f64 = (0..2).map(|i| w[i] * m[i]).sum();
    let central = |k: i32| -> f64 {
        let part = |i: usize| {
            let (d, s): (f64, f64) = (m[i] - mean, c[i]);
            match k {
                2 => d.powi(2) + s.powi(2),
                _ => d.powi(4) + 6.0 * (d * s).powi(2) + 3.0 * s.powi(4),
            }
        };
        (0..2).map(|i| w[i] * part(i)).sum()
    };
    let (found, var) = moments(x);
    let se = (central(2) / n as f64).sqrt();
    let se_var = ((central(4) - central(2).powi(2)) / n as f64).sqrt();
    ((found - mean) / se, (var - central(2)) / se_var)
}

/// Consistency and trajectory sampling with the exact map along the flow of Gaussian data.
#[test]
fn jumps_along_the_flow_keep_the_law() {
    let n = 20_000;
    let data = Gaussian::new(vec![0.4], vec![0.5]);
    let vp = Vp::default();
    let points = Grid::UniformLogSnr.points(&vp, 6).unwrap();
    let map = diffusion_core::denoiser::from_fn(|x: &Tensor, at, _| {
        let At::All(at) = at else { panic!("one point") };
        let x0 = data.flow(x, &at, &Point::data(0.0))?;
        let kind = diffusion_core::predict::Kind::X0;
        Ok(diffusion_core::predict::Prediction::new(kind, x0))
    });
    let (mean, var) = moments(&draw(Consistency::default(), &map, &points, n));
    let se = 0.25 * (2.0 / n as f64).sqrt();
    assert!((mean - 0.4).abs() < 4.0 * 0.5 / (n as f64).sqrt(), "{mean}");
    assert!((var - 0.25).abs() < 4.0 * se, "{var}");
    // γ moves between DDIM and the above: on data that is one point all of them are exact.
    let point = Gaussian::new(vec![0.4], vec![0.0]);
    let open = &points[..6];
    for gamma in [0.0, 0.3, 1.0] {
        let (mean, var) = moments(&draw(Tcd::along(gamma, open, &vp), &point, open, n));
        let last = open[5];
        let se = last.sigma.powi(2) * (2.0 / n as f64).sqrt();
        let se_mean = last.sigma / (n as f64).sqrt();
        assert!(
            (mean - last.alpha * 0.4).abs() < 4.0 * se_mean,
            "{gamma}: {mean}"
        );
        assert!(
            (var - last.sigma.powi(2)).abs() < 4.0 * se,
            "{gamma}: {var}"
        );
    }
}

/// The same Brownian path on a finer grid: strong convergence, where independent draws only agree in
/// law.
#[test]
fn a_finer_grid_refines_the_same_path() {
    let vp = Vp::default();
    let x = batch(&[-1.3, 0.4, 0.9]);
    let end = |steps: usize, brownian: bool| {
        let points = smooth(&vp, steps);
        let solver = SamplerConfig::named("dpmpp-2m-sde").unwrap();
        let solver = solver.solver(&points, None);
        let mut noise = CounterNoise::new(1, 0..3);
        let oracle = two_modes();
        let mut ctx = Ctx::new(&oracle, &mut noise, 0..3);
        ctx.brownian = brownian;
        solver.solve(x.clone(), &mut ctx, &mut ()).unwrap()
    };
    let gap = |steps, brownian| worst(&end(steps, brownian), &end(2 * steps, brownian));
    let (coarse, fine) = (gap(40, true), gap(320, true));
    println!(
        "one path: {coarse:.3} at 40 steps, {fine:.3} at 320; fresh draws {:.3}",
        gap(320, false)
    );
    assert!(fine < 0.35 * coarse, "{coarse} {fine}");
    assert!(gap(320, false) > 5.0 * fine);
}

/// The noise of these is additive, so that all of them follow a path at first order at least. Steps are
/// even in λ; small ones, as the first orders are those of the limit.
#[test]
fn stochastic_samplers_follow_their_path_at_first_order() {
    let schedule: Arc<dyn Schedule + Send + Sync> = Arc::new(Vp::default());
    let x = batch(&[-1.3, 0.4, 0.9]);
    let mut wrong = Vec::new();
    for name in [
        "ddpm",
        "ddim-eta1",
        "em",
        "reverse-diffusion",
        "dpmpp-1-sde",
        "dpmpp-2m-sde",
        "dpmpp-3m-sde",
        "dpmpp-sde",
        "kdpm2-a",
        "sa-solver",
    ] {
        let config = SamplerConfig::named(name).unwrap();
        let end = |steps: usize| -> Tensor {
            let solver = config.solver(&smooth(&*schedule, steps), Some(schedule.clone()));
            // Several paths, as one may be lucky.
            let ends: Vec<Tensor> = (0..4)
                .map(|seed| {
                    let mut noise = CounterNoise::new(seed, 0..3);
                    let oracle = two_modes();
                    let mut ctx = Ctx::new(&oracle, &mut noise, 0..3);
                    ctx.brownian = true;
                    solver.solve(x.clone(), &mut ctx, &mut ()).unwrap()
                })
                .collect();
            Tensor::cat(&ends, 0).unwrap()
        };
        let slope = order::measure(&[60, 120, 240], |n| {
            let gap = (end(n) - end(2 * n))?.sqr()?.mean_all()?;
            Ok(gap.to_scalar::<f64>()?.sqrt())
        })
        .unwrap();
        println!("{name:<20} strong order {slope:.3}");
        if slope < 0.85 {
            wrong.push(format!("{name}: {slope:.3}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn draw_with(solver: &dyn Solver, model: &dyn Denoiser, points: &[Point], n: usize) -> Tensor {
    let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
    let mut noise = CounterNoise::new(4, 0..1);
    let x = prior(&like, &points[0], &mut noise).unwrap();
    // One item holds all draws, so that noise is drawn in one call.
    let flat = diffusion_core::denoiser::from_fn(|x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
        let at = At::All(at.points(1)[0]);
        let mut said = model.predict(&x.reshape((n, 1))?, at, call)?;
        said.value = said.value.reshape((1, n))?;
        said.var_mix = Some(x.zeros_like()?);
        Ok(said)
    });
    sample(solver, &flat, x, &mut noise, 0..1).unwrap()
}

fn draw(step: impl Step, model: &dyn Denoiser, points: &[Point], n: usize) -> Tensor {
    draw_with(&Planned::new(step, points), model, points, n)
}

#[test]
fn ancestral_sampling_returns_the_data_law() {
    let n = 20_000;
    let table = BetaSchedule::ddpm(1000).table(1000).unwrap();
    let points = Grid::Trailing.points(&table, 1000).unwrap();
    for variance in [Variance::FixedSmall, Variance::FixedLarge] {
        let step = Ancestral {
            variance,
            ..Ancestral::default()
        };
        let (mean, var) = moments(&draw(
            step,
            &Gaussian::new(vec![0.4], vec![0.5]),
            &points,
            n,
        ));
        assert!((mean - 0.4).abs() < 0.02, "{variance:?}: mean {mean}");
        assert!(
            (var / 0.25 - 1.0).abs() < 0.05,
            "{variance:?}: variance {var}"
        );
    }
    // The optimal cases hold for any number of steps: large for standard normal data, small for
    // data that is one point.
    let coarse = Grid::Trailing.points(&table, 5).unwrap();
    let large = Ancestral {
        variance: Variance::FixedLarge,
        ..Ancestral::default()
    };
    let before_data = &coarse[..5];
    let (_, var) = moments(&draw(
        large,
        &Gaussian::new(vec![0.0], vec![1.0]),
        before_data,
        n,
    ));
    assert!((var - 1.0).abs() < 4.0 * (2.0 / n as f64).sqrt(), "{var}");
    let (mean, var) = moments(&draw(
        Ancestral::default(),
        &Gaussian::new(vec![0.7], vec![0.0]),
        &coarse,
        100,
    ));
    assert!((mean - 0.7).abs() < 1e-12 && var < 1e-24);
}

#[test]
fn churn_with_the_oracle_keeps_the_variance() {
    let n = 20_000;
    let points = Grid::karras().points(&Edm::default(), 60).unwrap();
    let churn = Churn {
        s_churn: 40.0,
        s_min: 0.05,
        s_max: Some(50.0),
        ..Churn::default()
    };
    let (mean, var) = moments(&draw(
        Heun { churn },
        &Gaussian::new(vec![0.4], vec![0.5]),
        &points,
        n,
    ));
    assert!(
        (mean - 0.4).abs() < 0.02 && (var / 0.25 - 1.0).abs() < 0.05,
        "{mean} {var}"
    );
}

/// The whole law, not two moments: Kolmogorov and Smirnov against the exact distribution.
#[test]
fn samples_of_a_mixture_pass_kolmogorov_smirnov() {
    let n = 20_000;
    let (w, m, c) = ([0.4, 0.6], [-1.0, 1.2], [0.3, 0.4]);
    let oracle = two_modes();
    let points = Grid::UniformLogSnr
        .points(
            &Vp {
                t_min: 1e-4,
                ..Vp::default()
            },
            60,
        )
        .unwrap();
    let x = draw(DpmMultistep::default(), &oracle, &points, n);
    let mut v = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    v.sort_by(f64::total_cmp);
    let cdf = |x: f64| {
        (0..2)
            .map(|k| w[k] * normal_cdf((x - m[k]) / c[k]))
            .sum::<f64>()
    };
    let d = v
        .iter()
        .enumerate()
        .map(|(i, x)| {
            (cdf(*x) - i as f64 / n as f64)
                .abs()
                .max((cdf(*x) - (i + 1) as f64 / n as f64).abs())
        })
        .fold(0.0, f64::max);
    // p > 1e-3 means √n D < 1.95.
    println!(
        "Kolmogorov and Smirnov: √n D = {:.2}",
        (n as f64).sqrt() * d
    );
    assert!((n as f64).sqrt() * d < 1.95, "D = {d}");
    let (z, z_var) = standard_errors(&x, n);
    println!("mean off by {z:.2} standard errors, variance by {z_var:.2}");
    assert!(z.abs() < 4.0 && z_var.abs() < 4.0, "{z} {z_var}");
}

/// Φ by Simpson's rule from 0: accurate to 1e-9 on the range used here.
fn normal_cdf(z: f64) -> f64 {
    let z = z.clamp(-8.0, 8.0);
    let n = 400;
    let h = z / f64::from(n);
    let f = |x: f64| (-0.5 * x * x).exp();
    let inner: f64 = (1..n)
        .map(|i| f(f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 })
        .sum();
    0.5 + h / 3.0 * (f(0.0) + inner + f(z)) / std::f64::consts::TAU.sqrt()
}

#[test]
fn a_nan_is_reported_with_its_place() {
    let bad = diffusion_core::denoiser::from_fn(|x: &Tensor, _, _| {
        let kind = diffusion_core::predict::Kind::X0;
        Ok(diffusion_core::predict::Prediction::new(
            kind,
            x.affine(f64::NAN, 0.0)?,
        ))
    });
    let points = Grid::karras().points(&Edm::default(), 4).unwrap();
    let mut noise = CounterNoise::new(0, 0..1);
    let x = noise
        .normal(&Tensor::zeros((1, 2), DType::F64, &Device::Cpu).unwrap())
        .unwrap();
    let error = sample(
        &Planned::new(Euler::default(), &points),
        &bad,
        x,
        &mut noise,
        0..1,
    )
    .unwrap_err();
    assert!(error.to_string().contains("move 1 of 4"), "{error}");
}

#[test]
fn an_observer_can_stop_a_run() {
    let oracle = Gaussian::new(vec![0.0], vec![1.0]);
    let points = Grid::karras().points(&Edm::default(), 10).unwrap();
    let mut noise = CounterNoise::new(0, 0..1);
    let x = batch(&[1.0]);
    let mut seen = 0;
    let solver = Planned::new(Heun::default(), &points);
    let result = solver.solve(
        x,
        &mut Ctx::new(&oracle, &mut noise, 0..1),
        &mut |p: &diffusion_core::sample::Progress<'_>| {
            seen = p.done;
            if p.done == 3 {
                std::ops::ControlFlow::Break(())
            } else {
                std::ops::ControlFlow::Continue(())
            }
        },
    );
    assert!(matches!(result, Err(diffusion_core::Error::Interrupted)));
    assert_eq!(seen, 3);
}
