//! DEIS (Zhang and Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator") and
//! the linear multistep method of k-diffusion.

use super::{Ctx, Order, Step};
use crate::error::{Report, Result};
use crate::quadrature::{gauss_legendre, lagrange};
use crate::schedule::{Point, Schedule};
use crate::tensor::At;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// In which variable the noise is taken for a polynomial.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// `ρ = σ/α` (the paper's ρAB; k-diffusion's LMS).
    #[default]
    Rho,
    /// `ln ρ` (diffusers').
    LogRho,
    /// The time of the schedule (the paper's tAB): needs [`Deis::schedule`].
    Time,
}

/// Adams and Bashforth in `y = x/α` over `ρ = σ/α`, where the flow is `dy/dρ = ε`.
///
/// ```text
/// y_to = y + Σ_j C_j ε_{i−j},   C_j = ∫_ρ^{ρ_to} L_j dρ
/// ```
///
/// with the Lagrange basis `L_j` on the present point and up to `order − 1` earlier ones. Order 1
/// is DDIM.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deis {
    /// Points that the polynomial goes through: 1 to 4.
    pub order: usize,
    /// Its variable.
    pub basis: Basis,
    /// With fewer than 15 steps the last one is of order 1 and the one before at most of order 2.
    pub lower_order_final: bool,
    /// Where times stand, for [`Basis::Time`].
    #[serde(skip)]
    pub schedule: Option<Arc<dyn Schedule + Send + Sync>>,
}

impl Default for Deis {
    fn default() -> Self {
        Self {
            order: 3,
            basis: Basis::LogRho,
            lower_order_final: true,
            schedule: None,
        }
    }
}

impl Deis {
    /// The linear multistep method of k-diffusion.
    pub fn lms(order: usize) -> Self {
        Self {
            order,
            basis: Basis::Rho,
            lower_order_final: false,
            schedule: None,
        }
    }

    fn order_now(&self, known: usize, to: &Point, ctx: &Ctx<'_>) -> usize {
        let left = ctx.total.saturating_sub(ctx.index);
        let few = self.lower_order_final && ctx.total < 15;
        let most = match left {
            1 if few => 1,
            2 if few => 2,
            // ln ρ of the data is −∞.
            _ if to.sigma == 0.0 && self.basis != Basis::Rho => 1,
            _ => 4,
        };
        self.order.min(known).min(most)
    }

    /// `C_j` for every node, latest first.
    fn weights(&self, nodes: &[Point], to: &Point) -> Result<Vec<f64>> {
        let (rho, rho_to) = (nodes[0].sigma_hat(), to.sigma_hat());
        if nodes.len() == 1 {
            return Ok(vec![rho_to - rho]);
        }
        let integrate = |place: fn(&Point) -> f64, jacobian: &dyn Fn(f64) -> f64| {
            let places: Vec<f64> = nodes.iter().map(place).collect();
            let integral = |j| {
                gauss_legendre(places[0], place(to), |u| {
                    jacobian(u) * lagrange(&places, j, u)
                })
            };
            (0..nodes.len()).map(integral).collect()
        };
        Ok(match (self.basis, &self.schedule) {
            (Basis::Rho, _) => integrate(Point::sigma_hat, &|_| 1.0),
            // dρ = ρ d ln ρ
            (Basis::LogRho, _) => integrate(|p| p.sigma_hat().ln(), &f64::exp),
            // dρ/dt = g²/(2 α σ)
            (Basis::Time, Some(schedule)) => integrate(|p| p.t, &|t| {
                let p = schedule.at(t);
                schedule.rates(t).g2 / (2.0 * p.alpha * p.sigma)
            }),
            (Basis::Time, None) => {
                return Err(Report::new("DEIS in time", "no schedule")
                    .expected("the schedule that the grid was made of")
                    .config());
            }
        })
    }
}

impl Step for Deis {
    /// Noises with the points where they were believed, latest first.
    type Memory = Vec<(Tensor, Point)>;

    fn order(&self) -> Order {
        match (self.basis, self.order) {
            (Basis::LogRho, 3..) => Order::AtLeast(3),
            (_, order) => Order::Exactly(order as u32),
        }
    }

    fn step(
        &self,
        x: &Tensor,
        from: &Point,
        to: &Point,
        ctx: &mut Ctx<'_>,
        memory: &mut Self::Memory,
    ) -> Result<Tensor> {
        let epsilon = ctx.denoise(x, from)?.epsilon_of_x0(x, At::All(*from))?;
        memory.insert(0, (epsilon, *from));
        memory.truncate(self.order.max(1));
        let order = self.order_now(memory.len(), to, ctx);
        let nodes: Vec<Point> = memory[..order].iter().map(|(_, p)| *p).collect();
        let mut terms = vec![(to.alpha / from.alpha, x)];
        for (c, (epsilon, _)) in self.weights(&nodes, to)?.into_iter().zip(memory.iter()) {
            terms.push((to.alpha * c, epsilon));
        }
        Ok(diffusion_ops::combine(&terms)?)
    }
}
