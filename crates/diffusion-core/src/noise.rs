//! Where noise comes from: counter-based streams, or a recording.

use crate::error::{Report, Result};
use candle_core::{DType, Tensor};
use diffusion_ops::rng::{Key, stream};
use rayon::prelude::*;
use std::collections::VecDeque;
use std::ops::Range;

/// A source of normal noise for a batch.
pub trait Noise {
    /// Standard normal values, shaped, typed and placed as `like`, `[B, …]`.
    ///
    /// # Errors
    /// When the batch is not the one this source was made for, or a recording has run out.
    fn normal(&mut self, like: &Tensor) -> Result<Tensor>;

    /// The increment `W(to) − W(from)` of one Brownian path an element, so that asking for two
    /// halves of an interval gives increments that add up to the whole.
    ///
    /// # Errors
    /// As [`Noise::normal`].
    fn brownian(&mut self, like: &Tensor, from: f64, to: f64) -> Result<Tensor>;

    /// As [`Noise::brownian`], with an interval `(from, to)` of its own for every item: solvers
    /// whose items have their own steps.
    ///
    /// # Errors
    /// As [`Noise::brownian`], and when there is not one interval an item.
    fn brownian_each(&mut self, like: &Tensor, spans: &[(f64, f64)]) -> Result<Tensor> {
        one_span_an_item(like, spans)?;
        let rows = spans
            .iter()
            .enumerate()
            .map(|(i, (from, to))| Ok(self.brownian(like, *from, *to)?.narrow(0, i, 1)?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    }

    /// An independent source for the same batch.
    fn child(&mut self, label: u64) -> Box<dyn Noise>;
}

fn one_span_an_item(like: &Tensor, spans: &[(f64, f64)]) -> Result<()> {
    if like.dim(0)? == spans.len() {
        return Ok(());
    }
    Err(
        Report::new("brownian paths", format!("{} intervals", spans.len()))
            .expected(format!("one for each of the {} items", like.dim(0)?))
            .config(),
    )
}

/// Noise that depends on the seed, the item and the number of the draw alone.
///
/// Item `i` of a run sees the same noise in a batch of 1, 3 or 64, on any number of threads, and
/// after a resume.
#[derive(Clone, Debug)]
pub struct CounterNoise {
    seed: u64,
    stream: u64,
    items: Range<u64>,
    step: u64,
}

impl CounterNoise {
    /// The sampling noise of the items `items` of a run.
    pub fn new(seed: u64, items: Range<u64>) -> Self {
        Self::on_stream(seed, stream::SAMPLE, items)
    }

    /// Noise on another stream.
    pub fn on_stream(seed: u64, stream: u64, items: Range<u64>) -> Self {
        Self {
            seed,
            stream,
            items,
            step: 0,
        }
    }

    /// The same source as if `step` draws had been made.
    pub fn at_step(self, step: u64) -> Self {
        Self { step, ..self }
    }

    fn fill(&self, like: &Tensor, draw: impl Fn(Key, &mut [f64]) + Sync) -> Result<Tensor> {
        let batch = like.dim(0)?;
        if batch as u64 != self.items.end - self.items.start {
            return Err(Report::new("noise", format!("a batch of {batch}"))
                .expected(format!(
                    "the {} items {:?} of this source",
                    self.items.end - self.items.start,
                    self.items
                ))
                .config());
        }
        let size = (like.elem_count() / batch.max(1)).max(1);
        let key = |row: usize| Key {
            seed: self.seed,
            stream: self.stream,
            item: self.items.start + row as u64,
            step: self.step,
        };
        let cpu = candle_core::Device::Cpu;
        // Rows are independent, so that any number of threads draws the same.
        let noise = if like.dtype() == DType::F32 {
            let mut values = vec![0f32; like.elem_count()];
            values.par_chunks_mut(size).enumerate().for_each_init(
                || vec![0f64; size],
                |wide, (row, out)| {
                    wide.fill(0.0);
                    draw(key(row), wide);
                    for (narrow, wide) in out.iter_mut().zip(wide.iter()) {
                        *narrow = *wide as f32;
                    }
                },
            );
            Tensor::from_vec(values, like.shape(), &cpu)?
        } else {
            let mut values = vec![0f64; like.elem_count()];
            let rows = values.par_chunks_mut(size).enumerate();
            rows.for_each(|(row, out)| draw(key(row), out));
            Tensor::from_vec(values, like.shape(), &cpu)?
        };
        Ok(noise.to_dtype(like.dtype())?.to_device(like.device())?)
    }
}

impl Noise for CounterNoise {
    fn normal(&mut self, like: &Tensor) -> Result<Tensor> {
        let noise = self.fill(like, |key, row| key.fill_normal(row))?;
        self.step += 1;
        Ok(noise)
    }

    fn brownian(&mut self, like: &Tensor, from: f64, to: f64) -> Result<Tensor> {
        self.fill(like, |key, row| increment(key, (from, to), row))
    }

    fn brownian_each(&mut self, like: &Tensor, spans: &[(f64, f64)]) -> Result<Tensor> {
        one_span_an_item(like, spans)?;
        self.fill(like, |key, row| {
            let place = key.item.wrapping_sub(self.items.start) as usize;
            increment(key, spans.get(place).copied().unwrap_or_default(), row);
        })
    }

    fn child(&mut self, label: u64) -> Box<dyn Noise> {
        let seed = Key {
            seed: self.seed,
            stream: self.stream,
            item: label,
            step: u64::MAX,
        }
        .words(1)[0];
        Box::new(Self {
            seed,
            step: 0,
            ..self.clone()
        })
    }
}

/// `W(to) − W(from)` of one item's path.
fn increment(key: Key, (from, to): (f64, f64), row: &mut [f64]) {
    if from == to {
        row.fill(0.0);
        return;
    }
    let key = Key {
        stream: stream::BROWNIAN ^ key.stream.rotate_left(32),
        ..key
    };
    let (a, b) = (path(key, from, row.len()), path(key, to, row.len()));
    for ((out, a), b) in row.iter_mut().zip(a).zip(b) {
        *out = b - a;
    }
}

/// How far Brownian paths reach: `|t| ≤ 2¹⁰` covers every schedule's time.
const PATH_SPAN: f64 = 1024.0;
/// Levels of the bridge; below them the path is a straight line of length `2⁻³⁰`.
const PATH_DEPTH: u32 = 40;

/// `W(t)` with `W(0) = 0` by the Brownian bridge, each node's draw being a function of its place:
/// given the ends of an interval, the middle is their mean plus normal noise of variance a
/// quarter of its length (Lévy).
fn path(key: Key, t: f64, n: usize) -> Vec<f64> {
    let side = u64::from(t < 0.0);
    let target = t.abs().min(PATH_SPAN);
    let node = |level: u32, index: u64| {
        Key {
            step: (side << 63) | (u64::from(level) << 48) | index,
            ..key
        }
        .normal(n)
    };
    let (mut low, mut high) = (0.0, PATH_SPAN);
    let mut left = vec![0.0; n];
    let mut right: Vec<f64> = node(0, 0)
        .into_iter()
        .map(|z| z * PATH_SPAN.sqrt())
        .collect();
    let mut index = 0u64;
    for level in 1..=PATH_DEPTH {
        if target == low {
            return left;
        }
        let middle = 0.5 * (low + high);
        let std = 0.5 * (high - low).sqrt();
        let centre: Vec<f64> = left
            .iter()
            .zip(&right)
            .zip(node(level, index))
            .map(|((a, b), z)| 0.5 * (a + b) + std * z)
            .collect();
        index *= 2;
        if target < middle {
            (high, right) = (middle, centre);
        } else {
            (low, left) = (middle, centre);
            index += 1;
        }
    }
    let u = (target - low) / (high - low);
    left.iter()
        .zip(&right)
        .map(|(a, b)| a + u * (b - a))
        .collect()
}

/// Tensors replayed in the order in which they were recorded: parity with other libraries.
#[derive(Debug, Default)]
pub struct RecordedNoise {
    tensors: VecDeque<Tensor>,
    served: usize,
}

impl RecordedNoise {
    /// A recording.
    pub fn new(tensors: impl IntoIterator<Item = Tensor>) -> Self {
        Self {
            tensors: tensors.into_iter().collect(),
            served: 0,
        }
    }

    /// How many tensors were not asked for.
    pub fn remaining(&self) -> usize {
        self.tensors.len()
    }
}

impl Noise for RecordedNoise {
    fn normal(&mut self, like: &Tensor) -> Result<Tensor> {
        let Some(next) = self.tensors.pop_front() else {
            return Err(Report::new(
                "recorded noise",
                format!("all {} tensors used up", self.served),
            )
            .expected("one tensor a draw")
            .input());
        };
        if next.dims() != like.dims() {
            return Err(Report::new(
                format!("recorded noise {}", self.served),
                format!("{:?}", next.dims()),
            )
            .expected(format!("{:?}", like.dims()))
            .input());
        }
        self.served += 1;
        Ok(next.to_dtype(like.dtype())?.to_device(like.device())?)
    }

    fn brownian(&mut self, like: &Tensor, from: f64, to: f64) -> Result<Tensor> {
        // What was recorded is the increment over its length.
        Ok(self.normal(like)?.affine((to - from).abs().sqrt(), 0.0)?)
    }

    fn child(&mut self, _: u64) -> Box<dyn Noise> {
        // A recording has one order; a child continues it.
        Box::new(std::mem::take(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn rows(items: Range<u64>, draws: usize) -> Vec<Vec<f32>> {
        let like = Tensor::zeros(
            ((items.end - items.start) as usize, 2, 3),
            DType::F32,
            &Device::Cpu,
        )
        .unwrap();
        let mut noise = CounterNoise::new(9, items);
        for _ in 1..draws {
            noise.normal(&like).unwrap();
        }
        noise
            .normal(&like)
            .unwrap()
            .flatten_from(1)
            .unwrap()
            .to_vec2()
            .unwrap()
    }

    #[test]
    fn an_item_sees_the_same_noise_in_any_batch() {
        let all = rows(0..64, 3);
        for i in [0usize, 1, 31, 63] {
            assert_eq!(rows(i as u64..i as u64 + 1, 3)[0], all[i]);
        }
        assert_eq!(rows(30..33, 3), all[30..33]);
        assert_ne!(rows(0..1, 2)[0], all[0]);
    }

    #[test]
    fn refuses_another_batch() {
        let like = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(
            CounterNoise::new(0, 0..3)
                .normal(&like)
                .unwrap_err()
                .to_string()
                .contains("a batch of 2")
        );
    }

    #[test]
    fn brownian_increments_add_up_and_have_the_right_variance() {
        let n = 4000;
        let like = Tensor::zeros((1, n), DType::F64, &Device::Cpu).unwrap();
        let mut noise = CounterNoise::new(3, 0..1);
        let mut get = |a: f64, b: f64| {
            noise
                .brownian(&like, a, b)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        let (whole, first, second) = (get(0.2, 0.9), get(0.2, 0.55), get(0.55, 0.9));
        for i in 0..n {
            assert!((first[i] + second[i] - whole[i]).abs() < 1e-12);
        }
        let var = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>() / n as f64;
        let cov = first.iter().zip(&second).map(|(a, b)| a * b).sum::<f64>() / n as f64;
        let tolerance = 4.0 * (2.0 / n as f64).sqrt();
        assert!((var(&whole) / 0.7 - 1.0).abs() < tolerance);
        assert!((var(&first) / 0.35 - 1.0).abs() < tolerance);
        assert!(cov.abs() < 0.35 * tolerance);
        let back = get(0.9, 0.2);
        assert!(back.iter().zip(&whole).all(|(a, b)| a + b == 0.0));
    }

    #[test]
    fn items_may_have_intervals_of_their_own() {
        let like = Tensor::zeros((3, 5), DType::F64, &Device::Cpu).unwrap();
        let spans = [(0.1, 0.4), (0.2, 0.2), (0.9, 0.3)];
        let each = CounterNoise::new(3, 4..7).brownian_each(&like, &spans);
        let each = each.unwrap().to_vec2::<f64>().unwrap();
        for (i, (from, to)) in spans.iter().enumerate() {
            let all = CounterNoise::new(3, 4..7).brownian(&like, *from, *to);
            assert_eq!(each[i], all.unwrap().to_vec2::<f64>().unwrap()[i]);
        }
        let error = CounterNoise::new(3, 4..7).brownian_each(&like, &spans[..2]);
        assert!(error.unwrap_err().to_string().contains("2 intervals"));
    }

    #[test]
    fn children_are_independent_and_reproducible() {
        let like = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
        let draw = |label| {
            let mut child = CounterNoise::new(1, 0..1).child(label);
            child.normal(&like).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn a_recording_is_replayed_in_order() {
        let t = |v: f32| Tensor::full(v, (1, 2), &Device::Cpu).unwrap();
        let mut noise = RecordedNoise::new([t(1.0), t(2.0)]);
        assert_eq!(
            noise.normal(&t(0.0)).unwrap().to_vec2::<f32>().unwrap(),
            [[1.0; 2]]
        );
        let wrong = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        assert!(noise.normal(&wrong).is_err());
        assert!(
            RecordedNoise::new([])
                .normal(&t(0.0))
                .unwrap_err()
                .to_string()
                .contains("used up")
        );
    }
}
