//! Training images of the classifier, a little different in every epoch.

use super::{ClassifierConfig, Task};
use crate::data::Dataset;
use candle_core::{Device, Tensor};
use diffusion_core::Result;
use diffusion_core::train::Source;
use diffusion_ops::rng::{Key, stream};

/// Images with what is to be said of them.
pub(super) struct Moved<'a> {
    pub data: &'a Dataset,
    pub task: Task,
    pub config: &'a ClassifierConfig,
}

impl Source for Moved<'_> {
    type Batch = (Tensor, Tensor);

    fn len(&self) -> usize {
        self.data.len()
    }

    fn batch(&self, items: &[usize], epoch: u64) -> Result<Self::Batch> {
        let (images, labels) = self.data.batch(items, &Device::Cpu)?;
        let shape = images.dims4()?;
        let key = Key::new(self.config.seed, stream::AUGMENT).step(epoch);
        let (images, labels) = match (self.task, labels) {
            (Task::Turns(turns), _) => {
                let draw = |item: &usize| key.item(!(*item as u64)).below(u64::from(turns)) as u32;
                let labels: Vec<u32> = items.iter().map(draw).collect();
                let quarters = |label: &u32| (label * 4 / turns) as usize;
                let quarters: Vec<usize> = labels.iter().map(quarters).collect();
                let labels = Tensor::from_vec(labels, items.len(), &Device::Cpu)?;
                (turned(&images, &quarters)?, labels)
            }
            (Task::Classes, Some(labels)) => (images, labels),
            (Task::Classes, None) => return Err(super::no_labels(self.data)),
        };
        let pixels = images.flatten_all()?.to_vec1::<f32>()?;
        let moved = moved_batch(
            &pixels,
            (shape.1, shape.2, shape.3),
            items,
            epoch,
            self.config,
        );
        let images = Tensor::from_vec(moved, shape, &Device::Cpu)?;
        Ok((images, labels.reshape((items.len(), 1))?))
    }
}

/// Each image turned by so many quarters, counter-clockwise; odd numbers for square images only.
///
/// # Shapes
/// `[B, C, H, W]`, a number an image.
pub(super) fn turned(images: &Tensor, quarters: &[usize]) -> Result<Tensor> {
    let (_, channels, height, width) = images.dims4()?;
    let pixels = images.flatten_all()?.to_vec1::<f32>()?;
    let mut out = Vec::with_capacity(pixels.len());
    for (image, quarters) in pixels.chunks_exact(channels * height * width).zip(quarters) {
        for plane in image.chunks_exact(height * width) {
            for y in 0..height {
                for x in 0..width {
                    let (from_y, from_x) = match quarters % 4 {
                        0 => (y, x),
                        1 => (x, width - 1 - y),
                        2 => (height - 1 - y, width - 1 - x),
                        _ => (height - 1 - x, y),
                    };
                    out.push(plane[from_y * width + from_x]);
                }
            }
        }
    }
    Ok(Tensor::from_vec(out, images.shape(), &Device::Cpu)?)
}

/// The images of these items, each shifted, turned and zoomed at random about its centre.
///
/// ```text
/// out(p) = image(c + R_θ (p − c) / z + d),   bilinear between pixels, the edge repeated outside
/// ```
pub(super) fn moved_batch(
    pixels: &[f32],
    (channels, height, width): (usize, usize, usize),
    items: &[usize],
    epoch: u64,
    config: &ClassifierConfig,
) -> Vec<f32> {
    let size = channels * height * width;
    let (cy, cx) = ((height as f64 - 1.0) / 2.0, (width as f64 - 1.0) / 2.0);
    let mut out = Vec::with_capacity(items.len() * size);
    for (image, &item) in pixels.chunks_exact(size).zip(items) {
        let key = Key::new(config.seed, stream::AUGMENT)
            .item(item as u64)
            .step(epoch);
        let draw: Vec<f64> = key.uniform(4).into_iter().map(|u| 2.0 * u - 1.0).collect();
        let (dy, dx) = (config.shift * draw[0], config.shift * draw[1]);
        let (sin, cos) = libm::sincos((config.rotation * draw[2]).to_radians());
        let zoom = 1.0 + config.zoom * draw[3];
        for plane in image.chunks_exact(height * width) {
            for y in 0..height {
                for x in 0..width {
                    let (v, u) = ((y as f64 - cy) / zoom, (x as f64 - cx) / zoom);
                    let at = (cy + cos * v - sin * u + dy, cx + sin * v + cos * u + dx);
                    out.push(bilinear(plane, (height, width), at));
                }
            }
        }
    }
    out
}

/// The value between the four pixels around a place; places outside are moved to the edge.
pub(super) fn bilinear(plane: &[f32], (height, width): (usize, usize), (y, x): (f64, f64)) -> f32 {
    let (y, x) = (
        y.clamp(0.0, height as f64 - 1.0),
        x.clamp(0.0, width as f64 - 1.0),
    );
    let (top, left) = (y as usize, x as usize);
    let (bottom, right) = ((top + 1).min(height - 1), (left + 1).min(width - 1));
    let (fy, fx) = ((y - top as f64) as f32, (x - left as f64) as f32);
    let mix = |row: usize| plane[row * width + left] * (1.0 - fx) + plane[row * width + right] * fx;
    mix(top) * (1.0 - fy) + mix(bottom) * fy
}
