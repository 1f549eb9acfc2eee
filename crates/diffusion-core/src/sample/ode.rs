//! The probability flow by an adaptive solver (Song et al. 2021, section 4.3): as many network calls
//! as the tolerance asks for.

use super::{Ctx, Observer, Progress, Solver};
use crate::error::{Report, Result};
use crate::ode::{Control, DormandPrince, System};
use crate::schedule::{Point, SharedSchedule};
use crate::sde::{Discretisation, flow_velocity};
use crate::tensor::{At, Coef, all_finite, combine};
use candle_core::{DType, Device, Tensor};
use std::ops::ControlFlow;

/// What follows the flow, at its end.
#[derive(Clone, Default)]
pub enum Finish {
    /// Nothing: the result still has the noise of the end.
    #[default]
    None,
    /// The network's `x̂₀`.
    Denoised,
    /// The mean of one reverse-diffusion step of a chain (the authors' code).
    Reversed(Discretisation),
}

impl Finish {
    /// The sample after it, from the sample `x` at a point.
    pub(super) fn apply(&self, x: Tensor, at: &Point, ctx: &mut Ctx<'_>) -> Result<Tensor> {
        let x = match self {
            Finish::None => x,
            Finish::Denoised => ctx.denoise(&x, at)?.x0(&x, At::All(*at))?,
            Finish::Reversed(chain) => {
                let score = ctx.denoise(&x, at)?.score(&x, At::All(*at))?;
                chain.kernel(at.t).reversed(&x, &score, 1.0)?
            }
        };
        if !all_finite(&x)? {
            return Err(Report::new("the end of an adaptive run", "NaN or infinity")
                .remedy("check the model's weights, or stop at a noisier time")
                .numeric());
        }
        Ok(x)
    }
}

/// The sampler: `dx/dt = f x − ½ g² s` from `start` to `end`.
///
/// The state is f64 whatever the model computes in. By default every item has its own steps; the
/// root mean square over the batch ([`Control::Whole`]) takes the steps of SciPy's RK45.
#[derive(Clone)]
pub struct FlowOde {
    /// The process.
    pub schedule: SharedSchedule,
    /// Where the samples given to it stand.
    pub start: f64,
    /// Where it stops: 1e-3 for VP and sub-VP, 1e-5 for VE.
    pub end: f64,
    /// The solver and its tolerances.
    pub solver: DormandPrince,
    /// What follows.
    pub finish: Finish,
}

impl FlowOde {
    /// Over the whole span of a process with the usual tolerances.
    pub fn new(schedule: SharedSchedule) -> Self {
        let (end, start) = schedule.span();
        Self {
            schedule,
            start,
            end,
            solver: DormandPrince::default(),
            finish: Finish::None,
        }
    }
}

impl Solver for FlowOde {
    fn solve(&self, x: Tensor, ctx: &mut Ctx<'_>, watch: &mut dyn Observer) -> Result<Tensor> {
        let dtype = x.dtype();
        let rows = x.dim(0)?;
        let y = rows_of(&x)?;
        let mut flow = Flow {
            sampler: self,
            like: x.to_dtype(DType::F64)?,
            ctx,
            watch,
            done: 0,
        };
        let y = self
            .solver
            .solve(&mut flow, rows, &y, (self.start, self.end))?
            .y;
        let x = tensor_of(y, &flow.like)?;
        let at = self.schedule.at(self.end);
        let x = self.finish.apply(x, &at, ctx)?;
        Ok(x.to_dtype(dtype)?)
    }
}

/// The flow as a system of ordinary differential equations.
struct Flow<'a, 'b> {
    sampler: &'a FlowOde,
    like: Tensor,
    ctx: &'a mut Ctx<'b>,
    watch: &'a mut dyn Observer,
    done: usize,
}

impl System for Flow<'_, '_> {
    fn rate(&mut self, t: &[f64], y: &[f64]) -> Result<Vec<f64>> {
        let x = tensor_of(y.to_vec(), &self.like)?;
        let schedule = self.sampler.schedule.as_ref();
        let velocity = match (self.sampler.solver.control, t.first()) {
            (Control::Whole, Some(&t)) => {
                let at = schedule.at(t);
                let score = self.ctx.denoise(&x, &at)?.score(&x, At::All(at))?;
                flow_velocity(&x, &score, &schedule.rates(t))?
            }
            _ => {
                let points: Vec<Point> = t.iter().map(|t| schedule.at(*t)).collect();
                let at = At::Each(&points);
                let score = self.ctx.denoise_each(&x, &points)?.score(&x, at)?;
                let rates: Vec<_> = t.iter().map(|t| schedule.rates(*t)).collect();
                combine(
                    &Coef::Each(rates.iter().map(|r| r.d_log_alpha).collect()),
                    &x,
                    &Coef::Each(rates.iter().map(|r| -0.5 * r.g2).collect()),
                    &score,
                )?
            }
        };
        rows_of(&velocity)
    }

    fn accepted(&mut self, t: &[f64], y: &[f64]) -> Result<ControlFlow<()>> {
        self.done += 1;
        let x = tensor_of(y.to_vec(), &self.like)?;
        // The item that is furthest behind.
        let side = (self.sampler.end - self.sampler.start).signum();
        let behind = t
            .iter()
            .copied()
            .reduce(|a, b| if side * (a - b) < 0.0 { a } else { b });
        Ok(self.watch.step(&Progress {
            done: self.done,
            total: self.done,
            calls: self.ctx.calls,
            at: self.sampler.schedule.at(behind.unwrap_or(self.sampler.end)),
            x: &x,
        }))
    }
}

/// A batch as rows of f64 numbers.
pub(crate) fn rows_of(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Rows of f64 numbers as a batch shaped and placed as `like`.
pub(crate) fn tensor_of(y: Vec<f64>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(y, like.shape(), &Device::Cpu)?
        .to_dtype(like.dtype())?
        .to_device(like.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::{Gaussian, Mixture};
    use crate::sample::sample;
    use crate::schedule::{SubVp, Ve, Vp};
    use std::sync::Arc;

    fn schedules() -> [SharedSchedule; 3] {
        [
            Arc::new(Vp::default()),
            Arc::new(SubVp::default()),
            Arc::new(Ve::default()),
        ]
    }

    #[test]
    fn follows_the_exact_flow_of_gaussian_data() {
        let oracle = Gaussian::new(vec![0.6, -0.2], vec![0.8, 0.3]);
        for schedule in schedules() {
            for control in [Control::PerItem, Control::Whole] {
                let mut solver = FlowOde::new(schedule.clone());
                solver.solver.control = control;
                solver.solver.rtol = 1e-7;
                solver.solver.atol = 1e-7;
                let (from, to) = (schedule.at(solver.start), schedule.at(solver.end));
                let x = Tensor::new(&[[1.2, -0.3], [-0.4, 2.0f64]], &Device::Cpu)
                    .unwrap()
                    .affine(from.sigma, 0.0)
                    .unwrap();
                let exact = oracle.flow(&x, &from, &to).unwrap();
                let mut noise = CounterNoise::new(0, 0..2);
                let y = sample(&solver, &oracle, x, &mut noise, 0..2).unwrap();
                let gap = (y - exact).unwrap().abs().unwrap().max_all().unwrap();
                assert!(gap.to_scalar::<f64>().unwrap() < 1e-5);
            }
        }
    }

    #[test]
    fn an_item_has_the_same_bits_in_any_batch() {
        let oracle = Mixture::new(
            vec![1.0, 2.0],
            vec![vec![-1.0, 0.0], vec![1.0, 0.5]],
            vec![0.2, 0.3],
        )
        .unwrap();
        let solver = FlowOde {
            finish: Finish::Denoised,
            ..FlowOde::new(Arc::new(Vp::default()))
        };
        let x = Tensor::new(&[[1.2, -0.3], [-0.4, 2.0], [0.1, 0.0f64]], &Device::Cpu).unwrap();
        let run = |from: usize, n: usize| {
            let mut noise = CounterNoise::new(0, 0..n as u64);
            let x = x.narrow(0, from, n).unwrap();
            rows_of(&sample(&solver, &oracle, x, &mut noise, 0..n as u64).unwrap()).unwrap()
        };
        let all = run(0, 3);
        for i in 0..3 {
            assert_eq!(run(i, 1), all[2 * i..2 * i + 2]);
        }
    }

    #[test]
    fn an_observer_can_stop_it() {
        let oracle = Gaussian::new(vec![0.6], vec![0.8]);
        let solver = FlowOde::new(Arc::new(Vp::default()));
        let mut noise = CounterNoise::new(0, 0..1);
        let mut ctx = Ctx::new(&oracle, &mut noise, 0..1);
        let mut seen = 0;
        let mut watch = |p: &Progress<'_>| {
            seen = p.done;
            if p.done == 3 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let x = Tensor::new(&[[1.2f64]], &Device::Cpu).unwrap();
        let error = solver.solve(x, &mut ctx, &mut watch).unwrap_err();
        assert!(matches!(error, crate::Error::Interrupted));
        assert_eq!(seen, 3);
    }
}
