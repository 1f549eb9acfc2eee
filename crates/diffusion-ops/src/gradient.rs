//! Backward passes that hand the gradients of variables over as they are.
//!
//! The tensor library's backward pass makes a tensor of zeros for every argument that a gradient
//! arrives at and adds the gradient to it. For the weights of a network this is three passes over
//! memory (and the page faults of a new buffer) for nothing: most of them receive one gradient.
//! Here the operations of this crate [`deliver`] the gradients of variables into a sink beside the
//! graph, which [`backward`] installs and merges with the rest at the end. Without a sink they take
//! the ordinary way. The gradients of inner nodes are the [`tape`](crate::tape)'s.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, bail};
use std::cell::RefCell;
use std::collections::HashMap;

type Sink = HashMap<TensorId, Tensor>;

thread_local! {
    static SINK: RefCell<Option<Sink>> = const { RefCell::new(None) };
}

/// A fresh sink in the place of the outer one, which returns when this is dropped: after an error
/// and while a panic unwinds, too.
struct Installed(Option<Sink>);

impl Installed {
    fn new() -> Self {
        Self(SINK.with(|sink| sink.replace(Some(Sink::new()))))
    }

    fn take(&self) -> Sink {
        SINK.with(|sink| sink.borrow_mut().as_mut().map(std::mem::take))
            .unwrap_or_default()
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        SINK.with(|sink| *sink.borrow_mut() = self.0.take());
    }
}

/// The gradients of a scalar with respect to all variables that it depends on.
///
/// ```text
/// ∂L/∂θ for every variable θ on a path to L
/// ```
///
/// The same numbers as `Tensor::backward`, at less cost: the gradients of variables need no
/// zero-filled copy, and what our operations kept for this pass is freed as soon as it has been
/// used, so that the memory falls while the pass goes back. A second pass through the same graph is
/// therefore an error; `Tensor::backward` keeps everything and may be repeated.
///
/// Variables that receive more than one gradient get the sum in the order of the backward pass;
/// what arrives from the tensor library's own operations is added last. Only this function reaches
/// the variables of a [`checkpointed`](crate::checkpointed) part.
///
/// # Errors
///
/// Those of the operations' backward passes, and when part of the graph has been passed before.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let installed = Installed::new();
    let mut store = loss.backward()?;
    for (id, delivered) in installed.take() {
        let sum = match store.get_id(id) {
            Some(other) => (delivered + other.detach())?,
            None => delivered,
        };
        store.insert_id(id, sum);
    }
    Ok(store)
}

/// Whether the gradient of an argument is needed at all.
pub(crate) fn wanted(arg: &Tensor) -> bool {
    arg.track_op()
}

/// Whether [`backward`] is running on this thread, so that variables can be delivered to.
pub(crate) fn delivering() -> bool {
    SINK.with(|sink| sink.borrow().is_some())
}

/// What the `bwd` of an operation returns for the gradient `grad` of its argument `arg`.
///
/// A variable's gradient goes to the sink (and `None` back to the tensor library) if there is one;
/// what nobody asks for is dropped.
///
/// # Errors
///
/// When shapes or element types of the argument and its gradient differ.
pub(crate) fn deliver(arg: &Tensor, grad: Tensor) -> Result<Option<Tensor>> {
    if !wanted(arg) {
        return Ok(None);
    }
    if grad.shape() != arg.shape() || grad.dtype() != arg.dtype() {
        bail!(
            "backward: a gradient {:?} {:?} for an argument {:?} {:?}; both must be alike",
            grad.dtype(),
            grad.dims(),
            arg.dtype(),
            arg.dims()
        )
    }
    if arg.is_variable() && delivering() {
        deliver_to(arg.id(), &grad)?;
        return Ok(None);
    }
    Ok(Some(grad))
}

/// Adds a gradient to what the sink holds for a variable.
pub(crate) fn deliver_to(variable: TensorId, grad: &Tensor) -> Result<()> {
    // Detached, or the sum would keep alive whatever the gradient was computed from.
    let grad = grad.detach();
    let before = SINK.with(|sink| sink.borrow_mut().as_mut().and_then(|s| s.remove(&variable)));
    // The sum is a new tensor: an operation may have delivered one gradient to two arguments, so
    // that adding in place would change both.
    let sum = match before {
        Some(before) => (before + grad)?,
        None => grad,
    };
    SINK.with(|sink| match sink.borrow_mut().as_mut() {
        Some(sink) => {
            sink.insert(variable, sum);
            Ok(())
        }
        None => bail!("backward: a gradient was delivered outside diffusion_ops::backward"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, normal};
    use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Var};

    /// `x ⊙ w`, as an operation of this crate.
    struct Times;

    impl CustomOp2 for Times {
        fn name(&self) -> &'static str {
            "times"
        }
        fn cpu_fwd(
            &self,
            x: &CpuStorage,
            _: &Layout,
            w: &CpuStorage,
            layout: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            let (x, w) = (x.as_slice::<f64>()?, w.as_slice::<f64>()?);
            let out = x.iter().zip(w).map(|(a, b)| a * b).collect();
            Ok((CpuStorage::F64(out), layout.shape().clone()))
        }
        fn bwd(
            &self,
            x: &Tensor,
            w: &Tensor,
            _: &Tensor,
            grad: &Tensor,
        ) -> Result<(Option<Tensor>, Option<Tensor>)> {
            Ok((deliver(x, (w * grad)?)?, deliver(w, (x * grad)?)?))
        }
    }

    fn times(x: &Tensor, w: &Tensor) -> Result<Tensor> {
        x.apply_op2(w, Times)
    }

    fn vars(n: u64) -> Result<Vec<Var>> {
        (0..n)
            .map(|k| Var::from_tensor(&normal(k, (3, 4))?))
            .collect()
    }

    #[test]
    fn the_same_bits_as_the_tensor_library() -> Result<()> {
        let v = vars(3)?;
        let x = normal(9, (3, 4))?;
        // v₀ twice through our operation, v₁ through ours and a plain one, v₂ through a plain one.
        let h = times(&x, &v[0])?.tanh()?;
        let h = (times(&h, &v[0])? + times(&h, &v[1])?)?;
        let loss = ((h * v[1].as_tensor())? + v[2].as_tensor())?
            .sqr()?
            .sum_all()?;
        let (theirs, ours) = (loss.backward()?, backward(&loss)?);
        for var in &v {
            let (a, b) = (ours.get(var).unwrap(), theirs.get(var).unwrap());
            assert_eq!(a.to_vec2::<f64>()?, b.to_vec2::<f64>()?);
        }
        assert!(!delivering());
        Ok(())
    }

    #[test]
    fn variables_alone_are_delivered() -> Result<()> {
        let v = vars(2)?;
        let grad = normal(5, (3, 4))?;
        assert!(deliver(&v[0], grad.clone())?.is_some());
        let installed = Installed::new();
        assert!(deliver(&v[0], grad.clone())?.is_none());
        assert!(deliver(&v[0], grad.clone())?.is_none());
        let inner = (v[1].as_tensor() * 2.0)?;
        assert!(deliver(&inner, grad.clone())?.is_some());
        assert!(deliver(&inner.detach(), grad.clone())?.is_none());
        assert!(deliver(&v[0], grad.narrow(0, 0, 1)?).is_err());
        let sink = installed.take();
        assert_eq!(sink.len(), 1);
        let twice = (&grad * 2.0)?;
        assert_eq!(max_abs_difference(&sink[&v[0].id()], &twice)?, 0.0);
        Ok(())
    }

    /// Runs a whole backward pass inside its own.
    struct Nested(Var);

    impl candle_core::CustomOp1 for Nested {
        fn name(&self) -> &'static str {
            "nested"
        }
        fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), l.shape().clone()))
        }
        fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let inner = backward(&times(&self.0, &self.0)?.sum_all()?)?;
            assert!(inner.get(x).is_none(), "the outer sink shows through");
            assert!(delivering());
            assert!(backward(&x.detach().apply_op1(Fails)?).is_ok());
            let tracked = self.0.as_tensor().apply_op1(Fails)?;
            assert!(backward(&tracked).is_err());
            assert!(delivering(), "an error must bring the outer sink back");
            deliver(x, grad.clone())
        }
    }

    struct Fails;

    impl candle_core::CustomOp1 for Fails {
        fn name(&self) -> &'static str {
            "fails"
        }
        fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), l.shape().clone()))
        }
    }

    #[test]
    fn nested_passes_keep_their_gradients_apart() -> Result<()> {
        let v = vars(2)?;
        let y = times(v[0].as_tensor(), v[0].as_tensor())?.apply_op1(Nested(v[1].clone()))?;
        let grads = backward(&(y.sum_all()?))?;
        let expected = (v[0].as_tensor() * 2.0)?;
        assert_eq!(
            max_abs_difference(grads.get(&v[0]).unwrap(), &expected)?,
            0.0
        );
        assert!(grads.get(&v[1]).is_none());
        Ok(())
    }

    #[test]
    fn a_panic_brings_the_outer_sink_back() {
        let outer = Installed::new();
        let caught = std::panic::catch_unwind(|| {
            let _inner = Installed::new();
            panic!("as a test");
        });
        assert!(caught.is_err() && delivering());
        drop(outer);
        assert!(!delivering());
    }
}
