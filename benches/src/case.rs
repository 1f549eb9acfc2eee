//! What a case is, and the list of all of them.

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// A piece of work that can be done again and again.
pub trait Case {
    /// Does the work once.
    ///
    /// # Errors
    /// Those of the tensor library and the trainer.
    fn call(&mut self) -> Result<()>;

    /// What another library needs to do the same work, and the results it must come to. Does not
    /// disturb the state that [`Case::call`] works on.
    ///
    /// # Errors
    /// Those of the tensor library.
    fn reference(&self) -> Result<Reference>;
}

/// Inputs and results of a case.
///
/// Tensors go by `weights/NAME`, `inputs/NAME`, `outputs/NAME` and `gradients/NAME`.
#[derive(Clone, Debug)]
pub struct Reference {
    /// What to compute: the peer's module reads it.
    pub config: Value,
    /// All tensors.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Reference {
    /// No tensors yet.
    pub fn new(config: Value) -> Self {
        Self {
            config,
            tensors: BTreeMap::new(),
        }
    }

    /// Adds a tensor under `group/name`.
    ///
    /// # Errors
    /// Those of a copy.
    pub fn put(&mut self, group: &str, name: &str, tensor: &Tensor) -> Result<()> {
        let tensor = tensor.detach().force_contiguous()?;
        self.tensors.insert(format!("{group}/{name}"), tensor);
        Ok(())
    }
}

/// What kind of work a case is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// One operation, forward or forward and backward.
    Op,
    /// A whole training step.
    Train,
    /// One evaluation of a network, as samplers make them.
    Call,
}

/// A case that can be built.
#[derive(Serialize)]
pub struct Spec {
    /// Its name: `domain/subject/work`.
    pub name: String,
    /// What kind of work it is.
    pub work: Work,
    #[serde(skip)]
    build: Builder,
}

type Builder = Box<dyn Fn() -> Result<Box<dyn Case>>>;

impl Spec {
    /// A case of this name.
    pub fn new(
        name: impl Into<String>,
        work: Work,
        build: impl Fn() -> Result<Box<dyn Case>> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            work,
            build: Box::new(build),
        }
    }

    /// The first part of the name.
    pub fn domain(&self) -> &str {
        self.name.split('/').next().unwrap_or_default()
    }

    /// Prepares the work.
    ///
    /// # Errors
    /// Those of building networks and inputs.
    pub fn build(&self) -> Result<Box<dyn Case>> {
        (self.build)()
    }
}

/// All cases, in the order in which they are shown.
pub fn specs() -> Vec<Spec> {
    let mut specs = crate::ops::specs();
    specs.extend(crate::optimiser::specs());
    specs.extend(crate::unet::specs());
    specs.extend(crate::csdi::specs());
    specs.extend(crate::diffwave::specs());
    specs.extend(crate::sampling::specs());
    specs
}

/// The case of this name.
///
/// # Errors
/// If there is none.
pub fn find(name: &str) -> Result<Spec> {
    match specs().into_iter().find(|spec| spec.name == name) {
        Some(spec) => Ok(spec),
        None => bail!("no case is called `{name}`; `case list` shows those there are"),
    }
}

/// Standard normal `f32` values that depend on `seed` alone.
pub(crate) fn normal(seed: u64, shape: &[usize]) -> Result<Tensor> {
    Ok(diffusion_ops::gradcheck::normal(seed, shape)?.to_dtype(DType::F32)?)
}
