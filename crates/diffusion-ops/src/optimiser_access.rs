//! Access to the memory of tensors that are updated in place.

use crate::optimiser::updates_in_place;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::sync::Mutex;

/// Runs a function on the locked storage of a tensor.
pub(super) fn with<R: Send>(
    tensor: &Tensor,
    f: impl FnOnce((&mut CpuStorage, &Layout)) -> Result<R> + Send,
) -> Result<R> {
    struct Once<F, R>(Mutex<(Option<F>, Option<R>)>);
    impl<F, R> InplaceOp1 for Once<F, R>
    where
        F: FnOnce((&mut CpuStorage, &Layout)) -> Result<R>,
    {
        fn name(&self) -> &'static str {
            "update"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let taken = match self.0.lock() {
                Ok(mut slot) => slot.0.take(),
                Err(_) => None,
            };
            let Some(f) = taken else {
                bail!("update: the operation was applied twice")
            };
            let result = f((storage, layout))?;
            if let Ok(mut slot) = self.0.lock() {
                slot.1 = Some(result);
            }
            Ok(())
        }
    }
    let once = Once(Mutex::new((Some(f), None)));
    tensor.inplace_op1(&once)?;
    match once.0.into_inner() {
        Ok((_, Some(result))) => Ok(result),
        _ => bail!("update: the tensor is on another device"),
    }
}

pub(super) fn slice_mut<'a, T: Storable>(
    s: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("update: an update in place takes contiguous tensors")
    };
    match T::values(s) {
        Some(values) => Ok(&mut values[start..end]),
        None => bail!("update: element types differ"),
    }
}

/// Element types with a vector in [`CpuStorage`].
pub(super) trait Storable: Sized {
    fn values(s: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

impl Storable for f32 {
    fn values(s: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match s {
            CpuStorage::F32(v) => Some(v),
            _ => None,
        }
    }
}

impl Storable for f64 {
    fn values(s: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match s {
            CpuStorage::F64(v) => Some(v),
            _ => None,
        }
    }
}

pub(super) fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(s) => Ok(s),
        _ => bail!("update: the tensor is on another device"),
    }
}

/// The address of a tensor's memory, which tells whether two tensors share it; empty tensors have
/// addresses of their own.
pub(super) fn memory(t: &Tensor) -> Result<(usize, usize)> {
    let (guard, _) = t.storage_and_layout();
    let address = match cpu(&guard)? {
        CpuStorage::F32(v) if !v.is_empty() => v.as_ptr().addr(),
        CpuStorage::F64(v) if !v.is_empty() => v.as_ptr().addr(),
        storage => return Ok((0, std::ptr::from_ref(storage).addr())),
    };
    Ok((1, address))
}

pub(super) fn alike(op: &str, i: usize, a: &Tensor, b: &Tensor) -> Result<()> {
    if !updates_in_place(b) {
        bail!("{op}: parameter {i}: expected contiguous f32 or f64 tensors on the CPU")
    }
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        bail!(
            "{op}: parameter {i} is {:?} {:?}, but something that belongs to it {:?} {:?}",
            a.dtype(),
            a.dims(),
            b.dtype(),
            b.dims()
        )
    }
    Ok(())
}
