//! How the kernels see weights and biases.

use crate::cpu::Real;
use candle_core::Layout;

/// The weights of a convolution, seen from either side.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a, T> {
    values: &'a [T],
    pub outputs: usize,
    pub inputs: usize,
    /// Elements from one output, and from one input, to the next.
    strides: (usize, usize),
    /// Whether the taps are taken in reverse.
    flip: bool,
    taps: usize,
}

impl<'a, T: Real> Weight<'a, T> {
    /// `values [K, C, taps]`, as the forward pass uses them.
    pub fn new(values: &'a [T], outputs: usize, inputs: usize, taps: usize) -> Self {
        assert!(values.len() == outputs * inputs * taps);
        Self {
            values,
            outputs,
            inputs,
            strides: (inputs * taps, taps),
            flip: false,
            taps,
        }
    }

    /// As the gradient of the map uses them: from K to C, and the taps reversed.
    pub fn adjoint(self) -> Self {
        Self {
            outputs: self.inputs,
            inputs: self.outputs,
            strides: (self.strides.1, self.strides.0),
            flip: !self.flip,
            ..self
        }
    }

    /// The taps between output `k` and input `c`, to be read through [`Weight::tap`].
    #[inline(always)]
    pub fn taps(&self, k: usize, c: usize) -> &'a [T] {
        &self.values[k * self.strides.0 + c * self.strides.1..][..self.taps]
    }

    /// Where tap `i` of `n` lies.
    #[inline(always)]
    pub fn tap(&self, i: usize, n: usize) -> usize {
        if self.flip { n - 1 - i } else { i }
    }

    /// `[outputs, inputs · taps]`, copied if it does not lie so.
    pub fn matrix(&self) -> std::borrow::Cow<'a, [T]> {
        if !self.flip {
            return self.values.into();
        }
        let mut out = Vec::with_capacity(self.values.len());
        for k in 0..self.outputs {
            for c in 0..self.inputs {
                out.extend(self.taps(k, c).iter().rev());
            }
        }
        out.into()
    }
}

/// What is added to the outputs.
#[derive(Clone, Copy)]
pub(crate) enum Bias<'a, T> {
    None,
    /// `[K]`
    Shared(&'a [T]),
    /// `[B, K]`, and K.
    PerItem(&'a [T], usize),
}

impl<'a, T> Bias<'a, T> {
    pub fn new(values: &'a [T], layout: &Layout) -> Self {
        match layout.dims() {
            [_, outputs] => Self::PerItem(values, *outputs),
            _ => Self::Shared(values),
        }
    }

    /// The values for `n` outputs from `k` on of batch element `item`.
    #[inline(always)]
    pub fn of(&self, item: usize, k: usize, n: usize) -> Option<&'a [T]> {
        match self {
            Self::None => None,
            Self::Shared(values) => values.get(k..k + n),
            Self::PerItem(values, outputs) => {
                values.get(item * outputs + k..item * outputs + k + n)
            }
        }
    }
}
