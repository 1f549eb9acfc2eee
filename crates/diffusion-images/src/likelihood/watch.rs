//! Who looks on while a likelihood is computed, and may stop it.

use candle_core::Tensor;
use diffusion_core::denoiser::{Call, Denoiser};
use diffusion_core::predict::Prediction;
use diffusion_core::tensor::At;
use diffusion_core::{Error, Result};
use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;

/// Told before every network call how many images are done, parts counted; may break off.
pub type Watch<'a> = dyn FnMut(f64) -> ControlFlow<()> + 'a;

/// A denoiser whose calls somebody watches.
pub(super) struct Watched<'a, 'w, D> {
    inner: D,
    watch: &'a RefCell<&'w mut Watch<'w>>,
    done: Cell<f64>,
    /// Images that a call gets done.
    each: f64,
}

impl<'a, 'w, D> Watched<'a, 'w, D> {
    /// With so many images done before, and so much of one with each call.
    pub(super) fn new(
        inner: D,
        watch: &'a RefCell<&'w mut Watch<'w>>,
        done: usize,
        each: f64,
    ) -> Self {
        Self {
            inner,
            watch,
            done: Cell::new(done as f64),
            each,
        }
    }
}

impl<D: Denoiser> Denoiser for Watched<'_, '_, D> {
    fn predict(&self, x: &Tensor, at: At<'_>, call: &mut Call<'_>) -> Result<Prediction> {
        if (*self.watch.borrow_mut())(self.done.get()).is_break() {
            return Err(Error::Interrupted);
        }
        self.done.set(self.done.get() + self.each);
        self.inner.predict(x, at, call)
    }
}
