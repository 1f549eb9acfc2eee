//! What samples are compared with: Gaussians that need no network.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use diffusion_images::data::Dataset;
use diffusion_ops::rng::{Key, stream};

/// Rounds of the subspace iteration; the directions that matter converge in far fewer.
const ROUNDS: usize = 12;

/// All images of a data set as rows, `[n, D]` in f64.
fn rows(data: &Dataset) -> Result<Tensor> {
    let (images, _) = data.all(&Device::Cpu)?;
    Ok(images.flatten_from(1)?.to_dtype(DType::F64)?)
}

/// Rows as images of the data set's shape, cut to `[−1, 1]`.
fn images(rows: &Tensor, like: &Dataset) -> Result<Tensor> {
    let shape = (rows.dim(0)?, like.channels(), like.height(), like.width());
    Ok(rows
        .clamp(-1.0, 1.0)?
        .to_dtype(DType::F32)?
        .reshape(shape)?)
}

/// Independent normal numbers, `[n, d]`.
fn normal(seed: u64, item: u64, n: usize, d: usize) -> Result<Tensor> {
    let values = Key::new(seed, stream::EVALUATION).item(item).normal(n * d);
    Ok(Tensor::from_vec(values, (n, d), &Device::Cpu)?)
}

/// A Gaussian on pixels: each with its own mean and deviation, independent of the others.
///
/// ```text
/// x_j = μ_j + s_j z_j
/// ```
pub fn pixels(train: &Dataset, count: usize, seed: u64) -> Result<Tensor> {
    let x = rows(train)?;
    let mean = x.mean_keepdim(0)?;
    let centred = x.broadcast_sub(&mean)?;
    let std = centred.sqr()?.mean_keepdim(0)?.sqrt()?;
    let z = normal(seed, 1, count, x.dim(1)?)?;
    images(&z.broadcast_mul(&std)?.broadcast_add(&mean)?, train)
}

/// A Gaussian in the principal directions: a mean, a basis, and the law of the coordinates.
pub struct Pca {
    mean: Tensor,
    /// `[D, k]`, orthonormal.
    basis: Tensor,
    /// `[k, k]`, lower triangular, `L Lᵀ` the covariance of the coordinates.
    factor: Tensor,
}

impl Pca {
    /// The `k` principal directions of rows `[n, D]`, by subspace iteration.
    ///
    /// ```text
    /// V ← orthonormal columns of Xᵀ X V,   C = (X V)ᵀ (X V)/(n − 1),   C = L Lᵀ
    /// ```
    pub fn fit(x: &Tensor, k: usize) -> Result<Self> {
        let (n, d) = x.dims2()?;
        let k = k.min(d).min(n.saturating_sub(1)).max(1);
        let mean = x.mean_keepdim(0)?;
        let x = x.broadcast_sub(&mean)?;
        let mut basis = orthonormal(&normal(0, 2, d, k)?)?;
        for _ in 0..ROUNDS {
            basis = orthonormal(&x.t()?.matmul(&x.matmul(&basis)?)?)?;
        }
        let y = x.matmul(&basis)?;
        let covariance = (y.t()?.matmul(&y)? / (n as f64 - 1.0))?;
        Ok(Self {
            mean,
            basis,
            factor: cholesky(&covariance)?,
        })
    }

    /// `x = μ + V L z`
    fn sample(&self, count: usize, seed: u64, item: u64) -> Result<Tensor> {
        let z = normal(seed, item, count, self.factor.dim(0)?)?;
        let x = z.matmul(&self.factor.t()?)?.matmul(&self.basis.t()?)?;
        Ok(x.broadcast_add(&self.mean)?)
    }
}

/// A Gaussian in `k` principal directions of all training images.
pub fn pca(train: &Dataset, k: usize, count: usize, seed: u64) -> Result<Tensor> {
    images(&Pca::fit(&rows(train)?, k)?.sample(count, seed, 3)?, train)
}

/// The same for each class by itself, for these labels.
pub fn pca_of_classes(train: &Dataset, k: usize, labels: &[u32], seed: u64) -> Result<Tensor> {
    let known = train.labels().context("labels")?;
    let mut out: Vec<Option<Tensor>> = vec![None; labels.len()];
    for class in 0..train.classes().len() as u32 {
        let of = |labels: &[u32]| -> Vec<usize> {
            (0..labels.len()).filter(|i| labels[*i] == class).collect()
        };
        let wanted = of(labels);
        if wanted.is_empty() {
            continue;
        }
        let fit = Pca::fit(&rows(&train.select(&of(known))?)?, k)?;
        let drawn = fit.sample(wanted.len(), seed, 4 + u64::from(class))?;
        for (row, at) in wanted.into_iter().enumerate() {
            out[at] = Some(drawn.narrow(0, row, 1)?);
        }
    }
    let out: Vec<Tensor> = out.into_iter().flatten().collect();
    images(&Tensor::cat(&out, 0)?, train)
}

/// The columns made orthonormal, one after the other (modified Gram-Schmidt, twice).
fn orthonormal(columns: &Tensor) -> Result<Tensor> {
    let mut rows = columns.t()?.to_vec2::<f64>()?;
    for _ in 0..2 {
        for i in 0..rows.len() {
            let (done, rest) = rows.split_at_mut(i);
            let row = &mut rest[0];
            for other in done.iter() {
                let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
            let norm = row.iter().map(|a| a * a).sum::<f64>().sqrt().max(1e-300);
            row.iter_mut().for_each(|a| *a /= norm);
        }
    }
    Ok(Tensor::new(rows, &Device::Cpu)?.t()?.contiguous()?)
}

/// The lower triangular `L` with `L Lᵀ = C`; directions without variance give columns of zeros.
fn cholesky(c: &Tensor) -> Result<Tensor> {
    let c = c.to_vec2::<f64>()?;
    let k = c.len();
    let mut l = vec![vec![0.0; k]; k];
    for i in 0..k {
        for j in 0..=i {
            let rest = c[i][j] - (0..j).map(|m| l[i][m] * l[j][m]).sum::<f64>();
            l[i][j] = if i == j {
                rest.max(0.0).sqrt()
            } else if l[j][j] > 0.0 {
                rest / l[j][j]
            } else {
                0.0
            };
        }
    }
    Ok(Tensor::new(l, &Device::Cpu)?)
}
