//! The sizes of one convolution, and the places of a map that a tap reads.

use super::Padding;
use candle_core::{Result, Tensor, bail};

/// The sizes of one convolution, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub kernel_h: usize,
    pub kernel_w: usize,
    pub out_h: usize,
    pub out_w: usize,
    pub stride: usize,
    pub dilation: usize,
    pub top: usize,
    pub left: usize,
    /// Pixels of an input and of an output plane where their last row is cut short.
    pub cut: Option<(usize, usize)>,
}

impl Geometry {
    /// Checks that map, weight and bias fit each other.
    pub fn new(
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        stride: usize,
        padding: Padding,
        dilation: usize,
    ) -> Result<Self> {
        let (batch, channels, height, width) = x.dims4()?;
        let (out_channels, in_channels, kernel_h, kernel_w) = weight.dims4()?;
        if in_channels != channels {
            bail!("conv2d: the map has {channels} channels, the weight expects {in_channels}");
        }
        if let Some(bias) = bias
            && bias.dims() != [out_channels]
            && bias.dims() != [batch, out_channels]
        {
            bail!(
                "conv2d: the bias has shape {:?}, expected [{out_channels}] or \
                 [{batch}, {out_channels}]",
                bias.dims()
            );
        }
        if stride == 0 || dilation == 0 || kernel_h == 0 || kernel_w == 0 {
            bail!("conv2d: stride {stride}, dilation {dilation} and kernel must be at least 1");
        }
        let out = |size: usize, pad: usize, kernel: usize| -> Result<usize> {
            let span = dilation * (kernel - 1) + 1;
            match (size + pad).checked_sub(span) {
                Some(room) => Ok(room / stride + 1),
                None => bail!(
                    "conv2d: a kernel spanning {span} on a map padded to {}",
                    size + pad
                ),
            }
        };
        Ok(Self {
            batch,
            channels,
            height,
            width,
            kernel_h,
            kernel_w,
            out_h: out(height, padding.top + padding.bottom, kernel_h)?,
            out_w: out(width, padding.left + padding.right, kernel_w)?,
            stride,
            dilation,
            top: padding.top,
            left: padding.left,
            cut: None,
        })
    }

    /// Taps of the kernel.
    pub fn taps(&self) -> usize {
        self.kernel_h * self.kernel_w
    }

    /// Terms of the sum for one output: the rows of the matrix of patches.
    pub fn rows(&self) -> usize {
        self.channels * self.taps()
    }

    /// Pixels of an input plane.
    pub fn plane(&self) -> usize {
        self.cut.map_or(self.height * self.width, |cut| cut.0)
    }

    /// Pixels of an output plane.
    pub fn out_plane(&self) -> usize {
        self.cut.map_or(self.out_h * self.out_w, |cut| cut.1)
    }

    /// Whether the patches are the map itself.
    pub fn is_pointwise(&self) -> bool {
        let sizes = (
            self.kernel_h,
            self.kernel_w,
            self.stride,
            self.top,
            self.left,
        );
        sizes == (1, 1, 1, 0, 0) && (self.out_h, self.out_w) == (self.height, self.width)
    }

    /// A line with three taps of dilation d as a map of width d with a 3×1 kernel, if it is one and
    /// its padding is whole rows.
    pub fn folded(&self) -> Option<Self> {
        let d = self.dilation;
        let line = (self.kernel_h, self.height, self.top, self.out_h) == (1, 1, 0, 1);
        if !line || self.kernel_w != 3 || self.stride != 1 || !self.left.is_multiple_of(d) {
            return None;
        }
        Some(Self {
            height: self.width.div_ceil(d),
            width: d,
            kernel_h: 3,
            kernel_w: 1,
            out_h: self.out_w.div_ceil(d),
            out_w: d,
            dilation: 1,
            top: self.left / d,
            left: 0,
            cut: Some((self.width, self.out_w)),
            ..*self
        })
    }

    /// Whether this is the case of Winograd's filters.
    pub fn is_3x3(&self) -> bool {
        (self.kernel_h, self.kernel_w, self.stride, self.dilation) == (3, 3, 1, 1)
    }

    /// The convolution that turns the gradient of the output into that of the map, by flipped
    /// taps; none for strides and for paddings wider than the kernel reaches.
    pub fn adjoint(&self, out_channels: usize) -> Option<Self> {
        let reach_h = self.dilation * (self.kernel_h - 1);
        let reach_w = self.dilation * (self.kernel_w - 1);
        if self.stride != 1 || self.top > reach_h || self.left > reach_w {
            return None;
        }
        Some(Self {
            channels: out_channels,
            height: self.out_h,
            width: self.out_w,
            out_h: self.height,
            out_w: self.width,
            top: reach_h - self.top,
            left: reach_w - self.left,
            ..*self
        })
    }

    /// Visits the outputs `from .. to` (in reading order) of one plane that tap `tap` reaches:
    /// `visit(first, input, count)` for `count` outputs from number `first` on, which read the
    /// inputs `input`, `input + stride`, ... Outputs that read the padding are not visited.
    #[inline]
    pub fn visit(
        &self,
        tap: usize,
        from: usize,
        to: usize,
        mut visit: impl FnMut(usize, usize, usize),
    ) {
        let (i, j) = (
            tap / self.kernel_w * self.dilation,
            tap % self.kernel_w * self.dilation,
        );
        // Columns p with 0 ≤ p·s + j − left < width.
        let p_lo = self.left.saturating_sub(j).div_ceil(self.stride);
        let p_hi = (self.width + self.left)
            .saturating_sub(j)
            .div_ceil(self.stride);
        let (mut o, mut p) = (from / self.out_w, from % self.out_w);
        let mut at = from;
        while at < to {
            let end = to.min(at - p + self.out_w);
            let y = o * self.stride + i;
            let (lo, hi) = (p.max(p_lo), (p + end - at).min(p_hi));
            if y >= self.top && y - self.top < self.height && lo < hi {
                let x = lo * self.stride + j - self.left;
                visit(at - p + lo, (y - self.top) * self.width + x, hi - lo);
            }
            (at, o, p) = (end, o + 1, 0);
        }
    }
}
