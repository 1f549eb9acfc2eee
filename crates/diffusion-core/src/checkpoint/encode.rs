//! Writing safetensors in pieces, in one order for all time: the same tensors give the same bytes.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, DType, Device, Storage as Memory, Tensor};
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::error::{Error, Report, Result};

/// Values that are converted to bytes at a time.
const PIECE: usize = 16 * 1024;

/// A safetensors file that is about to be written: its header is known, its data are produced in
/// pieces of at most 128 KiB.
#[derive(Debug)]
pub struct Encoder<'a> {
    header: Vec<u8>,
    order: Vec<&'a Tensor>,
}

impl<'a> Encoder<'a> {
    /// Lays out `tensors`: wider element types first, so that all data are aligned, then by name.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for an element type that [`read_safetensors`](super::read_safetensors)
    /// does not read, [`Error::Input`] for a tensor that is called `__metadata__`.
    pub fn new(
        tensors: &'a BTreeMap<String, Tensor>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut entries = Vec::with_capacity(tensors.len());
        for (name, tensor) in tensors {
            if name == "__metadata__" {
                return Err(Report::new("a tensor's name", name)
                    .expected("another name: the file format keeps this one for itself")
                    .input());
            }
            entries.push((type_name(name, tensor.dtype())?, name, tensor));
        }
        entries.sort_by_key(|(_, _, t)| std::cmp::Reverse(t.dtype().size_in_bytes()));
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let mut end = 0;
        let mut order = Vec::with_capacity(entries.len());
        for (dtype, name, tensor) in entries {
            let begin = end;
            end += tensor.elem_count() * tensor.dtype().size_in_bytes();
            let entry =
                json!({ "dtype": dtype, "shape": tensor.dims(), "data_offsets": [begin, end] });
            header.insert(name.clone(), entry);
            order.push(tensor);
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        Ok(Self { header, order })
    }

    /// Hands the file to `sink`, piece by piece.
    ///
    /// # Errors
    ///
    /// Those of `sink` and of copies from a device.
    pub fn write(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        sink(&self.header)?;
        self.order
            .iter()
            .try_for_each(|tensor| pieces(tensor, sink))
    }
}

fn type_name(name: &str, dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::U32 => "U32",
        DType::U8 => "U8",
        other => {
            return Err(
                Report::new(format_args!("tensor `{name}`"), format_args!("{other:?}"))
                    .expected("F64, F32, F16, BF16, I64, I32, U32 or U8")
                    .unsupported(),
            );
        }
    })
}

fn pieces(tensor: &Tensor, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    on_cpu(tensor, |storage, begin, end| match storage {
        CpuStorage::F64(v) => each(&v[begin..end], f64::to_le_bytes, sink),
        CpuStorage::F32(v) => each(&v[begin..end], f32::to_le_bytes, sink),
        CpuStorage::F16(v) => each(&v[begin..end], f16::to_le_bytes, sink),
        CpuStorage::BF16(v) => each(&v[begin..end], bf16::to_le_bytes, sink),
        CpuStorage::I64(v) => each(&v[begin..end], i64::to_le_bytes, sink),
        CpuStorage::I32(v) => each(&v[begin..end], i32::to_le_bytes, sink),
        CpuStorage::U32(v) => each(&v[begin..end], u32::to_le_bytes, sink),
        CpuStorage::U8(v) => each(&v[begin..end], u8::to_le_bytes, sink),
        _ => Err(Report::new("a tensor", format_args!("{:?}", tensor.dtype())).unsupported()),
    })?
}

fn each<T: Copy, const N: usize>(
    values: &[T],
    encode: fn(T) -> [u8; N],
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = Vec::with_capacity(N * PIECE.min(values.len()));
    for piece in values.chunks(PIECE) {
        buffer.clear();
        piece
            .iter()
            .for_each(|&v| buffer.extend_from_slice(&encode(v)));
        sink(&buffer)?;
    }
    Ok(())
}

/// Runs `f` on the values of `tensor`, row by row in memory, copied from its device if need be.
pub(crate) fn on_cpu<R>(
    tensor: &Tensor,
    f: impl FnOnce(&CpuStorage, usize, usize) -> R,
) -> Result<R> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (memory, layout) = tensor.storage_and_layout();
    match (&*memory, layout.contiguous_offsets()) {
        (Memory::Cpu(storage), Some((begin, end))) => Ok(f(storage, begin, end)),
        _ => Err(Error::Tensor(candle_core::Error::Msg(
            "a copy on the CPU is elsewhere".into(),
        ))),
    }
}

/// Whether every value is finite; integers always are.
///
/// # Errors
///
/// Those of a copy from the tensor's device.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    on_cpu(tensor, |storage, begin, end| match storage {
        CpuStorage::F64(v) => v[begin..end].iter().all(|v| v.is_finite()),
        CpuStorage::F32(v) => v[begin..end].iter().all(|v| v.is_finite()),
        CpuStorage::F16(v) => v[begin..end].iter().all(|v| v.is_finite()),
        CpuStorage::BF16(v) => v[begin..end].iter().all(|v| v.is_finite()),
        _ => true,
    })
}
