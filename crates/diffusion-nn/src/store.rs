//! The parameters of a network, by name.

use crate::error::{Error, Mismatch, Result, WeightReport};
use candle_core::{DType, Device, Shape, Tensor, Var};
use diffusion_ops::init::Init;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A sorted, strict store of named parameters.
///
/// Iteration is in the order of the names, always. Parameters are trainable; buffers are saved
/// and loaded with them but receive no gradient.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dtype: DType,
    device: Device,
    kind: Mutex<Kind>,
}

#[derive(Debug)]
enum Kind {
    /// Values of our own, begun from a seed.
    Fresh {
        seed: u64,
        params: BTreeMap<String, Var>,
        buffers: BTreeMap<String, Var>,
        /// The buffers whose values follow from the configuration.
        constants: BTreeSet<String>,
    },
    /// Given values, detached.
    Given {
        weights: BTreeMap<String, Tensor>,
        used: BTreeSet<String>,
        report: WeightReport,
    },
}

/// What [`Store::load`] does about names that only one side has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Both are errors.
    Exact,
    /// Names that the network lacks are passed over.
    IgnoreUnexpected,
    /// Names that the weights lack keep their values.
    IgnoreMissing,
}

impl Store {
    /// An empty store whose parameters will begin from `seed`.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        let kind = Kind::Fresh {
            seed,
            params: BTreeMap::new(),
            buffers: BTreeMap::new(),
            constants: BTreeSet::new(),
        };
        Self::with(kind, dtype, device)
    }

    fn with(kind: Kind, dtype: DType, device: &Device) -> Self {
        let inner = Inner {
            dtype,
            device: device.clone(),
            kind: Mutex::new(kind),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Builds a network on given weights, without variables: running it keeps no graph.
    ///
    /// The weights are converted to `dtype` and moved to `device`.
    ///
    /// # Errors
    /// [`Error::Weights`] with all missing, unexpected, mismatched and non-finite tensors, or what
    /// `build` returns.
    pub fn serve<T>(
        weights: &BTreeMap<String, Tensor>,
        dtype: DType,
        device: &Device,
        build: impl FnOnce(&Scope) -> Result<T>,
    ) -> Result<T> {
        let kind = Kind::Given {
            weights: weights.clone(),
            used: BTreeSet::new(),
            report: WeightReport::default(),
        };
        let store = Self::with(kind, dtype, device);
        let network = build(&store.root())?;
        if let Kind::Given {
            weights,
            used,
            report,
        } = &mut *store.lock()
        {
            report.unexpected = weights
                .keys()
                .filter(|k| !used.contains(*k))
                .cloned()
                .collect();
            std::mem::take(report).into_result()?;
        }
        Ok(network)
    }

    /// The scope of names without a prefix.
    pub fn root(&self) -> Scope {
        Scope {
            store: self.clone(),
            path: String::new(),
        }
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// Where the parameters are.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The trainable parameters.
    pub fn named(&self) -> BTreeMap<String, Var> {
        match &*self.lock() {
            Kind::Fresh { params, .. } => params.clone(),
            Kind::Given { .. } => BTreeMap::new(),
        }
    }

    /// The trainable parameters and the buffers.
    pub fn all(&self) -> BTreeMap<String, Var> {
        match &*self.lock() {
            Kind::Fresh {
                params, buffers, ..
            } => params
                .iter()
                .chain(buffers)
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
            Kind::Given { .. } => BTreeMap::new(),
        }
    }

    /// The number of trainable scalars.
    pub fn num_parameters(&self) -> usize {
        self.named().values().map(|v| v.elem_count()).sum()
    }

    /// Copies of all values, buffers included, that training no longer changes.
    ///
    /// # Errors
    /// If a copy cannot be made.
    pub fn frozen(&self) -> Result<BTreeMap<String, Tensor>> {
        let copy = |(name, var): (String, Var)| Ok((name, var.as_tensor().copy()?.detach()));
        self.all().into_iter().map(copy).collect()
    }

    /// Replaces the values by given ones, converted to the store's element type and device.
    ///
    /// Nothing is changed unless everything fits.
    ///
    /// # Errors
    /// [`Error::Weights`] with all missing, unexpected, mismatched and non-finite tensors.
    pub fn load(&self, weights: &BTreeMap<String, Tensor>, strictness: Strictness) -> Result<()> {
        let ours = self.all();
        let constants = match &*self.lock() {
            Kind::Fresh { constants, .. } => constants.clone(),
            Kind::Given { .. } => BTreeSet::new(),
        };
        let mut report = WeightReport::default();
        let mut values = Vec::new();
        for (name, var) in &ours {
            match weights.get(name) {
                Some(value) => {
                    let converted = self.convert(name, value, var.shape(), &mut report)?;
                    if let (true, Some(value)) = (constants.contains(name), &converted)
                        && !alike(value, var.as_tensor())?
                    {
                        report.differing.push(name.clone());
                    }
                    values.extend(converted.map(|value| (var, value)));
                }
                None if strictness == Strictness::IgnoreMissing => {}
                None => report.missing.push(name.clone()),
            }
        }
        if strictness != Strictness::IgnoreUnexpected {
            let unexpected = weights.keys().filter(|name| !ours.contains_key(*name));
            report.unexpected = unexpected.cloned().collect();
        }
        report.into_result()?;
        for (var, value) in values {
            // A copy: the value may share its storage with this very variable.
            var.set(&value.copy()?)?;
        }
        Ok(())
    }

    fn convert(
        &self,
        name: &str,
        value: &Tensor,
        shape: &Shape,
        report: &mut WeightReport,
    ) -> Result<Option<Tensor>> {
        if value.shape() != shape {
            report.mismatched.push(Mismatch {
                name: name.to_string(),
                expected: shape.dims().to_vec(),
                found: value.dims().to_vec(),
            });
            return Ok(None);
        }
        let (dtype, device) = (self.dtype(), self.device());
        let value = value
            .detach()
            .to_device(device)?
            .to_dtype(dtype)?
            .contiguous()?;
        // 0·x is NaN exactly where x is not finite.
        let zero = (&value * 0.0)?
            .to_dtype(DType::F32)?
            .sum_all()?
            .to_scalar::<f32>()?;
        if zero != 0.0 {
            report.non_finite.push(name.to_string());
            return Ok(None);
        }
        Ok(Some(value))
    }

    fn create(&self, name: String, shape: Shape, init: Init, trainable: bool) -> Result<Tensor> {
        let (dtype, device) = (self.dtype(), self.device());
        match &mut *self.lock() {
            Kind::Fresh {
                seed,
                params,
                buffers,
                ..
            } => {
                if params.contains_key(&name) || buffers.contains_key(&name) {
                    return Err(duplicate(&name));
                }
                let var = Var::from_tensor(&init.tensor(*seed, &name, shape, dtype, device)?)?;
                let tensor = var.as_tensor().clone();
                if trainable {
                    params.insert(name, var);
                    return Ok(tensor);
                }
                buffers.insert(name, var);
                // Shares the variable's storage, so that loading reaches it, and has no gradient.
                Ok(tensor.detach())
            }
            Kind::Given {
                weights,
                used,
                report,
            } => {
                if !used.insert(name.clone()) {
                    return Err(duplicate(&name));
                }
                // A stand-in lets the construction go on, so that the report is complete. It is one
                // value: a wrong configuration must not cost the memory of its network.
                let stand_in = || Tensor::zeros((), dtype, device)?.broadcast_as(&shape);
                let Some(value) = weights.get(&name) else {
                    report.missing.push(name);
                    return Ok(stand_in()?);
                };
                let tracked = value.is_variable();
                match self.convert(&name, value, &shape, report)? {
                    Some(value) if tracked => Ok(value.copy()?),
                    Some(value) => Ok(value),
                    None => Ok(stand_in()?),
                }
            }
        }
    }

    fn constant(&self, name: String, value: Tensor) -> Result<()> {
        let found = self.create(name.clone(), value.shape().clone(), Init::Const(0.0), false)?;
        match &mut *self.lock() {
            Kind::Fresh {
                buffers, constants, ..
            } => {
                if let Some(var) = buffers.get(&name) {
                    var.set(&value)?;
                }
                constants.insert(name);
            }
            Kind::Given {
                weights, report, ..
            } => {
                let given = weights.contains_key(&name);
                let elsewhere = |m: &Mismatch| m.name == name;
                let reported =
                    report.mismatched.iter().any(elsewhere) || report.non_finite.contains(&name);
                if given && !reported && !alike(&found, &value)? {
                    report.differing.push(name);
                }
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Kind> {
        // A panic elsewhere cannot leave the maps half changed.
        self.inner
            .kind
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether two values of a constant are the same but for rounding.
fn alike(found: &Tensor, expected: &Tensor) -> Result<bool> {
    let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (found, expected) = (flat(found)?, flat(expected)?);
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-2 * b.abs() + 1e-6;
    Ok(found.iter().zip(&expected).all(near))
}

fn duplicate(name: &str) -> Error {
    Error::config(
        name,
        "defined twice",
        "each name once",
        "give the two layers different scopes",
    )
}

/// A place in a [`Store`]: the prefix under which a layer creates its parameters.
#[derive(Clone, Debug)]
pub struct Scope {
    store: Store,
    path: String,
}

impl Scope {
    /// The scope of the child `name`.
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self {
            store: self.store.clone(),
            path: self.name(name),
        }
    }

    /// The full name of the child `name`.
    pub fn name(&self, name: impl std::fmt::Display) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// The full name of this scope.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A trainable parameter.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn param(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        self.store.create(self.name(name), shape.into(), init, true)
    }

    /// A value that is saved and loaded but not trained.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn buffer(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        self.store
            .create(self.name(name), shape.into(), init, false)
    }

    /// A buffer that follows from the configuration: weights that have another value there belong to
    /// another model and are refused.
    ///
    /// # Errors
    /// If the name is taken, or the values don't fill the shape.
    pub fn constant(&self, name: &str, shape: impl Into<Shape>, values: &[f64]) -> Result<()> {
        let value = Tensor::from_vec(values.to_vec(), shape, &Device::Cpu)?
            .to_dtype(self.dtype())?
            .to_device(self.device())?;
        self.store.constant(self.name(name), value)
    }

    /// The element type of the parameters.
    pub fn dtype(&self) -> DType {
        self.store.dtype()
    }

    /// Where the parameters are.
    pub fn device(&self) -> &Device {
        self.store.device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(scope: &Scope) -> Result<(Tensor, Tensor)> {
        let sub = scope.sub("block").sub(0);
        Ok((
            sub.param("weight", (2, 3), Init::fan_in(3))?,
            sub.buffer("table", 2, Init::Normal { std: 1.0 })?,
        ))
    }

    #[test]
    fn names_load_and_gradients() -> Result<()> {
        let store = Store::new(1, DType::F32, &Device::Cpu);
        let (weight, table) = build(&store.root())?;
        assert_eq!(store.named().keys().collect::<Vec<_>>(), ["block.0.weight"]);
        assert_eq!(store.all().len(), 2);
        assert_eq!(store.num_parameters(), 6);
        assert!(
            build(&store.root())
                .unwrap_err()
                .to_string()
                .contains("block.0.weight")
        );
        let frozen = store.frozen()?;
        let other = Store::new(2, DType::F32, &Device::Cpu);
        let (weight2, table2) = build(&other.root())?;
        assert_ne!(weight.to_vec2::<f32>()?, weight2.to_vec2::<f32>()?);
        let half = frozen
            .iter()
            .map(|(k, v)| Ok((k.clone(), v.to_dtype(DType::F64)?)));
        other.load(&half.collect::<Result<_>>()?, Strictness::Exact)?;
        // The tensors that the layers hold have changed with the variables.
        assert_eq!(weight.to_vec2::<f32>()?, weight2.to_vec2::<f32>()?);
        assert_eq!(table.to_vec1::<f32>()?, table2.to_vec1::<f32>()?);
        assert!(weight2.track_op() && !table2.track_op());
        // Copies stay.
        store.named()["block.0.weight"].set(&weight.zeros_like()?)?;
        assert_eq!(
            frozen["block.0.weight"].to_vec2::<f32>()?,
            weight2.to_vec2::<f32>()?
        );
        let served = Store::serve(&frozen, DType::F64, &Device::Cpu, build)?;
        assert!(!served.0.track_op() && served.0.dtype() == DType::F64);
        Ok(())
    }

    #[test]
    fn everything_wrong_is_reported_at_once() -> Result<()> {
        let store = Store::new(1, DType::F32, &Device::Cpu);
        let (weight, _) = build(&store.root())?;
        let before = weight.to_vec2::<f32>()?;
        let bad = BTreeMap::from([
            (
                "block.0.weight".to_string(),
                Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?,
            ),
            (
                "other".to_string(),
                Tensor::zeros(1, DType::F32, &Device::Cpu)?,
            ),
        ]);
        let expected = WeightReport {
            missing: vec!["block.0.table".into()],
            unexpected: vec!["other".into()],
            mismatched: vec![Mismatch {
                name: "block.0.weight".into(),
                expected: vec![2, 3],
                found: vec![3, 2],
            }],
            non_finite: vec![],
            differing: Vec::new(),
        };
        let served = Store::serve(&bad, DType::F32, &Device::Cpu, build).map(|_| ());
        for result in [store.load(&bad, Strictness::Exact), served] {
            match result {
                Err(Error::Weights(report)) => assert_eq!(*report, expected),
                other => panic!("{other:?}"),
            }
        }
        let mut nan = store.frozen()?;
        let value = Tensor::new(&[1f32, f32::INFINITY], &Device::Cpu)?;
        nan.insert("block.0.table".into(), value);
        let error = store.load(&nan, Strictness::Exact).unwrap_err().to_string();
        assert!(
            error.contains("NaN or an infinity (block.0.table)"),
            "{error}"
        );
        assert_eq!(weight.to_vec2::<f32>()?, before);
        nan.remove("block.0.table");
        assert!(store.load(&nan, Strictness::Exact).is_err());
        store.load(&nan, Strictness::IgnoreMissing)?;
        nan = store.frozen()?;
        nan.insert("extra".into(), weight);
        store.load(&nan, Strictness::IgnoreUnexpected)
    }

    #[test]
    fn constants_are_saved_and_must_agree() -> Result<()> {
        let build = |scope: &Scope| scope.constant("filter", 3, &[0.25, 0.5, 0.25]);
        let store = Store::new(1, DType::F32, &Device::Cpu);
        build(&store.root())?;
        assert!(store.named().is_empty());
        let mut saved = store.frozen()?;
        assert_eq!(saved["filter"].to_vec1::<f32>()?, [0.25, 0.5, 0.25]);
        store.load(&saved, Strictness::Exact)?;
        Store::serve(&saved, DType::F32, &Device::Cpu, build)?;
        let other = Tensor::new(&[0.5f32, 0.0, 0.5], &Device::Cpu)?;
        saved.insert("filter".into(), other);
        for said in [
            store.load(&saved, Strictness::Exact).unwrap_err(),
            Store::serve(&saved, DType::F32, &Device::Cpu, build).unwrap_err(),
        ] {
            assert!(
                said.to_string().contains("other constants (filter)"),
                "{said}"
            );
        }
        Ok(())
    }
}
