//! Ordinary differential equations on rows of f64 numbers, one row an item of a batch.
//!
//! The state lives in f64 outside the tensor library, so that the control of the error is the same
//! on every device. Items are independent: by default each has its own time and its own step, and
//! its result does not depend on the rest of the batch.
//!
//! | file | method |
//! |---|---|
//! | [`tableau`] | explicit Runge-Kutta methods with fixed steps: Euler, midpoint, Heun, Ralston, BS23, RK4 |
//! | [`dormand_prince`] | Dormand and Prince's adaptive pair 5(4), with the step control of Hairer, Nørsett and Wanner |

pub mod dormand_prince;
pub mod tableau;

pub use dormand_prince::{Control, DormandPrince, Solution};
pub use tableau::Tableau;

use crate::error::Result;
use std::ops::ControlFlow;

/// The right-hand side of `dy/dt = f(t, y)` for every row of a batch.
pub trait System {
    /// `f`, shaped as `y`: `rows` rows one after another, row `i` at time `t[i]`.
    ///
    /// # Errors
    /// Whatever the model refuses.
    fn rate(&mut self, t: &[f64], y: &[f64]) -> Result<Vec<f64>>;

    /// Told after every accepted step; `Break` ends the solution with `Interrupted`.
    ///
    /// # Errors
    /// Whatever the watcher refuses.
    fn accepted(&mut self, _t: &[f64], _y: &[f64]) -> Result<ControlFlow<()>> {
        Ok(ControlFlow::Continue(()))
    }
}

impl<F: FnMut(&[f64], &[f64]) -> Result<Vec<f64>>> System for F {
    fn rate(&mut self, t: &[f64], y: &[f64]) -> Result<Vec<f64>> {
        self(t, y)
    }
}
