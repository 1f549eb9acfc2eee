//! Progressive distillation (Salimans and Ho 2022): a student that makes one step of DDIM where its
//! teacher makes two, then teaches a student itself.

use super::teacher::{Ode, untracked};
use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::marginal;
use crate::loss::{Weight, weighted_error};
use crate::predict::Kind;
use crate::schedule::Point;
use crate::tensor::{At, Coef, combine};
use candle_core::Tensor;
use diffusion_ops::rng::Key;

/// One halving: from a teacher of `2N` steps to a student of `N` (algorithm 2).
///
/// ```text
/// z_t → z_t' → z_t''      two steps of the teacher by DDIM
/// x̃ = (z_t'' − (σ''/σ_t) z_t)/(α'' − (σ''/σ_t) α_t)
/// loss = w(t) ‖x̃ − x̂_θ(z_t)‖²,    w = max(SNR, 1) or SNR + 1
/// ```
///
/// One step of DDIM from `z_t` with `x̃` lands on `z_t''`. The last target, at the data, is the
/// data that the second step says.
///
/// The student may predict anything that knows the data without signal: a velocity or `x₀`. The noise
/// says nothing about the data where `α = 0`, and little where `α` is small, which is where few
/// steps begin.
#[derive(Clone, Debug, PartialEq)]
pub struct Progressive {
    /// `(t, t', t'')` of each step of the student, noisiest first.
    steps: Vec<[Point; 3]>,
    /// `w(t)`, as a weight on the error of the data; [`Weight::TruncatedSnr`] is `max(SNR, 1)`,
    /// [`Weight::Velocity`] is `SNR + 1`.
    pub weight: Weight,
}

impl Progressive {
    /// The halving of a teacher that runs along these points, noisiest first, the last the data.
    ///
    /// # Errors
    /// `Config` when the number of steps is not even, noise does not fall along the points, or they do not
    /// end in the data.
    pub fn new(teacher: &[Point], weight: Weight) -> Result<Self> {
        let n = teacher.len().saturating_sub(1);
        if n == 0 || !n.is_multiple_of(2) {
            return Err(Report::new("teacher", format!("{n} steps"))
                .expected("an even number of steps, at least 2")
                .remedy("give a teacher of twice the student's steps")
                .config());
        }
        // Compared so that NaN fails; without signal σ̂ is infinite.
        let falls = |w: &[Point]| w[0].sigma_hat() > w[1].sigma_hat();
        let ends = teacher.last().is_some_and(|p| p.sigma == 0.0);
        if !teacher.windows(2).all(falls) || !ends {
            return Err(
                Report::new("teacher", "points that do not lead to the data")
                    .expected("noise that falls along them, down to none")
                    .config(),
            );
        }
        let steps = teacher
            .windows(3)
            .step_by(2)
            .filter_map(|w| <[Point; 3]>::try_from(w).ok())
            .collect();
        Ok(Self { steps, weight })
    }

    /// The number of steps of the student.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Never: a student has at least one step.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The points that the student runs along, the last the data: the teacher's of the next halving.
    pub fn student_points(&self) -> Vec<Point> {
        let ends = self.steps.last().map(|s| s[2]);
        self.steps.iter().map(|s| s[0]).chain(ends).collect()
    }

    /// One step of the student an item, uniform, a function of the item's key alone.
    pub fn draw(&self, keys: impl IntoIterator<Item = Key>) -> Vec<usize> {
        keys.into_iter()
            .map(|key| key.below(self.steps.len() as u64) as usize)
            .collect()
    }

    /// Where the items with these steps begin (0), are halfway (1), and end (2).
    fn points(&self, steps: &[usize], place: usize) -> Result<Vec<Point>> {
        steps
            .iter()
            .map(|i| match self.steps.get(*i) {
                Some(step) => Ok(step[place]),
                None => Err(Report::new("step of the student", i)
                    .expected(format!("below {}", self.steps.len()))
                    .config()),
            })
            .collect()
    }

    /// The target `x̃`, `[B, …]`, for noisy samples `z`, `[B, …]`, at the beginning of these steps.
    ///
    /// # Errors
    /// `Config` for a step that the student does not have; whatever the teacher refuses.
    pub fn target(
        &self,
        teacher: &dyn Denoiser,
        z: &Tensor,
        steps: &[usize],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let [from, half, to] = [
            self.points(steps, 0)?,
            self.points(steps, 1)?,
            self.points(steps, 2)?,
        ];
        let middle = Ode::Euler.step(teacher, z, &from, &half, call)?;
        let end = Ode::Euler.step(teacher, &middle, &half, &to, call)?;
        let (mut of_end, mut of_start) = (Vec::new(), Vec::new());
        for (t, s) in from.iter().zip(&to) {
            let ratio = s.sigma / t.sigma;
            let signal = s.alpha - ratio * t.alpha;
            of_end.push(1.0 / signal);
            of_start.push(-ratio / signal);
        }
        let target = combine(&Coef::Each(of_end), &end, &Coef::Each(of_start), z)?;
        Ok(target.detach())
    }

    /// The loss of every item, `[B]`, differentiable in the student's weights.
    ///
    /// The error is taken of what the student predicts, with the weight that makes it an error of the data.
    ///
    /// # Shapes
    /// `x0` and `epsilon` `[B, …]`, one step of the student an item.
    ///
    /// # Errors
    /// `Config` for a student that predicts noise at a point without signal, and for a weight that is not
    /// finite; whatever the networks refuse.
    pub fn losses(
        &self,
        teacher: &dyn Denoiser,
        student: &dyn Denoiser,
        (x0, epsilon): (&Tensor, &Tensor),
        steps: &[usize],
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let from = self.points(steps, 0)?;
        let at = At::Each(&from);
        let z = marginal(x0, epsilon, at)?;
        let said = student.predict(&z, at, call)?;
        if matches!(said.kind, Kind::Epsilon | Kind::Score) && at.any(|p| p.alpha == 0.0) {
            return Err(Report::new(
                format!("a student that predicts {:?}", said.kind),
                "a step from alpha = 0, where the noise says nothing about the data",
            )
            .expected("a student that predicts a velocity or x0")
            .remedy(
                "let the student predict v, or use a schedule whose last step keeps some signal",
            )
            .config());
        }
        let target = self.target(teacher, &z, steps, &mut untracked(call))?;
        let noise = combine(
            &at.coef(|p| 1.0 / p.sigma),
            &z,
            &at.coef(|p| -p.alpha / p.sigma),
            &target,
        )?;
        weighted_error(&said, &target, &noise, &from, self.weight)
    }
}

/// The numbers of steps of the students, one after the other: `from/2, from/4, …, to`.
///
/// # Errors
/// `Config` unless `from` is `to` doubled once or more.
pub fn halvings(from: usize, to: usize) -> Result<Vec<usize>> {
    let mut steps = Vec::new();
    let mut n = from;
    while to > 0 && n > to && n.is_multiple_of(2) {
        n /= 2;
        steps.push(n);
    }
    if steps.last() == Some(&to) {
        return Ok(steps);
    }
    let doubled: Vec<String> = (1..7)
        .filter_map(|k| to.max(1).checked_shl(k))
        .map(|n| n.to_string())
        .collect();
    Err(
        Report::new("halvings", format!("from {from} steps to {to}"))
            .expected(format!("from one of {}, …", doubled.join(", ")))
            .remedy("begin at the last number of steps, doubled as often as you like")
            .config(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::noise::{CounterNoise, Noise};
    use crate::oracle::{Gaussian, Mixture};
    use crate::predict::Prediction;
    use crate::sample::{Ddim, Planned, sample};
    use crate::schedule::{Schedule, Vp};
    use crate::tensor::gradient;
    use candle_core::{DType, Device, Var};
    use diffusion_ops::rng::stream;

    /// The cosine process of the paper, `α = cos(πt/2)`, whose last point has no signal.
    fn cosine(n: usize) -> Vec<Point> {
        (0..=n)
            .rev()
            .map(|i| {
                let t = i as f64 / n as f64;
                let (sigma, alpha) = (std::f64::consts::FRAC_PI_2 * t).sin_cos();
                let alpha = if i == n { 0.0 } else { alpha };
                Point::new(t, alpha, sigma)
            })
            .collect()
    }

    fn vp(n: usize) -> Vec<Point> {
        let mut points: Vec<Point> = (1..=n)
            .rev()
            .map(|i| Vp::default().at(i as f64 / n as f64))
            .collect();
        points.push(Point::data(0.0));
        points
    }

    fn draw(batch: usize, label: u64) -> Tensor {
        let like = Tensor::zeros((batch, 2), DType::F64, &Device::Cpu).unwrap();
        let n = batch as u64;
        CounterNoise::new(label, 0..n).normal(&like).unwrap()
    }

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        let d = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        d.to_scalar().unwrap()
    }

    fn with_call<T>(batch: u64, f: impl FnOnce(&mut Call<'_>) -> T) -> T {
        let mut noise = CounterNoise::new(0, 0..batch);
        f(&mut Call {
            noise: &mut noise,
            items: 0..batch,
            tracked: true,
        })
    }

    /// One step of DDIM with the target lands where two steps of the teacher do, from the point without
    /// signal and into the data too.
    #[test]
    fn a_step_with_the_target_lands_on_two_steps_of_the_teacher() {
        let oracle = Mixture::new(
            vec![0.3, 0.7],
            vec![vec![-1.0, 0.5], vec![1.0, 0.0]],
            vec![0.2, 0.4],
        )
        .unwrap();
        for teacher in [cosine(8), vp(8)] {
            let halving = Progressive::new(&teacher, Weight::TruncatedSnr).unwrap();
            assert_eq!(halving.len(), 4);
            for (i, pair) in teacher.windows(3).step_by(2).enumerate() {
                let z = draw(6, i as u64);
                let x = with_call(6, |c| halving.target(&oracle, &z, &[i; 6], c)).unwrap();
                let told = from_fn(|_: &Tensor, _, _| Ok(Prediction::new(Kind::X0, x.clone())));
                let run = |points: &[Point], model: &dyn Denoiser| {
                    let solver = Planned::new(Ddim::default(), points);
                    sample(
                        &solver,
                        model,
                        z.clone(),
                        &mut CounterNoise::new(0, 0..6),
                        0..6,
                    )
                    .unwrap()
                };
                let two = run(pair, &oracle);
                let one = run(&[pair[0], pair[2]], &told);
                assert!(worst(&one, &two) < 1e-12, "step {i}: {}", worst(&one, &two));
            }
        }
    }

    /// A student that has learnt everything says the target: halving 64 steps down to one gives the 64
    /// steps of DDIM, and these the flow as their number grows.
    #[test]
    fn the_limit_of_all_halvings_is_the_flow() {
        let oracle = Gaussian::new(vec![0.5, -1.0], vec![0.3, 1.5]);
        let z = draw(5, 3);
        let limit = |n: usize| {
            let points = cosine(n);
            let mut students: Vec<Box<dyn Denoiser>> = vec![Box::new(oracle.clone())];
            let mut teacher = points.clone();
            for steps in halvings(n, 1).unwrap() {
                let halving = Progressive::new(&teacher, Weight::Velocity).unwrap();
                assert_eq!(halving.len(), steps);
                teacher = halving.student_points();
                let before = students.pop().unwrap();
                students.push(Box::new(from_fn(
                    move |x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
                        let steps: Vec<usize> = at
                            .points(x.dim(0)?)
                            .iter()
                            .map(|p| halving.steps.iter().position(|s| s[0] == *p).unwrap())
                            .collect();
                        let x0 = halving.target(&*before, x, &steps, call)?;
                        Ok(Prediction::new(Kind::X0, x0))
                    },
                )));
            }
            let run = |points: &[Point], model: &dyn Denoiser| {
                let solver = Planned::new(Ddim::default(), points);
                sample(
                    &solver,
                    model,
                    z.clone(),
                    &mut CounterNoise::new(0, 0..5),
                    0..5,
                )
                .unwrap()
            };
            let one = run(&teacher, &*students[0]);
            assert!(worst(&one, &run(&points, &oracle)) < 1e-11);
            let flow = oracle.flow(&z, &points[0], points.last().unwrap()).unwrap();
            worst(&one, &flow)
        };
        let (coarse, fine) = (limit(32), limit(64));
        assert!(
            fine < 0.05 && (1.7..2.3).contains(&(coarse / fine)),
            "{coarse} {fine}"
        );
    }

    /// The loss is the weighted error of the data, whatever the student predicts; it is zero for a student
    /// that says the target, and its gradient reaches the student alone.
    #[test]
    fn the_loss_is_the_weighted_error_of_the_data() {
        let oracle = Gaussian::new(vec![0.5, -1.0], vec![0.3, 1.5]);
        let halving = Progressive::new(&cosine(8), Weight::TruncatedSnr).unwrap();
        let steps = halving.draw((0..16).map(|i| Key::new(1, stream::TEST).item(i)));
        assert!((0..4).all(|i| steps.contains(&i)), "{steps:?}");
        let (x0, epsilon) = (draw(16, 1), draw(16, 2));
        let from = halving.points(&steps, 0).unwrap();
        let z = marginal(&x0, &epsilon, At::Each(&from)).unwrap();
        let target = with_call(16, |c| halving.target(&oracle, &z, &steps, c)).unwrap();
        let shift = Var::new(0.1f64, &Device::Cpu).unwrap();
        for kind in [Kind::X0, Kind::Velocity] {
            let student = from_fn(|x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
                let x0 = target.broadcast_add(shift.as_tensor())?;
                Prediction::new(Kind::X0, x0).into_kind(kind, x, at)
            });
            let losses = with_call(16, |c| {
                halving.losses(&oracle, &student, (&x0, &epsilon), &steps, c)
            })
            .unwrap();
            for (loss, p) in losses.to_vec1::<f64>().unwrap().iter().zip(&from) {
                let exact = 0.01 * p.snr().max(1.0);
                assert!(
                    (loss / exact - 1.0).abs() < 1e-9,
                    "{kind:?} {p:?}: {loss} {exact}"
                );
            }
            let grads = diffusion_ops::backward(&losses.mean_all().unwrap()).unwrap();
            let slope = grads
                .get(shift.as_tensor())
                .unwrap()
                .to_scalar::<f64>()
                .unwrap();
            let exact: f64 = from.iter().map(|p| 0.2 * p.snr().max(1.0)).sum::<f64>() / 16.0;
            assert!(
                (slope / exact - 1.0).abs() < 1e-9,
                "{kind:?}: {slope} {exact}"
            );
        }
        // The teacher is a constant.
        let slope = gradient(&Tensor::new(0.3f64, &Device::Cpu).unwrap(), |m| {
            let teacher = from_fn(|x: &Tensor, _, _| {
                Ok(Prediction::new(Kind::X0, x.zeros_like()?.broadcast_add(m)?))
            });
            let losses = with_call(16, |c| {
                halving.losses(&teacher, &oracle, (&x0, &epsilon), &steps, c)
            })?;
            Ok(losses.mean_all()?)
        });
        let error = slope.unwrap_err().to_string();
        assert!(error.contains("does not depend"), "{error}");
    }

    #[test]
    fn noise_is_refused_where_it_says_nothing() {
        let oracle = Gaussian::new(vec![0.0; 2], vec![1.0; 2]);
        let student = from_fn(|x: &Tensor, _, _| Ok(Prediction::new(Kind::Epsilon, x.clone())));
        let losses = |points: &[Point], step: usize| {
            let halving = Progressive::new(points, Weight::TruncatedSnr).unwrap();
            let (x0, epsilon) = (draw(1, 1), draw(1, 2));
            with_call(1, |c| {
                halving.losses(&oracle, &student, (&x0, &epsilon), &[step], c)
            })
        };
        let error = losses(&cosine(4), 0).unwrap_err().to_string();
        assert!(
            error.contains("alpha = 0") && error.contains("predict v"),
            "{error}"
        );
        assert!(losses(&cosine(4), 1).is_ok() && losses(&vp(4), 0).is_ok());
        assert!(losses(&cosine(4), 2).is_err());
    }

    #[test]
    fn halvings_end_where_they_should() {
        assert_eq!(halvings(1024, 128).unwrap(), [512, 256, 128]);
        assert_eq!(halvings(8, 4).unwrap(), [4]);
        for (from, to) in [(4, 4), (12, 5), (6, 4), (2, 4), (8, 0)] {
            assert!(halvings(from, to).is_err(), "{from} {to}");
        }
        assert!(
            halvings(9, 4)
                .unwrap_err()
                .to_string()
                .contains("8, 16, 32")
        );
        assert!(Progressive::new(&cosine(3), Weight::X0).is_err());
        assert!(Progressive::new(&cosine(4)[..3], Weight::X0).is_err());
        let mut rising = cosine(4);
        rising.reverse();
        assert!(Progressive::new(&rising, Weight::X0).is_err());
    }
}
