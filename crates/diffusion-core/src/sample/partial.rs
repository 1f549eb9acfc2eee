//! Parts of the way: a run that starts from samples noised to some point, a run that stops early, and
//! the condition that keeps such samples true to a measurement.
//!
//! - Come-closer-diffuse-faster (Chung, Sim and Ye 2022): start from an estimate, keep `A x = y`.
//! - Early-stopped DDPM (Lyu et al. 2022): start from what a VAE or a GAN makes.
//! - Truncated DPM (Zheng et al. 2022): start from a model of `q(x_t)` itself, see [`crate::sample::fit`].

use super::Constraint;
use crate::denoiser::{Call, Denoiser};
use crate::error::{Report, Result};
use crate::forward::marginal;
use crate::noise::Noise;
use crate::schedule::{Point, Rates, Schedule};
use crate::tensor::{At, combine, lincomb};
use candle_core::Tensor;
use diffusion_ops::{avg_pool2d, upsample_nearest2d};
use std::ops::Range;

/// Estimates of the data, noised to where a run starts (Chung et al. 2022, eq. 11).
///
/// ```text
/// x_{t₀} = α_{t₀} x̂ + σ_{t₀} z
/// ```
///
/// At the noisiest point this is the prior, up to the signal that is left there.
///
/// # Shapes
/// `estimate` `[B, …]`, the result likewise.
///
/// # Errors
/// Those of the noise source.
pub fn noised_start(estimate: &Tensor, first: &Point, noise: &mut dyn Noise) -> Result<Tensor> {
    marginal(estimate, &noise.normal(estimate)?, At::All(*first))
}

/// The part of a grid below a point, with the point before it: a grid for a run that starts there.
///
/// # Errors
/// `Config` when no point of the grid is cleaner.
pub fn from_point(points: &[Point], first: &Point) -> Result<Vec<Point>> {
    let start = first.sigma_hat();
    let below = points.iter().filter(|p| p.sigma_hat() < start);
    let part: Vec<Point> = std::iter::once(first).chain(below).copied().collect();
    if part.len() < 2 {
        return Err(Report::new("start of a run", format!("{first:?}"))
            .expected("a point that is noisier than some point of the grid")
            .remedy("start at a later time, or use a grid that goes further down")
            .config());
    }
    Ok(part)
}

/// The part of a grid above a point, with the point as its end: a grid for a run that stops there.
///
/// # Errors
/// `Config` when no point of the grid is noisier.
pub fn until_point(points: &[Point], last: &Point) -> Result<Vec<Point>> {
    let end = last.sigma_hat();
    let mut part: Vec<Point> = points
        .iter()
        .copied()
        .take_while(|p| p.sigma_hat() > end)
        .collect();
    if part.is_empty() {
        return Err(Report::new("end of a run", format!("{last:?}"))
            .expected("a point that is cleaner than some point of the grid")
            .remedy("stop at an earlier time, or use a grid that goes further up")
            .config());
    }
    part.push(*last);
    Ok(part)
}

/// A process that ends at some time of another: grids on it spend all their steps below that time.
pub struct Truncated<S> {
    inner: S,
    last: f64,
}

impl<S: Schedule> Truncated<S> {
    /// The process up to `last`, in the units of its time; an index for tables.
    ///
    /// # Errors
    /// `Config` when the time is not within the span of the process, or no index of a table.
    pub fn new(inner: S, last: f64) -> Result<Self> {
        let (low, high) = inner.span();
        let whole = inner.steps().is_none() || last.fract() == 0.0;
        // An index 0 leaves a single step.
        let inside = last > low || (inner.steps().is_some() && last == low);
        if !whole || !inside || last.is_nan() || last > high {
            return Err(Report::new("truncation time", last)
                .expected(match inner.steps() {
                    Some(steps) => format!("an index from 0 to {}", steps.saturating_sub(1)),
                    None => format!("above {low}, at most {high}"),
                })
                .config());
        }
        Ok(Self { inner, last })
    }
}

impl<S: Schedule> Schedule for Truncated<S> {
    fn at(&self, t: f64) -> Point {
        self.inner.at(t)
    }

    fn rates(&self, t: f64) -> Rates {
        self.inner.rates(t)
    }

    fn at_log_snr(&self, l: f64) -> Point {
        let found = self.inner.at_log_snr(l);
        if found.t > self.last {
            self.inner.at(self.last)
        } else {
            found
        }
    }

    fn span(&self) -> (f64, f64) {
        (self.inner.span().0, self.last)
    }

    fn steps(&self) -> Option<usize> {
        self.inner.steps().map(|_| self.last as usize + 1)
    }
}

/// Where the samples of a truncated run come from.
pub trait Start {
    /// Samples at `first`, shaped, typed and placed as `like`, `[B, …]`.
    ///
    /// # Errors
    /// Whatever a model behind it refuses.
    fn draw(
        &self,
        like: &Tensor,
        first: &Point,
        noise: &mut dyn Noise,
        items: Range<u64>,
    ) -> Result<Tensor>;
}

/// The implicit generator of truncated DPM: the network itself, at the time where the chain is cut.
///
/// ```text
/// x_{t_trunc} = G(z) = net(z, t_trunc),   z ~ N(0, I)
/// ```
///
/// What the network says is taken as it is: a generator shares the weights, not the meaning.
pub struct Implicit<D>(pub D);

impl<D: Denoiser> Start for Implicit<D> {
    fn draw(
        &self,
        like: &Tensor,
        first: &Point,
        noise: &mut dyn Noise,
        items: Range<u64>,
    ) -> Result<Tensor> {
        let z = noise.normal(like)?;
        let mut call = Call {
            noise,
            items,
            tracked: false,
        };
        Ok(self.0.predict(&z, At::All(*first), &mut call)?.value)
    }
}

/// What was measured of an image, up to a factor: `A` with `A Aᵀ = I`.
#[derive(Clone, Debug)]
pub enum Operator {
    /// Entries that are known: 1 in the mask, which broadcasts against the sample, 0 elsewhere.
    Mask(Tensor),
    /// Means of squares of this many pixels a side, `[B, C, H, W] → [B, C, H/f, W/f]` (super-resolution).
    Pool(usize),
}

impl Operator {
    /// The measurement of `x`; of the size of `x` for a mask.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn measure(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Operator::Mask(mask) => Ok(x.broadcast_mul(mask)?),
            Operator::Pool(factor) => {
                let sides = x.dims().get(2..).unwrap_or_default();
                if *factor == 0 || x.rank() != 4 || sides.iter().any(|side| side % factor != 0) {
                    return Err(
                        Report::new("pooling", format!("{:?} by {factor}", x.dims()))
                            .expected("images [B, C, H, W] whose sides are multiples of the factor")
                            .config(),
                    );
                }
                Ok(avg_pool2d(x, *factor)?)
            }
        }
    }

    /// The image with this measurement and nothing else: `A⁺ y`, with `A A⁺ y = y`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn lift(&self, y: &Tensor) -> Result<Tensor> {
        match self {
            Operator::Mask(mask) => Ok(y.broadcast_mul(mask)?),
            Operator::Pool(factor) => {
                let (_, _, h, w) = y.dims4()?;
                Ok(upsample_nearest2d(y, h * factor, w * factor)?)
            }
        }
    }
}

/// Keeps samples true to a measurement (Chung et al. 2022, eq. 12).
///
/// ```text
/// x ← (I − AᵀA) x + Aᵀ y_t,    y_t = α_t y + σ_t A z
/// ```
///
/// `A` is scaled to `A Aᵀ = I`, so that the map never moves two samples apart. Where there is no noise
/// left `A x = y` holds exactly.
pub struct DataConsistency {
    /// What was measured.
    pub operator: Operator,
    /// The measurement, for a batch; entries beyond a mask are not looked at.
    pub measurement: Tensor,
}

impl Constraint for DataConsistency {
    fn apply(&self, x: Tensor, at: &Point, noise: &mut dyn Noise) -> Result<Tensor> {
        let known = self.operator.lift(&self.measurement)?;
        let wanted = if at.sigma == 0.0 {
            lincomb(at.alpha, &known, 0.0, &known)?
        } else {
            let z = noise.normal(&x)?;
            let there = At::All(*at);
            combine(
                &there.coef(|p| p.alpha),
                &known,
                &there.coef(|p| p.sigma),
                &self.operator.lift(&self.operator.measure(&z)?)?,
            )?
        };
        let own = self.operator.lift(&self.operator.measure(&x)?)?;
        Ok(((x - own)? + wanted)?)
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
    use crate::sample::{Ancestral, Ddim, Planned, prior, sample};
    use crate::schedule::{BetaSchedule, Vp};
    use candle_core::{DType, Device};

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        let d = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        d.to_scalar().unwrap()
    }

    fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_start_at_the_noisiest_point_is_the_whole_run() {
        let oracle = Gaussian::new(vec![0.5, -1.0], vec![0.3, 1.5]);
        let points = Grid::UniformLogSnr.points(&Vp::default(), 20).unwrap();
        assert_eq!(from_point(&points, &points[0]).unwrap(), points);
        assert_eq!(until_point(&points, &points[20]).unwrap(), points);
        let (estimate, p) = (zeros(&[4, 2]), points[0]);
        let start = noised_start(&estimate, &p, &mut CounterNoise::new(1, 0..4)).unwrap();
        let whole = prior(&estimate, &p, &mut CounterNoise::new(1, 0..4)).unwrap();
        assert_eq!(worst(&start, &whole), 0.0);
        // The way in two parts is the way.
        let run = |points: &[Point], x: Tensor| {
            let solver = Planned::new(Ddim::default(), points);
            sample(&solver, &oracle, x, &mut CounterNoise::new(1, 0..4), 0..4).unwrap()
        };
        let upper = until_point(&points, &points[7]).unwrap();
        let lower = from_point(&points, &points[7]).unwrap();
        assert_eq!((upper.len(), lower.len()), (8, 14));
        let parts = run(&lower, run(&upper, whole.clone()));
        assert_eq!(worst(&parts, &run(&points, whole)), 0.0);
        assert!(from_point(&points, &points[20]).is_err());
        assert!(until_point(&points, &points[0]).is_err());
    }

    /// With samples of the data for estimates every start is exact, and a start from noised samples keeps
    /// the moments of the data.
    #[test]
    fn a_late_start_from_data_ends_in_the_data() {
        let oracle = Gaussian::new(vec![0.5], vec![0.3]);
        let cut = Truncated::new(Vp::default(), 0.4).unwrap();
        let points = Grid::UniformLogSnr.points(&cut, 60).unwrap();
        assert!((points[0].t - 0.4).abs() < 1e-9);
        let n = 4000u64;
        let mut noise = CounterNoise::new(1, 0..n);
        let z = noise.normal(&zeros(&[n as usize, 1])).unwrap();
        let x = noised_start(&z.affine(0.3, 0.5).unwrap(), &points[0], &mut noise).unwrap();
        let solver = Planned::new(Ddim::default(), &points);
        let x = sample(&solver, &oracle, x, &mut noise, 0..n).unwrap();
        let x = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mean = x.iter().sum::<f64>() / n as f64;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(
            (mean - 0.5).abs() < 4.0 * 0.3 / (n as f64).sqrt() + 2e-3,
            "{mean}"
        );
        // The solver's own error is added to the four standard errors.
        assert!(
            (var / 0.09 - 1.0).abs() < 4.0 * (2.0 / n as f64).sqrt() + 0.02,
            "{var}"
        );
    }

    #[test]
    fn truncated_tables_and_times() {
        let table = BetaSchedule::ddpm(1000).table(1000).unwrap();
        let cut = Truncated::new(table.clone(), 299.0).unwrap();
        let points = Grid::Trailing.points(&cut, 3).unwrap();
        let indices: Vec<f64> = points.iter().map(|p| p.t).collect();
        assert_eq!(indices[..3], [299.0, 199.0, 99.0]);
        assert_eq!(points[1], table.at(199.0));
        assert_eq!(cut.at_log_snr(-100.0), table.at(299.0));
        for wrong in [1000.0, -1.0, 3.5, f64::NAN] {
            assert!(Truncated::new(table.clone(), wrong).is_err(), "{wrong}");
        }
        assert!(Truncated::new(Vp::default(), 1.5).is_err());
    }

    #[test]
    fn a_generator_is_the_network_at_the_cut() {
        let network = from_fn(|x: &Tensor, at: At<'_>, _: &mut Call<'_>| {
            let value = at.coef(|p| p.t).times(x)?;
            Ok(Prediction::new(Kind::Epsilon, value))
        });
        let first = Vp::default().at(0.25);
        let mut noise = CounterNoise::new(3, 0..2);
        let x = Implicit(network)
            .draw(&zeros(&[2, 3]), &first, &mut noise, 0..2)
            .unwrap();
        let z = CounterNoise::new(3, 0..2).normal(&zeros(&[2, 3])).unwrap();
        assert_eq!(worst(&x, &z.affine(0.25, 0.0).unwrap()), 0.0);
    }

    /// At every level the map is a projection that moves no two samples apart; without noise the
    /// measurement holds exactly, at the end of a run too.
    #[test]
    fn the_measurement_holds_and_nothing_moves_apart() {
        let mask = Tensor::new(&[1.0, 0.0, 0.0, 1.0f64], &Device::Cpu).unwrap();
        let mask = mask.reshape((1, 1, 2, 2)).unwrap();
        let mask = upsample_nearest2d(&mask, 4, 4).unwrap();
        let mut noise = CounterNoise::new(5, 0..3);
        let shape = zeros(&[3, 2, 4, 4]);
        let truth = noise.normal(&shape).unwrap();
        for operator in [Operator::Mask(mask), Operator::Pool(2)] {
            let y = operator.measure(&truth).unwrap();
            let back = operator.measure(&operator.lift(&y).unwrap()).unwrap();
            assert!(worst(&back, &y) < 1e-15);
            let constraint = DataConsistency {
                operator: operator.clone(),
                measurement: y.clone(),
            };
            let (a, b) = (noise.normal(&shape).unwrap(), noise.normal(&shape).unwrap());
            let norm = |x: &Tensor| {
                let square = x.sqr().unwrap().sum_all().unwrap();
                square.to_scalar::<f64>().unwrap()
            };
            for t in [0.1, 0.5, 1.0] {
                let p = Vp::default().at(t);
                let at = |x: &Tensor| {
                    let mut same = CounterNoise::new(9, 0..3);
                    constraint.apply(x.clone(), &p, &mut same).unwrap()
                };
                let moved = norm(&(at(&a) - at(&b)).unwrap());
                assert!(moved <= norm(&(&a - &b).unwrap()), "{t}: {moved}");
                // What is measured is the measurement, noised.
                let z = CounterNoise::new(9, 0..3).normal(&shape).unwrap();
                let z = operator.measure(&z).unwrap();
                let noisy = lincomb(p.alpha, &y, p.sigma, &z).unwrap();
                assert!(worst(&operator.measure(&at(&a)).unwrap(), &noisy) < 1e-14);
            }
            let points = Grid::UniformLogSnr.points(&Vp::default(), 6).unwrap();
            let points = from_point(&points, &points[3]).unwrap();
            let model =
                from_fn(|x: &Tensor, _, _| Ok(Prediction::new(Kind::X0, x.affine(0.5, 0.0)?)));
            let mut solver = Planned::new(Ancestral::default(), &points);
            solver.constraint = Some(Box::new(constraint));
            let start = noised_start(&operator.lift(&y).unwrap(), &points[0], &mut noise).unwrap();
            let x = sample(&solver, &model, start, &mut noise, 0..3).unwrap();
            assert!(worst(&operator.measure(&x).unwrap(), &y) < 1e-14);
        }
        assert!(Operator::Pool(3).measure(&shape).is_err());
        assert!(Operator::Pool(0).measure(&shape).is_err());
    }

    /// How good a late start is: with an estimate that is off by a bias, the error after the run has its
    /// least at some time between none and all (the U of the paper's figure).
    #[test]
    fn a_biased_estimate_is_best_noised_to_some_point_between() {
        let data = Gaussian::new(vec![0.0], vec![0.3]);
        let error = |t0: f64| {
            let n = 2000u64;
            let mut noise = CounterNoise::new(2, 0..n);
            let truth = noise.normal(&zeros(&[n as usize, 1])).unwrap();
            let truth = truth.affine(0.3, 0.0).unwrap();
            let estimate = (&truth + 0.4).unwrap();
            let first = Vp::default().at(t0);
            let points = Grid::UniformLogSnr.points(&Vp::default(), 80).unwrap();
            let points = from_point(&points, &first).unwrap();
            let x = noised_start(&estimate, &first, &mut noise).unwrap();
            let solver = Planned::new(Ddim::default(), &points);
            let x = sample(&solver, &data, x, &mut noise, 0..n).unwrap();
            let square = (x - truth).unwrap().sqr().unwrap().mean_all().unwrap();
            square.to_scalar::<f64>().unwrap()
        };
        let (none, some, all) = (error(0.01), error(0.2), error(1.0));
        assert!(some < none && some < all, "{none} {some} {all}");
    }
}
