//! Samplers against the oracles: declared orders, exactness identities, laws of the samples.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use candle_core::{DType, Device, Tensor};
use diffusion_core::denoiser::Denoiser;
use diffusion_core::grid::Grid;
use diffusion_core::noise::{CounterNoise, Noise};
use diffusion_core::oracle::{Gaussian, Mixture, order};
use diffusion_core::sample::{
    Ancestral, Churn, Ctx, Ddim, Direction, DpmSolverPp, Euler, Heun, LowerFinal, Order, Planned,
    Solver, Step, Variance, prior, sample,
};
use diffusion_core::schedule::{BetaSchedule, Edm, Point, Schedule, SubVp, Ve, Vp};

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

/// The slope of the error on Gaussian data, whose flow is known exactly.
fn measured<S: Step + Clone>(step: S, schedule: &dyn Schedule) -> f64 {
    let oracle = Gaussian::new(vec![0.6], vec![0.8]);
    let start = batch(&[-1.5, 0.2, 1.1]);
    order::measure(&[80, 160, 320, 640], |n| {
        let points = smooth(schedule, n);
        let (first, last) = (points[0], points[n]);
        let x = start.affine(first.sigma, 0.0)?;
        let exact = oracle.flow(&x, &first, &last)?;
        Ok(worst(&run(step.clone(), &oracle, &points, &x), &exact))
    })
    .unwrap()
}

fn check_order<S: Step + Clone>(name: &str, step: S) {
    let schedules: [(&str, &dyn Schedule); 4] = [
        ("vp", &Vp::default()),
        ("sub-vp", &SubVp::default()),
        (
            "ve",
            &Ve {
                sigma_min: 0.01,
                sigma_max: 10.0,
            },
        ),
        (
            "edm",
            &Edm {
                sigma_min: 0.01,
                sigma_max: 10.0,
            },
        ),
    ];
    for (where_, schedule) in schedules {
        let slope = measured(step.clone(), schedule);
        match step.order() {
            Order::Exactly(n) => assert!(
                (slope - f64::from(n)).abs() < 0.15,
                "{name} on {where_}: declared {n}, measured {slope:.3}"
            ),
            Order::AtLeast(n) => assert!(
                slope > f64::from(n) - 0.15,
                "{name} on {where_}: {slope:.3}"
            ),
            Order::Unstated => {}
        }
    }
}

#[test]
fn declared_orders_hold() {
    check_order("ddim", Ddim::default());
    check_order("euler", Euler::default());
    check_order("heun", Heun::default());
    check_order(
        "dpm-solver++ 1",
        DpmSolverPp {
            multistep: false,
            lower_final: LowerFinal::Never,
        },
    );
    check_order(
        "dpm-solver++ 2M",
        DpmSolverPp {
            multistep: true,
            lower_final: LowerFinal::Never,
        },
    );
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
    let two_m = DpmSolverPp {
        multistep: true,
        lower_final: LowerFinal::Never,
    };
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
    let first = DpmSolverPp {
        multistep: false,
        lower_final: LowerFinal::Never,
    };
    assert!(worst(&ddim, &run(first, &oracle, &points, &x)) < 1e-12);
    // The first step of 2M is a step of DDIM.
    let two_m = DpmSolverPp {
        multistep: true,
        lower_final: LowerFinal::Never,
    };
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
                run(DpmSolverPp::default(), &oracle, points, x)
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

fn draw(step: impl Step, model: &dyn Denoiser, points: &[Point], n: usize) -> Tensor {
    let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
    let mut noise = CounterNoise::new(4, 0..1);
    let x = prior(&like, &points[0], &mut noise)
        .unwrap()
        .reshape((n, 1))
        .unwrap();
    // One item holds all draws, so that noise is drawn in one call.
    let flat = diffusion_core::denoiser::from_fn(|x, at, call| {
        let mut said = model.predict(&x.reshape((n, 1))?, at, call)?;
        said.value = said.value.reshape((1, n))?;
        Ok(said)
    });
    sample(
        &Planned::new(step, points),
        &flat,
        x.reshape((1, n)).unwrap(),
        &mut noise,
        0..1,
    )
    .unwrap()
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
    let oracle = Mixture::new(w.to_vec(), vec![vec![m[0]], vec![m[1]]], c.to_vec()).unwrap();
    let points = Grid::UniformLogSnr
        .points(
            &Vp {
                t_min: 1e-4,
                ..Vp::default()
            },
            60,
        )
        .unwrap();
    let x = draw(DpmSolverPp::default(), &oracle, &points, n);
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
    // Mean and variance within four standard errors of the exact ones.
    let central = |k: i32| -> f64 {
        let mean: f64 = (0..2).map(|i| w[i] * m[i]).sum();
        let part = |i: usize| {
            let (d, s) = (m[i] - mean, c[i]);
            match k {
                2 => d.powi(2) + s.powi(2),
                _ => d.powi(4) + 6.0 * (d * s).powi(2) + 3.0 * s.powi(4),
            }
        };
        (0..2).map(|i| w[i] * part(i)).sum()
    };
    let (mean, var) = moments(&x);
    let exact: f64 = (0..2).map(|i| w[i] * m[i]).sum();
    let se = (central(2) / n as f64).sqrt();
    let se_var = ((central(4) - central(2).powi(2)) / n as f64).sqrt();
    let (z, z_var) = ((mean - exact) / se, (var - central(2)) / se_var);
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
