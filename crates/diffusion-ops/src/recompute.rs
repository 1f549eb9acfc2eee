//! Gradient checkpointing: less memory for more time.

use crate::gradient::{backward, deliver, deliver_to, delivering};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, TensorId, Var, bail,
};
use std::sync::{Arc, Mutex, PoisonError};

/// A part of a network, as a function of its inputs; it may use variables of its own.
pub type Part = Arc<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// `f(inputs)`, whose inner activations are not kept: the backward pass computes them again
/// (gradient checkpointing; Chen et al. 2016, "Training deep nets with sublinear memory cost").
///
/// ```text
/// forward:   y = f(x),                  everything inside is freed
/// backward:  y = f(x) once more, then   ∂L/∂x = (∂y/∂x)ᵀ ∂L/∂y,   ∂L/∂θ = (∂y/∂θ)ᵀ ∂L/∂y
/// ```
///
/// where `x` are the inputs and `θ` the variables that `f` uses, which are found by themselves. `f`
/// must give the same numbers each time; what draws from [`rng`](crate::rng) does, because its
/// numbers depend on keys alone. The gradients have the bits of those without checkpointing, but
/// for inputs that are used elsewhere too: there the sum is taken in another order.
///
/// Without a variable or a tracked input this is `f(inputs)`.
///
/// # Errors
///
/// Those of `f`, and if more than three inputs depend on variables. The backward pass must be
/// [`backward`](crate::backward()); with `Tensor::backward` it ends with an error as soon as `f`
/// uses variables, since the tensor library has no way to their gradients.
pub fn checkpointed(inputs: &[&Tensor], f: Part) -> Result<Tensor> {
    // The inputs are cut off, so that the nodes found are those of `f` alone.
    let inside: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
    let y = f(&inside)?;
    let variables = variables(&y);
    let tracked: Vec<bool> = inputs.iter().map(|x| x.track_op()).collect();
    let mut args: Vec<&Tensor> = inputs.iter().copied().filter(|x| x.track_op()).collect();
    // The result belongs to the graph through its arguments. Where no input is part of it, a
    // variable stands in; it receives no gradient as an argument.
    let stands_in = args.is_empty();
    if stands_in {
        match variables.first() {
            Some(variable) => args.push(variable),
            None => return Ok(y),
        }
    }
    let (y, shape) = (y.detach(), y.shape().clone());
    let storage = stored(&y)?;
    let op = Recompute {
        f,
        inputs: inside,
        tracked,
        variables: variables.clone(),
        stands_in,
        shape,
        result: Mutex::new(Some(storage)),
    };
    match args[..] {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => bail!(
            "checkpointed: {} inputs depend on variables, expected at most 3; \
             concatenate some of them or checkpoint smaller parts",
            args.len()
        ),
    }
}

/// The variables that a tensor depends on, each once, in the order of the backward pass.
fn variables(y: &Tensor) -> Vec<Tensor> {
    let nodes = y.sorted_nodes().into_iter();
    nodes.filter(|n| n.is_variable()).cloned().collect()
}

/// A copy of the values in a storage of their own.
fn stored(y: &Tensor) -> Result<Storage> {
    let whole = |y: &Tensor| -> Result<Option<Storage>> {
        let (storage, layout) = y.storage_and_layout();
        let own = match &*storage {
            Storage::Cpu(s) => length(s) == y.elem_count(),
            _ => true,
        };
        if own && layout.is_contiguous() && layout.start_offset() == 0 {
            return Ok(Some(storage.try_clone(layout)?));
        }
        Ok(None)
    };
    match whole(y)? {
        Some(storage) => Ok(storage),
        None => match whole(&y.force_contiguous()?)? {
            Some(storage) => Ok(storage),
            None => bail!("checkpointed: a contiguous copy is not contiguous"),
        },
    }
}

fn length(storage: &CpuStorage) -> usize {
    match storage {
        CpuStorage::F64(v) => v.len(),
        CpuStorage::F32(v) => v.len(),
        CpuStorage::F16(v) => v.len(),
        CpuStorage::BF16(v) => v.len(),
        // Never equal to a number of elements, so that the tensor library copies.
        _ => usize::MAX,
    }
}

struct Recompute {
    f: Part,
    inputs: Vec<Tensor>,
    /// Which inputs are arguments of the operation.
    tracked: Vec<bool>,
    variables: Vec<Tensor>,
    /// The only argument is a variable of `f`.
    stands_in: bool,
    shape: Shape,
    /// The values, on their way into the graph.
    result: Mutex<Option<Storage>>,
}

const NAME: &str = "checkpointed";

impl Recompute {
    fn take(&self) -> Result<Storage> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        match result.take() {
            Some(storage) => Ok(storage),
            None => bail!("{NAME}: the operation was applied twice"),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Storage::Cpu(s) => Ok((s, self.shape.clone())),
            _ => bail!("{NAME}: the function moved its input to another device"),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Storage::Cuda(s) => Ok((s, self.shape.clone())),
            _ => bail!("{NAME}: the function moved its input to another device"),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            Storage::Metal(s) => Ok((s, self.shape.clone())),
            _ => bail!("{NAME}: the function moved its input to another device"),
        }
    }

    /// The gradients of the arguments; those of the variables are delivered.
    fn gradients(&self, args: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        if !self.variables.is_empty() && !delivering() {
            bail!(
                "{NAME}: the gradients of {} variables have no way out of this backward pass; \
                 use diffusion_ops::backward(&loss) instead of loss.backward()",
                self.variables.len()
            )
        }
        let inputs = self.inputs.iter().zip(&self.tracked);
        let inputs: Vec<Tensor> = inputs
            .map(|(x, tracked)| match tracked {
                true => Ok(Var::from_tensor(x)?.into_inner()),
                false => Ok(x.clone()),
            })
            .collect::<Result<_>>()?;
        let y = (self.f)(&inputs)?;
        if y.shape() != &self.shape {
            bail!(
                "{NAME}: the function gave {:?} at first and {:?} when computed again; \
                 it must not depend on anything that changes",
                self.shape,
                y.shape()
            )
        }
        let ids = |all: &[Tensor]| all.iter().map(Tensor::id).collect::<Vec<TensorId>>();
        let (known, own) = (ids(&self.variables), ids(&inputs));
        let strange = |v: &&Tensor| !known.contains(&v.id()) && !own.contains(&v.id());
        if let Some(variable) = variables(&y).iter().find(strange) {
            bail!(
                "{NAME}: when computed again, the function used another variable, of shape {:?}; \
                 it must not depend on anything that changes",
                variable.dims()
            )
        }
        let mut store = if y.track_op() {
            backward(&y.apply_op1(Seed(grad.detach()))?)?
        } else {
            // Nothing to differentiate: the store of a constant is empty.
            backward(&grad.detach())?
        };
        for variable in &self.variables {
            if let Some(grad) = store.remove(variable) {
                deliver_to(variable.id(), &grad)?;
            }
        }
        if self.stands_in {
            return Ok(vec![None]);
        }
        let vars = inputs.iter().zip(&self.tracked).filter(|(_, t)| **t);
        vars.zip(args)
            .map(|((var, _), arg)| match store.remove(var) {
                Some(grad) => deliver(arg, grad),
                // The library expects a gradient wherever it has been before.
                None => deliver(arg, arg.zeros_like()?),
            })
            .collect()
    }
}

/// A scalar whose gradient with respect to its argument is given.
struct Seed(Tensor);

fn zero<S>(storage: &S) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    let zero = storage.device().zeros_impl(&shape, storage.dtype())?;
    Ok((zero, shape))
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }
    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        zero(s)
    }
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        zero(s)
    }
    fn metal_fwd(&self, s: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        zero(s)
    }
    fn bwd(&self, arg: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        deliver(arg, self.0.clone())
    }
}

/// The same operation for each number of arguments.
macro_rules! operation {
    ($op:ident, $($arg:ident),+; $($storage:ident),+; $($layout:ident),+) => {
        impl $op for Recompute {
            fn name(&self) -> &'static str {
                NAME
            }
            fn cpu_fwd(
                &self,
                $($storage: &CpuStorage, $layout: &Layout),+
            ) -> Result<(CpuStorage, Shape)> {
                $(let _ = ($storage, $layout);)+
                self.cpu()
            }
            fn cuda_fwd(
                &self,
                $($storage: &CudaStorage, $layout: &Layout),+
            ) -> Result<(CudaStorage, Shape)> {
                $(let _ = ($storage, $layout);)+
                self.cuda()
            }
            fn metal_fwd(
                &self,
                $($storage: &MetalStorage, $layout: &Layout),+
            ) -> Result<(MetalStorage, Shape)> {
                $(let _ = ($storage, $layout);)+
                self.metal()
            }
            fn bwd(
                &self,
                $($arg: &Tensor,)+
                _: &Tensor,
                grad: &Tensor,
            ) -> Result<operation!(@result $($arg),+)> {
                let mut grads = self.gradients(&[$($arg),+], grad)?.into_iter();
                $(let $arg = grads.next().flatten();)+
                Ok(operation!(@tuple $($arg),+))
            }
        }
    };
    (@result $a:ident) => { Option<Tensor> };
    (@result $a:ident, $b:ident) => { (Option<Tensor>, Option<Tensor>) };
    (@result $a:ident, $b:ident, $c:ident) => { (Option<Tensor>, Option<Tensor>, Option<Tensor>) };
    (@tuple $a:ident) => { $a };
    (@tuple $($a:ident),+) => { ($($a),+) };
}

operation!(CustomOp1, a; sa; la);
operation!(CustomOp2, a, b; sa, sb; la, lb);
operation!(CustomOp3, a, b, c; sa, sb, sc; la, lb, lc);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{at_every_level, max_relative_error, normal};
    use crate::rng::{Key, stream};
    use crate::{dropout, linear, silu};

    fn vars(n: u64) -> Result<Vec<Var>> {
        (0..n)
            .map(|k| Var::from_tensor(&(normal(k, (6, 6))? * 0.4)?))
            .collect()
    }

    fn key(step: u64) -> Key {
        Key::new(3, stream::DROPOUT).step(step)
    }

    /// One residual layer with a second input and dropout.
    fn layer(w: &Var, k: u64) -> Part {
        let w = w.as_tensor().clone();
        Arc::new(move |t| {
            let h = dropout(&silu(&linear(&t[0], &w, None)?)?, 0.3, key(k))?;
            (h + &t[0])?.broadcast_add(&t[1])
        })
    }

    fn run(v: &[Var], x: &Tensor, checkpoint: bool) -> Result<Tensor> {
        let extra = v[0].as_tensor().narrow(0, 0, 1)?;
        let mut h = x.clone();
        for (k, w) in v.iter().enumerate() {
            let f = layer(w, k as u64);
            h = match checkpoint {
                true => checkpointed(&[&h, &extra], f)?,
                false => f(&[h, extra.clone()])?,
            };
        }
        h.sqr()?.sum_all()
    }

    #[test]
    fn gradients_have_the_same_bits() -> Result<()> {
        at_every_level(|_| {
            let (v, x) = (vars(3)?, Var::from_tensor(&normal(8, (5, 6))?)?);
            for x in [x.as_tensor().clone(), x.detach()] {
                let (plain, short) = (run(&v, &x, false)?, run(&v, &x, true)?);
                assert_eq!(plain.to_scalar::<f64>()?, short.to_scalar::<f64>()?);
                let (plain, short) = (backward(&plain)?, backward(&short)?);
                let mut all: Vec<&Tensor> = v.iter().map(|v| v.as_tensor()).collect();
                all.extend(x.is_variable().then_some(&x));
                for var in all {
                    let bits = |t: &Tensor| t.to_vec2::<f64>();
                    let (a, b) = (plain.get(var).unwrap(), short.get(var).unwrap());
                    assert_eq!(bits(a)?, bits(b)?);
                }
            }
            Ok(())
        })
    }

    #[test]
    fn nested_parts_and_finite_differences() -> Result<()> {
        let inputs = [normal(1, (3, 6))?, normal(2, (6, 6))?, normal(3, (1, 6))?];
        let error = max_relative_error(
            |t| {
                let inner: Part = Arc::new(|t| silu(&linear(&t[0], &t[1], None)?));
                let outer: Part = Arc::new(move |t| {
                    let h = checkpointed(&[&t[0], &t[1]], inner.clone())?;
                    h.broadcast_mul(&t[2])
                });
                checkpointed(&[&t[0], &t[1], &t[2]], outer)
            },
            &inputs,
        )?;
        assert!(error < 1e-6, "{error:e}");
        // Variables of an inner part pass through both. Other tests lower the level meanwhile, which
        // changes bits, unless they are kept from it.
        at_every_level(|_| same_bits_through_both(&inputs))
    }

    fn same_bits_through_both(inputs: &[Tensor]) -> Result<()> {
        let w = vars(1)?.remove(0);
        let inner = layer(&w, 0);
        let outer: Part = {
            let inner = inner.clone();
            Arc::new(move |t| checkpointed(&[&t[0], &t[1]], inner.clone())?.sqr())
        };
        let (x, e) = (&inputs[0], &inputs[2]);
        let short = backward(&checkpointed(&[x, e], outer)?.sum_all()?)?;
        let plain = backward(&inner(&[x.clone(), e.clone()])?.sqr()?.sum_all()?)?;
        let bits = |s: &candle_core::backprop::GradStore| s.get(&w).unwrap().to_vec2::<f64>();
        assert_eq!(bits(&short)?, bits(&plain)?);
        Ok(())
    }

    #[test]
    fn misuse_ends_with_an_error() -> Result<()> {
        let v = vars(1)?;
        let x = normal(8, (5, 6))?;
        let error = run(&v, &x, true)?.backward().unwrap_err().to_string();
        assert!(error.contains("diffusion_ops::backward"), "{error}");
        // Without variables inside, the tensor library's own backward pass will do.
        let x = Var::from_tensor(&x)?;
        let y = checkpointed(&[&x], Arc::new(|t| t[0].sqr()))?.sum_all()?;
        let grad = y.backward()?.get(&x).unwrap().to_vec2::<f64>()?;
        assert_eq!(grad, (x.as_tensor() * 2.0)?.to_vec2::<f64>()?);
        let many = vars(4)?;
        let many: Vec<&Tensor> = many.iter().map(|v| v.as_tensor()).collect();
        assert!(checkpointed(&many, Arc::new(|t| t[0].sqr())).is_err());
        // A function that changes its mind.
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let changes: Part = Arc::new(move |t| {
            let n = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            t[0].narrow(0, 0, 1 + n)
        });
        let y = checkpointed(&[&x], changes)?.sum_all()?;
        assert!(backward(&y).is_err());
        Ok(())
    }

    #[test]
    fn nothing_to_differentiate_is_a_plain_call() -> Result<()> {
        let x = normal(8, (5, 6))?;
        let y = checkpointed(&[&x], Arc::new(|t| t[0].narrow(1, 2, 3)))?;
        assert!(!y.track_op());
        // A view is copied out of its storage.
        let x = Var::from_tensor(&x)?;
        let y = checkpointed(&[&x], Arc::new(|t| t[0].narrow(1, 2, 3)))?;
        let expected = x.narrow(1, 2, 3)?.to_vec2::<f64>()?;
        assert_eq!(y.to_vec2::<f64>()?, expected);
        Ok(())
    }
}
