//! The card of VDM: what the bound must do whatever the network.

use super::*;
use crate::noise::{CounterNoise, Noise};
use crate::oracle::Mixture;
use crate::sample::{Ancestral, Ctx, Step, Variance};
use crate::schedule::Schedule;
use crate::schedule::learned::{Frozen, LinearGamma, MonotoneGamma};
use candle_core::Device;
use diffusion_ops::rng::stream;

const LEVELS: usize = 4;

/// Levels 0 and 2 of four, one dimension: the exact denoiser of two points.
fn data(n: usize) -> Tensor {
    let k: Vec<f64> = (0..n).map(|i| (i * 7 % 3 / 2 * 2) as f64).collect();
    Tensor::from_vec(k, (n, 1), &Device::Cpu).unwrap()
}

fn exact(z: &Tensor, gamma: &Tensor) -> Result<Tensor> {
    let share = 1.0 / 3.0;
    let (a, b) = (bin_middle(0.0, LEVELS), bin_middle(2.0, LEVELS));
    let means = vec![vec![a], vec![b]];
    let oracle = Mixture::new(vec![1.0 - share, share], means, vec![0.0, 0.0])?;
    let gammas = gamma.to_vec1::<f64>()?;
    let rows = gammas.iter().enumerate().map(|(i, g)| {
        let p = crate::schedule::Point::from_log_snr(0.0, -g);
        let z = z.narrow(0, i, 1)?;
        let x0 = oracle.x0(&z, &p)?;
        Ok(((z - (x0 * p.alpha)?)? * (1.0 / p.sigma))?)
    });
    Ok(Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?)
}

/// `γ` of another schedule at `t²`.
struct Squared(LinearGamma);

impl LearnedSchedule for Squared {
    fn gamma(&self, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let (gamma, slope) = self.0.gamma(&t.sqr()?)?;
        Ok((gamma, ((slope * t)? * 2.0)?))
    }

    fn freeze(&self) -> Result<Frozen> {
        self.0.freeze()
    }
}

fn diffusion(schedule: &dyn LearnedSchedule, steps: Option<usize>, n: usize) -> (f64, f64) {
    let k = data(n);
    let mut noise = CounterNoise::new(5, 0..n as u64);
    let draw = VdmDraw {
        epsilon0: noise.normal(&k).unwrap(),
        epsilon: noise.normal(&k).unwrap(),
        times: even_times(0.37, n),
    };
    let vdm = Vdm {
        schedule,
        levels: LEVELS,
        steps,
    };
    let losses = vdm.losses(&exact, &k, &draw).unwrap();
    let all = losses.diffusion.to_vec1::<f64>().unwrap();
    let mean = all.iter().sum::<f64>() / n as f64;
    let var = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
    (mean, (var / n as f64).sqrt())
}

const LINEAR: LinearGamma = LinearGamma {
    min: -5.0,
    max: 4.0,
};

#[test]
fn more_steps_tighten_the_bound() {
    let n = 1500;
    let losses: Vec<f64> = [Some(1), Some(3), Some(12), Some(100), None]
        .map(|steps| diffusion(&LINEAR, steps, n).0)
        .to_vec();
    assert!(losses[..4].windows(2).all(|w| w[1] < w[0]), "{losses:?}");
    assert!((losses[4] / losses[3] - 1.0).abs() < 0.1, "{losses:?}");
}

#[test]
fn only_the_ends_of_the_schedule_matter() {
    let n = 3000;
    let (a, ea) = diffusion(&LINEAR, None, n);
    let (b, eb) = diffusion(&Squared(LINEAR), None, n);
    assert!((a - b).abs() < 4.0 * ea.hypot(eb), "{a} {ea} {b} {eb}");
}

/// The bound of the two points is their entropy, up to the ends of the schedule.
#[test]
fn the_bound_of_two_points_is_their_entropy() {
    let n = 3000;
    let k = data(n);
    let mut noise = CounterNoise::new(5, 0..n as u64);
    let draw = VdmDraw {
        epsilon0: noise.normal(&k).unwrap(),
        epsilon: noise.normal(&k).unwrap(),
        times: even_times(0.37, n),
    };
    let schedule = LinearGamma {
        min: -6.0,
        max: 7.0,
    };
    let vdm = Vdm {
        schedule: &schedule,
        levels: LEVELS,
        steps: None,
    };
    let losses = vdm.losses(&exact, &k, &draw).unwrap();
    let bits = losses.bits().unwrap().to_scalar::<f64>().unwrap();
    let entropy = -(2.0f64 / 3.0).log2() * 2.0 / 3.0 - (1.0f64 / 3.0).log2() / 3.0;
    let (_, error) = diffusion(&schedule, None, n);
    let error = 4.0 * error / std::f64::consts::LN_2;
    assert!(
        (bits - entropy).abs() < error + 0.01,
        "{bits} {entropy} {error}"
    );
}

#[test]
fn even_times_are_a_grid_of_the_circle() {
    let mut t = even_times(0.93, 8);
    t.sort_by(f64::total_cmp);
    assert!(t.windows(2).all(|w| (w[1] - w[0] - 0.125).abs() < 1e-12));
    assert!(t.iter().all(|t| (0.0..1.0).contains(t)));
    let free = independent_times((0..500).map(|i| Key::new(1, stream::TEST).item(i)));
    let mean = free.iter().sum::<f64>() / 500.0;
    assert!((mean - 0.5).abs() < 4.0 * (1.0f64 / 12.0 / 500.0).sqrt());
}

/// Training the interior on the second moment lowers the spread of the estimate.
#[test]
fn the_interior_learns_a_smaller_variance() {
    let n = 128;
    let var = |item, shape: &[usize], scale: f64| {
        let count = shape.iter().product();
        let z = Key::new(2, stream::TEST).item(item).normal(count);
        let z: Vec<f64> = z.iter().map(|z| z * scale).collect();
        candle_core::Var::from_tensor(&Tensor::from_vec(z, shape, &Device::Cpu).unwrap()).unwrap()
    };
    let one = |v: f64| Tensor::new(&[v], &Device::Cpu).unwrap();
    let inner = [
        var(1, &[1, 6], 2.0),
        var(2, &[6], 1.0),
        var(3, &[6, 1], 20.0),
    ];
    let schedule = || MonotoneGamma {
        l1_kernel: one(9.0).unsqueeze(0).unwrap(),
        l1_bias: one(-5.0),
        l2_kernel: inner[0].as_tensor().clone(),
        l2_bias: inner[1].as_tensor().clone(),
        l3_kernel: inner[2].as_tensor().clone(),
        ends: Some((one(-5.0), one(4.0))),
    };
    // A smooth belief that is differentiable in γ: that of N(0, 0.5²).
    let belief = |z: &Tensor, gamma: &Tensor| -> Result<Tensor> {
        let (noise, signal) = (sigmoid(gamma)?, sigmoid(&gamma.neg()?)?);
        let gain = (noise.sqrt()? / (noise + signal.affine(0.25, 0.0)?)?)?;
        Ok(z.broadcast_mul(&broad(&gain, z)?)?)
    };
    let k = data(n);
    let moment = |seed: u64| {
        let mut noise = CounterNoise::new(seed, 0..n as u64);
        let draw = VdmDraw {
            epsilon0: noise.normal(&k).unwrap(),
            epsilon: noise.normal(&k).unwrap(),
            times: even_times(0.37, n),
        };
        let schedule = schedule().learning_interior();
        let vdm = Vdm {
            schedule: &schedule,
            levels: LEVELS,
            steps: None,
        };
        vdm.losses(&belief, &k, &draw)
            .unwrap()
            .second_moment()
            .unwrap()
    };
    let value = || moment(99).to_scalar::<f64>().unwrap();
    let before = value();
    for step in 0..30 {
        let grads = diffusion_ops::backward(&moment(step)).unwrap();
        for var in &inner {
            let grad = grads.get(var.as_tensor()).unwrap();
            let size = grad
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
                .sqrt();
            let step = grad.affine(-0.2 / size.max(1e-12), 0.0).unwrap();
            var.set(&(var.as_tensor() + step).unwrap().detach())
                .unwrap();
        }
    }
    let after = value();
    assert!(after < 0.9 * before, "{before} {after}");
}

/// The published update of z is DDPM's posterior, so that any ancestral sampler draws it.
#[test]
fn the_sampler_is_the_posterior() {
    let frozen = LINEAR.freeze().unwrap();
    let (t, s) = (frozen.at(0.7), frozen.at(0.5));
    let (gt, gs) = (frozen.gamma(0.7).0, frozen.gamma(0.5).0);
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
    let z = Tensor::new(&[[0.4f64], [-1.1]], &Device::Cpu).unwrap();
    let said = Tensor::new(&[[0.2f64], [0.9]], &Device::Cpu).unwrap();
    let told = said.clone();
    let network = crate::denoiser::from_fn(move |_: &Tensor, _, _| {
        let kind = crate::predict::Kind::Epsilon;
        Ok(crate::predict::Prediction::new(kind, told.clone()))
    });
    let mut noise = CounterNoise::new(3, 0..2);
    let eps = noise.clone().normal(&z).unwrap();
    let mut ctx = Ctx::new(&network, &mut noise, 0..2);
    let step = Ancestral {
        variance: Variance::FixedSmall,
        ..Ancestral::default()
    };
    let ours = step.step(&z, &t, &s, &mut ctx, &mut ()).unwrap();
    let c = -(gs - gt).exp_m1();
    let scale = (logistic(-gs) / logistic(-gt)).sqrt();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (z, said, eps, ours) = (flat(&z), flat(&said), flat(&eps), flat(&ours));
    for i in 0..2 {
        let mean = scale * (z[i] - logistic(gt).sqrt() * c * said[i]);
        let exact = mean + (logistic(gs) * c).sqrt() * eps[i];
        assert!((ours[i] - exact).abs() < 1e-12, "{} {exact}", ours[i]);
    }
}
