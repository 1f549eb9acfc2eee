//! Resizing by whole factors: each element stands for a block of elements.

use crate::cpu::{Real, by_float, half_on_cpu, native, slice, worth, written};
use crate::gradient::deliver;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tape::apply1;
use crate::vmath::real;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Each element becomes a block of `factors` (rows, columns) copies of it.
pub(super) fn repeat(x: &Tensor, factors: (usize, usize)) -> Result<Tensor> {
    apply(x, factors, Direction::Repeat, 1.0)
}

/// Each block of `factors` (rows, columns) becomes its mean; the factors divide the sizes.
pub(super) fn mean(x: &Tensor, factors: (usize, usize)) -> Result<Tensor> {
    let weight = 1.0 / (factors.0 * factors.1) as f64;
    apply(x, factors, Direction::Sum, weight)
}

fn apply(x: &Tensor, factors: (usize, usize), direction: Direction, weight: f64) -> Result<Tensor> {
    if half_on_cpu(x) {
        return apply(&x.to_dtype(DType::F32)?, factors, direction, weight)?.to_dtype(x.dtype());
    }
    let op = Block {
        factors,
        direction,
        weight,
    };
    if native(x) {
        apply1(&x.contiguous()?, op)
    } else {
        op.composed(x)
    }
}

#[derive(Clone, Copy, Debug)]
enum Direction {
    Repeat,
    Sum,
}

/// `weight` times the copies, or times the sum; one is the adjoint of the other.
#[derive(Clone, Copy, Debug)]
struct Block {
    factors: (usize, usize),
    direction: Direction,
    weight: f64,
}

impl Block {
    fn shape(&self, dims: &[usize]) -> Vec<usize> {
        let mut out = dims.to_vec();
        let rank = out.len();
        let (rows, cols) = self.factors;
        match self.direction {
            Direction::Repeat => {
                out[rank - 2] *= rows;
                out[rank - 1] *= cols;
            }
            Direction::Sum => {
                out[rank - 2] /= rows;
                out[rank - 1] /= cols;
            }
        }
        out
    }

    /// The same function from the tensor library's differentiable operations.
    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let ((b, c, h, w), (rows, cols)) = (x.dims4()?, self.factors);
        let y = match self.direction {
            Direction::Repeat => x
                .reshape((b * c, h, 1, w, 1))?
                .broadcast_as((b * c, h, rows, w, cols))?
                .contiguous()?,
            Direction::Sum => x
                .reshape((b * c, h / rows, rows, w / cols, cols))?
                .sum((2, 4))?,
        };
        y.reshape(self.shape(x.dims()))? * self.weight
    }
}

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        "resample2d_block"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let dims = self.shape(l.dims());
        let (small, large) = match self.direction {
            Direction::Repeat => (l.dims(), &dims[..]),
            Direction::Sum => (&dims[..], l.dims()),
        };
        let plane = |dims: &[usize]| dims[2] * dims[3];
        let (width, small, large) = (small[3], plane(small).max(1), plane(large).max(1));
        let out = by_float!(s, self.name(), T => {
            let x = slice::<T>(s, l, self.name())?;
            let weight = real::<T>(self.weight);
            let factors = self.factors;
            let fill = |out: &mut [T]| match self.direction {
                Direction::Repeat => out
                    .par_chunks_mut(large)
                    .with_min_len(worth(large))
                    .zip(x.par_chunks(small))
                    .for_each(|(out, x)| dispatch(Repeat { x, width, factors, weight, out })),
                Direction::Sum => out
                    .par_chunks_mut(small)
                    .with_min_len(worth(large))
                    .zip(x.par_chunks(large))
                    .for_each(|(out, x)| dispatch(Sum { x, width, factors, weight, out })),
            };
            // SAFETY: the planes cover the output, and the kernels write all of their rows.
            unsafe { written(dims.iter().product(), fill) }
        });
        Ok((out, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let direction = match self.direction {
            Direction::Repeat => Direction::Sum,
            Direction::Sum => Direction::Repeat,
        };
        let adjoint = Block { direction, ..*self };
        deliver(x, grad.detach().contiguous()?.apply_op1_no_bwd(&adjoint)?)
    }
}

struct Repeat<'a, T> {
    x: &'a [T],
    /// Of `x`.
    width: usize,
    factors: (usize, usize),
    weight: T,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Repeat<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (rows, cols) = self.factors;
        let wide = self.width * cols;
        let outs = self.out.chunks_exact_mut(rows * wide);
        for (x, out) in self.x.chunks_exact(self.width).zip(outs) {
            let (first, rest) = out.split_at_mut(wide);
            if cols == 2 {
                for (o, v) in first.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                    *o = [*v * self.weight; 2];
                }
            } else {
                for (o, v) in first.chunks_exact_mut(cols).zip(x) {
                    o.fill(*v * self.weight);
                }
            }
            for row in rest.chunks_exact_mut(wide) {
                row.copy_from_slice(first);
            }
        }
    }
}

struct Sum<'a, T> {
    x: &'a [T],
    /// Of `out`.
    width: usize,
    factors: (usize, usize),
    weight: T,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Sum<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (rows, cols) = self.factors;
        let wide = self.width * cols;
        let blocks = self.x.chunks_exact(rows * wide);
        for (x, out) in blocks.zip(self.out.chunks_exact_mut(self.width)) {
            if (rows, cols) == (2, 2) {
                let (upper, lower) = x.split_at(wide);
                let pairs = upper
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .zip(lower.as_chunks::<2>().0);
                for (o, (a, b)) in out.iter_mut().zip(pairs) {
                    *o = ((a[0] + b[0]) + (a[1] + b[1])) * self.weight;
                }
                continue;
            }
            out.fill(real(0.0));
            for row in x.chunks_exact(wide) {
                for (o, block) in out.iter_mut().zip(row.chunks_exact(cols)) {
                    for v in block {
                        *o += *v;
                    }
                }
            }
            out.iter_mut().for_each(|o| *o *= self.weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::{
        at_every_level, max_abs_difference, max_relative_error, normal,
        same_bits_on_any_number_of_threads,
    };

    #[test]
    fn kernels_compositions_and_finite_differences_agree() -> Result<()> {
        at_every_level(|level| {
            for factors in [(2, 2), (1, 3), (3, 2), (2, 1)] {
                let x = [normal(1, (2, 3, 6, 18))?];
                for direction in [Direction::Repeat, Direction::Sum] {
                    let run = |t: &[Tensor]| apply(&t[0], factors, direction, 0.3);
                    let op = Block {
                        factors,
                        direction,
                        weight: 0.3,
                    };
                    let gap = max_abs_difference(&run(&x)?, &op.composed(&x[0])?)?;
                    assert!(gap < 1e-14, "{op:?} at {level:?}: {gap:e}");
                    let e = max_relative_error(run, &x)?;
                    assert!(e < 1e-6, "{op:?} at {level:?}: {e:e}");
                    let e = max_relative_error(|t| op.composed(&t[0]), &x)?;
                    assert!(e < 1e-6, "composition of {op:?}: {e:e}");
                }
            }
            Ok(())
        })
    }

    #[test]
    fn f32_follows_f64_with_the_same_bits_on_any_number_of_threads() -> Result<()> {
        let wide = normal(1, (3, 5, 64, 66))?;
        let x = wide.to_dtype(DType::F32)?;
        at_every_level(|_| {
            let run = |x: &Tensor| Ok(vec![repeat(x, (2, 2))?, mean(x, (2, 2))?, mean(x, (1, 3))?]);
            same_bits_on_any_number_of_threads(|| run(&x))?;
            for (a, e) in run(&x)?.iter().zip(&run(&x.to_dtype(DType::F64)?)?) {
                let gap = max_abs_difference(a, e)?;
                assert!(gap < 1e-6, "{gap:e}");
            }
            assert_eq!(
                repeat(&x.to_dtype(DType::F16)?, (2, 2))?.dtype(),
                DType::F16
            );
            Ok(())
        })
    }
}
