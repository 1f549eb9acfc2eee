//! What is measured on which data, and what it costs.
//!
//! | study | network | training, a seed | samples, a seed |
//! |---|---|---|---|
//! | digits, 8×8 | 0.15 M weights, 3 M multiply-adds | 1000 × 32 images, 0.6 TFLOP | 0.5 TFLOP |
//! | mnist, 28×28 | 0.6 M weights, 67 M multiply-adds | 800 × 32 images, 10 TFLOP | 4 TFLOP; the first 10 |
//! | emoji, 32×32 | 0.6 M weights, 88 M multiply-adds | 400 × 32 images, 7 TFLOP, one seed | 1 TFLOP |
//!
//! Two seeds at a time, a core each; about 8 minutes on two cores of a server without AVX-512.

use crate::{Options, Preset};

/// A sampler and the numbers of steps it is tried with.
pub struct Curve {
    pub sampler: &'static str,
    pub steps: &'static [usize],
}

/// A study of one data set.
pub struct Plan {
    pub name: &'static str,
    pub data: String,
    /// Training steps.
    pub steps: u64,
    /// Seeds of training and sampling; of which so many get all samplers.
    pub seeds: Vec<u64>,
    pub curve_seeds: usize,
    /// The most samples of a row.
    pub samples: usize,
    /// The sampler of the main rows, and its steps.
    pub sampler: &'static str,
    pub sampler_steps: usize,
    /// Guidance weights tried; the main one.
    pub sweep: &'static [f64],
    pub guidance: f64,
    pub curves: &'static [Curve],
    /// Principal directions of the Gaussian baselines: of all images, of a class.
    pub directions: (usize, usize),
    pub vae_steps: u64,
    /// Whether the targets of the section are checked here.
    pub targets: bool,
}

impl Plan {
    /// About how long the seed of this place takes, in any unit.
    pub fn cost(&self, place: usize) -> f64 {
        let image = match self.name {
            "digits" => 1.0,
            _ => 8.0,
        };
        let curves = if place < self.curve_seeds { 1.4 } else { 1.0 };
        self.steps as f64 * image * curves
    }
}

/// Every sampler at 5 to 50 calls.
const CURVES: &[Curve] = &[
    Curve {
        sampler: "ddpm",
        steps: &[5, 10, 20, 50],
    },
    Curve {
        sampler: "ddim",
        steps: &[5, 10, 20, 50],
    },
    Curve {
        sampler: "heun",
        steps: &[3, 5, 10, 25],
    },
    Curve {
        sampler: "edm",
        steps: &[10, 25],
    },
    Curve {
        sampler: "dpmpp-2m",
        steps: &[5, 10, 20, 50],
    },
];
/// The same within the time of a quick run on larger images.
const SHORT: &[Curve] = &[
    Curve {
        sampler: "ddpm",
        steps: &[20],
    },
    Curve {
        sampler: "ddim",
        steps: &[5, 10, 20],
    },
    Curve {
        sampler: "heun",
        steps: &[3, 5],
    },
    Curve {
        sampler: "dpmpp-2m",
        steps: &[5, 10, 20],
    },
];

/// The studies asked for, the quickest first.
pub fn plans(options: &Options) -> Vec<Plan> {
    let quick = options.preset == Preset::Quick;
    let seeds: Vec<u64> = (0..3).map(|i| options.seed + i).collect();
    let steps = |few: u64, many: u64| if quick { few } else { many };
    let all = vec![
        Plan {
            name: "digits",
            data: "digits".into(),
            steps: steps(1000, 10_000),
            seeds: seeds.clone(),
            curve_seeds: 3,
            samples: 1000,
            sampler: "dpmpp-2m",
            sampler_steps: 10,
            sweep: &[1.0, 1.5, 2.0, 3.0],
            guidance: 2.0,
            curves: CURVES,
            directions: (30, 12),
            vae_steps: 2000,
            targets: false,
        },
        Plan {
            name: "mnist",
            data: options.data.clone().unwrap_or_else(|| "mnist".into()),
            steps: steps(800, 20_000),
            seeds: seeds.clone(),
            curve_seeds: if quick { 1 } else { 3 },
            samples: if quick { 500 } else { 1000 },
            sampler: "dpmpp-2m",
            sampler_steps: 10,
            sweep: &[1.0, 1.5, 3.0],
            guidance: 3.0,
            curves: if quick { SHORT } else { CURVES },
            directions: (50, 30),
            vae_steps: 3000,
            targets: true,
        },
        Plan {
            name: "emoji",
            data: "emoji".into(),
            steps: steps(400, 10_000),
            seeds: if quick { vec![options.seed] } else { seeds },
            curve_seeds: 1,
            samples: 1000,
            sampler: "dpmpp-2m",
            sampler_steps: 10,
            sweep: &[1.0, 2.0],
            guidance: 1.0,
            curves: SHORT,
            directions: (50, 30),
            vae_steps: 1000,
            targets: false,
        },
    ];
    let wanted = |plan: &Plan| options.only.as_ref().is_none_or(|name| plan.name == name);
    all.into_iter().filter(wanted).collect()
}
