//! How a model is sampled: the sampler, where it stops, and what it measures first.

use crate::progress::Progress;
use anyhow::Result;
use candle_core::Tensor;
use diffusion_core::Report;
use diffusion_core::grid::Grid;
use diffusion_core::sample::{SAMPLERS, SamplerConfig};
use diffusion_images::data::Dataset;
use diffusion_images::likelihood::Moments;
use diffusion_images::model::{ImageModel, SampleRequest};

/// A sampler whose variances are measured on training images before the first step.
#[derive(Clone, Copy)]
pub struct Measured {
    pub name: &'static str,
    pub about: &'static str,
    /// The sampler whose mean and usual grid it takes.
    mean: &'static str,
    eta: f64,
}

pub const MEASURED: &[Measured] = &[
    Measured {
        name: "analytic",
        about: "DDPM with the best variances for the network, found on --moments training images",
        mean: "ddpm",
        eta: 1.0,
    },
    Measured {
        name: "analytic-ddim",
        about: "the same with the mean of DDIM",
        mean: "ddim",
        eta: 0.0,
    },
];

/// The sampler of this name that is measured first, if it is one.
pub fn measured(name: Option<&str>) -> Option<&'static Measured> {
    MEASURED.iter().find(|m| name == Some(m.name))
}

/// How a model is sampled.
pub struct Way {
    /// The sampler's name, or its parameters as JSON.
    pub name: String,
    /// The sampler.
    pub sampler: SamplerConfig,
    /// Where it stops.
    pub grid: Grid,
    /// Its steps.
    pub steps: usize,
    measured: Option<&'static Measured>,
}

/// A sampler as given on the command line.
pub fn sampler(text: &str) -> Result<SamplerConfig> {
    if let Some(found) = measured(Some(text)) {
        return Ok(SamplerConfig::named(found.mean)?);
    }
    if text.trim_start().starts_with('{') || SAMPLERS.iter().any(|s| s.name == text) {
        return Ok(SamplerConfig::parse(text)?);
    }
    let names = SAMPLERS.iter().map(|s| s.name);
    let names: Vec<&str> = names.chain(MEASURED.iter().map(|m| m.name)).collect();
    // Names differ in little; what is nearest was probably meant.
    let near = names
        .iter()
        .map(|name| (distance(name, &text.to_lowercase()), name))
        .min();
    let mut report =
        Report::new("--sampler", text).expected(format!("one of {}", names.join(", ")));
    if let Some((0..=2, name)) = near {
        report = report.remedy(format!("did you mean {name}?"));
    }
    Err(report.config().into())
}

/// Insertions, deletions and substitutions between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The way that was asked for; where nothing was, the one that the model was distilled for, or else the
/// usual one.
pub fn way(model: &ImageModel, asked: Option<&str>, steps: Option<usize>) -> Result<Way> {
    if let (Some(learnt), None) = (model.distilled(), asked) {
        return Ok(Way {
            name: learnt.sampler_name().into(),
            sampler: learnt.sampler.clone(),
            grid: learnt.grid.clone(),
            steps: steps.unwrap_or(learnt.steps),
            measured: None,
        });
    }
    let name = asked.unwrap_or("dpmpp-2m");
    let sampler = sampler(name)?;
    Ok(Way {
        name: name.into(),
        grid: sampler.usual_grid(&model.table()?),
        sampler,
        steps: steps.unwrap_or(20),
        measured: measured(asked),
    })
}

impl Way {
    /// Samples, after measuring `moments` of the training images where the sampler asks for it.
    pub fn sample(
        &self,
        model: &ImageModel,
        train: Option<&Dataset>,
        moments: usize,
        request: &SampleRequest,
        progress: &mut Progress,
    ) -> Result<Tensor> {
        let (Some(measured), Some(train)) = (self.measured, train) else {
            return Ok(model.sample(request, progress)?);
        };
        let how = Moments {
            images: moments,
            batch: request.batch,
            seed: request.seed,
        };
        let points = request.grid.points(&model.table()?, request.steps)?;
        let solver = model.analytic(&points, train, &how, measured.eta, &mut |_| {
            progress.at(0.0)
        })?;
        Ok(model.sample_by(&solver, &points, request, progress)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_sampler_is_told_the_nearest() {
        assert_eq!((distance("ddim", "ddim"), distance("ddim", "dimm")), (0, 2));
        let said = sampler("dpmpp-2n").err().unwrap().to_string();
        assert!(said.contains("did you mean dpmpp-2m?") && said.contains("analytic-ddim"));
        let said = sampler("DDIM").err().unwrap().to_string();
        assert!(said.contains("did you mean ddim?"), "{said}");
        assert!(
            !sampler("nothing-like-it")
                .err()
                .unwrap()
                .to_string()
                .contains("mean ")
        );
    }
}
