//! Features of the Inception network that Fréchet distances are published in (Heusel et al. 2017),
//! from weights that the user gives.
//!
//! The network is the Inception v3 of 2015 (Szegedy et al. 2016) as TensorFlow ran it, whose 2048
//! channels after the last block are averaged over the map ("pool3"). Weights are read under the
//! names of PyTorch's port, the file `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid.
//!
//! ```text
//! conv  y = relu(γ (W ⊛ x − μ)/√(v + 0.001) + β)
//! ```
//!
//! which is one convolution with bias, folded when the weights are read.
//!
//! Published numbers come from images of 8 bits: round samples to 256 levels first where they are
//! to be compared with those.

use candle_core::{DType, Device, Tensor};
use diffusion_core::interop::weights::load_weight_file;
use diffusion_core::limits::Limits;
use diffusion_core::{Report, Result};
use diffusion_ops::{Padding, conv2d, relu};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Numbers in a feature vector.
pub const FEATURES: usize = 2048;
/// Width and height that images are brought to.
const SIDE: usize = 299;
/// ε of the norms.
const EPS: f64 = 0.001;
/// Images that pass through the network at a time.
const CHUNK: usize = 16;
/// Classes of the network's last layer, which tells it from others with the same names.
const CLASSES: usize = 1008;

/// The network, ready to run.
pub struct Inception {
    stem: [Vec<Unit>; 2],
    blocks: Vec<Block>,
}

/// A convolution with its norm, and relu.
struct Unit {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: Padding,
}

/// Branches side by side, whose channels are put together.
struct Block(Vec<Branch>);

enum Branch {
    /// Convolutions one after the other.
    Chain(Vec<Unit>),
    /// Convolutions one after the other, and two beside each other at the end.
    Fork(Vec<Unit>, [Unit; 2]),
    /// A 3×3 pool of stride 1, and a convolution.
    Pooled(Pool, Unit),
    /// The largest of 3×3, with stride 2.
    Halved,
}

#[derive(Clone, Copy)]
enum Pool {
    /// The mean of what lies inside the map.
    Mean,
    /// The largest.
    Max,
}

/// A convolution by name: channels out, kernel, and whether it halves the map.
type Spec = (&'static str, usize, (usize, usize), Step);

#[derive(Clone, Copy, PartialEq)]
enum Step {
    /// Keeps the size of the map.
    Same,
    /// Only where the kernel lies inside the map.
    Inside,
    /// The same, at every second place.
    Half,
}
use Step::{Half, Inside, Same};

impl Inception {
    /// Reads the weights: a `.pth`, `.pt`, `.bin` or `.safetensors` file with the names of
    /// pytorch-fid's network.
    ///
    /// # Errors
    /// `Input` when weights are missing or of another shape, or belong to another Inception
    /// network; whatever reading refuses (`Unsupported`, `Limit`, `Io`). All name the file.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let weights = load_weight_file(path, limits)?;
        if let Some([rows, _]) = weights.get("fc.weight").map(Tensor::dims)
            && *rows != CLASSES
        {
            return Err(Report::file(path, format!("fc.weight of {rows} classes"))
                .expected(format!("{CLASSES} classes, as the network of 2015 has"))
                .remedy("give the weights that pytorch-fid loads, not torchvision's")
                .input());
        }
        Self::build(&weights, path, 1)
    }

    /// The network with every width divided by `divisor`, which is 1 but in tests.
    fn build(weights: &BTreeMap<String, Tensor>, path: &Path, divisor: usize) -> Result<Self> {
        let reader = Reader {
            weights,
            path: path.to_path_buf(),
            divisor,
        };
        let (first, channels) = reader.chain(
            "",
            3,
            &[
                ("Conv2d_1a_3x3", 32, (3, 3), Half),
                ("Conv2d_2a_3x3", 32, (3, 3), Inside),
                ("Conv2d_2b_3x3", 64, (3, 3), Same),
            ],
        )?;
        let (second, mut channels) = reader.chain(
            "",
            channels,
            &[
                ("Conv2d_3b_1x1", 80, (1, 1), Same),
                ("Conv2d_4a_3x3", 192, (3, 3), Inside),
            ],
        )?;
        let mut blocks = Vec::new();
        for (name, kind) in [
            ("Mixed_5b", Kind::A(32)),
            ("Mixed_5c", Kind::A(64)),
            ("Mixed_5d", Kind::A(64)),
            ("Mixed_6a", Kind::B),
            ("Mixed_6b", Kind::C(128)),
            ("Mixed_6c", Kind::C(160)),
            ("Mixed_6d", Kind::C(160)),
            ("Mixed_6e", Kind::C(192)),
            ("Mixed_7a", Kind::D),
            ("Mixed_7b", Kind::E(Pool::Mean)),
            ("Mixed_7c", Kind::E(Pool::Max)),
        ] {
            let (block, out) = reader.block(name, channels, kind)?;
            blocks.push(block);
            channels = out;
        }
        Ok(Self {
            stem: [first, second],
            blocks,
        })
    }

    /// The features of images.
    ///
    /// # Shapes
    /// `[B, 1, H, W]` (grey, which counts as three equal colours) or `[B, 3, H, W]` in `[−1, 1]`,
    /// of any size, to `[B, 2048]`, on the CPU in f32.
    ///
    /// Images are brought to 299×299 by bilinear interpolation between pixel centres, without
    /// smoothing first.
    ///
    /// # Errors
    /// `Config` for images of another shape.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        let (n, height, width) = match images.dims() {
            [n, 1 | 3, h, w] if n * h * w > 0 => (*n, *h, *w),
            found => {
                return Err(Report::new("images", format!("of shape {found:?}"))
                    .expected("[B, 1 or 3, H, W]")
                    .config());
            }
        };
        let images = images.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let (rows, columns) = (interpolation(height)?, interpolation(width)?.t()?);
        let mut parts = Vec::new();
        for start in (0..n).step_by(CHUNK) {
            let x = images.narrow(0, start, CHUNK.min(n - start))?;
            let x = x.contiguous()?.broadcast_matmul(&columns.contiguous()?)?;
            let x = rows.broadcast_matmul(&x)?;
            let x = x.broadcast_as((x.dim(0)?, 3, SIDE, SIDE))?.contiguous()?;
            parts.push(self.run(x)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn run(&self, mut x: Tensor) -> Result<Tensor> {
        for part in &self.stem {
            for unit in part {
                x = unit.forward(&x)?;
            }
            x = x.max_pool2d_with_stride((3, 3), (2, 2))?;
        }
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        Ok(x.flatten_from(2)?.mean(2)?)
    }
}

impl Unit {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = conv2d(
            x,
            &self.weight,
            Some(&self.bias),
            self.stride,
            self.padding,
            1,
        )?;
        Ok(relu(&y)?)
    }
}

impl Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let run = |units: &[Unit]| -> Result<Tensor> {
            units.iter().try_fold(x.clone(), |h, unit| unit.forward(&h))
        };
        let mut parts = Vec::new();
        for branch in &self.0 {
            match branch {
                Branch::Chain(units) => parts.push(run(units)?),
                Branch::Fork(units, [one, other]) => {
                    let h = run(units)?;
                    parts.push(one.forward(&h)?);
                    parts.push(other.forward(&h)?);
                }
                Branch::Pooled(pool, unit) => parts.push(unit.forward(&pool.forward(x)?)?),
                Branch::Halved => parts.push(x.max_pool2d_with_stride((3, 3), (2, 2))?),
            }
        }
        Ok(Tensor::cat(&parts, 1)?)
    }
}

impl Pool {
    fn forward(self, x: &Tensor) -> Result<Tensor> {
        // What comes in went through relu: a zero around it is never the largest alone.
        let padded = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
        let Pool::Mean = self else {
            return Ok(padded.max_pool2d_with_stride((3, 3), (1, 1))?);
        };
        let (_, _, h, w) = x.dims4()?;
        // Nine over the number of places inside the map.
        let inside = |n: usize, i: usize| 3 - usize::from(i == 0) - usize::from(i + 1 == n);
        let share: Vec<f32> = (0..h * w)
            .map(|i| 9.0 / (inside(h, i / w) * inside(w, i % w)) as f32)
            .collect();
        let share = Tensor::from_vec(share, (1, 1, h, w), x.device())?;
        let mean = padded.avg_pool2d_with_stride((3, 3), (1, 1))?;
        Ok(mean.broadcast_mul(&share)?)
    }
}

/// The matrix `[299, n]` of linear interpolation between the centres of `n` pixels.
///
/// ```text
/// s = max((i + ½) n/299 − ½, 0),   y[i] = (1 − (s − ⌊s⌋)) x[⌊s⌋] + (s − ⌊s⌋) x[min(⌊s⌋ + 1, n − 1)]
/// ```
fn interpolation(n: usize) -> Result<Tensor> {
    let mut matrix = vec![0f32; SIDE * n];
    for (i, row) in matrix.chunks_exact_mut(n).enumerate() {
        let s = ((i as f64 + 0.5) * n as f64 / SIDE as f64 - 0.5).max(0.0);
        let low = (s.floor() as usize).min(n - 1);
        let part = (s - low as f64) as f32;
        row[low] += 1.0 - part;
        row[(low + 1).min(n - 1)] += part;
    }
    Ok(Tensor::from_vec(matrix, (SIDE, n), &Device::Cpu)?)
}

/// The kinds of blocks, under the letters of the original.
enum Kind {
    /// 35×35 maps; channels of the pooled branch.
    A(usize),
    /// From 35×35 to 17×17.
    B,
    /// 17×17 maps; channels inside the branches.
    C(usize),
    /// From 17×17 to 8×8.
    D,
    /// 8×8 maps.
    E(Pool),
}

/// Reads convolutions by name and checks their shapes.
struct Reader<'a> {
    weights: &'a BTreeMap<String, Tensor>,
    path: PathBuf,
    divisor: usize,
}

impl Reader<'_> {
    fn block(&self, block: &str, from: usize, kind: Kind) -> Result<(Block, usize)> {
        let mut branches = Vec::new();
        let mut channels = 0;
        let mut add = |(branch, out): (Branch, usize)| {
            branches.push(branch);
            channels += out;
        };
        let chain = |specs: &[Spec]| -> Result<(Branch, usize)> {
            let (units, out) = self.chain(block, from, specs)?;
            Ok((Branch::Chain(units), out))
        };
        let fork = |specs: &[Spec], ends: [Spec; 2]| -> Result<(Branch, usize)> {
            let (units, inner) = self.chain(block, from, specs)?;
            let [one, other] = ends;
            let ((a, out), (b, more)) = (
                self.unit(block, inner, one)?,
                self.unit(block, inner, other)?,
            );
            Ok((Branch::Fork(units, [a, b]), out + more))
        };
        let pooled = |pool, to| -> Result<(Branch, usize)> {
            let (unit, out) = self.unit(block, from, ("branch_pool", to, (1, 1), Same))?;
            Ok((Branch::Pooled(pool, unit), out))
        };
        let (dot, row, column) = ((1, 1), (1, 7), (7, 1));
        match kind {
            Kind::A(pool) => {
                add(chain(&[("branch1x1", 64, dot, Same)])?);
                add(chain(&[
                    ("branch5x5_1", 48, dot, Same),
                    ("branch5x5_2", 64, (5, 5), Same),
                ])?);
                add(chain(&[
                    ("branch3x3dbl_1", 64, dot, Same),
                    ("branch3x3dbl_2", 96, (3, 3), Same),
                    ("branch3x3dbl_3", 96, (3, 3), Same),
                ])?);
                add(pooled(Pool::Mean, pool)?);
            }
            Kind::B => {
                add(chain(&[("branch3x3", 384, (3, 3), Half)])?);
                add(chain(&[
                    ("branch3x3dbl_1", 64, dot, Same),
                    ("branch3x3dbl_2", 96, (3, 3), Same),
                    ("branch3x3dbl_3", 96, (3, 3), Half),
                ])?);
                add((Branch::Halved, from));
            }
            Kind::C(inner) => {
                add(chain(&[("branch1x1", 192, dot, Same)])?);
                add(chain(&[
                    ("branch7x7_1", inner, dot, Same),
                    ("branch7x7_2", inner, row, Same),
                    ("branch7x7_3", 192, column, Same),
                ])?);
                add(chain(&[
                    ("branch7x7dbl_1", inner, dot, Same),
                    ("branch7x7dbl_2", inner, column, Same),
                    ("branch7x7dbl_3", inner, row, Same),
                    ("branch7x7dbl_4", inner, column, Same),
                    ("branch7x7dbl_5", 192, row, Same),
                ])?);
                add(pooled(Pool::Mean, 192)?);
            }
            Kind::D => {
                add(chain(&[
                    ("branch3x3_1", 192, dot, Same),
                    ("branch3x3_2", 320, (3, 3), Half),
                ])?);
                add(chain(&[
                    ("branch7x7x3_1", 192, dot, Same),
                    ("branch7x7x3_2", 192, row, Same),
                    ("branch7x7x3_3", 192, column, Same),
                    ("branch7x7x3_4", 192, (3, 3), Half),
                ])?);
                add((Branch::Halved, from));
            }
            Kind::E(pool) => {
                add(chain(&[("branch1x1", 320, dot, Same)])?);
                add(fork(
                    &[("branch3x3_1", 384, dot, Same)],
                    [
                        ("branch3x3_2a", 384, (1, 3), Same),
                        ("branch3x3_2b", 384, (3, 1), Same),
                    ],
                )?);
                add(fork(
                    &[
                        ("branch3x3dbl_1", 448, dot, Same),
                        ("branch3x3dbl_2", 384, (3, 3), Same),
                    ],
                    [
                        ("branch3x3dbl_3a", 384, (1, 3), Same),
                        ("branch3x3dbl_3b", 384, (3, 1), Same),
                    ],
                )?);
                add(pooled(pool, 192)?);
            }
        }
        Ok((Block(branches), channels))
    }

    fn chain(&self, block: &str, from: usize, specs: &[Spec]) -> Result<(Vec<Unit>, usize)> {
        let mut units = Vec::with_capacity(specs.len());
        let mut channels = from;
        for spec in specs {
            let (unit, out) = self.unit(block, channels, *spec)?;
            units.push(unit);
            channels = out;
        }
        Ok((units, channels))
    }

    /// A convolution with its norm folded in, and its channels out.
    fn unit(&self, block: &str, from: usize, spec: Spec) -> Result<(Unit, usize)> {
        let (name, to, (kh, kw), step) = spec;
        let to = to / self.divisor;
        let at = match block {
            "" => name.to_string(),
            block => format!("{block}.{name}"),
        };
        let weight = self.tensor(&format!("{at}.conv.weight"), &[to, from, kh, kw])?;
        let norm = |part: &str| self.tensor(&format!("{at}.bn.{part}"), &[to]);
        let (gamma, beta) = (norm("weight")?, norm("bias")?);
        let (mean, variance) = (norm("running_mean")?, norm("running_var")?);
        let scale = (gamma / (variance + EPS)?.sqrt()?)?;
        let bias = (beta - (mean * &scale)?)?;
        let weight = weight.broadcast_mul(&scale.reshape((to, 1, 1, 1))?)?;
        let padding = match step {
            Same => Padding::hw(kh / 2, kw / 2),
            Inside | Half => Padding::default(),
        };
        let unit = Unit {
            weight: weight.to_dtype(DType::F32)?,
            bias: bias.to_dtype(DType::F32)?,
            stride: if step == Half { 2 } else { 1 },
            padding,
        };
        Ok((unit, to))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = match self.weights.get(name) {
            Some(tensor) if tensor.dims() == shape => return Ok(tensor.to_dtype(DType::F64)?),
            Some(tensor) => format!("`{name}` of shape {:?}", tensor.dims()),
            None => format!("no tensor `{name}`"),
        };
        Err(Report::file(&self.path, found)
            .expected(format!("`{name}` of shape {shape:?}"))
            .remedy("give the weights of the Inception network of pytorch-fid")
            .input())
    }
}

#[cfg(test)]
mod tests;
