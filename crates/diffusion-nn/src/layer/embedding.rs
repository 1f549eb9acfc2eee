//! A trainable table.

use crate::error::{Error, Result};
use crate::store::Scope;
use candle_core::{DType, Tensor};
use diffusion_ops::init::Init;

/// A table of vectors: `y[i] = weight[index[i]]`. Names: `weight`.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// A table of `entries` vectors of `dim` numbers, begun with the standard normal law.
    ///
    /// # Errors
    /// If a name is taken.
    pub fn new(scope: &Scope, entries: usize, dim: usize) -> Result<Self> {
        Ok(Self {
            weight: scope.param("weight", (entries, dim), Init::Normal { std: 1.0 })?,
        })
    }

    /// `[B] -> [B, dim]`; floating-point indices are truncated.
    ///
    /// # Errors
    /// If an index is negative or not less than the number of entries.
    pub fn forward(&self, index: &Tensor) -> Result<Tensor> {
        let index = index.detach().flatten_all()?.to_dtype(DType::I64)?;
        let entries = self.weight.dim(0)? as i64;
        for i in index.to_vec1::<i64>()? {
            if !(0..entries).contains(&i) {
                return Err(Error::Input {
                    name: "index",
                    found: i.to_string(),
                    expected: format!("0 to {}", entries - 1),
                });
            }
        }
        let index = index
            .to_dtype(DType::U32)?
            .to_device(self.weight.device())?;
        Ok(self.weight.index_select(&index, 0)?)
    }
}
