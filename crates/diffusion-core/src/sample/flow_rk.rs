//! Explicit Runge-Kutta methods on the probability flow in the time of its own schedule, with churn:
//! the sampler of EDM's ablation (Karras et al. 2022, algorithm 3), and its kin of other orders.
//!
//! [`Heun`](super::Heun) and [`Euler`](super::Euler) run in `(x/α, σ/α)`, where the flow is straightest; this one shows what
//! a choice of `σ(t)` and scaling does to the same method.

use super::{Churn, Ctx, Order, Step};
use crate::error::Result;
use crate::ode::Tableau;
use crate::predict::Prediction;
use crate::schedule::{Point, SharedSchedule};
use crate::sde::flow_velocity;
use crate::tensor::At;
use candle_core::Tensor;
use diffusion_ops::combine;

/// The sampler.
///
/// ```text
/// dx/dt = f x − ½ g² s,   k_i = dx/dt at (x + h Σ_{j<i} a_ij k_j, t + c_i h),   x′ = x + h Σ_i b_i k_i
/// ```
///
/// The step into the data is Euler's: there is no velocity at the data.
#[derive(Clone)]
pub struct FlowRk {
    /// The method.
    pub method: Tableau,
    /// Noise raised before each step.
    pub churn: Churn,
    schedule: SharedSchedule,
}

impl FlowRk {
    /// A method on the flow of a process; the points of the run must be that process's.
    pub fn new(method: Tableau, schedule: SharedSchedule) -> Self {
        Self {
            method,
            churn: Churn::default(),
            schedule,
        }
    }

    /// With noise raised before each step.
    pub fn with_churn(self, churn: Churn) -> Self {
        Self {
            churn: Churn {
                schedule: Some(self.schedule.clone()),
                ..churn
            },
            ..self
        }
    }

    fn velocity(&self, x: &Tensor, at: &Point, said: &Prediction) -> Result<Tensor> {
        let score = said.score(x, At::All(*at))?;
        flow_velocity(x, &score, &self.schedule.rates(at.t))
    }
}

impl Step for FlowRk {
    type Memory = ();

    fn order(&self) -> Order {
        if self.churn.s_churn == 0.0 {
            Order::Exactly(self.method.order)
        } else {
            Order::Unstated
        }
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        (): &mut (),
    ) -> Result<Tensor> {
        let (x, from, said) = self.churn.raise(x, from, ctx)?;
        let h = to.t - from.t;
        let mut slopes = vec![self.velocity(&x, &from, &said)?];
        if to.sigma == 0.0 {
            return moved(&x, h, &[1.0], &slopes);
        }
        for (node, row) in self.method.nodes.iter().zip(&self.method.matrix).skip(1) {
            let stage = moved(&x, h, row, &slopes)?;
            let at = self.schedule.at(from.t + node * h);
            let said = ctx.denoise(&stage, &at)?;
            slopes.push(self.velocity(&stage, &at, &said)?);
        }
        moved(&x, h, &self.method.weights, &slopes)
    }
}

/// `x + h Σ w_j k_j`.
fn moved(x: &Tensor, h: f64, weights: &[f64], slopes: &[Tensor]) -> Result<Tensor> {
    let mut terms = vec![(1.0, x)];
    terms.extend(weights.iter().zip(slopes).map(|(w, k)| (h * w, k)));
    Ok(combine(&terms)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CounterNoise;
    use crate::oracle::{Gaussian, order};
    use crate::sample::{Euler, Planned, sample};
    use crate::schedule::linear::linspace;
    use crate::schedule::{Designed, Edm, Vp};
    use candle_core::Device;
    use std::sync::Arc;

    #[test]
    fn every_method_has_its_order_on_several_processes() {
        let oracle = Gaussian::new(vec![0.6], vec![0.8]);
        let schedules: [(SharedSchedule, f64, f64); 3] = [
            (Arc::new(Vp::default()), 1.0, 0.1),
            (Arc::new(Designed::vp(0.1, 20.0, 1e-3)), 1.0, 0.1),
            (Arc::new(Designed::sqrt(0.02, 10.0)), 25.0, 1.0),
        ];
        let x = Tensor::new(&[[1.2f64]], &Device::Cpu).unwrap();
        for (schedule, high, low) in schedules {
            for method in [
                Tableau::euler(),
                Tableau::midpoint(),
                Tableau::heun(),
                Tableau::bogacki_shampine(),
                Tableau::rk4(),
            ] {
                let step = FlowRk::new(method.clone(), schedule.clone());
                let slope = order::measure(&[80, 160, 320], |n| {
                    let points: Vec<Point> = linspace(high, low, n + 1)
                        .into_iter()
                        .map(|t| schedule.at(t))
                        .collect();
                    let exact = oracle.flow(&x, &points[0], &points[n])?;
                    let mut noise = CounterNoise::new(0, 0..1);
                    let plan = Planned::new(step.clone(), &points);
                    let y = sample(&plan, &oracle, x.clone(), &mut noise, 0..1)?;
                    Ok((y - exact)?.abs()?.sum_all()?.to_scalar::<f64>()?)
                })
                .unwrap();
                // On Gaussian data σ = √t is kinder to some methods than their order.
                let kinder = high == 25.0 && slope > f64::from(method.order);
                assert!(
                    kinder || (slope - f64::from(method.order)).abs() < 0.25,
                    "order {}: {slope}",
                    method.order
                );
                assert_eq!(step.order(), Order::Exactly(method.order));
            }
        }
    }

    /// With σ = t and no scaling it is Euler in σ̂, the step into the data included.
    #[test]
    fn in_edms_time_it_is_eulers_method_in_sigma() {
        let oracle = Gaussian::new(vec![0.6], vec![0.8]);
        let points = crate::grid::Grid::karras()
            .points(&Edm::default(), 9)
            .unwrap();
        let x = Tensor::new(&[[31.2f64]], &Device::Cpu).unwrap();
        let run = |euler: bool| {
            let mut noise = CounterNoise::new(3, 0..1);
            let churn = Churn {
                s_churn: 2.0,
                ..Churn::default()
            };
            let x = if euler {
                let step = Euler { churn };
                sample(
                    &Planned::new(step, &points),
                    &oracle,
                    x.clone(),
                    &mut noise,
                    0..1,
                )
            } else {
                let step = FlowRk::new(Tableau::euler(), Arc::new(Edm::default()));
                let plan = Planned::new(step.with_churn(churn), &points);
                sample(&plan, &oracle, x.clone(), &mut noise, 0..1)
            };
            x.unwrap().to_vec2::<f64>().unwrap()[0][0]
        };
        assert!((run(true) / run(false) - 1.0).abs() < 1e-9);
    }
}
