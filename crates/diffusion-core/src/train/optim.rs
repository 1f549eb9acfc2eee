//! AdamW with moments that can be saved, and gradients with a norm that never changes a bit.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use diffusion_ops::{
    AdamWParameter, AdamWRates, adamw_step, first_not_finite, sum_of_squares, updates_in_place,
};
use serde::{Deserialize, Serialize};

use super::ema::Pull;
use crate::error::{Report, Result};

/// The constants of AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; 0 makes it Adam.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// Gradients by parameter name.
#[derive(Clone, Debug, Default)]
pub struct Grads(BTreeMap<String, Tensor>);

impl Grads {
    /// Takes the gradients of `params` out of `store` and adds them to those already here.
    ///
    /// # Errors
    ///
    /// Those of the addition.
    pub fn add<'a>(
        &mut self,
        store: &mut GradStore,
        params: impl Iterator<Item = (&'a String, &'a Var)>,
    ) -> Result<()> {
        for (name, var) in params {
            let Some(new) = store.remove(var.as_tensor()) else {
                continue;
            };
            // Detached, or the graph of the backward pass would stay alive with the sum.
            let new = new.detach().contiguous()?;
            let sum = match self.0.get(name) {
                Some(old) => (old + new)?,
                None => new,
            };
            self.0.insert(name.clone(), sum);
        }
        Ok(())
    }

    /// Whether no parameter has a gradient.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The gradients, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter()
    }

    /// The norm of all gradients together, summed in f64 in the order of the names.
    ///
    /// ```text
    /// ‖g‖₂ = √(Σ_name Σ_i g_{name,i}²)
    /// ```
    ///
    /// # Errors
    ///
    /// Those of a copy from a device.
    pub fn norm(&self) -> Result<f64> {
        let grads: Vec<&Tensor> = self.0.values().collect();
        Ok(sum_of_squares(&grads)?.sqrt())
    }
}

/// AdamW (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW`.
///
/// ```text
/// m_t = β₁ m_{t−1} + (1 − β₁) g_t
/// v_t = β₂ v_{t−1} + (1 − β₂) g_t²
/// θ_t = (1 − lr λ) θ_{t−1} − lr · m_t/(1 − β₁ᵗ) / (√(v_t/(1 − β₂ᵗ)) + ε)
/// ```
///
/// where t counts the updates of each parameter by itself: a parameter without a gradient is left
/// as it is. Moments have the element type of their parameter, but are never narrower than `F32`.
#[derive(Clone, Debug, Default)]
pub struct AdamW {
    config: AdamWConfig,
    slots: BTreeMap<String, Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    updates: u64,
    m: Tensor,
    v: Tensor,
}

impl AdamW {
    /// An optimiser that has seen no gradient.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            slots: BTreeMap::new(),
        }
    }

    /// Updates the parameters that have a gradient; each gradient is first multiplied by `scale`.
    ///
    /// # Errors
    ///
    /// Those of the device.
    pub fn update(
        &mut self,
        params: &BTreeMap<String, Var>,
        grads: &Grads,
        lr: f64,
        scale: f64,
    ) -> Result<()> {
        self.update_with(params, grads, lr, scale, None)?;
        Ok(())
    }

    /// [`AdamW::update`], which takes the moving average of these parameters along in the same pass
    /// over memory; returns the first parameter that is not finite afterwards.
    pub(super) fn update_with<'a>(
        &mut self,
        params: &'a BTreeMap<String, Var>,
        grads: &Grads,
        lr: f64,
        scale: f64,
        mut average: Option<&mut Pull<'_>>,
    ) -> Result<Option<&'a String>> {
        for (name, _) in grads.iter() {
            let Some(var) = params.get(name) else {
                continue;
            };
            if !self.slots.contains_key(name) {
                let m = Tensor::zeros(var.shape(), moment_type(var.dtype()), var.device())?;
                let v = m.zeros_like()?;
                self.slots.insert(name.clone(), Slot { updates: 0, m, v });
            }
        }
        let pull = average.as_ref().map_or(0.0, |a| a.pull());
        let mut together = Vec::new();
        let mut bad: Option<&String> = None;
        for (name, slot) in &mut self.slots {
            let (Some((name, var)), Some(grad)) = (params.get_key_value(name), grads.0.get(name))
            else {
                continue;
            };
            slot.updates += 1;
            let rates = self.config.rates(slot.updates, lr);
            if updates_in_place(var) && updates_in_place(grad) && grad.dtype() == var.dtype() {
                let average = average.as_mut().and_then(|a| a.take(name));
                together.push((name, var, grad, &*slot, average, rates));
                continue;
            }
            slot.update(&rates, var, grad, scale)?;
            if bad.is_none() && first_not_finite(&[var.as_tensor()])?.is_some() {
                bad = Some(name);
            }
        }
        let parameters: Vec<AdamWParameter<'_>> = together
            .iter()
            .map(|(_, var, grad, slot, average, rates)| AdamWParameter {
                value: var.as_tensor(),
                grad,
                m: &slot.m,
                v: &slot.v,
                average: average.as_ref(),
                rates: *rates,
            })
            .collect();
        let worst = adamw_step(&parameters, scale, pull)?.map(|i| together[i].0);
        Ok(worst.into_iter().chain(bad).min())
    }

    /// First and second moments and the number of updates, by parameter name. The tensors are the
    /// optimiser's own: copy them to keep them beyond the next update.
    pub fn state(&self) -> AdamState {
        let of = |f: fn(&Slot) -> &Tensor| {
            self.slots
                .iter()
                .map(|(n, s)| (n.clone(), f(s).clone()))
                .collect()
        };
        AdamState {
            m: of(|s| &s.m),
            v: of(|s| &s.v),
            updates: self
                .slots
                .iter()
                .map(|(n, s)| (n.clone(), s.updates))
                .collect(),
        }
    }

    /// Takes back a state.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) naming the first moment that has no parameter,
    /// no partner or another shape or element type.
    pub fn restore(&mut self, params: &BTreeMap<String, Var>, state: &AdamState) -> Result<()> {
        let mut slots = BTreeMap::new();
        let names = state
            .m
            .keys()
            .chain(state.v.keys())
            .chain(state.updates.keys());
        for name in names {
            if slots.contains_key(name) {
                continue;
            }
            let misfit = |found: &str, expected: String| {
                Report::new(format_args!("moments of `{name}`"), found)
                    .expected(expected)
                    .remedy("resume with the code and configuration that wrote the checkpoint")
                    .checkpoint()
            };
            let (Some(var), Some(m), Some(v), Some(&updates)) = (
                params.get(name),
                state.m.get(name),
                state.v.get(name),
                state.updates.get(name),
            ) else {
                let expected = "a parameter, both moments and a count".to_string();
                return Err(misfit("incomplete", expected));
            };
            let dtype = moment_type(var.dtype());
            for moment in [m, v] {
                if moment.shape() != var.shape() || moment.dtype() != dtype {
                    let found = format!("{:?} {:?}", moment.dtype(), moment.dims());
                    return Err(misfit(&found, format!("{dtype:?} {:?}", var.dims())));
                }
            }
            let own =
                |t: &Tensor| -> Result<Tensor> { Ok(t.to_device(var.device())?.copy()?.detach()) };
            slots.insert(
                name.clone(),
                Slot {
                    updates,
                    m: own(m)?,
                    v: own(v)?,
                },
            );
        }
        self.slots = slots;
        Ok(())
    }
}

/// What [`AdamW`] remembers.
#[derive(Clone, Debug, Default)]
pub struct AdamState {
    /// First moments.
    pub m: BTreeMap<String, Tensor>,
    /// Second moments.
    pub v: BTreeMap<String, Tensor>,
    /// Updates done.
    pub updates: BTreeMap<String, u64>,
}

fn moment_type(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

impl AdamWConfig {
    /// The numbers of a parameter's `updates`-th update.
    fn rates(&self, updates: u64, lr: f64) -> AdamWRates {
        let t = updates as f64;
        // Not `powf`, which may differ between platforms.
        let bias1 = 1.0 - whole_power(self.beta1, t);
        let bias2 = 1.0 - whole_power(self.beta2, t);
        AdamWRates {
            beta1: self.beta1,
            beta2: self.beta2,
            decay: 1.0 - lr * self.weight_decay,
            rate: lr / bias1,
            root: 1.0 / bias2.sqrt(),
            eps: self.eps,
        }
    }
}

impl Slot {
    /// The update as tensor operations, for other devices and for half precision.
    fn update(&mut self, r: &AdamWRates, var: &Var, grad: &Tensor, scale: f64) -> Result<()> {
        let g = (grad.to_dtype(self.m.dtype())? * scale)?;
        self.m = ((&self.m * r.beta1)? + (&g * (1.0 - r.beta1))?)?.detach();
        self.v = ((&self.v * r.beta2)? + (g.sqr()? * (1.0 - r.beta2))?)?.detach();
        let change = ((&self.m * r.rate)? / ((self.v.sqrt()? * r.root)? + r.eps)?)?;
        let kept = (var.as_tensor().detach().to_dtype(self.m.dtype())? * r.decay)?;
        var.set(&(kept - change)?.to_dtype(var.dtype())?)?;
        Ok(())
    }
}

/// bⁿ for a whole number n ≥ 0, by squaring: exact rules, hence the same bits everywhere.
fn whole_power(base: f64, n: f64) -> f64 {
    let (mut power, mut base, mut n) = (1.0, base, n as u64);
    while n > 0 {
        if n & 1 == 1 {
            power *= base;
        }
        base *= base;
        n >>= 1;
    }
    power
}
