//! Configurations that fit a data set, by name.

use crate::config::{ImageConfig, Predicts};
use crate::data::Dataset;
use diffusion_core::loss::Weight;
use diffusion_core::schedule::BetaSchedule;
use diffusion_core::train::{AdamWConfig, EmaRule, LrSchedule, TrainConfig};
use diffusion_core::{Report, Result};
use diffusion_nn::net::unet2d::{DownBlockType, SampleSize, UpBlockType};

/// Every preset, with what it is for.
pub const PRESETS: [(&str, &str); 5] = [
    (
        "auto",
        "the largest of the others that suits the size of the images",
    ),
    ("tiny", "a few thousand parameters, for trying things out"),
    (
        "quick",
        "recognisable images in two minutes on two cores: 0.2 M parameters up to 16x16, 0.6 M above",
    ),
    (
        "small",
        "about 0.7 M parameters, for images up to 16x16 and a few minutes on two cores",
    ),
    (
        "medium",
        "about 1.1 M parameters, for 28x28 and 32x32, hours on two cores",
    ),
];

struct Shape {
    channels: &'static [usize],
    groups: usize,
    /// Attention where the map is at most this wide.
    attention_below: usize,
    batch: usize,
    steps: u64,
    lr: f64,
    /// Velocity on the cosine table: less grey noise left in flat areas than with the noise on the linear
    /// one, which short trainings show most.
    velocity: bool,
}

const TINY: Shape = Shape {
    channels: &[8, 16],
    groups: 4,
    attention_below: 4,
    batch: 16,
    steps: 200,
    lr: 2e-3,
    velocity: false,
};
const QUICK_SMALL: Shape = Shape {
    channels: &[16, 32],
    attention_below: 4,
    ..QUICK
};
const QUICK: Shape = Shape {
    channels: &[16, 32, 64],
    groups: 8,
    attention_below: 0,
    batch: 32,
    steps: 1500,
    lr: 2e-3,
    velocity: true,
};
const SMALL: Shape = Shape {
    channels: &[32, 64],
    groups: 8,
    attention_below: 4,
    batch: 64,
    steps: 3000,
    lr: 2e-3,
    velocity: false,
};
const MEDIUM: Shape = Shape {
    channels: &[32, 64, 64],
    groups: 8,
    attention_below: 8,
    batch: 64,
    steps: 4000,
    lr: 1e-3,
    velocity: true,
};

/// The configuration of a preset, fitted to a data set.
///
/// # Errors
/// `Config` for an unknown name, or images whose sides cannot be halved once.
pub fn preset(name: &str, data: &Dataset) -> Result<ImageConfig> {
    let side = data.height().max(data.width());
    let shape = match name {
        "tiny" => TINY,
        "quick" if side <= 16 => QUICK_SMALL,
        "quick" => QUICK,
        "small" => SMALL,
        "medium" => MEDIUM,
        "auto" if side <= 16 => SMALL,
        "auto" => MEDIUM,
        other => {
            let names: Vec<&str> = PRESETS.iter().map(|p| p.0).collect();
            return Err(Report::new("preset", other)
                .expected(format!("one of {}", names.join(", ")))
                .config());
        }
    };
    let (batch, accumulate) = batch(shape.batch, data);
    let mut config = ImageConfig {
        train: TrainConfig {
            steps: shape.steps,
            batch_size: batch,
            accumulate,
            lr: shape.lr,
            schedule: schedule(shape.steps),
            adamw: AdamWConfig {
                weight_decay: 0.0,
                ..AdamWConfig::default()
            },
            // The first steps of a short run must not linger in the average.
            ema: EmaRule::Warmup {
                decay: 0.999,
                inv_gamma: 1.0,
                power: 0.75,
                update_after_step: 0,
                min_decay: 0.0,
            },
            checkpoint_every: 500,
            keep_last: 2,
            ..TrainConfig::default()
        },
        ..ImageConfig::default()
    };
    if shape.velocity {
        config.predicts = Predicts::VPrediction;
        config.process.betas = BetaSchedule::Cosine;
        config.weight = Weight::Velocity;
    }
    let levels = shape.channels.len();
    let attention: Vec<bool> = (0..levels)
        .map(|level| side >> level <= shape.attention_below)
        .collect();
    let network = &mut config.network;
    network.block_out_channels = shape.channels.to_vec();
    network.layers_per_block = 1;
    network.norm_num_groups = Some(shape.groups);
    network.down_block_types = attention
        .iter()
        .map(|a| {
            if *a {
                DownBlockType::AttnDownBlock2D
            } else {
                DownBlockType::DownBlock2D
            }
        })
        .collect();
    network.up_block_types = attention
        .iter()
        .rev()
        .map(|a| {
            if *a {
                UpBlockType::AttnUpBlock2D
            } else {
                UpBlockType::UpBlock2D
            }
        })
        .collect();
    fit(&mut config, data)?;
    Ok(config)
}

/// A batch of the preset for images up to 48×48; of larger ones so many fewer that it takes about the same
/// memory, in up to eight parts whose gradients are averaged.
fn batch(usual: usize, data: &Dataset) -> (usize, usize) {
    let pixels = data.height() * data.width();
    let few = (usual * 48 * 48 / pixels.max(1)).clamp(1, usual);
    (few, (usual / few).clamp(1, 8))
}

/// A short warm-up and a cosine down to a fiftieth.
fn schedule(steps: u64) -> LrSchedule {
    LrSchedule::CosineToFloor {
        warmup: 100.min(steps / 10),
        floor: 0.02,
    }
}

/// Another number of steps, with the learning rate's schedule stretched to it.
pub fn set_steps(config: &mut ImageConfig, steps: u64) {
    if config.train.schedule == schedule(config.train.steps) {
        config.train.schedule = schedule(steps);
    }
    config.train.steps = steps;
}

/// Sets what follows from the data: sizes, channels, classes.
///
/// # Errors
/// `Config` when the sides cannot be halved as often as the network does.
pub fn fit(config: &mut ImageConfig, data: &Dataset) -> Result<()> {
    let halvings = config.network.block_out_channels.len().saturating_sub(1);
    for (what, side) in [("height", data.height()), ("width", data.width())] {
        if side % (1 << halvings) != 0 || side == 0 {
            return Err(
                Report::new(format!("image {what}"), format!("{side} pixels"))
                    .expected(format!(
                        "a multiple of {}, as the network halves {halvings} times",
                        1 << halvings
                    ))
                    .remedy("resize the images (--size) or choose a network with fewer levels")
                    .config(),
            );
        }
    }
    let classes = data.classes().len();
    config.conditional &= classes > 0 && data.labels().is_some();
    let network = &mut config.network;
    network.sample_size = Some(if data.height() == data.width() {
        SampleSize::Side(data.height())
    } else {
        SampleSize::HeightWidth([data.height(), data.width()])
    });
    network.in_channels = data.channels();
    network.out_channels = data.channels();
    // One class more than there are: the label that says nothing.
    network.num_class_embeds = config.conditional.then_some(classes + 1);
    Ok(())
}
