//! Where the heads of queries, keys, values and masks lie in memory.

use super::NAME;
use candle_core::{CpuStorage, Layout, Result, Tensor, WithDType, bail};

/// Where the axis of the heads is.
#[derive(Clone, Copy)]
pub(super) enum Axes {
    /// `[B, h, N, d]`.
    HeadsFirst,
    /// `[B, N, h·d]`, with that many heads.
    HeadsLast(usize),
}

impl Axes {
    /// The tensor as `[B, h, N, d]`.
    pub(super) fn heads_first(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::HeadsFirst => Ok(x.clone()),
            Self::HeadsLast(heads) => {
                let (b, n, width) = x.dims3()?;
                x.reshape((b, n, heads, width / heads))?.transpose(1, 2)
            }
        }
    }

    /// The inverse of [`heads_first`](Self::heads_first).
    pub(super) fn back(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::HeadsFirst => Ok(x.clone()),
            Self::HeadsLast(_) => {
                let (b, h, n, width) = x.dims4()?;
                x.transpose(1, 2)?.reshape((b, n, h * width))
            }
        }
    }

    /// The shape of something with `n` rows of `width` elements for each head.
    pub(super) fn shape(self, sizes: &Sizes, n: usize, width: usize) -> Vec<usize> {
        match self {
            Self::HeadsFirst => vec![sizes.batch, sizes.heads, n, width],
            Self::HeadsLast(_) => vec![sizes.batch, n, sizes.heads * width],
        }
    }

    /// The strides of a contiguous tensor of that shape.
    pub(super) fn strides(self, sizes: &Sizes, n: usize, width: usize) -> Strides {
        let batch = sizes.heads * n * width;
        match self {
            Self::HeadsFirst => Strides {
                batch,
                head: n * width,
                row: width,
            },
            Self::HeadsLast(_) => Strides {
                batch,
                head: width,
                row: sizes.heads * width,
            },
        }
    }

    fn sizes(self, dims: &[usize]) -> Option<[usize; 4]> {
        match (self, dims) {
            (Self::HeadsFirst, &[b, h, n, d]) => Some([b, h, n, d]),
            (Self::HeadsLast(h), &[b, n, width]) if h > 0 && width % h == 0 => {
                Some([b, h, n, width / h])
            }
            _ => None,
        }
    }
}

/// The sizes of an attention.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) heads: usize,
    /// Queries.
    pub(super) n: usize,
    /// Keys.
    pub(super) s: usize,
    /// Features of a query and of a key.
    pub(super) d: usize,
    /// Features of a value.
    pub(super) e: usize,
}

impl Sizes {
    pub(super) fn new(axes: Axes, q: &[usize], k: &[usize], v: &[usize]) -> Result<Self> {
        let sizes = (axes.sizes(q), axes.sizes(k), axes.sizes(v));
        let (Some([batch, heads, n, d]), Some([kb, kh, s, kd]), Some([vb, vh, vs, e])) = sizes
        else {
            match axes {
                Axes::HeadsFirst => bail!(
                    "{NAME}: q {q:?}, k {k:?}, v {v:?}, expected [B, h, N, d], [B, h, S, d] and \
                     [B, h, S, e]"
                ),
                Axes::HeadsLast(h) => bail!(
                    "{NAME}: q {q:?}, k {k:?}, v {v:?}, expected [B, N, h d], [B, S, h d] and \
                     [B, S, h e] with h = {h} heads"
                ),
            }
        };
        if (kb, kh, kd) != (batch, heads, d) || (vb, vh, vs) != (batch, heads, s) {
            bail!("{NAME}: q {q:?}, k {k:?} and v {v:?} don't fit each other")
        }
        Ok(Self {
            batch,
            heads,
            n,
            s,
            d,
            e,
        })
    }

    /// Keys that are handled at once: as many as keep their parts of all matrices in the cache.
    pub(super) fn keys_at_once(&self) -> usize {
        let most = (16_384 / self.d.max(self.e)).clamp(64, 512);
        self.s.div_ceil(self.s.div_ceil(most)).next_multiple_of(16)
    }

    /// Into how many parts to divide `rows` of each head, so that a few threads find work.
    pub(super) fn parts(&self, rows: usize) -> usize {
        8usize
            .div_ceil(self.batch * self.heads)
            .min(rows.div_ceil(QUERIES))
    }

    /// About what one of `parts` parts of a head costs, in elementwise operations.
    pub(super) fn work(&self, parts: usize) -> usize {
        self.n * self.s * (self.d + self.e) / 16 / parts
    }
}

/// Queries that are handled at once.
pub(super) const QUERIES: usize = 64;

/// Elements from one item, head and row to the next; a row is contiguous.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) row: usize,
}

impl Strides {
    /// Where a head begins, of all heads of all items.
    pub(super) fn head(&self, sizes: &Sizes, index: usize) -> usize {
        index / sizes.heads * self.batch + index % sizes.heads * self.head
    }
}

/// The rows of all heads, inside a storage.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    data: &'a [T],
    strides: Strides,
    width: usize,
}

impl<'a, T: WithDType> View<'a, T> {
    /// # Errors
    /// If the last axis is not contiguous.
    pub(super) fn new(
        storage: &'a CpuStorage,
        layout: &Layout,
        axes: Axes,
        width: usize,
    ) -> Result<Self> {
        let data = &T::cpu_storage_as_slice(storage)?[layout.start_offset()..];
        let strides = match (axes, layout.stride()) {
            (Axes::HeadsFirst, &[batch, head, row, last]) if last == 1 || width == 1 => {
                Strides { batch, head, row }
            }
            (Axes::HeadsLast(_), &[batch, row, 1]) => Strides {
                batch,
                head: width,
                row,
            },
            (Axes::HeadsLast(1), &[batch, row, _]) if width == 1 => Strides {
                batch,
                head: width,
                row,
            },
            (_, stride) => bail!("{NAME}: strides {stride:?}, expected a contiguous last axis"),
        };
        let reach = layout.dims().iter().zip(layout.stride());
        let last: usize = reach.map(|(n, stride)| (n - 1) * stride).sum();
        if last >= data.len() {
            bail!("{NAME}: a layout that reaches beyond its storage")
        }
        Ok(Self {
            data,
            strides,
            width,
        })
    }

    /// Elements from one row to the next.
    pub(super) fn row(&self) -> usize {
        self.strides.row
    }

    /// Row `row` of a head; that and all later rows of the head can be read through it.
    pub(super) fn at(&self, sizes: &Sizes, head: usize, row: usize) -> *const T {
        let at = self.strides.head(sizes, head) + row * self.strides.row;
        self.data[at..].as_ptr()
    }

    /// `count` rows of a head from `row` on, one after the other: as they lie, or in `copy`.
    pub(super) fn rows(
        &self,
        sizes: &Sizes,
        head: usize,
        (row, count): (usize, usize),
        copy: &mut [T],
    ) -> *const T {
        let (from, width) = (self.strides.head(sizes, head), self.width);
        let at = from + row * self.strides.row;
        if self.strides.row == width {
            return self.data[at..at + count * width].as_ptr();
        }
        for (i, to) in copy.chunks_exact_mut(width).take(count).enumerate() {
            let at = at + i * self.strides.row;
            to.copy_from_slice(&self.data[at..at + width]);
        }
        copy.as_ptr()
    }
}

/// What is added to the scores.
#[derive(Clone, Copy)]
pub(super) struct Mask<'a, T> {
    data: &'a [T],
    strides: [usize; 4],
}

/// A part of one row of a mask.
#[derive(Clone, Copy)]
pub(super) enum MaskRow<'a, T> {
    /// One number for each key.
    Each(&'a [T]),
    /// The same number for all keys.
    All(T),
}

impl<'a, T: WithDType> Mask<'a, T> {
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let data = &T::cpu_storage_as_slice(storage)?[layout.start_offset()..];
        match *layout.stride() {
            [b, h, n, s] if s <= 1 => Ok(Self {
                data,
                strides: [b, h, n, s],
            }),
            ref stride => bail!("{NAME}: a mask with the strides {stride:?}"),
        }
    }

    /// What is added to the scores of a query and `count` keys from `key` on.
    #[inline(always)]
    pub(super) fn row(
        &self,
        sizes: &Sizes,
        head: usize,
        query: usize,
        (key, count): (usize, usize),
    ) -> MaskRow<'a, T> {
        let [b, h, n, s] = self.strides;
        let at = head / sizes.heads * b + head % sizes.heads * h + query * n + key * s;
        if s == 0 {
            MaskRow::All(self.data[at])
        } else {
            MaskRow::Each(&self.data[at..at + count])
        }
    }
}
