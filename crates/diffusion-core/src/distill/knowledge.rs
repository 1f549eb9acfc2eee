//! Knowledge distillation (Luhman and Luhman 2021): one step from noise to what a teacher makes of it.

use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::noise::Noise;
use crate::sample::{Solver, prior, sample};
use crate::schedule::Point;
use crate::tensor::{At, mean_per_item};
use candle_core::Tensor;
use std::ops::Range;

/// Noise and the samples that a deterministic teacher makes of it, drawn once.
#[derive(Clone, Debug)]
pub struct Pairs {
    /// `x_T`, `[B, …]`.
    pub noise: Tensor,
    /// The teacher's samples, `[B, …]`.
    pub samples: Tensor,
}

impl Pairs {
    /// Pairs for these items of a run, each a function of the noise source and the item alone.
    ///
    /// `solver` is deterministic, DDIM with η = 0 in the paper; `first` is where it begins and `like`,
    /// `[B, …]`, the shape of the samples.
    ///
    /// # Errors
    /// Whatever the teacher and the noise source refuse.
    pub fn generate(
        solver: &dyn Solver,
        teacher: &dyn Denoiser,
        first: &Point,
        like: &Tensor,
        noise: &mut dyn Noise,
        items: Range<u64>,
    ) -> Result<Self> {
        let x = prior(like, first, noise)?;
        let samples = sample(solver, teacher, x.clone(), noise, items)?;
        Ok(Self { noise: x, samples })
    }
}

/// The regression of a student on a teacher's samples (eq. 7).
///
/// ```text
/// loss = ‖x̂_θ(x_T, T) − y(x_T)‖² / D
/// ```
///
/// The student is asked at `T` alone: it begins as the teacher with its time fixed, and one step of
/// DDIM from `T` to the data gives what it says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Knowledge {
    /// `T`, where the noise stands.
    pub first: Point,
}

impl Knowledge {
    /// The loss of every pair, `[B]`, differentiable in the student's weights.
    ///
    /// # Errors
    /// `Config` when noise and samples differ in shape; whatever the student refuses.
    pub fn losses(
        &self,
        student: &dyn Denoiser,
        pairs: &Pairs,
        call: &mut Call<'_>,
    ) -> Result<Tensor> {
        let (x, y) = (&pairs.noise, &pairs.samples);
        if x.shape() != y.shape() {
            return Err(Report::new(
                "pairs",
                format!("noise {:?}, samples {:?}", x.shape(), y.shape()),
            )
            .expected("one sample for each noise, of its shape")
            .input());
        }
        let at = At::All(self.first);
        let x0 = student.predict(x, at, call)?.x0(x, at)?;
        mean_per_item(&(x0 - y)?.sqr()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::from_fn;
    use crate::grid::Grid;
    use crate::noise::CounterNoise;
    use crate::oracle::Gaussian;
    use crate::predict::{Kind, Prediction};
    use crate::sample::{Ddim, Planned};
    use crate::schedule::Vp;
    use crate::tensor::gradient;
    use candle_core::{DType, Device};

    /// Pairs of a Gaussian teacher lie on its flow, and the affine student that the regression has its
    /// minimum at is the flow: zero loss, zero gradient; another slope costs.
    #[test]
    fn the_best_student_of_a_gaussian_is_its_flow() {
        let oracle = Gaussian::new(vec![0.5, -1.0], vec![0.3, 1.5]);
        let points = Grid::UniformLogSnr.points(&Vp::default(), 400).unwrap();
        let (first, last) = (points[0], points[400]);
        let solver = Planned::new(Ddim::default(), &points);
        let pairs = |items: Range<u64>| {
            let batch = (items.end - items.start) as usize;
            let like = Tensor::zeros((batch, 2), DType::F64, &Device::Cpu).unwrap();
            let mut noise = CounterNoise::new(7, items.clone());
            Pairs::generate(&solver, &oracle, &first, &like, &mut noise, items).unwrap()
        };
        let all = pairs(0..4);
        // A pair does not depend on the batch that it was made in.
        let one = pairs(2..3);
        assert_eq!(
            one.samples.to_vec2::<f64>().unwrap()[0],
            all.samples.to_vec2::<f64>().unwrap()[2]
        );
        let flow = oracle.flow(&all.noise, &first, &last).unwrap();
        let knowledge = Knowledge { first };
        let loss = |s: &Tensor| {
            let student =
                from_fn(|_: &Tensor, _, _| Ok(Prediction::new(Kind::X0, flow.broadcast_mul(s)?)));
            let mut noise = CounterNoise::new(0, 0..4);
            let mut call = Call {
                noise: &mut noise,
                items: 0..4,
                tracked: true,
            };
            Ok(knowledge.losses(&student, &all, &mut call)?.mean_all()?)
        };
        let number = |v: f64| Tensor::new(v, &Device::Cpu).unwrap();
        let value = |v: f64| loss(&number(v)).unwrap().to_scalar::<f64>().unwrap();
        // The error of 400 steps, squared.
        assert!(value(1.0) < 1e-4, "{}", value(1.0));
        assert!(value(1.1) > 10.0 * value(1.0));
        let slope = gradient(&number(1.1), loss).unwrap();
        let numeric = (value(1.1 + 1e-5) - value(1.1 - 1e-5)) / 2e-5;
        assert!((slope.to_scalar::<f64>().unwrap() - numeric).abs() < 1e-6);
    }

    #[test]
    fn pairs_that_do_not_fit_are_refused() {
        let x = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let pairs = Pairs {
            noise: x.clone(),
            samples: x.narrow(0, 0, 1).unwrap(),
        };
        let mut noise = CounterNoise::new(0, 0..2);
        let mut call = Call {
            noise: &mut noise,
            items: 0..2,
            tracked: true,
        };
        let knowledge = Knowledge {
            first: Point::new(1.0, 0.1, 0.99),
        };
        let oracle = Gaussian::new(vec![0.0; 3], vec![1.0; 3]);
        assert!(knowledge.losses(&oracle, &pairs, &mut call).is_err());
    }
}
