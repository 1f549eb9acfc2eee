//! How the operations of this crate enter the tensor library's graph.
//!
//! The library's backward pass makes a tensor of zeros for every argument that a gradient arrives
//! at, adds the gradient to it on one thread or a pool of its own, and keeps every activation until
//! the whole pass is over. To have none of this, the graph that the library walks holds *tokens*:
//! tensors of one number that stand for our results. An operation on `x` hangs on the token of `x`
//! and receives a token of its own, the gradients themselves pass from operation to operation in
//! [`Slot`]s beside the graph, and what an operation has kept for its backward pass is freed as
//! soon as that has run. The result proper hangs on its token by a [`Bridge`], so that operations
//! of the library can go on from it, and its own `Tensor::backward` still works.

use crate::combine::combine;
use crate::gradient::delivering;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Result, Shape, Tensor, TensorId,
    bail,
};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

/// `y = f(x)`, with the backward pass of `op`.
pub(crate) fn apply1(x: &Tensor, op: impl CustomOp1 + Send + Sync + 'static) -> Result<Tensor> {
    if !x.track_op() {
        return x.apply_op1_no_bwd(&op);
    }
    apply(vec![x.clone()], Arc::new(One(op)))
}

/// `y = f(x, w)`, with the backward pass of `op`.
pub(crate) fn apply2(
    x: &Tensor,
    w: &Tensor,
    op: impl CustomOp2 + Send + Sync + 'static,
) -> Result<Tensor> {
    if !x.track_op() && !w.track_op() {
        return x.apply_op2_no_bwd(w, &op);
    }
    apply(vec![x.clone(), w.clone()], Arc::new(Two(op)))
}

/// `y = f(x, w, b)`, with the backward pass of `op`.
pub(crate) fn apply3(
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    op: impl CustomOp3 + Send + Sync + 'static,
) -> Result<Tensor> {
    if !x.track_op() && !w.track_op() && !b.track_op() {
        return x.apply_op3_no_bwd(w, b, &op);
    }
    apply(vec![x.clone(), w.clone(), b.clone()], Arc::new(Three(op)))
}

/// The tensor library's operations of one, two and three arguments as one.
trait Operation: Send + Sync {
    fn name(&self) -> &'static str;
    fn forward(&self, args: &[Tensor]) -> Result<(CpuStorage, Shape)>;
    /// The gradients of the arguments, where they are wanted and not delivered already.
    fn backward(&self, args: &[Tensor], y: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]>;
}

struct One<O>(O);
struct Two<O>(O);
struct Three<O>(O);

/// Binds the storages and layouts of the arguments.
macro_rules! on_cpu {
    ($name:expr, $args:expr, [$($k:literal $s:ident $l:ident),+] => $body:expr) => {{
        $(
            let (guard, $l) = $args[$k].storage_and_layout();
            let candle_core::Storage::Cpu($s) = &*guard else {
                bail!("{}: the CPU kernel got a tensor of another device", $name)
            };
        )+
        $body
    }};
}

impl<O: CustomOp1 + Send + Sync> Operation for One<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn forward(&self, args: &[Tensor]) -> Result<(CpuStorage, Shape)> {
        on_cpu!(self.name(), args, [0 s l] => self.0.cpu_fwd(s, l))
    }
    fn backward(&self, args: &[Tensor], y: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        Ok([self.0.bwd(&args[0], y, grad)?, None, None])
    }
}

impl<O: CustomOp2 + Send + Sync> Operation for Two<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn forward(&self, args: &[Tensor]) -> Result<(CpuStorage, Shape)> {
        on_cpu!(self.name(), args, [0 s0 l0, 1 s1 l1] => self.0.cpu_fwd(s0, l0, s1, l1))
    }
    fn backward(&self, args: &[Tensor], y: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (a, b) = self.0.bwd(&args[0], &args[1], y, grad)?;
        Ok([a, b, None])
    }
}

impl<O: CustomOp3 + Send + Sync> Operation for Three<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn forward(&self, args: &[Tensor]) -> Result<(CpuStorage, Shape)> {
        on_cpu!(self.name(), args, [0 s0 l0, 1 s1 l1, 2 s2 l2] =>
            self.0.cpu_fwd(s0, l0, s1, l1, s2, l2))
    }
    fn backward(&self, args: &[Tensor], y: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (a, b, c) = self.0.bwd(&args[0], &args[1], &args[2], y, grad)?;
        Ok([a, b, c])
    }
}

/// Runs an operation and hangs its result on the graph.
fn apply(args: Vec<Tensor>, op: Arc<dyn Operation>) -> Result<Tensor> {
    let (storage, shape) = op.forward(&args)?;
    let handles: Vec<Option<Arc<Handle>>> = args.iter().map(handle).collect();
    let slot = Arc::new(Slot::default());
    let nodes = handles.iter().zip(&args);
    let nodes: Vec<Tensor> = nodes
        .map(|(handle, arg)| handle.as_ref().map_or(arg, |h| &h.token).clone())
        .collect();
    let node = Node {
        name: op.name(),
        slot: slot.clone(),
    };
    let token = match &nodes[..] {
        [a] => a.apply_op1(node)?,
        [a, b] => a.apply_op2(b, node)?,
        [a, b, c] => a.apply_op3(b, c, node)?,
        _ => bail!("{}: {} arguments", op.name(), nodes.len()),
    };
    let own = Arc::new(Handle {
        token: token.clone(),
        slot: slot.clone(),
        id: Mutex::new(None),
    });
    let bridge = Bridge {
        name: op.name(),
        handle: own.clone(),
        result: Mutex::new(Some((storage, shape))),
    };
    let y = token.apply_op1(bridge)?;
    *lock(&own.id) = Some(y.id());
    lock(&HANDLES).insert(y.id(), Arc::downgrade(&own));
    let slots = handles.into_iter().map(|h| h.map(|h| h.slot.clone()));
    *lock(&slot.kept) = Some(Kept {
        op,
        args,
        slots: slots.collect(),
        y: y.detach(),
    });
    Ok(y)
}

/// The handles of the results that are alive, found by the results' identities.
static HANDLES: LazyLock<Mutex<HashMap<TensorId, Weak<Handle>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The handle of a tensor that one of our operations has made.
fn handle(x: &Tensor) -> Option<Arc<Handle>> {
    lock(&HANDLES).get(&x.id()).and_then(Weak::upgrade)
}

/// What leads from a result to its place in the graph; lives as long as the result.
struct Handle {
    token: Tensor,
    slot: Arc<Slot>,
    id: Mutex<Option<TensorId>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(id) = *lock(&self.id) {
            lock(&HANDLES).remove(&id);
        }
    }
}

/// What an operation keeps until its backward pass, and the gradient of its result so far.
#[derive(Default)]
struct Slot {
    gradient: Mutex<Option<Tensor>>,
    kept: Mutex<Option<Kept>>,
}

#[derive(Clone)]
struct Kept {
    op: Arc<dyn Operation>,
    args: Vec<Tensor>,
    /// Where the gradients of those arguments go that are results of ours.
    slots: Vec<Option<Arc<Slot>>>,
    /// The result, without a graph.
    y: Tensor,
}

impl Slot {
    fn add(&self, grad: &Tensor) -> Result<()> {
        let grad = grad.detach();
        let before = lock(&self.gradient).take();
        // The sum is a new tensor: an operation may have handed one gradient to two arguments, so
        // that adding in place would change both.
        let sum = match before {
            Some(before) => combine(&[(1.0, &before), (1.0, &grad)])?,
            None => grad,
        };
        *lock(&self.gradient) = Some(sum);
        Ok(())
    }
}

/// What the tensor library gets instead of a gradient, for a token.
fn nothing() -> Result<Option<Tensor>> {
    Tensor::new(&[0f32], &Device::Cpu).map(Some)
}

/// The one number of a token.
fn token() -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
}

/// The operation of a token: runs the backward pass of the operation proper.
struct Node {
    name: &'static str,
    slot: Arc<Slot>,
}

impl Node {
    fn run(&self) -> Result<[Option<Tensor>; 3]> {
        let mut place = lock(&self.slot.kept);
        // Under our own backward pass what was kept is freed now; the library's passes may be
        // repeated.
        let kept = match delivering() {
            true => place.take(),
            false => place.clone(),
        };
        drop(place);
        let Some(kept) = kept else {
            bail!(
                "backward: `{}` has been passed before, and what it had kept was freed; \
                 compute the loss again for another pass",
                self.name
            )
        };
        let grad = match lock(&self.slot.gradient).take() {
            Some(grad) => grad,
            None => kept.y.zeros_like()?,
        };
        let mut grads = kept.op.backward(&kept.args, &kept.y, &grad)?;
        for (grad, slot) in grads.iter_mut().zip(&kept.slots) {
            let Some(slot) = slot else { continue };
            if let Some(grad) = grad.take() {
                slot.add(&grad)?;
            }
            *grad = nothing()?;
        }
        Ok(grads)
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token()
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let [a, _, _] = self.run()?;
        Ok(a)
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        token()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b, _] = self.run()?;
        Ok((a, b))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        token()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.run()?;
        Ok((a, b, c))
    }
}

/// From a token to the result that it stands for.
struct Bridge {
    name: &'static str,
    handle: Arc<Handle>,
    /// The values, on their way into the graph.
    result: Mutex<Option<(CpuStorage, Shape)>>,
}

impl CustomOp1 for Bridge {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match lock(&self.result).take() {
            Some(result) => Ok(result),
            None => bail!("{}: the operation was applied twice", self.name),
        }
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.handle.slot.add(grad)?;
        nothing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{max_abs_difference, normal};
    use crate::{add, backward, linear, silu};
    use candle_core::Var;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// `2x`, which counts how many of it are alive.
    struct Double(Arc<AtomicUsize>);

    impl Double {
        fn new(alive: &Arc<AtomicUsize>) -> Self {
            alive.fetch_add(1, Ordering::Relaxed);
            Self(alive.clone())
        }
    }

    impl Drop for Double {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl CustomOp1 for Double {
        fn name(&self) -> &'static str {
            "double"
        }
        fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
            let out = x.as_slice::<f64>()?.iter().map(|v| 2.0 * v).collect();
            Ok((CpuStorage::F64(out), l.shape().clone()))
        }
        fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            crate::gradient::deliver(x, (grad * 2.0)?)
        }
    }

    /// Ours and the library's operations in turns, with shared arguments and views.
    fn network(x: &Tensor, w: &Var, w2: &Var) -> Result<Tensor> {
        let h = silu(&linear(x, w, None)?)?;
        let g = add(&linear(&h, w2, None)?, &h)?;
        let turned = g.t()?.contiguous()?;
        let y = linear(&turned, w, None)?.t()?;
        let y = (add(&h, &g)? * y)?;
        add(&y.narrow(1, 0, 2)?, &silu(&y.narrow(1, 1, 2)?)?)?
            .sqr()?
            .sum_all()
    }

    #[test]
    fn gradients_through_both_kinds_of_operations() -> Result<()> {
        let var = |k| Var::from_tensor(&normal(k, (4, 4))?);
        let (x, w, w2) = (var(1)?, var(2)?, var(3)?);
        let loss = network(&x, &w, &w2)?;
        let (again, theirs, ours) = (loss.backward()?, loss.backward()?, backward(&loss)?);
        for v in [&x, &w, &w2] {
            let gradient = ours.get(v).unwrap();
            assert!(max_abs_difference(gradient, theirs.get(v).unwrap())? < 1e-12);
            assert!(max_abs_difference(gradient, again.get(v).unwrap())? < 1e-12);
            for i in [0, 7, 15] {
                let value = |by: f64| -> Result<f64> {
                    let mut values = v.flatten_all()?.to_vec1::<f64>()?;
                    values[i] += by;
                    let moved = Var::from_tensor(&Tensor::from_vec(values, (4, 4), v.device())?)?;
                    let pick = |other: &Var| {
                        if other.id() == v.id() {
                            moved.clone()
                        } else {
                            other.clone()
                        }
                    };
                    network(&pick(&x), &pick(&w), &pick(&w2))?.to_scalar()
                };
                let slope = (value(1e-6)? - value(-1e-6)?) / 2e-6;
                let exact = gradient.flatten_all()?.to_vec1::<f64>()?[i];
                assert!(
                    (slope - exact).abs() < 1e-6 * (1.0 + exact.abs()),
                    "{slope} {exact}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn our_pass_frees_as_it_goes_and_the_librarys_may_be_repeated() -> Result<()> {
        let alive = Arc::new(AtomicUsize::new(0));
        let x = Var::from_tensor(&normal(1, (2, 3))?)?;
        let mut y = x.as_tensor().clone();
        for _ in 0..5 {
            y = apply1(&y, Double::new(&alive))?;
        }
        let loss = y.sum_all()?;
        for _ in 0..2 {
            let grads = loss.backward()?;
            let all = grads.get(&x).unwrap().to_vec2::<f64>()?;
            assert_eq!(all, vec![vec![32.0; 3]; 2]);
            assert_eq!(alive.load(Ordering::Relaxed), 5);
        }
        assert!(backward(&loss)?.get(&x).is_some());
        assert_eq!(alive.load(Ordering::Relaxed), 0);
        for error in [backward(&loss).unwrap_err(), loss.backward().unwrap_err()] {
            assert!(error.to_string().contains("double"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn nothing_is_left_of_a_graph_that_is_dropped() -> Result<()> {
        let alive = Arc::new(AtomicUsize::new(0));
        let x = Var::from_tensor(&normal(1, (2, 3))?)?;
        let y = apply1(&x, Double::new(&alive))?;
        let id = y.id();
        let z = apply1(&y, Double::new(&alive))?.sqr()?;
        drop(y);
        assert!(lock(&HANDLES).contains_key(&id), "the graph still needs it");
        drop(z);
        assert!(!lock(&HANDLES).contains_key(&id));
        assert_eq!(alive.load(Ordering::Relaxed), 0);
        // Without anything to differentiate there is no graph at all.
        let y = apply1(&x.detach(), Double::new(&alive))?;
        assert!(!y.track_op() && handle(&y).is_none());
        Ok(())
    }
}
