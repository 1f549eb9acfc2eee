//! Features of images as rows of numbers, which all distances between sets of images start from.

use candle_core::{DType, Device, Tensor};
use diffusion_core::{Report, Result};
use rayon::prelude::*;

/// Vectors whose distances to all others are taken at a time.
const CHUNK: usize = 256;

/// `n` vectors of `d` numbers, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    values: Vec<f64>,
    count: usize,
    size: usize,
}

impl Features {
    /// Features from row-major values.
    ///
    /// # Errors
    /// `Numeric` when a value is not finite; `Config` without vectors, or when the length is no
    /// multiple of `size`.
    pub fn new(values: Vec<f64>, size: usize) -> Result<Self> {
        if size == 0 || values.is_empty() || !values.len().is_multiple_of(size) {
            return Err(Report::new("features", format!("{} values", values.len()))
                .expected(format!("a positive multiple of {size}"))
                .config());
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(
                Report::new(format!("features of image {}", i / size), values[i])
                    .expected("finite numbers")
                    .numeric(),
            );
        }
        let count = values.len() / size;
        Ok(Self {
            values,
            count,
            size,
        })
    }

    /// The rows of a tensor; whatever follows the first dimension is one vector.
    ///
    /// # Shapes
    /// `[n, …]`
    ///
    /// # Errors
    /// As [`Features::new`].
    pub fn from_tensor(x: &Tensor) -> Result<Self> {
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let size = x.dims().iter().skip(1).product();
        Self::new(x.flatten_all()?.to_vec1()?, size)
    }

    /// The number of vectors, at least 1.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Always false: there is at least one vector.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Numbers in a vector.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Vector `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.size..][..self.size]
    }

    /// All vectors in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f64]> {
        self.values.chunks_exact(self.size)
    }

    /// The vectors of these indices, which may repeat.
    ///
    /// # Errors
    /// `Config` for no index, or one beyond the last.
    pub fn select(&self, items: &[usize]) -> Result<Self> {
        if let Some(bad) = items.iter().find(|i| **i >= self.count) {
            return Err(Report::new("features: index", bad)
                .expected(format!("below {}", self.count))
                .config());
        }
        let values = items.iter().flat_map(|i| self.row(*i)).copied().collect();
        Self::new(values, self.size)
    }

    /// The same length of vectors in both sets, which every distance needs.
    ///
    /// # Errors
    /// `Config` otherwise.
    pub fn must_match(&self, other: &Features) -> Result<()> {
        if self.size == other.size {
            return Ok(());
        }
        Err(
            Report::new("features", format!("{} numbers each", other.size))
                .expected(format!("{}, as in the other set", self.size))
                .config(),
        )
    }

    /// For each vector the distance to the nearest of `others`, and its index.
    ///
    /// All distances are first taken in f32 by a matrix product; those that rounding cannot tell from
    /// the smallest are then taken again in f64, so that the answer is exact.
    ///
    /// # Errors
    /// `Config` when the vectors differ in length.
    pub fn nearest_one(&self, others: &Features) -> Result<Vec<(f64, usize)>> {
        self.must_match(others)?;
        let b = others.in_f32()?;
        let squares = others.squares();
        let longest = squares.iter().fold(0.0f64, |a, b| a.max(*b));
        let mut found = Vec::with_capacity(self.count);
        for start in (0..self.count).step_by(CHUNK) {
            let items: Vec<usize> = (start..self.count.min(start + CHUNK)).collect();
            let rows = self.select(&items)?;
            let products = rows.in_f32()?.matmul(&b.t()?)?.to_vec2::<f32>()?;
            let own = rows.squares();
            let nearest = (0..rows.count).into_par_iter().map(|i| {
                let rough = |j: usize| squares[j] - 2.0 * f64::from(products[i][j]);
                let least = (0..others.count).map(rough).fold(f64::INFINITY, f64::min);
                // Far above the rounding of a product of two such vectors.
                let limit = least + 1e-4 * (own[i] + longest);
                let near = (0..others.count).filter(|j| rough(*j) <= limit);
                let exact = near.map(|j| (squared_distance(rows.row(i), others.row(j)), j));
                let none = (f64::INFINITY, 0);
                let best = exact.fold(none, |a, b| if b.0 < a.0 { b } else { a });
                (best.0.sqrt(), best.1)
            });
            found.extend(nearest.collect::<Vec<_>>());
        }
        Ok(found)
    }

    /// `[n, d]` in f32.
    fn in_f32(&self) -> Result<Tensor> {
        let values: Vec<f32> = self.values.iter().map(|v| *v as f32).collect();
        Ok(Tensor::from_vec(
            values,
            (self.count, self.size),
            &Device::Cpu,
        )?)
    }

    /// `‖x‖²` of each vector.
    fn squares(&self) -> Vec<f64> {
        self.rows()
            .map(|row| row.iter().map(|v| v * v).sum())
            .collect()
    }

    /// For each vector the squared distances to the `k` nearest of `others`, ascending, with their
    /// indices; `skip_own` leaves out the vector of the same index (a set against itself).
    pub(crate) fn nearest(
        &self,
        others: &Features,
        k: usize,
        skip_own: bool,
    ) -> Vec<Vec<(f64, usize)>> {
        let one = |i: usize| {
            let mut best: Vec<(f64, usize)> = Vec::with_capacity(k + 1);
            for (j, other) in others.rows().enumerate() {
                if skip_own && i == j {
                    continue;
                }
                let d = squared_distance(self.row(i), other);
                if best.len() < k || best.last().is_some_and(|worst| d < worst.0) {
                    let at = best.partition_point(|b| b.0 <= d);
                    best.insert(at, (d, j));
                    best.truncate(k);
                }
            }
            best
        };
        (0..self.count).into_par_iter().map(one).collect()
    }
}

/// `‖a − b‖²`
pub(crate) fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    // Eight sums that do not wait for each other; their order is fixed.
    let mut lanes = [0.0f64; 8];
    let (x, y) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = x.remainder().iter().zip(y.remainder());
    let tail: f64 = rest.map(|(p, q)| (p - q) * (p - q)).sum();
    for (p, q) in x.zip(y) {
        for k in 0..8 {
            let d = p[k] - q[k];
            lanes[k] += d * d;
        }
    }
    lanes.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_and_distances() {
        let a: Vec<f64> = (0..11).map(f64::from).collect();
        let b: Vec<f64> = (0..11).map(|i| f64::from(i) + 0.5).collect();
        assert_eq!(squared_distance(&a, &b), 11.0 * 0.25);
        let line = Features::new(vec![0.0, 1.0, 3.0, 7.0], 1).unwrap();
        let found = line.nearest(&line, 2, true);
        assert_eq!(found[0], [(1.0, 1), (9.0, 2)]);
        assert_eq!(found[3], [(16.0, 2), (36.0, 1)]);
        assert_eq!(line.nearest(&line, 1, false)[2], [(0.0, 2)]);
        assert_eq!(line.select(&[2, 2]).unwrap().row(1), [3.0]);
    }

    #[test]
    fn the_nearest_one_is_exact_though_found_by_rounded_products() {
        use diffusion_ops::rng::Key;
        let normal = |seed, n: usize, d: usize| {
            let values = Key::new(seed, 0).normal(n * d);
            // Far from the origin, where products round most.
            Features::new(values.into_iter().map(|v| 5.0 + v).collect(), d).unwrap()
        };
        let (a, b) = (normal(1, 300, 40), normal(2, 700, 40));
        for (found, exact) in a
            .nearest_one(&b)
            .unwrap()
            .iter()
            .zip(a.nearest(&b, 1, false))
        {
            assert_eq!(*found, (exact[0].0.sqrt(), exact[0].1));
        }
        let itself = b.nearest_one(&b).unwrap();
        assert!(itself.iter().enumerate().all(|(i, f)| *f == (0.0, i)));
    }

    #[test]
    fn what_is_no_set_of_features_is_refused() {
        assert!(Features::new(vec![], 2).is_err());
        assert!(Features::new(vec![1.0; 3], 2).is_err());
        let error = Features::new(vec![1.0, 2.0, 3.0, f64::NAN], 2).unwrap_err();
        assert!(error.to_string().contains("image 1"), "{error}");
        let a = Features::new(vec![1.0; 4], 2).unwrap();
        assert!(
            a.must_match(&Features::new(vec![1.0; 4], 4).unwrap())
                .is_err()
        );
        assert!(a.select(&[2]).is_err() && a.select(&[]).is_err());
    }
}
