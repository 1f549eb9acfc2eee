//! What the CPU kernels share: element types, access to contiguous storage, ordered sums.

use crate::simd::{Simd, Vector};
use candle_core::{CpuStorage, DType, Layout, Result, Tensor, WithDType, bail};
use rayon::prelude::*;

/// The element types that the kernels are compiled for.
pub(crate) trait Real: WithDType + std::ops::Neg<Output = Self> {
    /// Vectors of this type.
    type V<S: Simd>: Vector<Self>;
    /// `self · b + c` with one rounding; call it through [`Simd::mul_add`].
    fn fused(self, b: Self, c: Self) -> Self;
}

impl Real for f32 {
    type V<S: Simd> = S::F32;
    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
}

impl Real for f64 {
    type V<S: Simd> = S::F64;
    #[inline(always)]
    fn fused(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
}

/// Runs the body with the type alias bound to the element type of a CPU storage.
macro_rules! by_float {
    ($storage:expr, $op:expr, $t:ident => $body:expr) => {
        match $storage {
            candle_core::CpuStorage::F32(_) => {
                type $t = f32;
                $body
            }
            candle_core::CpuStorage::F64(_) => {
                type $t = f64;
                $body
            }
            _ => candle_core::bail!("{}: the CPU kernel takes f32 or f64 tensors", $op),
        }
    };
}
pub(crate) use by_float;

/// Whether the CPU kernels take this tensor as it is.
pub(crate) fn native(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64)
}

/// Whether this tensor has to be widened first, because the CPU computes in `f32` at least.
pub(crate) fn half_on_cpu(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F16 | DType::BF16)
}

/// The elements of a contiguous storage.
pub(crate) fn slice<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
    op: &str,
) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: the CPU kernel takes contiguous tensors")
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// A new storage of `n` zeros handed to `fill`.
pub(crate) fn filled<T: WithDType>(n: usize, fill: impl FnOnce(&mut [T])) -> CpuStorage {
    let mut out = vec![T::zero(); n];
    fill(&mut out);
    T::to_cpu_storage_owned(out)
}

/// A new storage of `n` elements that `fill` writes.
///
/// # Safety
/// `fill` must write every element before it reads it.
pub(crate) unsafe fn written<T: WithDType>(n: usize, fill: impl FnOnce(&mut [T])) -> CpuStorage {
    // SAFETY: passed on to the caller.
    T::to_cpu_storage_owned(unsafe { buffer(n, fill) })
}

/// [`written`], as a vector.
///
/// # Safety
/// As for [`written`].
pub(crate) unsafe fn buffer<T: Copy>(n: usize, fill: impl FnOnce(&mut [T])) -> Vec<T> {
    let mut out: Vec<T> = Vec::with_capacity(n);
    // SAFETY: the capacity is n, every bit pattern is a number, and the caller vouches that no
    // element is read before it is written.
    #[allow(clippy::uninit_vec)]
    unsafe {
        out.set_len(n);
    }
    fill(&mut out);
    out
}

/// A slice that several tasks write at once, each in its own places.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    at: *mut T,
    len: usize,
}

// SAFETY: the pointer is only followed through `at`, whose callers write disjoint places.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The whole slice; it must outlive the tasks, which a parallel loop inside its borrow ensures.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self {
            at: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// The slice from element `from` on.
    pub(crate) fn shifted(self, from: usize) -> Self {
        assert!(from <= self.len, "{from} of {}", self.len);
        Self {
            at: self.at.wrapping_add(from),
            len: self.len - from,
        }
    }

    /// A pointer to element `i`.
    ///
    /// # Safety
    /// What is written through it must lie inside the slice, and no other task may use that part
    /// meanwhile.
    pub(crate) unsafe fn at(self, i: usize) -> *mut T {
        assert!(i < self.len, "{i} of {}", self.len);
        // SAFETY: inside the slice.
        unsafe { self.at.add(i) }
    }
}

/// How many tasks of `size` elements each are at least worth handing to another thread: waking one
/// costs as much as some ten thousand additions.
pub(crate) fn worth(size: usize) -> usize {
    (32_768 / size.max(1)).max(1)
}

/// How many elements one task of an elementwise loop handles.
pub(crate) const CHUNK: usize = 8192;

const LANES: usize = 16;

/// Σ f(xᵢ, yᵢ) in a fixed order: sixteen partial sums, which is what a vector unit can keep busy.
#[inline(always)]
pub(crate) fn sum2<T: Real>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder());
    for (a, b) in xs.clone().zip(ys.clone()) {
        for k in 0..LANES {
            lanes[k] += f(a[k], b[k]);
        }
    }
    for (k, (a, b)) in rest.enumerate() {
        lanes[k] += f(*a, *b);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for k in 0..width {
            let other = lanes[k + width];
            lanes[k] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ f(xᵢ), in the order of [`sum2`].
#[inline(always)]
pub(crate) fn sum1<T: Real>(x: &[T], f: impl Fn(T) -> T) -> T {
    sum2(x, x, |a, _| f(a))
}

/// Calls `task(scratch, i)` for i < n, on several threads where that pays: one call costs about as
/// much as `work` additions. Each thread works through its calls with a scratch of its own.
pub(crate) fn for_each_task<S>(
    n: usize,
    work: usize,
    scratch: impl Fn() -> S + Send + Sync,
    task: impl Fn(&mut S, usize) + Send + Sync,
) {
    let least = worth(work);
    // Even a pool of one thread would have to be woken.
    if n < 2 * least || rayon::current_num_threads() == 1 {
        let mut scratch = scratch();
        (0..n).for_each(|i| task(&mut scratch, i));
        return;
    }
    let calls = (0..n).into_par_iter().with_min_len(least);
    calls.for_each_init(scratch, task);
}
