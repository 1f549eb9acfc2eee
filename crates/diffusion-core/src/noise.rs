//! Where noise comes from: counter-based streams, or a recording.

use crate::error::{Report, Result};
use candle_core::{DType, Device, Tensor, WithDType};
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

    /// A tensor like `like` of what `draw` writes into the row of each item.
    fn fill<T: WithDType>(
        &self,
        like: &Tensor,
        draw: impl Fn(Key, &mut [T]) + Sync,
    ) -> Result<Tensor> {
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
        let mut values = vec![T::zero(); like.elem_count()];
        // Rows are independent, so that any number of threads draws the same.
        let rows = values.par_chunks_mut(size).enumerate();
        rows.for_each(|(row, out)| draw(key(row), out));
        let noise = Tensor::from_vec(values, like.shape(), &Device::Cpu)?;
        Ok(noise.to_dtype(like.dtype())?.to_device(like.device())?)
    }

    /// Increments of the paths over an interval that may depend on the place in the batch.
    fn increments(
        &self,
        like: &Tensor,
        span: impl Fn(usize) -> (f64, f64) + Sync,
    ) -> Result<Tensor> {
        self.fill(like, |key, row: &mut [f64]| {
            let place = key.item.wrapping_sub(self.items.start) as usize;
            increment(key, span(place), row);
        })
    }
}

impl Noise for CounterNoise {
    fn normal(&mut self, like: &Tensor) -> Result<Tensor> {
        let noise = match like.dtype() {
            DType::F32 => self.fill(like, Key::fill_normal_f32)?,
            _ => self.fill(like, Key::fill_normal)?,
        };
        self.step += 1;
        Ok(noise)
    }

    fn brownian(&mut self, like: &Tensor, from: f64, to: f64) -> Result<Tensor> {
        self.increments(like, |_| (from, to))
    }

    fn brownian_each(&mut self, like: &Tensor, spans: &[(f64, f64)]) -> Result<Tensor> {
        one_span_an_item(like, spans)?;
        self.increments(like, |place| spans.get(place).copied().unwrap_or_default())
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
    let mut first = Bridge::new(key, from, row.len());
    let second = if (from < 0.0) == (to < 0.0) {
        while first.descend(&[from, to]) {}
        first.clone()
    } else {
        Bridge::new(key, to, row.len())
    };
    let (a, b) = (first.value(from), second.value(to));
    for ((out, a), b) in row.iter_mut().zip(a).zip(b) {
        *out = b - a;
    }
}

/// How far Brownian paths reach: `|t| ≤ 2¹⁰` covers every schedule's time.
const PATH_SPAN: f64 = 1024.0;
/// Levels of the bridge; below them the path is a straight line of length `2⁻³⁰`.
const PATH_DEPTH: u32 = 40;

/// An interval of the Brownian bridge with `W(0) = 0`, each node's draw being a function of its
/// place: given the ends of an interval, the middle is their mean plus normal noise of variance a
/// quarter of its length (Lévy).
///
/// Times are told by their distance from 0; the two sides of it are two bridges.
#[derive(Clone)]
struct Bridge {
    key: Key,
    level: u32,
    index: u64,
    low: f64,
    high: f64,
    left: Vec<f64>,
    right: Vec<f64>,
}

impl Bridge {
    /// The whole side on which `t` lies.
    fn new(key: Key, t: f64, n: usize) -> Self {
        let key = key.step(u64::from(t < 0.0) << 63);
        let mut right = key.normal(n);
        for z in &mut right {
            *z *= PATH_SPAN.sqrt();
        }
        Self {
            key,
            level: 0,
            index: 0,
            low: 0.0,
            high: PATH_SPAN,
            left: vec![0.0; n],
            right,
        }
    }

    /// Takes the half in which all the times lie; `false` if there is none, or no need for one.
    fn descend(&mut self, times: &[f64]) -> bool {
        let middle = 0.5 * (self.low + self.high);
        let mut targets = times.iter().map(|t| distance(*t));
        let below = targets.clone().filter(|t| *t < middle).count();
        if self.level == PATH_DEPTH
            || targets.any(|t| t == self.low)
            || (below != 0 && below != times.len())
        {
            return false;
        }
        self.level += 1;
        let place = (u64::from(self.level) << 48) | self.index;
        let mut centre = self.key.step(self.key.step | place).normal(self.left.len());
        let std = 0.5 * (self.high - self.low).sqrt();
        for ((z, a), b) in centre.iter_mut().zip(&self.left).zip(&self.right) {
            *z = 0.5 * (a + b) + std * *z;
        }
        self.index *= 2;
        if below > 0 {
            (self.high, self.right) = (middle, centre);
        } else {
            (self.low, self.left) = (middle, centre);
            self.index += 1;
        }
        true
    }

    /// `W(t)` of a time in the interval.
    fn value(mut self, t: f64) -> Vec<f64> {
        while self.descend(&[t]) {}
        if self.level < PATH_DEPTH {
            return self.left;
        }
        let u = (distance(t) - self.low) / (self.high - self.low);
        for (a, b) in self.left.iter_mut().zip(&self.right) {
            *a += u * (b - *a);
        }
        self.left
    }
}

fn distance(t: f64) -> f64 {
    t.abs().min(PATH_SPAN)
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
    fn brownian_paths_never_change() {
        let spans = [
            (0.2, 0.9),
            (0.0, 0.3),
            (-0.4, 0.7),
            (80.0, 79.5),
            (512.0, 0.25),
            (-3.0, 2e3),
        ];
        let like = Tensor::zeros((spans.len(), 7), DType::F64, &Device::Cpu).unwrap();
        let paths = CounterNoise::new(3, 4..10).brownian_each(&like, &spans);
        let paths = paths.unwrap().flatten_all().unwrap();
        // FNV-1a over the bits.
        let folded = paths
            .to_vec1::<f64>()
            .unwrap()
            .iter()
            .flat_map(|w| w.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        assert_eq!(folded, 0x1bea_ec8f_6dac_cb3f);
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
