//! What a model was distilled for: the sampler, the grid and the steps that it has learnt.
//!
//! `distilled.json` beside `unet/` says it, so that whoever samples the model need not be told. A
//! model without the file was trained as usual.

use diffusion_core::checkpoint::write_atomic;
use diffusion_core::grid::Grid;
use diffusion_core::limits::Limits;
use diffusion_core::sample::SamplerConfig;
use diffusion_core::{Report, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file.
const FILE: &str = "distilled.json";

/// How a student is taught.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Half as many steps, again and again (Salimans and Ho 2022).
    #[default]
    Progressive,
    /// Jumps that agree along the teacher's trajectories (Song et al. 2023).
    Consistency,
    /// One step, from pairs of noise and the teacher's image (Luhman and Luhman 2021).
    Knowledge,
}

impl Method {
    /// The method's name, as on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Progressive => "progressive",
            Method::Consistency => "consistency",
            Method::Knowledge => "knowledge",
        }
    }
}

/// What a model was distilled for.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distilled {
    /// How it was taught.
    pub method: Method,
    /// Steps of its sampler.
    pub steps: usize,
    /// The sampler.
    pub sampler: SamplerConfig,
    /// Where it stops.
    pub grid: Grid,
}

impl Distilled {
    /// The sampler's name, as on a command line.
    pub fn sampler_name(&self) -> &'static str {
        match self.method {
            Method::Consistency => "consistency",
            Method::Progressive | Method::Knowledge => "ddim",
        }
    }

    /// What the model in this folder was distilled for, if it was.
    ///
    /// # Errors
    /// `Input` naming the file when it is malformed.
    pub fn read(folder: &Path, limits: &Limits) -> Result<Option<Self>> {
        let file = folder.join(FILE);
        if !file.exists() {
            return Ok(None);
        }
        let read: Self = serde_json::from_str(&limits.read_config(&file)?).map_err(|e| {
            Report::file(&file, e)
                .expected("method, steps, sampler and grid of a distilled model")
                .remedy("get the file again, or remove it to sample the model as any other")
                .input()
        })?;
        if read.steps == 0 {
            return Err(Report::file(&file, "steps: 0")
                .expected("at least 1")
                .remedy("get the file again, or remove it to sample the model as any other")
                .input());
        }
        Ok(Some(read))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text =
            serde_json::to_string_pretty(self).map_err(|e| Report::new("distilled", e).config())?;
        write_atomic(&folder.join(FILE), format!("{text}\n").as_bytes())
    }
}
